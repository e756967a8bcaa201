-- Remember where a session's conversation ends, so that its next message is known as such.
--
-- KEYS  1 tip, 2 turn (the tip's own key: there is none), 3.. earlier values of the conversation
-- ARGV  1 session id, 2 TTL ms, 3 tip as hex
-- A value says whose it is: 't' and the session that ends there, or 'i' and the one that passed there first.
-- A turn says the tip (32 hex digits) and the session of the conversation that ended with it; '?': several did.
local session_id, ttl_ms = ARGV[1], ARGV[2]
for i = 3, #KEYS do
    local owner = redis.call('GET', KEYS[i])
    if not owner or string.sub(owner, 2) == session_id then
        redis.call('SET', KEYS[i], 'i' .. session_id, 'PX', ttl_ms)
    else
        redis.call('PEXPIRE', KEYS[i], ttl_ms)
    end
end
redis.call('SET', KEYS[1], 't' .. session_id, 'PX', ttl_ms)
if KEYS[2] ~= KEYS[1] then
    local turn = redis.call('GET', KEYS[2])
    local others = turn and (turn == '?' or string.sub(turn, 33) ~= session_id)
    redis.call('SET', KEYS[2], others and '?' or ARGV[3] .. session_id, 'PX', ttl_ms)
end
return 1
