"""The fleet's list of engines in Redis: an engine keeps its record alive, schedulers read them all.

A record lives as long as its engine's heartbeat: `{antiphon:FLEET}:engine:ID` is a hash (record, incarnation)
with a TTL, `{antiphon:FLEET}:engines` the set of ids ever seen. Blocking redis-py on the engine's side (its
heartbeat is one thread), asyncio on the scheduler's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import quote

import msgspec
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from antiphon.engines.base import EngineRecord

log = logging.getLogger(__name__)

SOCKET_TIMEOUT_S = 2.0
MAX_BACKOFF_S = 5.0

# KEYS: record, index. ARGV: incarnation, record JSON, TTL ms, engine id, "1" to replace another's record.
# Answers the incarnation that holds the id: ours when the write took place.
_BEAT = """
local holder = redis.call('HGET', KEYS[1], 'incarnation')
if holder and holder ~= ARGV[1] and ARGV[5] ~= '1' then return holder end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'record', ARGV[2])
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
    """A ledger's URL for logs and errors: without user and password."""
    scheme, separator, rest = url.partition("://")
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
    ) -> None:
        if not record.engine_id or not record.incarnation:
            raise ValueError("an engine record needs an engine_id and an incarnation")
        if not 0 < interval_s < ttl_s:
            raise ValueError(f"interval_s ({interval_s}) must be positive and less than ttl_s ({ttl_s})")
        self._where = shown(url)
        self._record = record
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
        encoded = msgspec.json.encode(self._record).decode()
        arguments = [self._record.incarnation, encoded, str(int(self._ttl_s * 1000)), self._record.engine_id]
        return cast(str, self._redis.eval(_BEAT, 2, *self._keys, *arguments, "1" if self._replace else ""))

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


async def list_engines(client: redis.asyncio.Redis, fleet: str = "default") -> tuple[EngineRecord, ...]:
    """Every live engine's record, ordered by id; records that cannot be read are logged and left out.

    The client must decode responses; its own errors (`RedisError`, `OSError`) pass through.
    """
    ids = sorted(await cast("Awaitable[set[str]]", client.smembers(index_key(fleet))))
    async with client.pipeline(transaction=False) as pipeline:
        for engine_id in ids:
            pipeline.hget(record_key(fleet, engine_id), "record")
        encoded: list[Any] = await pipeline.execute() if ids else []
    records = (_read(engine_id, raw) for engine_id, raw in zip(ids, encoded, strict=True))
    return tuple(record for record in records if record is not None)


def _read(engine_id: str, raw: str | None) -> EngineRecord | None:
    if raw is None:
        return None  # expired: its engine is gone
    try:
        record = msgspec.json.decode(raw, type=EngineRecord)
    except msgspec.MsgspecError as error:
        log.warning("engine record %r cannot be read and is ignored: %s", engine_id, error)
        return None
    if record.engine_id != engine_id:
        log.warning("engine record %r names itself %r and is ignored", engine_id, record.engine_id)
        return None
    return record
