-- What a claim would be told, without claiming: reads only.
--
-- KEYS  1 replicas, 2 session, 3.. residency, longest prefix first
-- ARGV  1 key prefix of the fleet, 2 replica
-- Answers {1 known | 0, 1 held by a live round | 0, parent id, rounds so far, home, {engine, value, ...},
-- {totals, ...}, tip}; texts are '' where there is none.
local record = redis.call('HMGET', KEYS[2], 'session_id', 'parent_id', 'rounds', 'home', 'tip')
local lease = redis.call('HMGET', KEYS[2], 'lease_round', 'lease_replica', 'lease_until')
return {record[1] and 1 or 0, holds(lease) and 1 or 0, record[2] or '', record[3] or '0', record[4] or '',
    read_holdings(3), read_totals(KEYS[1]), record[5] or ''}
