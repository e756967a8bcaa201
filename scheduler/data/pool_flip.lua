-- One step of an engine's change of pool, if this replica leads and nobody else has touched it meanwhile.
--
-- KEYS  1 lead, 2 pools, 3 flips, 4 drain marks, then what is known of a drain of the engine: 5 seen, 6 lead, 7 work
-- ARGV  1 replica, 2 engine, 3 record of its flip as last read ("" = none), 4 as it is to be ("" = none),
--       5 pool to put it in ("" = as it is), 6 drain (mark | unmark | ""), 7 incarnation, 8 TTL of pools, ms
-- Answers done, not_leading, other_flip, drains (it is marked already, by somebody else).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'not_leading' end
if (redis.call('HGET', KEYS[3], ARGV[2]) or '') ~= ARGV[3] then return 'other_flip' end
local marked = redis.call('HGET', KEYS[4], ARGV[2]) == ARGV[7]
if ARGV[6] == 'mark' then
  if marked then return 'drains' end
  redis.call('DEL', KEYS[5], KEYS[7])
  redis.call('HSET', KEYS[4], ARGV[2], ARGV[7])
elseif ARGV[6] == 'unmark' and marked then
  redis.call('HDEL', KEYS[4], ARGV[2])
  redis.call('DEL', KEYS[5], KEYS[6], KEYS[7])
end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[3], ARGV[2])
else
  redis.call('HSET', KEYS[3], ARGV[2], ARGV[4])
end
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[5])
  redis.call('PEXPIRE', KEYS[2], ARGV[8])
end
return 'done'
