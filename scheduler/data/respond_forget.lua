-- Forget a call that was refused, if no other try of it has come.
--
-- KEYS  1 the call's record
-- ARGV  1 round id
if redis.call('HGET', KEYS[1], 'round') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
