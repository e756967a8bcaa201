-- What a claim would be told, without claiming: reads only.
--
-- KEYS  1 replicas, 2 session, 3.. residency, longest prefix first
-- ARGV  1 key prefix of the fleet, 2 replica, 3 key of the parent that the session would have, or '', 4 its id
-- Answers {1 known | 0, 1 held by a live round | 0, parent id, rounds so far, home, {engine, value, ...},
-- {totals, ...}, tip, TTFT SLO, ITL SLO, rounds expected}; texts are '' where there is none.
local record = redis.call('HMGET', KEYS[2], 'session_id', 'parent_id', 'rounds', 'home', 'tip', 'want_ttft_s',
    'want_itl_s', 'expected_rounds')
if not record[1] and ARGV[3] ~= '' then
    record = redis.call('HMGET', ARGV[3], '', 'session_id', '', 'home', 'tip', 'want_ttft_s', 'want_itl_s', '')
    record[2] = ARGV[4]
end
return {record[1] and 1 or 0, read_lease(KEYS[2]).state == HELD and 1 or 0, record[2] or '', record[3] or '0', record[4] or '',
    read_holdings(3), read_totals(KEYS[1]), record[5] or '', record[6] or '', record[7] or '', record[8] or ''}
