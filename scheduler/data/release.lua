-- Give back a claim whose answer nobody waited for. What ended or belongs to another is left alone.
-- The claim may still be on its way: a round that nobody knows yet is marked, so that it is refused then.
--
-- KEYS  1 round, 2 session index
-- ARGV  1 key prefix, 2 replica, 3 round id, 4 ms to remember a round that is not there
local round = redis.call('HMGET', KEYS[1], 'session_key', 'replica', 'done')
if not round[1] and not round[3] then
    redis.call('HSET', KEYS[1], 'gone', 'given back')
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    return 0
end
if round[2] ~= replica or round[3] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'gone', 'given back')
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if not is_of(read_lease(round[1]), ARGV[3]) then return 0 end
local session = redis.call('HMGET', round[1], 'rounds', 'doc')
if session[1] or session[2] then
    free_lease(round[1])
else
    forget(KEYS[2], round[1])
end
return 1
