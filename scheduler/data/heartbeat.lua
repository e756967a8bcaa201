-- Say that a replica lives, with its totals, and forget the replicas that do not. Its leases live with it.
--
-- KEYS  1 heartbeat, 2 totals, 3 replicas, 4.. rounds that the replica believes to run
-- ARGV  1 key prefix, 2 replica, 3 TTL ms, 4 totals JSON
-- Answers the places, from 1, of those rounds that a retry has replaced: nobody waits for them any more.
redis.call('SET', KEYS[1], '1', 'PX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[3])
redis.call('SADD', KEYS[3], replica)
for _, other in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    if not alive(other) then redis.call('SREM', KEYS[3], other) end
end
local lost = {}
for i = 4, #KEYS do
    if redis.call('HGET', KEYS[i], 'gone') == REPLACED then lost[#lost + 1] = i - 3 end
end
return lost
