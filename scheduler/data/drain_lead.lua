-- Who moves the sessions of an engine that drains: one replica at a time, for as long as it says so.
--
-- KEYS  1 lead
-- ARGV  1 replica, 2 TTL ms
-- Answers 1 if it is this replica, and then the server's clock in ms; 0 if it is another.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, 0} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local clock = redis.call('TIME')
return {1, clock[1] * 1000 + math.floor(clock[2] / 1000)}
