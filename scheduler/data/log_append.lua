-- Add an entry to a session's token log, if it is as long as the writer believes, and still the same log, and
-- no newer claim of the session has said that it writes now.
--
-- KEYS  1 log: a list, its header first, 2 the newest fence of its writers
-- ARGV  1 header, 2 elements there as the writer knows it (0: there is no log; -1: replace whatever is there),
--       3 entry, 4 TTL ms, 5 the writer's fence, 0 = it has none
-- Answers 1; 0 if another writer was there, -1 if this one was fenced off: nothing was changed.
local expected, fence = tonumber(ARGV[2]), tonumber(ARGV[5])
if fence > 0 and (tonumber(redis.call('GET', KEYS[2])) or 0) > fence then return -1 end
if expected < 0 then
    redis.call('DEL', KEYS[1])
    expected = 0
elseif redis.call('LLEN', KEYS[1]) ~= expected then
    return 0
end
if expected == 0 then
    redis.call('RPUSH', KEYS[1], ARGV[1])
elseif redis.call('LINDEX', KEYS[1], 0) ~= ARGV[1] then
    return 0
end
redis.call('RPUSH', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if fence > 0 then redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[4]) end
return 1
