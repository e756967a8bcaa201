-- Of which call a response is a try: what is known of it, else it is written down.
--
-- KEYS  1 the call's record
-- ARGV  1 round id, 2 digest of what it asks, 3 'first' try, as far as is known, | 'again', 4 '1' if nothing
--       but its words names it, 5 TTL ms, 6 response id, 7 when it was made, 8 where it begins;
--       6 '' = only look
-- Answers {response id, when, where, '1' if a try of it was known, '1' if one was stored}; {} for nothing known where it only looks.
local known = redis.call('HMGET', KEYS[1], 'asks', 'response', 'created', 'start', 'stored', 'shared')
if known[1] and known[1] ~= ARGV[2] then
    return redis.error_reply('KEYREUSED its idempotency key was used for something else')
end
if known[1] and ARGV[3] == 'first' and not known[6] then
    if known[5] and ARGV[4] ~= '1' then
        known = {} -- the same is asked once more, after its answer: another call
        redis.call('DEL', KEYS[1])
    else
        redis.call('HSET', KEYS[1], 'shared', '1') -- a retry would not know which of the two it repeats
        known[6] = '1'
    end
end
if known[1] and not known[6] then
    redis.call('HSET', KEYS[1], 'round', ARGV[1])
    redis.call('PEXPIRE', KEYS[1], ARGV[5])
    return {known[2], known[3], known[4], '1', known[5] or ''}
end
if ARGV[6] == '' then return {} end
if not known[6] then
    redis.call('HSET', KEYS[1], 'round', ARGV[1], 'asks', ARGV[2], 'response', ARGV[6], 'created', ARGV[7],
        'start', ARGV[8])
    redis.call('PEXPIRE', KEYS[1], ARGV[5])
end
return {ARGV[6], ARGV[7], ARGV[8], '', ''}
