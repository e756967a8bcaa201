"""What the ledger knows of engines that are to be stopped: marks, who has seen them, how far the moves are.

A mark names an incarnation: an engine that was started again is not drained. Every replica says that it has
seen the mark and how many of its rounds still need the engine; one replica at a time moves the sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from antiphon.scheduler.ledger_connection import LedgerConnection, escaped

KEEP_MS = 24 * 3600 * 1000
"""What a forgotten drain leaves behind is gone after this."""
SESSIONS_PER_READ = 500
_FIELDS = ("session_id", "tenant", "home", "tip", "context_tokens", "lease_replica", "updated_ms")


class Work(msgspec.Struct, frozen=True):
    """What has been moved so far, and what the last look at all sessions found."""

    incarnation: str = ""
    began_ms: int = 0
    """When that look began, by the ledger's clock; 0 = none has ended yet."""
    left: int = 0
    """Sessions whose home the engine was then."""
    moved: int = 0
    moved_partly: int = 0
    """Of `moved`, those whose KV could not be brought whole: the rest is computed again."""
    moved_bytes: int = 0
    stuck: str = ""
    """Why sessions could not be moved; "" = they could."""


class DrainStatus(msgspec.Struct, frozen=True):
    """How far a drain is. `safe`: the engine can be stopped and nothing is lost."""

    engine_id: str
    draining: bool
    incarnation: str
    replicas: int
    """That live."""
    replicas_seen: int
    """Of those, how many place nothing there any more."""
    rounds: int
    """In flight that need the engine, of those replicas."""
    work: Work
    safe: bool


@dataclass(frozen=True, slots=True)
class AtHome:
    """A session whose home is an engine. `tip`: "hash|tokens|incarnation|engine", or ""."""

    key: str
    session_id: str
    tenant: str
    tip: str
    context_tokens: int
    in_flight: bool
    updated_ms: int = 0
    """When its last round was recorded, by the ledger's clock."""


class DrainStore:
    """Raises `LedgerUnavailable`."""

    def __init__(self, connection: LedgerConnection) -> None:
        self._connection = connection
        self._marks, self._flips = connection.keys("drain", "pool_flips")

    def _key(self, word: str, engine_id: str) -> str:
        return f"{self._connection.tag}:drain_{word}:{escaped(engine_id)}"

    async def marks(self) -> dict[str, str]:
        """Engine id -> incarnation."""
        found: dict[str, str] = await self._connection.command("HGETALL", self._marks)
        return found

    async def mark(self, engine_id: str, incarnation: str) -> None:
        """Have every replica leave the engine; repeating it changes nothing.

        An engine that is leaving its pool is drained instead, and not used again by itself.
        """
        marked, _ = await self._connection.commands(
            [("HGET", self._marks, engine_id), ("HDEL", self._flips, engine_id)]
        )
        if marked == incarnation:
            return
        await self._connection.commands(
            [
                ("DEL", self._key("seen", engine_id), self._key("work", engine_id)),
                ("HSET", self._marks, engine_id, incarnation),
            ]
        )

    async def unmark(self, engine_id: str) -> bool:
        """Take it back; False if there was no mark."""
        found, _ = await self._connection.commands(
            [
                ("HDEL", self._marks, engine_id),
                ("DEL", *(self._key(word, engine_id) for word in ("seen", "lead", "work"))),
            ]
        )
        return bool(found)

    async def seen(self, engine_id: str, incarnation: str, replica: str, rounds: int) -> None:
        """This replica places nothing there any more; so many of its rounds still need the engine."""
        key = self._key("seen", engine_id)
        await self._connection.script("drain_seen", [key], [escaped(replica), incarnation, rounds, KEEP_MS])

    async def lead(self, engine_id: str, replica: str, ttl_s: float) -> int:
        """Be the one that moves its sessions, for so long: the ledger's clock in ms; 0 if another is."""
        key, ttl_ms = self._key("lead", engine_id), max(1, round(ttl_s * 1000))
        ours, now_ms = await self._connection.script("drain_lead", [key], [replica, ttl_ms])
        return int(now_ms) if ours else 0

    async def tell(self, engine_id: str, work: Work) -> None:
        """How far the moves are."""
        key = self._key("work", engine_id)
        await self._connection.command("SET", key, msgspec.json.encode(work), "PX", KEEP_MS)

    async def work(self, engine_id: str) -> Work:
        raw = await self._connection.command("GET", self._key("work", engine_id))
        return msgspec.json.decode(raw, type=Work) if raw else Work()

    async def at_home(self, engine_id: str) -> list[AtHome]:
        """Every session whose home it is, at about the same moment."""
        (index,) = self._connection.keys("sessions")
        names: list[str] = await self._connection.command("ZRANGE", index, 0, -1)
        found: list[AtHome] = []
        live = set(await self._live())
        for start in range(0, len(names), SESSIONS_PER_READ):
            some = names[start : start + SESSIONS_PER_READ]
            records = await self._connection.commands([("HMGET", name, *_FIELDS) for name in some])
            for name, record in zip(some, records, strict=True):
                session_id, tenant, home, tip, context_tokens, holder, updated_ms = record
                if session_id and home == engine_id:
                    tokens = int(context_tokens or 0)
                    busy, when = holder in live, int(updated_ms or 0)
                    found.append(AtHome(name, session_id, tenant or "", tip or "", tokens, busy, when))
        return found

    async def switch(
        self,
        session: AtHome,
        from_home: str,
        to_home: str,
        tip: str,
        checkpoints: Sequence[tuple[int, bytes]],
        incarnation: str,
        ttl_s: float,
    ) -> str:
        """Compare-and-set the session's home: moved | busy | went_on | unknown_session.

        `tip` and `checkpoints` ((tokens, hash)): what the new home, of this incarnation, has of it.
        """
        residency = self._connection.residency_keys(
            session.tenant, [page_hash for _, page_hash in checkpoints]
        )
        arguments = [self._connection.tag, "", from_home, session.tip, to_home, tip, round(ttl_s * 1000)]
        values = [f"{incarnation}|{tokens}" for tokens, _ in checkpoints]
        answer = await self._connection.script("drain_switch", [session.key, *residency], arguments + values)
        return str(answer)

    async def status(self, engine_id: str) -> DrainStatus:
        """How far the drain of the engine is."""
        mark, told, raw = await self._connection.commands(
            [
                ("HGET", self._marks, engine_id),
                ("HGETALL", self._key("seen", engine_id)),
                ("GET", self._key("work", engine_id)),
            ]
        )
        work = msgspec.json.decode(raw, type=Work) if raw else Work()
        return _status(engine_id, mark or "", await self._live(), told, work)

    async def _live(self) -> list[str]:
        """The replicas that live, as they stand in keys."""
        (replicas,) = self._connection.keys("replicas")
        names = sorted(await self._connection.command("SMEMBERS", replicas))
        beats = [("EXISTS", f"{self._connection.tag}:replica:{name}") for name in names]
        lives = await self._connection.commands(beats)
        return [name for name, alive in zip(names, lives, strict=True) if alive]


def _status(engine_id: str, mark: str, live: Sequence[str], told: dict[str, str], work: Work) -> DrainStatus:
    """`told`: replica (as in keys) -> "incarnation|rounds|since ms"."""
    seen = [told[name].rsplit("|", 2) for name in live if name in told]
    ours = [(int(rounds), since) for incarnation, rounds, since in seen if incarnation == mark]
    rounds = sum(count for count, _ in ours)
    quiet_ms = max((int(since) for _, since in ours if since), default=0)
    looked = work.incarnation == mark and work.began_ms > quiet_ms
    all_seen = bool(live) and len(ours) == len(live)
    safe = bool(mark) and all_seen and rounds == 0 and looked and work.left == 0
    return DrainStatus(engine_id, bool(mark), mark, len(live), len(ours), rounds, work, safe)
