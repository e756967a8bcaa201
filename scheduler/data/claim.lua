-- Claim a round in one step: lease, session record, residency of its prompt, the other replicas' totals.
--
-- KEYS  1 fence, 2 replicas, 3 session index, 4 round, 5 session, 6.. residency, longest prefix first
-- ARGV  1 key prefix of the fleet, 2 replica, 3 round id, 4 session id, 5 tenant, 6 session TTL ms, 7 lease ms,
--       8 head of a fork's id, 9 head of a fork's key, 10 epoch for an empty ledger, 11 TTFT SLO, 12 ITL SLO,
--       13 parent id or '', 14 the parent's key, 15 the session's own TTL ms or '', 16 '1' if this is its last round
-- Answers {fence, epoch, session id, parent id, rounds so far, home, {engine, value, ...}, {totals, ...}, tip,
-- TTL ms, TTFT SLO and ITL SLO that the session was created with, rounds expected}: the tip is where the session's
-- last round ended and who holds it, "hash|tokens|incarnation|engine"; '' stands for what there is not.
local round_id = ARGV[3]
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
local known = redis.call('HMGET', KEYS[4], 'session_key', 'session_id', 'replica', 'done', 'lease_until')
if known[4] then return redis.error_reply('ROUNDTAKEN the round has ended already') end
if known[1] then
    if known[3] ~= replica and holds({known[1], known[3], known[5]}) then
        return redis.error_reply('ROUNDTAKEN the round runs on replica ' .. known[3])
    end
    key, session_id = known[1], known[2]
end

local lease = redis.call('HMGET', key, 'lease_round', 'lease_replica', 'lease_until', 'lease_fence')
local fence
if lease[1] == round_id and lease[2] == replica then
    fence = tonumber(lease[4]) -- asked again, as after a lost answer: the same claim
else
    fence = next_fence()
    if holds(lease) then
        local parent_id, parent_key = session_id, key
        local suffix = string.format('~%x', fence)
        while redis.call('EXISTS', ARGV[9] .. suffix) == 1 do
            fence = next_fence()
            suffix = string.format('~%x', fence)
        end
        key, session_id = ARGV[9] .. suffix, ARGV[8] .. suffix
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
    'lease_round', round_id, 'lease_replica', replica, 'lease_until', until_ms, 'lease_fence', fence_text,
    'updated_ms', string.format('%.0f', now_ms))
if record[9] or record[10] then redis.call('HDEL', key, 'closed_ms', 'closing') end -- used again, it is open
if ARGV[16] == '1' then redis.call('HSET', key, 'closing', 'after_round') end
begin(key, now_ms, ttl_ms)
keep(KEYS[3], key, now_ms, math.max(ttl_ms, lease_ms))
redis.call('HSET', KEYS[4], 'session_key', key, 'session_id', session_id, 'replica', replica, 'lease_until', until_ms)
redis.call('PEXPIRE', KEYS[4], lease_ms)

return {fence_text, redis.call('HGET', KEYS[1], 'epoch'), session_id, record[1] or '', record[2] or '0',
    record[3] or '', read_holdings(6, ttl_ms), read_totals(KEYS[2]), record[4] or '', text(ttl_ms),
    record[5] or '', record[6] or '', record[7] or ''}
