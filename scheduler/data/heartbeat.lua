-- Say that a replica lives, with its totals, and forget the replicas that do not.
--
-- KEYS  1 heartbeat, 2 totals, 3 replicas
-- ARGV  1 key prefix, 2 replica, 3 TTL ms, 4 totals JSON
redis.call('SET', KEYS[1], '1', 'PX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[3])
redis.call('SADD', KEYS[3], ARGV[2])
for _, other in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    if redis.call('EXISTS', ARGV[1] .. ':replica:' .. other) == 0 then
        redis.call('SREM', KEYS[3], other)
    end
end
return 1
