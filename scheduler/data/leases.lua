-- The lease of a session, for every script that reads or changes it; stands in front of them.
--
-- A lease is four fields of the session record. It is FREE when they are not there, HELD while `lease_until`
-- lies ahead and its replica's heartbeat key lives, and LAPSED else. scheduler/lease_states.py has the table
-- of what each script may do from each state; a test compares it with what the scripts do.
--
-- ARGV  1 key prefix of the fleet, 2 replica that asks, '' for nobody's
local prefix, replica = ARGV[1], ARGV[2]
local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)
local FREE, HELD, LAPSED = 'free', 'held', 'lapsed'
local REPLACED = 'replaced by its retry' -- why a round is gone

-- We are alive, whatever our heartbeat says.
local function alive(other)
    return other == replica or redis.call('EXISTS', prefix .. ':replica:' .. other) == 1
end

-- `newest`: no claim with a smaller fence has anything to say about the session any more.
local function read_lease(key)
    local found = redis.call('HMGET', key, 'lease_round', 'lease_replica', 'lease_until', 'lease_fence', 'last_fence')
    local lease = {round = found[1], replica = found[2], fence = tonumber(found[4]) or 0, state = FREE}
    lease.newest = math.max(lease.fence, tonumber(found[5]) or 0)
    if lease.round then
        lease.state = tonumber(found[3]) > now_ms and alive(lease.replica) and HELD or LAPSED
    end
    return lease
end

local function is_of(lease, round_id)
    return lease.round == round_id and lease.replica == replica
end

-- claim, take over: from any state; the caller has made sure that nobody else's live round holds it.
local function take_lease(key, round_id, until_ms, fence)
    redis.call('HSET', key, 'lease_round', round_id, 'lease_replica', replica, 'lease_until', until_ms,
        'lease_fence', fence)
end

-- complete, release.
local function free_lease(key)
    redis.call('HDEL', key, 'lease_round', 'lease_replica', 'lease_fence', 'lease_until', 'closing')
end
