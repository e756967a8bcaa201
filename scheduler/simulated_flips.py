"""The heap driver with pools that follow the load: the same controller as live, in simulated time.

An engine that leaves the decode pool is emptied first: its sessions' KV moves over the links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

from msgspec.structs import replace

from antiphon.engines.cluster import Cluster, EngineEvent, EngineSpec
from antiphon.engines.links import Pull
from antiphon.policies.base import Pool
from antiphon.policies.pools import Flip
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.demand import Demand
from antiphon.scheduler.drain_copy import DrainTimes
from antiphon.scheduler.drain_targets import choose_target
from antiphon.scheduler.messages import (
    Command,
    Complete,
    EngineDraining,
    EngineUp,
    SessionMoved,
    SessionsAged,
)
from antiphon.scheduler.pool_looks import pool_engines, window_rounds
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.repooling import RESULTS, Place, Repooler, Step, after
from antiphon.scheduler.simulated_sessions import PlannedRound
from antiphon.scheduler.simulation import TENANT, RoundEnd, Simulation, Targets

PRUNE_EVERY = 64
"""Looks between two at whose chains are still needed."""


class FlipRecord(NamedTuple):
    """One flip, as it went."""

    began_s: float
    ended_s: float
    flip: Flip
    result: str
    """done | in_part | given_up"""
    moved_sessions: int
    moved_bytes: int
    pools: str
    """Afterwards, as in receipts."""

    def words(self) -> str:
        return (
            f"{self.began_s:.1f} s: {self.flip.engine_id} to {self.flip.to_pool.value}, {self.result} after "
            f"{self.ended_s - self.began_s:.1f} s, {self.moved_sessions} sessions "
            f"({self.moved_bytes / 1e9:.1f} GB) moved, then {self.pools}: {self.flip.reason}"
        )


class _Copy:
    """One session's KV on its way to another home."""

    __slots__ = ("plan", "session_id", "target")

    def __init__(self, session_id: str, target: str, plan: PlannedRound) -> None:
        self.session_id, self.target, self.plan = session_id, target, plan


class _Leaving:
    """A flip from decode to prefill under way."""

    __slots__ = ("began_s", "copies", "flip", "moved_bytes", "moved_sessions")

    def __init__(self, flip: Flip, began_s: float) -> None:
        self.flip, self.began_s = flip, began_s
        self.copies: dict[str, Pull] = {}
        self.moved_sessions = self.moved_bytes = 0


class RepoolingSimulation(Simulation):
    """A `Simulation` whose engines change pool. The core's policy must be one that moves sessions off homes
    that drain (`policies/leaving.py`)."""

    def __init__(
        self,
        core: Scheduler,
        cluster: Cluster,
        specs: Iterable[EngineSpec],
        targets: Targets,
        on_round: Callable[[RoundEnd], None],
        max_live: int | None = None,
        *,
        config: RepoolConfig,
    ) -> None:
        self.flips: list[FlipRecord] = []
        self._config = config
        self._times = DrainTimes()
        self._demand = core.demand = Demand()
        self._repooler = Repooler(config)
        self._marks: dict[str, str] = {}
        """Engine -> the pool that it was given; it outlives the engine."""
        self._ended: dict[str, PlannedRound] = {}
        """Session -> its last round that ended: what there is of it to move."""
        self._leaving: _Leaving | None = None
        self._looks = 0
        super().__init__(core, cluster, specs, targets, on_round, max_live)
        self.at(config.period_s, self._look)

    # ---------------------------------------------------------------- looking

    def _look(self) -> None:
        now, core = self.now_s, self.core
        self._post(SessionsAged())
        self.at(now + self._config.period_s, self._look)
        self._demand.know(core.books.fleet.books.values())
        total, seconds = self._repooler.counted(now, {"": self._demand.counts()})
        engines = pool_engines(core, now, total, seconds)
        busy = self._leaving is not None
        flip = self._repooler.look(engines, window_rounds(total), now, known=seconds > 0, busy=busy)
        if flip is not None:
            self._begin(flip)
        self._looks += 1
        if self._looks % PRUNE_EVERY == 0:
            known = core.books.sessions
            self._ended = {s: plan for s, plan in self._ended.items() if known.get((TENANT, s)) is not None}

    def _begin(self, flip: Flip) -> None:
        if after(Place(flip.from_pool.value), Step.CHOSEN) is Place.LEAVING:
            self._leaving = _Leaving(flip, self.now_s)
            self._post(EngineDraining(flip.engine_id, True))
            self._empty()
        else:
            self._put(flip.engine_id, flip.to_pool)
            self._over(_Leaving(flip, self.now_s), Step.CHOSEN)

    def _put(self, engine_id: str, pool: Pool) -> None:
        self._marks[engine_id] = pool.value
        book = self.core.books.fleet.books[engine_id]
        self._post(self._up(self.specs[engine_id], book.up.incarnation))

    def _over(self, leaving: _Leaving, step: Step) -> None:
        self._repooler.ended(self.now_s)
        self.flips.append(
            FlipRecord(
                leaving.began_s,
                self.now_s,
                leaving.flip,
                RESULTS[step],
                leaving.moved_sessions,
                leaving.moved_bytes,
                self.core.books.fleet.pools,
            )
        )

    # ---------------------------------------------------------------- emptying

    def _empty(self) -> None:
        """Start copies while there is room for them; change pool when nobody is at home there any more."""
        leaving = self._leaving
        if leaving is None:
            return
        engine_id = leaving.flip.engine_id
        at_work = any(round.uses(engine_id) for round in self.core.rounds.values())
        if not at_work and not self._expected(engine_id):
            self._leave(Step.EMPTIED)
        elif self.now_s - leaving.began_s >= self._config.drain_limit_s:
            self._leave(Step.WAITED)
        else:
            self._copy_some(leaving)
            self.at(self.now_s + self._times.poll_s, lambda: self._go_on(leaving))

    def _go_on(self, leaving: _Leaving) -> None:
        if self._leaving is leaving:
            self._empty()

    def _expected(self, engine_id: str) -> list[tuple[str, int]]:
        """(Session, tokens) of those at home there that will probably be back: the rest stays where it is."""
        self._post(SessionsAged())
        return [
            (key[1], tokens) for key, tokens in self.core.books.fleet.books[engine_id].session_tokens.items()
        ]

    def _copy_some(self, leaving: _Leaving) -> None:
        busy = {live.run.trace.session_id for live in self._rounds.values()}
        source_id = leaving.flip.engine_id
        for session_id, tokens in self._expected(source_id):
            if len(leaving.copies) >= self._times.at_once:
                return
            if session_id in busy or session_id in leaving.copies:
                continue
            target = choose_target(self.core, source_id, tokens, self.now_s)
            plan = self._ended.get(session_id)
            if target is None or plan is None:
                continue
            self._copy(leaving, _Copy(session_id, target, plan))

    def _copy(self, leaving: _Leaving, copy: _Copy) -> None:
        source_id = leaving.flip.engine_id
        source, puller = self.engines[source_id], self.engines[copy.target]
        tokens = copy.plan.end.pages * self._page
        predicted_s = self.core.books.transfer_s(copy.target, source_id, tokens)
        limit_s = max(self._times.transfer_floor_s, self._times.transfer_slack * predicted_s)
        chain = copy.plan.end
        pull = Pull(copy, puller, source, chain, chain.pages, self.now_s + limit_s)
        leaving.copies[copy.session_id] = pull
        self.network.start(pull, self.now_s)
        self._watch_network()

    @property
    def _page(self) -> int:
        return self.cluster.page_tokens

    def _copied(self, pull: Pull) -> None:
        copy, leaving = pull.tag, self._leaving
        if leaving is None or leaving.copies.get(copy.session_id) is not pull:
            return
        del leaving.copies[copy.session_id]
        source_id = leaving.flip.engine_id
        busy = any(live.run.trace.session_id == copy.session_id for live in self._rounds.values())
        there = self.core.books.sessions.live_home((TENANT, copy.session_id)) == source_id
        if copy.target in self.engines and there and not busy:
            leaving.moved_sessions += 1
            leaving.moved_bytes += pull.pulled_bytes
            hashes = copy.plan.end_hashes[: pull.have_pages]
            self._post(SessionMoved(TENANT, copy.session_id, source_id, copy.target, hashes, self._page))
        self.at(self.now_s, lambda: self._go_on_copying(leaving))

    def _go_on_copying(self, leaving: _Leaving) -> None:
        if self._leaving is leaving:
            self._copy_some(leaving)

    def _leave(self, step: Step) -> None:
        """The flip ends: by `step` the engine is in the prefill pool, or stays where it was."""
        leaving = self._leaving
        assert leaving is not None
        self._leaving = None
        for pull in leaving.copies.values():
            self.network.cancel(pull, self.now_s)
        self._watch_network()
        engine_id = leaving.flip.engine_id
        place = after(Place.LEAVING, step)
        if engine_id in self.engines:
            self._put(engine_id, Pool(place.value))
        self._post(EngineDraining(engine_id, False))
        self._over(leaving, step)

    # ---------------------------------------------------------------- what the heap driver does

    def _up(self, spec: EngineSpec, incarnation: str) -> EngineUp:
        up = super()._up(spec, incarnation)
        return replace(up, pool=self._marks.get(spec.engine_id, up.pool))

    def _pulled(self, pulls: Iterable[Pull]) -> None:
        rounds: list[Pull] = []
        for pull in pulls:
            if isinstance(pull.tag, _Copy):
                self._copied(pull)
            else:
                rounds.append(pull)
        super()._pulled(rounds)

    def _fleet_event(self, event: EngineEvent) -> None:
        leaving = self._leaving
        if leaving is not None and event.engine == leaving.flip.engine_id and event.kind == "down":
            leaving.copies.clear()  # the network ends them
            super()._fleet_event(event)
            self._leave(Step.GONE)
        else:
            super()._fleet_event(event)

    def _complete(self, command: Complete) -> None:
        live = self._rounds[command.round_id]
        self._ended[live.run.trace.session_id] = live.plan
        super()._complete(command)

    _acts: ClassVar[dict[type[Command], Callable[[Simulation, Any], None]]] = {
        **Simulation._acts,
        Complete: _complete,  # type: ignore[dict-item]
    }
