"""What the ledger knows of pools that follow the load: pools given, flips under way, work that was counted.

One replica at a time leads; steps are scripts that check it. A pool is given to an engine's id, not to an
incarnation: who is started again comes up where the plan has it. The replica that leads renews what was
given; where nobody re-plans, engines go back to their own pools.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from antiphon.scheduler.demand import Counts
from antiphon.scheduler.ledger_connection import LedgerConnection, escaped

KEEP_MS = 900_000
"""Pools that nobody renews are forgotten after this, and so is what replicas told."""


class FlipUnderWay(msgspec.Struct, frozen=True):
    """From when an engine is to leave the decode pool, until it is of the other one and used again."""

    to_pool: str
    incarnation: str
    began_ms: int
    """By the ledger's clock."""
    reason: str
    result: str = ""
    """Once the pool is changed: done | in_part. What is left is to let it be used again."""


class Told(msgspec.Struct, frozen=True):
    """What one replica has counted for one model, and the KV of live sessions that it knows of, by engine."""

    counts: Counts
    live_tokens: dict[str, int]


class PoolStore:
    """Raises `LedgerUnavailable`."""

    def __init__(self, connection: LedgerConnection) -> None:
        self._connection = connection
        self._lead, self._pools, self._flips, self._drains, self._told, self._replicas = connection.keys(
            "pool_lead", "pools", "pool_flips", "drain", "pool_demand", "replicas"
        )

    async def read(self) -> tuple[dict[str, str], dict[str, FlipUnderWay], dict[str, str]]:
        """Engine -> pool it was given; -> flip under way; -> incarnation that is marked to be drained."""
        pools, flips, marks = await self._connection.commands(
            [("HGETALL", self._pools), ("HGETALL", self._flips), ("HGETALL", self._drains)]
        )
        return pools, {e: flip for e, raw in flips.items() if (flip := _flip(raw)) is not None}, marks

    async def lead(self, replica: str, ttl_s: float) -> int:
        """Be the one that changes pools, for so long: the ledger's clock in ms; 0 if another is."""
        ttl_ms = max(1, round(ttl_s * 1000))
        ours, now_ms = await self._connection.script("drain_lead", [self._lead], [replica, ttl_ms])
        if ours:
            await self._connection.command("PEXPIRE", self._pools, KEEP_MS)
        return int(now_ms) if ours else 0

    async def step(
        self,
        replica: str,
        engine_id: str,
        before: FlipUnderWay | None,
        after: FlipUnderWay | None,
        *,
        pool: str = "",
        drain: str = "",
        incarnation: str = "",
    ) -> str:
        """done | not_leading | other_flip | drains. `drain`: mark, unmark, or leave as it is."""
        drain_keys = [
            f"{self._connection.tag}:drain_{w}:{escaped(engine_id)}" for w in ("seen", "lead", "work")
        ]
        answer = await self._connection.script(
            "pool_flip",
            [self._lead, self._pools, self._flips, self._drains, *drain_keys],
            [replica, engine_id, _text(before), _text(after), pool, drain, incarnation, KEEP_MS],
        )
        return str(answer)

    async def tell(self, replica: str, model: str, told: Told) -> None:
        """What this replica has counted up to now."""
        key = self._told_key(model)
        await self._connection.commands(
            [("HSET", key, replica, msgspec.json.encode(told)), ("PEXPIRE", key, KEEP_MS)]
        )

    async def told(self, model: str) -> Mapping[str, Told]:
        """What the replicas that live have told."""
        raw, names = await self._connection.commands(
            [("HGETALL", self._told_key(model)), ("SMEMBERS", self._replicas)]
        )
        live = {str(name) for name in names}
        gone = [name for name in raw if escaped(name) not in live]
        if gone:
            await self._connection.command("HDEL", self._told_key(model), *gone)
        found = {name: _told(text) for name, text in raw.items() if name not in gone}
        return {name: told for name, told in found.items() if told is not None}

    def _told_key(self, model: str) -> str:
        return f"{self._told}:{escaped(model)}"


def _text(flip: FlipUnderWay | None) -> str:
    """Equal flips are equal texts: scripts compare them."""
    return msgspec.json.encode(flip).decode() if flip is not None else ""


def _flip(raw: str) -> FlipUnderWay | None:
    try:
        return msgspec.json.decode(raw, type=FlipUnderWay)
    except msgspec.MsgspecError:
        return None  # of a later version: whoever wrote it ends it


def _told(raw: str) -> Told | None:
    try:
        return msgspec.json.decode(raw, type=Told)
    except msgspec.MsgspecError:
        return None
