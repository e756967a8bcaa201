-- Let no writer with an older claim of the session add to its token log from now on.
--
-- KEYS  1 the newest fence of its writers
-- ARGV  1 fence, 2 TTL ms
if (tonumber(redis.call('GET', KEYS[1])) or 0) < tonumber(ARGV[1]) then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return 1
