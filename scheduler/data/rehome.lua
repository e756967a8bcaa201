-- Set a session's home, if the claim that asks still holds the session and its home is what the asker thinks.
--
-- KEYS  1 session
-- ARGV  1 fence of the claim, 2 home as the asker knows it, 3 new home
-- Answers moved | fenced | ended | other_home | unknown_session. A fence is given once in a ledger's life, so
-- that it names round and replica too. Asking again changes nothing and answers the same.
local session = redis.call('HMGET', KEYS[1], 'session_id', 'lease_fence', 'last_fence', 'home')
if not session[1] then return 'unknown_session' end
if session[2] ~= ARGV[1] then
    -- Our own completion came first: what it said of the home stands.
    if not session[2] and session[3] == ARGV[1] then return 'ended' end
    return 'fenced'
end
if session[4] == ARGV[3] then return 'moved' end
if session[4] ~= ARGV[2] then return 'other_home' end
redis.call('HSET', KEYS[1], 'home', ARGV[3])
return 'moved'
