"""The token store's layout in Redis: its keys, and the scripts that change them.

A turn is four keys, all with a time to live:

    eloquent:turn:ID:PRINCIPAL    a hash: state, owner, fence, hashes, body, chunks, length, size
    eloquent:log:...              a stream: the entry `N-0` is the N-th append (o: offset, d: data)
    eloquent:more:...             a list of continuations, until the turn ends
    eloquent:lease:...            whose turn it is; gone when its owner has not renewed it

`eloquent:grave:...` outlives them: an id that was used is never used again. `eloquent:read:...` is
there while another gateway has readers of the turn. `eloquent:open` has the turns without an end,
`eloquent:fence` the newest fencing number, `eloquent:inbox:OWNER` messages to a gateway;
`eloquent:check` is written to see whether that is possible.

A script runs alone, so what it writes is there whole or not at all. It may run twice: who asked
sends a write again when the answer was lost on the way. One Redis, not a cluster: the keys of a
script lie in different slots.
"""

import hashlib
from dataclasses import dataclass

OPEN_KEY = b"eloquent:open"
FENCE_KEY = b"eloquent:fence"
CHECK_KEY = b"eloquent:check"


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the name by which Redis remembers it."""

    text: str

    @property
    def digest(self) -> str:
        """What EVALSHA takes."""
        # Not for security: the command wants SHA-1.
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class Keys:
    """The names of a turn's keys."""

    __slots__ = ("continuations", "grave", "lease", "log", "name", "read", "turn")

    def __init__(self, principal: str, turn_id: bytes) -> None:
        """A turn id has a fixed length, so that no principal's name makes one key of two."""
        self.name = turn_id.hex().encode() + b":" + principal.encode()
        self.turn = b"eloquent:turn:" + self.name
        self.log = b"eloquent:log:" + self.name
        self.continuations = b"eloquent:more:" + self.name
        self.lease = b"eloquent:lease:" + self.name
        self.grave = b"eloquent:grave:" + self.name
        self.read = b"eloquent:read:" + self.name


def turn_named(name: bytes) -> tuple[str, bytes]:
    """Return principal and turn id of `Keys.name`."""
    turn_id, _, principal = name.partition(b":")
    return principal.decode(), bytes.fromhex(turn_id.decode())


def inbox(owner: bytes) -> bytes:
    """Return the key of the messages to a gateway."""
    return b"eloquent:inbox:" + owner


BEGIN = Script("""
-- KEYS turn, lease, grave, fence, open
-- ARGV owner, lease_ms, now_s, ttl_ms, grave_ms, name, secret_hash, body_hash, body
if redis.call('EXISTS', KEYS[1], KEYS[3]) > 0 then return 0 end
local fence = redis.call('INCR', KEYS[4])
redis.call('HSET', KEYS[1], 'state', 'open', 'owner', ARGV[1], 'fence', fence, 'secret', ARGV[7],
  'body_hash', ARGV[8], 'body', ARGV[9], 'chunks', 0, 'length', 0, 'size', #ARGV[9],
  'created', ARGV[3], 'updated', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[3], '', 'PX', ARGV[4] + ARGV[5])
redis.call('ZADD', KEYS[5], ARGV[3], ARGV[6])
return fence
""")
"Make a turn and lease it; return the fencing number, 0 where there is a turn or was one."

CLAIM = Script("""
-- KEYS turn, lease, fence, open
-- ARGV owner, lease_ms, name
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'open' then
  redis.call('ZREM', KEYS[4], ARGV[3])
  return 0
end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return 0 end
local fence = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'fence', fence)
return fence
""")
"Lease an open turn that nobody has; return the fencing number, 0 if it is not to be had."

WRITE = Script("""
-- KEYS open, then of each write: turn, log, continuations, lease, grave
-- ARGV owner, now_s, ttl_ms, grave_ms, then of each write:
--   what, fence, sequence, offset, data, continuation ('+' before it), name
local owner, now, ttl, grave_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local replies = {}
for i = 1, (#KEYS - 1) / 5 do
  local turn, log, more, lease, grave = unpack(KEYS, 5 * i - 3, 5 * i + 1)
  local what, fence, sequence, offset, data, continuation, name = unpack(ARGV, 7 * i - 2, 7 * i + 4)
  local held = redis.call('HMGET', turn, 'owner', 'fence', 'chunks', 'length', 'size', 'state')
  local chunks = tonumber(held[3] or 0)
  local reply = 'stored'
  if held[1] ~= owner or held[2] ~= fence then
    reply = 'stale'
  elseif what == 'release' then
    if chunks == 0 then redis.call('DEL', turn, grave) end
    redis.call('DEL', lease)
    redis.call('ZREM', KEYS[1], name)
  elseif chunks >= tonumber(sequence) then
    reply = 'stored'
  elseif chunks + 1 ~= tonumber(sequence) or held[4] ~= offset or held[6] ~= 'open' then
    reply = 'gap'
  else
    local length, size = offset + #data, held[5] + #data
    redis.call('XADD', log, sequence .. '-0', 'o', offset, 'd', data)
    if chunks == 0 then redis.call('PEXPIRE', log, ttl) end
    if continuation ~= '' then
      size = size + #continuation - 1
      if redis.call('RPUSH', more, string.sub(continuation, 2)) == 1 then
        redis.call('PEXPIRE', more, ttl)
      end
    end
    if what == 'end' then
      redis.call('HSET', turn, 'state', 'ended', 'chunks', sequence, 'length', length,
        'size', length, 'updated', now)
      redis.call('HDEL', turn, 'body')
      redis.call('DEL', more, lease)
      redis.call('PEXPIRE', turn, ttl)
      redis.call('PEXPIRE', log, ttl)
      redis.call('SET', grave, '', 'PX', ttl + grave_ms)
      redis.call('ZREM', KEYS[1], name)
    else
      redis.call('HSET', turn, 'chunks', sequence, 'length', length, 'size', size, 'updated', now)
    end
  end
  replies[i] = reply
end
return replies
""")
"""Append, end and release, each only by the owner whose fencing number is the turn's newest.

Return of each write `stored` (now, or when it was sent before), `stale` (somebody else owns the
turn, or it was deleted) or `gap` (Redis has lost what it had confirmed)."""

RENEW = Script("""
-- KEYS of each turn: lease, turn, log, continuations
-- ARGV owner, lease_ms, ttl_ms
local replies = {}
for i = 1, #KEYS / 4 do
  local lease, turn, log, more = unpack(KEYS, 4 * i - 3, 4 * i)
  if redis.call('GET', lease) == ARGV[1] then
    redis.call('PEXPIRE', lease, ARGV[2])
    redis.call('PEXPIRE', turn, ARGV[3])
    redis.call('PEXPIRE', log, ARGV[3])
    redis.call('PEXPIRE', more, ARGV[3])
    replies[i] = 1
  else
    replies[i] = 0
  end
end
return replies
""")
"Lengthen a gateway's leases, and its turns' time to live; return 0 for those it has no more."

RELEASE = Script("""
-- KEYS leases
-- ARGV owner
for _, lease in ipairs(KEYS) do
  if redis.call('GET', lease) == ARGV[1] then redis.call('DEL', lease) end
end
""")
"Give leases back."

BURY = Script("""
-- KEYS turn, log, continuations, lease, grave, open
-- ARGV grave_ms, name
if redis.call('EXISTS', KEYS[1], KEYS[5]) == 0 then return 0 end
redis.call('SET', KEYS[5], '', 'PX', ARGV[1])
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('ZREM', KEYS[6], ARGV[2])
return 1
""")
"Delete a turn but for its grave; return whether there was one, or its grave."

READ = Script("""
-- KEYS log
-- ARGV first, last
local data = {}
for i, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2])) do data[i] = entry[2][4] end
return table.concat(data)
""")
"Return a part of a log in one piece: its entries one by one are slow to take apart."

SCRIPTS = (BEGIN, CLAIM, WRITE, RENEW, RELEASE, BURY, READ)
