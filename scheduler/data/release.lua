-- Give back a claim whose answer nobody waited for. What ended or belongs to another is left alone.
--
-- KEYS  1 round, 2 session index
-- ARGV  1 replica, 2 round id
local round = redis.call('HMGET', KEYS[1], 'session_key', 'replica', 'done')
if not round[1] or round[2] ~= ARGV[1] or round[3] then return 0 end
redis.call('DEL', KEYS[1])
local session = redis.call('HMGET', round[1], 'lease_round', 'lease_replica', 'rounds', 'doc')
if session[1] ~= ARGV[2] or session[2] ~= ARGV[1] then return 0 end
if session[3] or session[4] then
    redis.call('HDEL', round[1], 'lease_round', 'lease_replica', 'lease_fence', 'lease_until', 'closing')
else
    forget(KEYS[2], round[1])
end
return 1
