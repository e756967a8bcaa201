-- A token log's header and elements [start, stop], of one moment.
--
-- KEYS  1 log
-- ARGV  1 start, 2 stop
return {redis.call('LINDEX', KEYS[1], 0), redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])}
