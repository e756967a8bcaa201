-- Record the end of a round and free its lease, once: a second call changes nothing and answers the same.
--
-- KEYS  1 fence, 2 round, 3 session, 4 session index, 5 receipts, 6 counters, 7 the call's record (any key if there
--       is none), 8.. residency
-- ARGV  1 key prefix, 2 replica, 3 round id, 4 fence ('0': the round was never claimed), 5 session id, 6 tenant,
--       7 home or '', 8 outcome, 9 session TTL ms, 10 prompt, 11 completion, 12 cached tokens, 13 receipt JSON,
--       14 receipts kept, 15 ms to remember round and call, 16 tip or '', 17 call as for a claim,
--       18 digest of what it asks, 19.. engine and value for each residency key
-- Answers {1 recorded | 2 so was another try of its call before | 0 fenced off, epoch}.
local round_id, fence, ttl_ms, outcome = ARGV[3], ARGV[4], tonumber(ARGV[9]), ARGV[8]
local now_text = text(now_ms)
local epoch = redis.call('HGET', KEYS[1], 'epoch') or ''

local round = redis.call('HMGET', KEYS[2], 'done', 'number', 'gone', 'fence')
if round[1] == fence then return {1, epoch} end

local lease = read_lease(KEYS[3])
local claimed = fence ~= '0'
local gone = round[3] == REPLACED or claimed and round[3]
if round[1] or gone or claimed and lease.newest > tonumber(fence) then
    redis.call('HINCRBY', KEYS[6], 'fenced', 1)
    if round[4] == fence and not round[1] and not round[3] then -- for good: the newer claim may be given back
        redis.call('HSET', KEYS[2], 'gone', 'fenced off')
        redis.call('PEXPIRE', KEYS[2], ARGV[15])
    end
    return {0, epoch}
end

-- Has this round's call been answered before? Only its latest try may say that it is now. A try that was never
-- claimed is one of a call that has none, or that it repeats.
local try = {}
if ARGV[17] ~= '' then
    local found = redis.call('HMGET', KEYS[7], 'round', 'session_key', 'number', 'completed', 'shared', 'digest')
    local known = found[1] == round_id
        or not claimed and not found[5] and (not found[1] or ARGV[17] == 'again' and found[6] == ARGV[18])
    if known then try = {known = true, number = found[2] == KEYS[3] and found[3], completed = found[4]} end
end
local repeated = outcome == 'completed' and try.completed
local number = claimed and tonumber(round[2] or '') or tonumber(try.number or '')

-- An unclaimed round must not disturb another one that holds the session; what it computed is still true.
local other_runs = lease.state == HELD and not is_of(lease, round_id)
if claimed or not other_runs then
    local session = redis.call('HMGET', KEYS[3], 'rounds', 'ttl_ms', 'doc', 'closing', 'answered')
    local before = tonumber(session[1]) or 0
    local rounds = before
    number = number or before + 1
    if outcome ~= 'refused' then rounds = math.max(before, number) end
    if rounds == 0 and not session[3] then -- nobody else has spoken of it
        forget(KEYS[4], KEYS[3])
    else
        redis.call('HSET', KEYS[3], 'session_id', ARGV[5], 'tenant', ARGV[6], 'rounds', rounds, 'updated_ms', now_text)
        begin(KEYS[3], now_ms, ttl_ms)
        free_lease(KEYS[3])
        if claimed then redis.call('HSET', KEYS[3], 'last_fence', fence) end
        if outcome == 'completed' then
            local answered = math.max(tonumber(session[5]) or 0, number)
            redis.call('HSET', KEYS[3], 'answered', answered)
            if number >= before then -- else the session has gone on since
                redis.call('HSET', KEYS[3], 'home', ARGV[7], 'context_tokens', ARGV[10] + ARGV[11])
                if ARGV[16] ~= '' then redis.call('HSET', KEYS[3], 'tip', ARGV[16]) end
            end
            if not repeated or number > before then
                redis.call('HINCRBY', KEYS[3], 'prompt_tokens', ARGV[10])
                redis.call('HINCRBY', KEYS[3], 'completion_tokens', ARGV[11])
                redis.call('HINCRBY', KEYS[3], 'cached_tokens', ARGV[12])
            end
        end
        if session[4] == 'at_once' or session[4] == 'after_round' and outcome == 'completed' then
            redis.call('HSET', KEYS[3], 'closed_ms', now_text)
        end
        keep(KEYS[4], KEYS[3], now_ms, tonumber(session[2]) or ttl_ms)
        keep_list(KEYS[3], tonumber(session[2]) or ttl_ms)
    end
    if try.known and outcome ~= 'refused' then
        if not claimed then
            redis.call('HSET', KEYS[7], 'round', round_id, 'round_key', KEYS[2], 'session_key', KEYS[3], 'session_id',
                ARGV[5], 'digest', ARGV[18])
        end
        redis.call('HSET', KEYS[7], 'number', number)
    end
end
if try.known and outcome == 'completed' then
    -- Also of an unclaimed one that changes nothing in its session: else the next try is recorded once more.
    if not claimed and redis.call('EXISTS', KEYS[7]) == 0 then
        redis.call('HSET', KEYS[7], 'round', round_id, 'round_key', KEYS[2], 'session_key', KEYS[3], 'session_id',
            ARGV[5], 'digest', ARGV[18])
    end
    redis.call('HSET', KEYS[7], 'completed', '1')
end
if try.known and redis.call('EXISTS', KEYS[7]) == 1 then
    redis.call('PEXPIRE', KEYS[7], ARGV[15])
end
sweep(KEYS[4], now_ms)

redis.call('HSET', KEYS[2], 'done', fence)
redis.call('PEXPIRE', KEYS[2], ARGV[15])
if repeated then
    redis.call('HINCRBY', KEYS[6], 'repeated', 1)
else
    redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[14], '*', 'session_id', ARGV[5], 'tenant', ARGV[6], 'receipt', ARGV[13])
    redis.call('HINCRBY', KEYS[6], outcome, 1)
end
for i = 8, #KEYS do
    local at = 19 + 2 * (i - 8)
    redis.call('HSET', KEYS[i], ARGV[at], ARGV[at + 1])
    redis.call('PEXPIRE', KEYS[i], ttl_ms)
end
return {repeated and 2 or 1, epoch}
