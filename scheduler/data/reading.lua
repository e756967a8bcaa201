-- What `claim` and `look` read alike; stands behind leases.lua.

-- {engine, value, ...}: the longest prefix of each engine (and incarnation: the caller knows which one lives),
-- from the residency keys, longest first. With `ttl_ms` those that say something are kept for so much longer.
local function read_holdings(first_key, ttl_ms)
    local holdings, seen = {}, {}
    for i = first_key, #KEYS do
        local entries = redis.call('HGETALL', KEYS[i])
        for j = 1, #entries, 2 do
            local holder = entries[j] .. '\n' .. (string.match(entries[j + 1], '^(.*)|') or '')
            if not seen[holder] then
                seen[holder] = true
                holdings[#holdings + 1] = entries[j]
                holdings[#holdings + 1] = entries[j + 1]
            end
        end
        if ttl_ms and #entries > 0 then redis.call('PEXPIRE', KEYS[i], ttl_ms) end
    end
    return holdings
end

-- The totals of every other replica that lives.
local function read_totals(replicas_key)
    local totals = {}
    for _, other in ipairs(redis.call('SMEMBERS', replicas_key)) do
        if other ~= replica and alive(other) then
            totals[#totals + 1] = redis.call('GET', prefix .. ':totals:' .. other) or nil
        end
    end
    return totals
end
