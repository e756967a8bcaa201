-- A replica has seen the mark of an engine that drains, and says how many of its rounds still need it.
--
-- KEYS  1 seen
-- ARGV  1 replica, 2 incarnation of the engine, 3 rounds, 4 TTL ms
-- Keeps "incarnation|rounds|since": since when, by the server's clock in ms, there are none; '' while there are.
local clock = redis.call('TIME')
local since = ''
if ARGV[3] == '0' then
    local before = redis.call('HGET', KEYS[1], ARGV[1])
    since = before and string.match(before, '^' .. string.gsub(ARGV[2], '%W', '%%%0') .. '|0|(%d+)$')
        or string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000))
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '|' .. ARGV[3] .. '|' .. since)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
