-- Keep what a call was answered, if the try that answers is its latest.
--
-- KEYS  1 the call's record, 2 its answer
-- ARGV  1 round id, 2 answer, 3 TTL ms
-- Answers 1, or 0 if another try took this one's place: nothing was changed.
if redis.call('HGET', KEYS[1], 'round') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return 1
