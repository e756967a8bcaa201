-- Give a session another home between its rounds, if it still is as it was when its KV was copied.
--
-- KEYS  1 session, 2.. residency
-- ARGV  1 key prefix, 2 '', 3 home that is left, 4 tip that was copied or '', 5 new home, 6 its tip or '',
--       7 TTL ms of residency, 8.. value for each residency key
-- Answers moved | busy (a round is in flight) | went_on (it has another tip or home by now) | unknown_session.
-- Asking again changes nothing and answers the same.
local session = redis.call('HMGET', KEYS[1], 'session_id', 'home', 'tip')
local home, tip = session[2] or '', session[3] or ''
if not session[1] then return 'unknown_session' end
if home == ARGV[5] and tip == ARGV[6] then return 'moved' end
if read_lease(KEYS[1]).state == HELD then return 'busy' end
if home ~= ARGV[3] or tip ~= ARGV[4] then return 'went_on' end
redis.call('HSET', KEYS[1], 'home', ARGV[5])
if ARGV[6] ~= '' then
    redis.call('HSET', KEYS[1], 'tip', ARGV[6])
else
    redis.call('HDEL', KEYS[1], 'tip')
end
for i = 2, #KEYS do
    redis.call('HSET', KEYS[i], ARGV[5], ARGV[6 + i])
    redis.call('PEXPIRE', KEYS[i], ARGV[7])
end
return 'moved'
