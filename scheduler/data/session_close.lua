-- Close a session: at once, or when the round that holds it is over. It is remembered for its TTL.
--
-- KEYS  1 session
-- ARGV  1 key prefix of the fleet, 2 replica ('': nobody's)
-- Answers {'closed' | 'closing' | 'unknown', 1 if it was open | 0, the session's home or ''}.
local record = redis.call('HMGET', KEYS[1], 'session_id', 'closed_ms', 'closing', 'home')
if not record[1] then return {'unknown', 0, ''} end
if record[2] then return {'closed', 0, record[4] or ''} end
if read_lease(KEYS[1]).state == HELD then
    redis.call('HSET', KEYS[1], 'closing', 'at_once')
    return {'closing', record[3] == 'at_once' and 0 or 1, record[4] or ''}
end
redis.call('HSET', KEYS[1], 'closed_ms', string.format('%.0f', now_ms))
redis.call('HDEL', KEYS[1], 'closing')
return {'closed', 1, record[4] or ''}
