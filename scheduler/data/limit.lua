-- Let a round of an API key in, or not: its tokens of the minute, and how many sessions of it live.
-- The sums are those of gateway/token_bucket.py.
--
-- KEYS  1 bucket, 2 sessions of the key
-- ARGV  1 tokens per minute or 0, 2 tokens asked for, 3 tokens owed, 4 sessions or 0, 5 the session's record,
--       6 ms for which an unused list of sessions is kept
-- Answers {1 | 0 let in, 1 | 0 too many sessions, tokens left, ms to wait for tokens, sessions, now in ms}.
local per_minute, asked, owed = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local most_sessions, session = tonumber(ARGV[4]), ARGV[5]
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)

local left, wait_ms = 0, 0
if per_minute > 0 then
    local kept = redis.call('HMGET', KEYS[1], 'level', 'at_ms')
    left = (tonumber(kept[1]) or per_minute) - owed
    if kept[1] then left = left + math.max(0, now_ms - tonumber(kept[2])) * per_minute / 60000 end
    left = math.min(per_minute, left)
    wait_ms = math.max(0, (math.min(asked, per_minute) - left) * 60000 / per_minute)
end

-- Sessions whose record is gone have ended. One that was let in just now has none yet.
local function prune()
    local last = tonumber(redis.call('GET', KEYS[2] .. ':pruned')) or 0
    if now_ms - last < 1000 then return end
    redis.call('SET', KEYS[2] .. ':pruned', string.format('%.0f', now_ms), 'PX', 60000)
    for _, other in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms - 15000)) do
        if redis.call('EXISTS', other) == 0 then redis.call('ZREM', KEYS[2], other) end
    end
end

local sessions, full = 0, false
if most_sessions > 0 then
    sessions = redis.call('ZCARD', KEYS[2])
    if not redis.call('ZSCORE', KEYS[2], session) then
        if sessions >= most_sessions then
            prune()
            sessions = redis.call('ZCARD', KEYS[2])
        end
        full = sessions >= most_sessions
    end
end

local let_in = wait_ms == 0 and not full
if let_in then left = left - asked end
if per_minute > 0 then
    redis.call('HSET', KEYS[1], 'level', string.format('%.17g', left), 'at_ms', string.format('%.0f', now_ms))
    redis.call('PEXPIRE', KEYS[1], string.format('%.0f', (per_minute - left) * 60000 / per_minute + 60000))
end
if let_in and most_sessions > 0 then
    redis.call('ZADD', KEYS[2], string.format('%.0f', now_ms), session)
    redis.call('PEXPIRE', KEYS[2], ARGV[6])
    sessions = redis.call('ZCARD', KEYS[2])
end
return {let_in and 1 or 0, full and 1 or 0, string.format('%.17g', left), math.ceil(wait_ms), sessions, now_ms}
