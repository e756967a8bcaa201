"""The fleet's list of engines in Redis: an engine keeps its record alive, schedulers read them all.

A record lives as long as its engine's heartbeat: `{antiphon:FLEET}:engine:ID` is a hash (record, incarnation,
signature) with a TTL, `{antiphon:FLEET}:engines` the set of ids ever seen. The signature is made with the
fleet key: who can only write the ledger cannot draw rounds, and the key that goes with them, to his host.
Blocking redis-py on the engine's side (its heartbeat is one thread), asyncio on the scheduler's.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import quote, urlsplit

import msgspec
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from antiphon.engines.base import EngineRecord
from antiphon.engines.fleet_secrets import is_signed, record_signature

log = logging.getLogger(__name__)

SOCKET_TIMEOUT_S = 2.0
MAX_BACKOFF_S = 5.0
MAX_RECORD_BYTES = 64 * 1024
MAX_FIELD_CHARS = 4096
MAX_RANKS = 1024
MAX_ENGINES = 4096
"""A fleet of more is not read any further: somebody fills the ledger."""
MAX_SAID = 1000
"""Complaints about records that are remembered, so that each is said once."""

# KEYS: record, index. ARGV: incarnation, record JSON, TTL ms, engine id, "1" to replace another's record,
# signature.
# Answers the incarnation that holds the id: ours when the write took place.
_BEAT = """
local holder = redis.call('HGET', KEYS[1], 'incarnation')
if holder and holder ~= ARGV[1] and ARGV[5] ~= '1' then return holder end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'record', ARGV[2], 'signature', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[4])
return ARGV[1]
"""

# KEYS: record, index. ARGV: incarnation, engine id. Only the holder may remove a record.
_REMOVE = """
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
redis.call('SREM', KEYS[2], ARGV[2])
return redis.call('DEL', KEYS[1])
"""


class EngineIdTaken(Exception):
    """Another live engine has this id."""


def shown(url: str) -> str:
    """A ledger's URL for logs and errors: without user and password, wherever they stand."""
    scheme, separator, rest = re.sub(r"([?&](?:username|password)=)[^&#]*", r"\1***", url).partition("://")
    return scheme + separator + rest.rpartition("@")[2] if separator else url


def fleet_tag(fleet: str) -> str:
    """Prefix and hash tag of every key of a fleet; no name can break out of the braces."""
    return "{antiphon:" + quote(fleet, safe="") + "}"


def record_key(fleet: str, engine_id: str) -> str:
    return f"{fleet_tag(fleet)}:engine:{quote(engine_id, safe='')}"


def index_key(fleet: str) -> str:
    return f"{fleet_tag(fleet)}:engines"


class Registration:
    """Keeps one engine's record in the registry from a thread of its own, through outages of the ledger.

    `start()` raises `EngineIdTaken` when another incarnation keeps the id alive (`replace` takes it over). A
    ledger that is away is no error: the thread tries on, with backoff. When the id is taken later (after an
    outage, or by a `replace`), the thread says so in the log, calls `on_taken` once and stops.
    """

    def __init__(
        self,
        url: str,
        record: EngineRecord,
        *,
        fleet: str = "default",
        ttl_s: float = 5.0,
        interval_s: float = 1.0,
        replace: bool = False,
        on_taken: Callable[[str], None] | None = None,
        fleet_key: bytes | None = None,
    ) -> None:
        """Without `fleet_key` the record is not signed: schedulers refuse it."""
        if not record.engine_id or not record.incarnation:
            raise ValueError("an engine record needs an engine_id and an incarnation")
        if not 0 < interval_s < ttl_s:
            raise ValueError(f"interval_s ({interval_s}) must be positive and less than ttl_s ({ttl_s})")
        self._where = shown(url)
        self._record = record
        encoded = msgspec.json.encode(record)
        signature = record_signature(fleet_key, fleet, encoded) if fleet_key is not None else ""
        self._written = encoded.decode(), signature
        self._keys = [record_key(fleet, record.engine_id), index_key(fleet)]
        self._ttl_s = ttl_s
        self._interval_s = interval_s
        self._replace = replace
        self._on_taken = on_taken
        self._redis = redis.Redis.from_url(
            url,
            protocol=2,
            decode_responses=True,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="antiphon-registry", daemon=True)

    def start(self) -> None:
        """Register now (or as soon as the ledger answers) and keep it so; raises `EngineIdTaken`.

        An old record may belong to a process that just died: it gets one TTL to expire.
        """
        deadline = time.monotonic() + self._ttl_s + self._interval_s
        try:
            while (holder := self._beat()) != self._record.incarnation:
                if time.monotonic() > deadline:
                    raise EngineIdTaken(self._taken(holder))
                self._closing.wait(self._interval_s / 4)
        except (RedisError, OSError) as error:
            log.warning("the ledger at %s is away (%s): registering when it is back", self._where, error)
        except EngineIdTaken:
            self._redis.close()
            raise
        self._replace = False
        self._thread.start()

    def close(self) -> None:
        """Stop the heartbeat and remove the record, if it is still ours. Never raises for a ledger outage.

        May be called from `on_taken`, and twice.
        """
        self._closing.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        try:
            self._redis.eval(_REMOVE, 2, *self._keys, self._record.incarnation, self._record.engine_id)
        except (RedisError, OSError) as error:
            log.info("record of %s is left to its TTL: %s", self._record.engine_id, error)
        finally:
            self._redis.close()

    def _beat(self) -> str:
        """One write; the incarnation that holds the id afterwards."""
        encoded, signature = self._written
        arguments = [self._record.incarnation, encoded, str(int(self._ttl_s * 1000)), self._record.engine_id]
        replace = "1" if self._replace else ""
        return cast(str, self._redis.eval(_BEAT, 2, *self._keys, *arguments, replace, signature))

    def _run(self) -> None:
        pause_s, away = self._interval_s, False
        while not self._closing.wait(pause_s):
            try:
                holder = self._beat()
            except (RedisError, OSError) as error:
                if not away:
                    log.warning("the ledger at %s is away: %s", self._where, error)
                away, pause_s = True, min(2 * pause_s, MAX_BACKOFF_S)
                continue
            if holder != self._record.incarnation:
                log.error("%s", self._taken(holder))
                if self._on_taken is not None:
                    self._on_taken(holder)
                return
            if away:
                log.info("the ledger is back: %s is registered again", self._record.engine_id)
            away, pause_s = False, self._interval_s

    def _taken(self, holder: str) -> str:
        return (
            f"engine id {self._record.engine_id!r} is held by another live engine (incarnation {holder}): "
            f"stop that one, or give this one another id, or replace it on purpose"
        )


class RecordReader:
    """Reads a fleet's records, and refuses those that nobody with the fleet key has written.

    `refused` counts them by reason: unreadable | foreign (another id than its key's) | unsigned | too_many.
    """

    def __init__(self, fleet: str, fleet_key: bytes | None) -> None:
        """Without `fleet_key` signatures are not looked at: to show what stands there, not to use it."""
        self._fleet = fleet
        self._fleet_key = fleet_key
        self.refused: Counter[str] = Counter()
        self._said: set[tuple[str, str]] = set()

    async def read(self, client: redis.asyncio.Redis) -> tuple[EngineRecord, ...]:
        """Every live engine's record, ordered by id; each that is refused is logged once.

        The client must decode responses; its own errors (`RedisError`, `OSError`) pass through.
        """
        ids = sorted(await cast("Awaitable[set[str]]", client.smembers(index_key(self._fleet))))
        if len(ids) > MAX_ENGINES:
            self._refuse("", "too_many", f"the ledger lists {len(ids)} engines; {MAX_ENGINES} are looked at")
            del ids[MAX_ENGINES:]
        async with client.pipeline(transaction=False) as pipeline:
            for engine_id in ids:
                pipeline.hmget(record_key(self._fleet, engine_id), "record", "signature")
            found: list[Any] = await pipeline.execute(raise_on_error=False) if ids else []
        records = (self._looked_at(engine_id, fields) for engine_id, fields in zip(ids, found, strict=True))
        return tuple(record for record in records if record is not None)

    def _looked_at(self, engine_id: str, fields: Any) -> EngineRecord | None:
        """Raises what the ledger said, unless that is about this one key."""
        if isinstance(fields, ResponseError):
            self._refuse(engine_id, "unreadable", f"engine record {engine_id!r} is no record: {fields}")
            return None
        if isinstance(fields, Exception):
            raise fields
        return self._accepted(engine_id, *fields)

    def _accepted(self, engine_id: str, raw: str | None, signature: str | None) -> EngineRecord | None:
        if raw is None:
            return None  # expired: its engine is gone
        named = f"engine record {engine_id[:MAX_FIELD_CHARS]!r}"
        if self._fleet_key is not None and not is_signed(
            self._fleet_key, self._fleet, raw.encode(), signature or ""
        ):
            self._refuse(engine_id, "unsigned", f"{named} is not signed with this fleet's key and is ignored")
            return None
        try:
            record = parse_record(raw)
        except ValueError as error:
            self._refuse(engine_id, "unreadable", f"{named} cannot be read and is ignored: {error}")
            return None
        if record.engine_id != engine_id:
            self._refuse(engine_id, "foreign", f"{named} names itself {record.engine_id!r} and is ignored")
            return None
        return record

    def _refuse(self, engine_id: str, reason: str, message: str) -> None:
        self.refused[reason] += 1
        if (engine_id, reason) not in self._said and len(self._said) < MAX_SAID:
            self._said.add((engine_id, reason))
            log.warning("%s", message)


def parse_record(raw: str | bytes) -> EngineRecord:
    """An engine's record from its JSON; raises ValueError in words."""
    if len(raw) > MAX_RECORD_BYTES:
        raise ValueError(f"it has {len(raw)} bytes or more, over {MAX_RECORD_BYTES}")
    try:
        record = msgspec.json.decode(raw, type=EngineRecord)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not record.engine_id or len(record.kv_addresses) > MAX_RANKS:
        raise ValueError("it has no engine_id, or too many ranks")
    texts = (record.engine_id, record.url, record.incarnation, record.model_id, record.model_path)
    if any(len(text) > MAX_FIELD_CHARS for text in (*texts, *record.kv_addresses)):
        raise ValueError(f"a field has more than {MAX_FIELD_CHARS} characters")
    if min(record.chunk_tokens, record.decode_interval) < 0:
        raise ValueError("chunk_tokens and decode_interval are 0 or more")
    parts = urlsplit(record.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("its url is not http://HOST:PORT")
    return record


async def list_engines(
    client: redis.asyncio.Redis, fleet: str = "default", fleet_key: bytes | None = None
) -> tuple[EngineRecord, ...]:
    """One look at the records, as `RecordReader` sees them."""
    return await RecordReader(fleet, fleet_key).read(client)
