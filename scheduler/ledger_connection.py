"""A connection to the ledger's Redis: deadlines, one kind of error, scripts, and the names of keys.

Keys of a fleet share one hash tag, so that a script never leaves its slot. Tenants and ids are
percent-encoded in keys, so that no name can reach another's record:

    {antiphon:F}:fence              hash   epoch, last fence given
    {antiphon:F}:sess:TENANT:ID     hash   a session, with the lease of the round in flight; TTL
    {antiphon:F}:round:ID           hash   the session that a round was claimed in, whether it is done; TTL
    {antiphon:F}:call:DIGEST        hash   a client's call that may be made again: its latest round; TTL
    {antiphon:F}:answer:DIGEST      string what a call with an idempotency key was answered; TTL
    {antiphon:F}:respcall:DIGEST    hash   a call of /v1/responses: its response, where it begins; TTL
    {antiphon:F}:res:TENANT:HASH    hash   engine id -> "incarnation|tokens"; TTL
    {antiphon:F}:replica:ID, totals:ID     a replica's heartbeat, and what it has reserved; TTL
    {antiphon:F}:chain:SCOPE:VALUE  string whose conversation has come there; turn:SCOPE:VALUE: ended so; TTL
    {antiphon:F}:api_keys, api_key_names   hash   digest -> an API key's record; name -> digest
    {antiphon:F}:limit:NAME, limit_sessions:NAME   what the API key NAME has used; TTL
    {antiphon:F}:own:TENANT, kids:TENANT:ID   a tenant's sessions by age; ids of a session's children; TTL
    {antiphon:F}:drain              hash   engine id -> incarnation that is to be stopped; drain_seen:ID,
                                    drain_lead:ID, drain_work:ID: who has seen it, who moves its sessions
    {antiphon:F}:replicas, sessions, receipts, counters
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import quote

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from antiphon.engines.registry import fleet_tag, shown

T = TypeVar("T")

RETRY_AFTER_S = 1.0
"""A ledger that failed is not asked again before this."""

GONE = (exceptions.ConnectionError, exceptions.TimeoutError, RuntimeError)
"""How a connection says that it is gone. RuntimeError: uvloop's, of one that was reset while it was idle."""

SCRIPTS = {
    "claim": ("leases", "reading", "records", "claim"),
    "look": ("leases", "reading", "look"),
    "rehome": ("leases", "rehome"),
    "complete": ("leases", "records", "complete"),
    "release": ("leases", "records", "release"),
    "heartbeat": ("leases", "heartbeat"),
    "answer_keep": ("answer_keep",),
    "remember": ("remember",),
    "session_put": ("records", "session_put"),
    "session_close": ("leases", "session_close"),
    "respond": ("respond",),
    "respond_call": ("respond_call",),
    "respond_forget": ("respond_forget",),
    "limit": ("limit",),
    "log_append": ("log_append",),
    "log_fence": ("log_fence",),
    "log_keep": ("log_keep",),
    "log_read": ("log_read",),
    "drain_lead": ("drain_lead",),
    "drain_seen": ("drain_seen",),
    "drain_switch": ("leases", "drain_switch"),
    "pool_flip": ("pool_flip",),
}
"""Script -> the files of data/ that it is made of, in order."""


class LedgerUnavailable(Exception):
    """The ledger did not answer in time, or could not do what it was asked: go on without it."""


class RoundTaken(Exception):
    """The round runs on another live replica, or has ended: it must not run again."""


class KeyReused(Exception):
    """The call's idempotency key was used for another request."""


class Failures:
    """When the ledger last failed; shared by all connections of a process to the same one."""

    def __init__(self) -> None:
        self._failed_s: float | None = None

    def failed(self) -> None:
        self._failed_s = time.monotonic()

    def answered(self) -> None:
        self._failed_s = None

    def within(self, seconds: float) -> bool:
        """The last call failed, less than `seconds` ago."""
        return self._failed_s is not None and time.monotonic() - self._failed_s < seconds


class LedgerConnection:
    """Every call ends within `deadline_s` or raises `LedgerUnavailable`. Used from one event loop."""

    def __init__(
        self,
        url: str,
        fleet: str,
        deadline_s: float,
        max_connections: int,
        *,
        binary: bool = False,
        failures: Failures | None = None,
    ) -> None:
        """`binary`: answers are bytes, not text. `failures`: of another connection to the same ledger."""
        self.where = shown(url)
        self.fleet = fleet
        self.deadline_s = deadline_s
        self.tag = fleet_tag(fleet)
        self.failures = failures or Failures()
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=deadline_s,
            protocol=2,
            decode_responses=not binary,
            encoding_errors="replace",  # one key that is no text must not make all others unreadable
            # No socket timeouts: `call` has a deadline, and redis-py's go through asyncio.wait_for, which
            # before Python 3.12 swallows a cancellation that comes together with the answer.
            socket_timeout=None,
            socket_connect_timeout=None,
            # One retry: a server that was restarted leaves dead connections in the pool. Scripts bear it.
            retry=Retry(NoBackoff(), 1, supported_errors=GONE),  # type: ignore[arg-type]  # any will do
        )
        self.redis = redis.asyncio.Redis.from_pool(pool)
        folder = resources.files("antiphon.scheduler") / "data"
        self._texts = {
            name: "\n".join((folder / f"{part}.lua").read_text() for part in parts)
            for name, parts in SCRIPTS.items()
        }
        self._scripts = {name: self.redis.register_script(text) for name, text in self._texts.items()}

    async def call(self, call: Callable[[], Awaitable[T]]) -> T:
        """One exchange; raises `LedgerUnavailable` for whatever goes wrong, `RoundTaken` and `KeyReused` from
        a script."""
        try:
            async with asyncio.timeout(self.deadline_s):
                answer = await call()
        except ResponseError as error:
            if str(error).startswith("ROUNDTAKEN"):
                raise RoundTaken(str(error)) from error
            if str(error).startswith("KEYREUSED"):
                raise KeyReused(str(error)) from error
            raise self._failed(f"refuses: {error}") from error
        except TimeoutError as error:
            raise self._failed(f"did not answer in {self.deadline_s:g} s") from error
        except (RedisError, OSError, *GONE) as error:
            raise self._failed(f"is away: {error}") from error
        self.failures.answered()
        return answer

    async def command(self, *words: str | int | bytes) -> Any:
        """One Redis command, its answer as redis-py parses it."""
        (answer,) = await self.commands([words])
        return answer

    async def commands(self, commands: Sequence[tuple[str | int | bytes, ...]]) -> list[Any]:
        """Several commands in one exchange, not atomic."""

        async def execute() -> list[Any]:
            async with self.redis.pipeline(transaction=False) as pipeline:
                for words in commands:
                    pipeline.execute_command(*words)
                return await pipeline.execute()

        return await self.call(execute) if commands else []

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script by its hash; a server that does not know it (restarted, flushed) is taught again."""
        return await self.call(lambda: self._scripts[name](keys=keys, args=arguments))

    async def load_scripts(self) -> None:
        """Teach the server every script: shows that it is there and takes them."""
        await self.commands([("SCRIPT LOAD", text) for text in self._texts.values()])

    def not_if_it_failed(self, retry_after_s: float = RETRY_AFTER_S) -> None:
        """Raises `LedgerUnavailable` if the last call failed, less than `retry_after_s` ago.

        So a ledger that hangs costs one round its deadline, and not every round.
        """
        if self.failed_within(retry_after_s):
            raise LedgerUnavailable("the ledger failed a moment ago")

    def failed_within(self, seconds: float) -> bool:
        """The last call failed, less than `seconds` ago."""
        return self.failures.within(seconds)

    async def close(self) -> None:
        await self.redis.aclose()
        await self.redis.connection_pool.disconnect()

    def _failed(self, what: str) -> LedgerUnavailable:
        self.failures.failed()
        return LedgerUnavailable(f"the ledger at {self.where} {what}")

    # ---- names of keys

    def keys(self, *names: str) -> list[str]:
        return [f"{self.tag}:{name}" for name in names]

    def round_key(self, round_id: str) -> str:
        return f"{self.tag}:round:{escaped(round_id)}"

    def call_keys(self, digest: str) -> list[str]:
        """What is known of a client's call, and its answer."""
        return self.keys(f"call:{digest}", f"answer:{digest}")

    def session_key(self, tenant: str, session_id: str) -> str:
        return f"{self.tag}:sess:{escaped(tenant)}:{escaped(session_id)}"

    def own_key(self, tenant: str) -> str:
        """The tenant's sessions, by age."""
        return f"{self.tag}:own:{escaped(tenant)}"

    def children_key(self, tenant: str, session_id: str) -> str:
        return f"{self.tag}:kids:{escaped(tenant)}:{escaped(session_id)}"

    def residency_keys(self, tenant: str, page_hashes: Sequence[bytes]) -> list[str]:
        """Content is shared within a tenant only: the tenant's digest stands in the key."""
        digest = hashlib.sha256(tenant.encode()).hexdigest()[:16]
        return [f"{self.tag}:res:{digest}:{page_hash.hex()}" for page_hash in page_hashes]

    def replica_keys(self, replica: str) -> list[str]:
        """Heartbeat and totals."""
        return [f"{self.tag}:replica:{escaped(replica)}", f"{self.tag}:totals:{escaped(replica)}"]


def escaped(name: str) -> str:
    """Percent-encoded: letters, digits and -_.~ only, so neither ':' nor braces; different names differ."""
    return quote(name, safe="")
