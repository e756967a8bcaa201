-- Keeps a response: its document, and the messages of its round at the end of its conversation's list.
-- KEYS: response, list it continues, list for a branch, response or conversation pointer,
--       the call's record (any key if there is none)
-- ARGV: messages before it, ttl in ms, session, document, id of list, id of branch, conversation or "",
--       response id, round id of a call's try or "", messages...
-- Answers 1, or 0 when what came before it is gone, or a later try of its call has come.
local round = ARGV[9]
local latest = round ~= '' and redis.call('HGET', KEYS[5], 'round')
if latest and latest ~= round then
  return 0
end
local before, ttl = tonumber(ARGV[1]), ARGV[2]
local list, id = KEYS[2], ARGV[5]
local length = redis.call('LLEN', list)
if length < before then
  return 0
end
if length > before then
  -- Another response went on from here: this one is a branch with a list of its own.
  redis.call('DEL', KEYS[3])
  if before > 0 then
    redis.call('COPY', list, KEYS[3])
    redis.call('LTRIM', KEYS[3], 0, before - 1)
  end
  list, id = KEYS[3], ARGV[6]
end
for at = 10, #ARGV do
  redis.call('RPUSH', list, ARGV[at])
end
redis.call('PEXPIRE', list, ttl)
redis.call('HSET', KEYS[1], 'list', id, 'length', before + #ARGV - 9, 'session', ARGV[3], 'document', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ttl)
if ARGV[7] ~= '' then
  redis.call('SET', KEYS[4], ARGV[8], 'PX', ttl)
end
if latest then
  redis.call('HSET', KEYS[5], 'stored', '1')
end
return 1
