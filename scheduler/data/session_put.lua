-- Create a session or change what is known of it, outside of its rounds.
--
-- KEYS  1 session, 2 session index
-- ARGV  1 session id, 2 tenant, 3 TTL ms if it has none of its own, 4 'create' | 'update', 5 parent id or '',
--       6 the parent's key, 7.. names and values of fields; a value of '' takes the field away
-- Answers 1; 0 if it was to be updated and is not there.
local key, clock = KEYS[1], redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
if ARGV[4] == 'update' and redis.call('EXISTS', key) == 0 then return 0 end
for i = 7, #ARGV, 2 do
    if ARGV[i + 1] == '' then
        redis.call('HDEL', key, ARGV[i])
    else
        redis.call('HSET', key, ARGV[i], ARGV[i + 1])
        if ARGV[i] == 'event' then redis.call('HSET', key, 'event_ms', text(now_ms)) end
    end
end
if ARGV[4] == 'create' then
    redis.call('HSET', key, 'session_id', ARGV[1], 'tenant', ARGV[2], 'doc', '1')
    redis.call('HSETNX', key, 'updated_ms', text(now_ms))
    redis.call('HDEL', key, 'closed_ms')
    link(key, ARGV[1], ARGV[6], ARGV[5], tonumber(ARGV[3]))
    begin(key, now_ms, tonumber(ARGV[3]))
end
local lease_until = tonumber(redis.call('HGET', key, 'lease_until')) or 0
local ttl_ms = tonumber(redis.call('HGET', key, 'ttl_ms')) or tonumber(ARGV[3])
keep(KEYS[2], key, now_ms, math.max(ttl_ms, lease_until - now_ms))
keep_list(key, ttl_ms)
return 1
