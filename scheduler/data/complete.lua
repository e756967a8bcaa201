-- Record the end of a round and free its lease, once: a second call changes nothing and answers the same.
--
-- KEYS  1 fence, 2 round, 3 session, 4 session index, 5 receipts, 6 counters, 7.. residency
-- ARGV  1 key prefix, 2 replica, 3 round id, 4 fence ('0': the round was never claimed), 5 session id, 6 tenant,
--       7 home or '', 8 outcome, 9 session TTL ms, 10 prompt, 11 completion, 12 cached tokens, 13 receipt JSON,
--       14 receipts kept, 15 ms to remember the round, 16 tip or '', 17.. engine and value for each residency key
-- Answers {1 recorded | 0 fenced off, epoch}.
local prefix, replica, round_id, fence = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ttl_ms, outcome = tonumber(ARGV[9]), ARGV[8]
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local now_text = string.format('%.0f', now_ms)
local epoch = redis.call('HGET', KEYS[1], 'epoch') or ''

local done = redis.call('HGET', KEYS[2], 'done')
if done == fence then return {1, epoch} end

local session = redis.call('HMGET', KEYS[3], 'lease_round', 'lease_replica', 'lease_fence', 'lease_until',
    'last_fence', 'rounds', 'ttl_ms', 'doc', 'closing')
local ours = session[1] == round_id and session[2] == replica
local newer = math.max(tonumber(session[3]) or 0, tonumber(session[5]) or 0)
local claimed = fence ~= '0'
if done or claimed and newer > tonumber(fence) then
    redis.call('HINCRBY', KEYS[6], 'fenced', 1)
    return {0, epoch}
end

-- An unclaimed round must not disturb another one that holds the session; what it computed is still true.
local other_runs = session[1] and not ours and tonumber(session[4]) > now_ms
    and redis.call('EXISTS', prefix .. ':replica:' .. session[2]) == 1
if claimed or not other_runs then
    local rounds = tonumber(session[6]) or 0
    if outcome ~= 'refused' then rounds = rounds + 1 end
    if rounds == 0 and not session[8] then -- nobody else has spoken of it
        forget(KEYS[4], KEYS[3])
    else
        redis.call('HSET', KEYS[3], 'session_id', ARGV[5], 'tenant', ARGV[6], 'rounds', rounds, 'updated_ms', now_text)
        begin(KEYS[3], now_ms, ttl_ms)
        redis.call('HDEL', KEYS[3], 'lease_round', 'lease_replica', 'lease_fence', 'lease_until', 'closing')
        if claimed then redis.call('HSET', KEYS[3], 'last_fence', fence) end
        if outcome == 'completed' then
            redis.call('HSET', KEYS[3], 'home', ARGV[7], 'context_tokens', ARGV[10] + ARGV[11], 'answered', rounds)
            if ARGV[16] ~= '' then redis.call('HSET', KEYS[3], 'tip', ARGV[16]) end
            redis.call('HINCRBY', KEYS[3], 'prompt_tokens', ARGV[10])
            redis.call('HINCRBY', KEYS[3], 'completion_tokens', ARGV[11])
            redis.call('HINCRBY', KEYS[3], 'cached_tokens', ARGV[12])
        end
        if session[9] == 'at_once' or session[9] == 'after_round' and outcome == 'completed' then
            redis.call('HSET', KEYS[3], 'closed_ms', now_text)
        end
        keep(KEYS[4], KEYS[3], now_ms, tonumber(session[7]) or ttl_ms)
        keep_list(KEYS[3], tonumber(session[7]) or ttl_ms)
    end
end
sweep(KEYS[4], now_ms)

redis.call('HSET', KEYS[2], 'done', fence)
redis.call('PEXPIRE', KEYS[2], ARGV[15])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[14], '*', 'session_id', ARGV[5], 'tenant', ARGV[6], 'receipt', ARGV[13])
redis.call('HINCRBY', KEYS[6], outcome, 1)
for i = 7, #KEYS do
    local at = 17 + 2 * (i - 7)
    redis.call('HSET', KEYS[i], ARGV[at], ARGV[at + 1])
    redis.call('PEXPIRE', KEYS[i], ttl_ms)
end
return {1, epoch}
