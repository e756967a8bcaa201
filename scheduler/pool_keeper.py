"""Pools that follow the load, live: one task of a replica. What was decided is in the ledger, known to all.

Every replica takes over the pools that engines were given, and tells the work that it has counted. One of
them leads: it shows the fleet to the controller (`repooling.py`), carries flips out, each step a script; if
it dies, the next one goes on where the ledger says that the flip is. Without the ledger nothing changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec import structs

from antiphon.policies.pools import Flip, PoolShares
from antiphon.scheduler.demand import Demand
from antiphon.scheduler.drain_store import DrainStore
from antiphon.scheduler.ledger_connection import LedgerUnavailable
from antiphon.scheduler.messages import SessionsAged
from antiphon.scheduler.model_fleet import ModelFleet
from antiphon.scheduler.pool_looks import live_tokens, pool_engines, window_rounds
from antiphon.scheduler.pool_store import FlipUnderWay, PoolStore, Told
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.repooling import RESULTS, Place, Repooler, Step, after

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeeperTimes:
    """Seconds."""

    poll_s: float = 0.5
    lead_ttl_s: float = 5.0
    settle_s: float = 1.5
    """After a pool was changed, before the engine is used again: all replicas have seen it by then."""


class PoolKeeper:
    """`run()` is a task of the caller's TaskGroup and never ends by itself."""

    def __init__(
        self,
        store: PoolStore,
        drains: DrainStore,
        replica: str,
        fleets: Mapping[str, ModelFleet],
        fleet_of: Callable[[str], ModelFleet | None],
        config: RepoolConfig,
        *,
        on_pools: Callable[[Mapping[str, str]], None],
        on_flip: Callable[[str, str], None] = lambda direction, result: None,
        times: KeeperTimes | None = None,
    ) -> None:
        """`on_pools` is told which pools engines were given, at every look; `on_flip` direction and result of
        each flip that this replica has ended."""
        self._store = store
        self._drains = drains
        self._replica = replica
        self._fleets = fleets
        self._fleet_of = fleet_of
        self._config = config
        self._on_pools = on_pools
        self._on_flip = on_flip
        self._times = times or KeeperTimes()
        self._repoolers: dict[str, Repooler] = {}
        """By model, while this replica leads."""
        self._look_s = float("-inf")
        self._put_s: dict[str, float] = {}
        """Engine -> when its pool was first seen to be changed, of flips that end."""
        self.flips: Mapping[str, FlipUnderWay] = {}
        """Engine -> its flip under way, as last read."""
        self._met: set[tuple[str, str]] = set()
        """Engine and incarnation of flips under way, of those that were seen to be up meanwhile."""
        if config.enabled:
            for fleet in fleets.values():
                fleet.core.demand = Demand()

    async def run(self) -> None:
        while True:
            try:
                await self._step()
            except LedgerUnavailable as error:
                log.debug("pools stay as they are: %s", error)
                self._repoolers.clear()
            await asyncio.sleep(self._times.poll_s)

    def flip_of(self, engine_id: str) -> dict[str, str] | None:
        """For an operator: where the engine is on its way to."""
        flip = self.flips.get(engine_id)
        return None if flip is None else {"to": flip.to_pool, "reason": flip.reason, "result": flip.result}

    def spared_after_s(self, engine_id: str) -> float | None:
        """Of an engine that changes pool: who has been idle for longer is not expected back, and stays."""
        fleet = self._fleet_of(engine_id) if engine_id in self.flips else None
        return fleet.core.books.fleet.returns.horizon_s if fleet is not None else None

    def shares(self) -> PoolShares | None:
        """How full the pools are by the last look: of the first model, at the replica that leads."""
        return next((r.shares for r in self._repoolers.values() if r.shares is not None), None)

    async def _step(self) -> None:
        pools, self.flips, marks = await self._store.read()
        self._on_pools(pools)
        if not self._config.enabled:
            return
        on_their_way = {(engine_id, flip.incarnation) for engine_id, flip in self.flips.items()}
        self._met = {key for key in on_their_way if key in self._met or self._life(key[0]) == key[1]}
        now = asyncio.get_running_loop().time()
        due = now - self._look_s >= self._config.period_s
        if due:
            self._look_s = now
            await self._tell()
        now_ms = await self._store.lead(self._replica, self._times.lead_ttl_s)
        if not now_ms:
            self._repoolers.clear()
            self._put_s.clear()
            return
        self._take_the_lead(now)
        for engine_id, flip in self.flips.items():
            await self._go_on(engine_id, flip, marks.get(engine_id, ""), now, now_ms)
        if due:
            for model, fleet in self._fleets.items():
                await self._look(model, fleet, now, now_ms)

    def _take_the_lead(self, now: float) -> None:
        if not self._repoolers:
            self._repoolers = {model: Repooler(self._config) for model in self._fleets}
            for repooler in self._repoolers.values():
                repooler.ended(now)  # whoever led before may have flipped a moment ago

    async def _tell(self) -> None:
        for model, fleet in self._fleets.items():
            fleet.runtime.post(SessionsAged())
            demand = fleet.core.demand
            if demand is not None:
                demand.know(fleet.core.books.fleet.books.values())
                live = live_tokens(fleet.core, fleet.runtime.now())
                await self._store.tell(self._replica, model, Told(demand.counts(), live))

    # ---------------------------------------------------------------- leading

    async def _look(self, model: str, fleet: ModelFleet, now: float, now_ms: int) -> None:
        repooler, told = self._repoolers[model], await self._store.told(model)
        total, seconds = repooler.counted(now, {name: each.counts for name, each in told.items()})
        held: dict[str, int] = {}
        for each in told.values():
            for engine_id, tokens in each.live_tokens.items():
                held[engine_id] = max(held.get(engine_id, 0), tokens)
        engines = pool_engines(fleet.core, fleet.runtime.now(), total, seconds, held)
        busy = any(self._fleet_of(engine_id) in (fleet, None) for engine_id in self.flips)
        flip = repooler.look(engines, window_rounds(total), now, known=seconds > 0, busy=busy)
        if flip is not None:
            await self._begin(fleet, repooler, flip, now, now_ms)

    async def _begin(
        self, fleet: ModelFleet, repooler: Repooler, flip: Flip, now: float, now_ms: int
    ) -> None:
        engine_id, to_pool = flip.engine_id, flip.to_pool.value
        incarnation = fleet.incarnation(engine_id)
        if after(Place(flip.from_pool.value), Step.CHOSEN) is not Place.LEAVING:
            answer = await self._store.step(self._replica, engine_id, None, None, pool=to_pool)
            if answer == "done":
                log.info("engine %s changes to the %s pool: %s", engine_id, to_pool, flip.reason)
                self._over(repooler, flip.direction, Step.CHOSEN, now)
            return
        under_way = FlipUnderWay(to_pool, incarnation, now_ms, flip.reason)
        answer = await self._store.step(
            self._replica, engine_id, None, under_way, drain="mark", incarnation=incarnation
        )
        if answer == "done":
            log.info("engine %s leaves for the %s pool: %s", engine_id, to_pool, flip.reason)

    async def _go_on(self, engine_id: str, flip: FlipUnderWay, marked: str, now: float, now_ms: int) -> None:
        """The next step of a flip that is under way, whoever began it."""
        if flip.result:
            seen_s = self._put_s.setdefault(engine_id, now)
            if now - seen_s >= self._times.settle_s:
                await self._end(engine_id, flip, flip.result, now)
            return
        step = await self._what_happened(engine_id, flip, marked, now_ms)
        if step is None:
            return
        place = after(Place.LEAVING, step)
        if place is Place.DECODE:
            await self._end(engine_id, flip, RESULTS[step], now)
            return
        put = structs.replace(flip, result=RESULTS[step])
        await self._store.step(self._replica, engine_id, flip, put, pool=place.value)
        log.info("engine %s is of the %s pool (%s)", engine_id, place.value, put.result)

    async def _what_happened(
        self, engine_id: str, flip: FlipUnderWay, marked: str, now_ms: int
    ) -> Step | None:
        life = self._life(engine_id)
        if life != flip.incarnation and (life or (engine_id, flip.incarnation) in self._met):
            return Step.GONE
        if marked != flip.incarnation:
            return Step.TAKEN_BACK
        waited = now_ms - flip.began_ms >= 1000 * self._config.drain_limit_s
        if not life:  # who has just been started may not have found the engine yet
            return Step.GONE if waited else None
        if (await self._drains.status(engine_id)).safe:
            return Step.EMPTIED
        return Step.WAITED if waited else None

    def _life(self, engine_id: str) -> str:
        """The engine's incarnation; "" if it is not up, as far as is known here."""
        fleet = self._fleet_of(engine_id)
        return fleet.incarnation(engine_id) if fleet is not None else ""

    async def _end(self, engine_id: str, flip: FlipUnderWay, result: str, now: float) -> None:
        answer = await self._store.step(
            self._replica, engine_id, flip, None, drain="unmark", incarnation=flip.incarnation
        )
        self._put_s.pop(engine_id, None)
        if answer != "done":
            return
        log.info("engine %s: its way to the %s pool is over: %s", engine_id, flip.to_pool, result)
        for model, fleet in self._fleets.items():
            if self._fleet_of(engine_id) in (fleet, None):
                self._repoolers[model].ended(now)
        self._on_flip(f"decode_to_{flip.to_pool}", result)

    def _over(self, repooler: Repooler, direction: str, step: Step, now: float) -> None:
        repooler.ended(now)
        self._on_flip(direction, RESULTS[step])
