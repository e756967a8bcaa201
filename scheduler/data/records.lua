-- What the scripts that write session records share; stands in front of them.
local function text(number) return string.format('%.0f', number) end

-- A session's key with another word in the place of 'sess': its children, say.
local function beside(key, word)
    return (string.gsub(key, ':sess:', ':' .. word .. ':', 1))
end

-- Of all sessions of the tenant, by age.
local function tenants_index(key)
    return string.match(key, '^(.-):sess:') .. ':own:' .. string.match(key, ':sess:([^:]*):')
end

-- The session is to live for so long from now.
local function keep(index, key, now_ms, ttl_ms)
    redis.call('PEXPIRE', key, text(ttl_ms))
    redis.call('ZADD', index, text(now_ms + ttl_ms), key)
end

-- So is the list that it is in.
local function keep_list(key, ttl_ms)
    local own = tenants_index(key)
    if redis.call('PTTL', own) < ttl_ms then redis.call('PEXPIRE', own, text(ttl_ms)) end
end

-- Record where a session comes from, unless that is known: it starts with what its parent has come to.
local function link(key, session_id, parent_key, parent_id, keep_ms)
    if parent_id == '' or parent_id == session_id or redis.call('HEXISTS', key, 'parent_id') == 1
        or tonumber(redis.call('HGET', key, 'rounds') or 0) > 0 then return end
    redis.call('HSET', key, 'parent_id', parent_id)
    redis.call('HSETNX', key, 'root_id', redis.call('HGET', parent_key, 'root_id') or parent_id)
    redis.call('HSETNX', key, 'forked_at', redis.call('HGET', parent_key, 'rounds') or '0')
    for _, name in ipairs({'home', 'tip', 'ttl_ms', 'want_ttft_s', 'want_itl_s', 'model'}) do
        local value = redis.call('HGET', parent_key, name)
        if value then redis.call('HSETNX', key, name, value) end
    end
    local children = beside(parent_key, 'kids')
    redis.call('SADD', children, session_id)
    if redis.call('PTTL', children) < keep_ms then redis.call('PEXPIRE', children, text(keep_ms)) end
end

-- The session is new: who owns it is told from its key.
local function begin(key, now_ms, ttl_ms)
    if redis.call('HSETNX', key, 'created_ms', text(now_ms)) == 1 then
        redis.call('ZADD', tenants_index(key), text(now_ms), key)
        keep_list(key, ttl_ms)
    end
end

local function forget(index, key)
    redis.call('DEL', key)
    redis.call('ZREM', index, key)
    redis.call('ZREM', tenants_index(key), key)
end

-- Sessions that are gone by themselves leave the indexes.
local function sweep(index, now_ms)
    for _, gone in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', text(now_ms), 'LIMIT', 0, 100)) do
        redis.call('ZREM', index, gone)
        if redis.call('EXISTS', gone) == 0 then redis.call('ZREM', tenants_index(gone), gone) end
    end
end
