-- Add an entry to a session's token log, if it is as long as the writer believes, and still the same log.
--
-- KEYS  1 log: a list, its header first
-- ARGV  1 header, 2 elements there as the writer knows it (0: there is no log; -1: replace whatever is there),
--       3 entry, 4 TTL ms
-- Answers 1, or 0 if another writer was there: nothing was changed.
local expected = tonumber(ARGV[2])
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
return 1
