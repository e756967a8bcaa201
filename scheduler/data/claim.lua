-- Claim a round in one step: lease, session record, residency of its prompt, the other replicas' totals.
--
-- KEYS  1 fence, 2 replicas, 3 session index, 4 round, 5 session, 6 the call's record (any key if there is none),
--       7.. residency, longest prefix first
-- ARGV  1 key prefix of the fleet, 2 replica, 3 round id, 4 session id, 5 tenant, 6 session TTL ms, 7 lease ms,
--       8 head of a fork's id, 9 head of a fork's key, 10 epoch for an empty ledger, 11 TTFT SLO, 12 ITL SLO,
--       13 parent id or '', 14 the parent's key, 15 the session's own TTL ms or '', 16 '1' if this is its last round,
--       17 call: '' | 'first' try of one that may be tried again | 'again', 18 digest of what it asks or '',
--       19 '1' if nobody named the session, 20 ms to remember the call
-- Answers {fence, epoch, session id, parent id, rounds before, home, {engine, value, ...}, {totals, ...}, tip,
-- TTL ms, TTFT SLO and ITL SLO that the session was created with, rounds expected, round that this one replaces}:
-- the tip is where the session's last round ended and who holds it, "hash|tokens|incarnation|engine"; '' stands
-- for what there is not.
local round_id, call = ARGV[3], ARGV[17]
local ttl_ms, lease_ms = tonumber(ARGV[6]), tonumber(ARGV[7])

-- Above every fence of this ledger and, after a loss of its data, above those of the lost one too: the
-- clock has gone on since. Microseconds stay exact in a double until the year 2255.
local function next_fence()
    redis.call('HSETNX', KEYS[1], 'epoch', ARGV[10])
    local fence = math.max(now_us, (tonumber(redis.call('HGET', KEYS[1], 'last')) or 0) + 1)
    redis.call('HSET', KEYS[1], 'last', string.format('%.0f', fence))
    return fence
end

local key, session_id = KEYS[5], ARGV[4]
local number, replaced = '', ''
local known = redis.call('HMGET', KEYS[4], 'session_key', 'session_id', 'replica', 'done', 'lease_until', 'number',
    'replaces', 'gone')
if known[4] then return redis.error_reply('ROUNDTAKEN the round has ended already') end
if known[8] then return redis.error_reply('ROUNDTAKEN the round was ' .. known[8]) end
if known[1] then
    if known[3] ~= replica and tonumber(known[5]) > now_ms and alive(known[3]) then
        return redis.error_reply('ROUNDTAKEN the round runs on replica ' .. known[3])
    end
    key, session_id, number, replaced = known[1], known[2], known[6], known[7]
elseif call ~= '' then
    local before = redis.call('HMGET', KEYS[6], 'round', 'round_key', 'session_key', 'session_id', 'number', 'digest',
        'shared')
    if before[1] and before[6] ~= ARGV[18] then
        return redis.error_reply('KEYREUSED its idempotency key was used for something else')
    end
    if call == 'first' and before[1] then
        -- Not told apart by anything: a retry would not know which of the two it repeats.
        if ARGV[19] == '1' or read_lease(before[3]).round == before[1] then
            redis.call('HSET', KEYS[6], 'shared', '1')
        elseif not before[7] then
            redis.call('DEL', KEYS[6])
        end
        before = redis.call('HMGET', KEYS[6], 'round', '', '', '', '', '', 'shared')
    end
    if before[7] then
        call = ''
    elseif before[1] and before[1] ~= round_id then
        key, session_id, number, replaced = before[3], before[4], before[5] or '', before[1]
        local old = redis.call('HMGET', before[2], 'session_key', 'done')
        if old[1] and not old[2] then redis.call('HSET', before[2], 'gone', REPLACED) end
    end
end

local lease = read_lease(key)
local fence
if is_of(lease, round_id) then
    fence = lease.fence -- asked again, as after a lost answer: the same claim
else
    fence = next_fence()
    if lease.state == HELD and not (replaced ~= '' and lease.round == replaced) then
        local parent_id, parent_key = session_id, key
        local suffix = string.format('~%x', fence)
        while redis.call('EXISTS', ARGV[9] .. suffix) == 1 do
            fence = next_fence()
            suffix = string.format('~%x', fence)
        end
        key, session_id, number = ARGV[9] .. suffix, ARGV[8] .. suffix, ''
        link(key, session_id, parent_key, parent_id, ttl_ms)
    end
end
link(key, session_id, ARGV[14], ARGV[13], ttl_ms)
if ARGV[15] ~= '' then redis.call('HSET', key, 'ttl_ms', ARGV[15]) end
local record = redis.call('HMGET', key, 'parent_id', 'rounds', 'home', 'tip', 'want_ttft_s', 'want_itl_s',
    'expected_rounds', 'ttl_ms', 'closed_ms', 'closing')
ttl_ms = tonumber(record[8]) or ttl_ms

local fence_text, until_ms = string.format('%.0f', fence), string.format('%.0f', now_ms + lease_ms)
redis.call('HSET', key, 'session_id', session_id, 'tenant', ARGV[5], 'slo_ttft_s', ARGV[11], 'slo_itl_s', ARGV[12],
    'updated_ms', string.format('%.0f', now_ms))
take_lease(key, round_id, until_ms, fence_text)
if record[9] or record[10] then redis.call('HDEL', key, 'closed_ms', 'closing') end -- used again, it is open
if ARGV[16] == '1' then redis.call('HSET', key, 'closing', 'after_round') end
begin(key, now_ms, ttl_ms)
keep(KEYS[3], key, now_ms, math.max(ttl_ms, lease_ms))
redis.call('HSET', KEYS[4], 'session_key', key, 'session_id', session_id, 'replica', replica, 'lease_until', until_ms,
    'number', number, 'replaces', replaced, 'fence', fence_text)
redis.call('PEXPIRE', KEYS[4], lease_ms)
if call ~= '' and not known[1] then
    redis.call('HSET', KEYS[6], 'round', round_id, 'round_key', KEYS[4], 'session_key', key, 'session_id', session_id,
        'digest', ARGV[18])
    if number == '' then redis.call('HDEL', KEYS[6], 'number') end
    redis.call('PEXPIRE', KEYS[6], math.max(lease_ms, tonumber(ARGV[20])))
end

local rounds = number ~= '' and tonumber(number) - 1 or tonumber(record[2] or '0')
return {fence_text, redis.call('HGET', KEYS[1], 'epoch'), session_id, record[1] or '', text(rounds),
    record[3] or '', read_holdings(7, ttl_ms), read_totals(KEYS[2]), record[4] or '', text(ttl_ms),
    record[5] or '', record[6] or '', record[7] or '', replaced}
