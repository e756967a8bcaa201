-- Set a session's home, if the claim that asks still holds the session and its home is what the asker thinks.
--
-- KEYS  1 session
-- ARGV  1 key prefix, 2 '', 3 fence of the claim, 4 home as the asker knows it, 5 new home
-- Answers moved | fenced | ended | other_home | unknown_session. A fence is given once in a ledger's life, so
-- that it names round and replica too. Asking again changes nothing and answers the same.
local session = redis.call('HMGET', KEYS[1], 'session_id', 'home')
if not session[1] then return 'unknown_session' end
local lease, fence = read_lease(KEYS[1]), tonumber(ARGV[3])
if lease.state == FREE or lease.fence ~= fence then
    -- Our own completion came first: what it said of the home stands.
    return lease.state == FREE and lease.newest == fence and 'ended' or 'fenced'
end
if session[2] == ARGV[5] then return 'moved' end
if session[2] ~= ARGV[4] then return 'other_home' end
redis.call('HSET', KEYS[1], 'home', ARGV[5])
return 'moved'
