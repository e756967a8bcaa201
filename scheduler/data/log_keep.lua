-- Let a token log live for at least so long: it is what a fork begins with.
--
-- KEYS  1 log
-- ARGV  1 TTL ms
local left = redis.call('PTTL', KEYS[1])
if left >= 0 and left < tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 1
