"""Empties engines that are to be stopped: one task of a replica. What is marked is known to all replicas.

Every replica tells its cores of the marks and the ledger that it has. One of them, at a time and for each
engine, brings the KV of the sessions that rest there to other homes: copy, then compare-and-set the owner. A
session that has a round meanwhile is left to that round, which moves it by itself (`policies/leaving.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from msgspec import structs

from antiphon.engines.base import Engine, EngineError
from antiphon.scheduler.drain_store import AtHome, DrainStore, Work
from antiphon.scheduler.drain_targets import choose_target
from antiphon.scheduler.ledger_connection import LedgerUnavailable
from antiphon.scheduler.messages import EngineDraining, SessionMoved
from antiphon.scheduler.model_fleet import ModelFleet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """Seconds and counts."""

    poll_s: float = 0.5
    lead_ttl_s: float = 5.0
    """A replica that moves sessions and dies is followed by another after this."""
    directory_s: float = 2.0
    transfer_floor_s: float = 2.0
    transfer_slack: float = 4.0
    """A copy may take so many times its prediction."""
    at_once: int = 2
    """Copies under way: rounds use the same links."""
    tries: int = 3
    """Of a copy that does not come whole, before the rest is left to be computed again."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """What was brought where. `pages` of `wanted` are there."""

    to_home: str
    incarnation: str
    hashes: tuple[bytes, ...] = ()
    page_tokens: int = 1
    wanted: int = 0
    pulled_bytes: int = 0
    reason: str = ""

    @property
    def whole(self) -> bool:
        return len(self.hashes) == self.wanted

    @property
    def tip(self) -> str:
        if not self.hashes:
            return ""
        tokens = len(self.hashes) * self.page_tokens
        return f"{self.hashes[-1].hex()}|{tokens}|{self.incarnation}|{self.to_home}"


class Drainer:
    """`run()` is a task of the caller's TaskGroup and never ends by itself. Cancelled, it leaves nothing
    behind: a copy that was not switched to is a copy, and its lead runs out."""

    def __init__(
        self,
        store: DrainStore,
        replica: str,
        engines: Mapping[str, Engine],
        fleet_of: Callable[[str], ModelFleet | None],
        *,
        session_ttl_s: float,
        on_moved: Callable[[str, int], None] = lambda result, moved_bytes: None,
        times: DrainTimes | None = None,
    ) -> None:
        """`fleet_of`: engine id -> its model's core and driver; None if it is not up.

        `on_moved` gets how each move ended (whole | partly | busy | went_on | stuck) and its bytes.
        """
        self._store = store
        self._replica = replica
        self._engines = engines
        self._fleet_of = fleet_of
        self._session_ttl_s = session_ttl_s
        self._on_moved = on_moved
        self._times = times or DrainTimes()
        self._told: dict[str, str] = {}
        """Engine -> incarnation, as the cores have been told."""
        self._failed: dict[tuple[str, str], int] = {}
        """(session's key, tip) -> copies that did not come whole."""

    async def run(self) -> None:
        while True:
            try:
                await self._look()
            except LedgerUnavailable as error:
                log.debug("drains are not looked at: %s", error)  # what the cores were told goes on
            await asyncio.sleep(self._times.poll_s)

    async def _look(self) -> None:
        marks = await self._store.marks()
        self._tell_cores(marks)
        for engine_id, incarnation in self._told.items():
            fleet = self._fleet_of(engine_id)
            rounds = fleet.runtime.needing(engine_id) if fleet is not None else 0
            await self._store.seen(engine_id, incarnation, self._replica, rounds)
        for engine_id, incarnation in dict(self._told).items():
            began_ms = await self._store.lead(engine_id, self._replica, self._times.lead_ttl_s)
            if began_ms:
                await self._empty(engine_id, incarnation, began_ms)

    def _tell_cores(self, marks: Mapping[str, str]) -> None:
        """An engine drains while a mark names the incarnation that is up."""
        now = {}
        for engine_id, incarnation in marks.items():
            fleet = self._fleet_of(engine_id)
            if fleet is not None and fleet.incarnation(engine_id) == incarnation:
                now[engine_id] = incarnation
        for engine_id in self._told.keys() - now.keys():
            self._post(engine_id, draining=False)
        for engine_id in now.keys() - self._told.keys():
            self._post(engine_id, draining=True)
        self._told = now

    def _post(self, engine_id: str, *, draining: bool) -> None:
        log.info("engine %s %s", engine_id, "drains" if draining else "does not drain any more")
        fleet = self._fleet_of(engine_id)
        if fleet is not None:
            fleet.runtime.post(EngineDraining(engine_id, draining))

    # ---------------------------------------------------------------- the moves

    async def _empty(self, engine_id: str, incarnation: str, began_ms: int) -> None:
        """Try to move every session that is there now, and tell how many are left."""
        work = await self._store.work(engine_id)
        if work.incarnation != incarnation:
            work = Work(incarnation=incarnation)
        sessions = await self._store.at_home(engine_id)
        left, stuck = len(sessions), ""
        resting = [session for session in sessions if not session.in_flight]
        for start in range(0, len(resting), self._times.at_once):
            some = resting[start : start + self._times.at_once]
            moves = await asyncio.gather(*(self._move(engine_id, incarnation, session) for session in some))
            for result, copy in moves:
                self._on_moved(result, copy.pulled_bytes)
                if result in ("whole", "partly"):
                    left -= 1
                    work = structs.replace(
                        work,
                        moved=work.moved + 1,
                        moved_partly=work.moved_partly + (result == "partly"),
                        moved_bytes=work.moved_bytes + copy.pulled_bytes,
                    )
                elif result == "stuck":
                    stuck = copy.reason
            await self._store.tell(engine_id, structs.replace(work, left=left, stuck=stuck))
            if not await self._store.lead(engine_id, self._replica, self._times.lead_ttl_s):
                return  # we were too slow, and another one is at it
        done = structs.replace(work, began_ms=began_ms, left=left, stuck=stuck)
        await self._store.tell(engine_id, done)

    async def _move(self, engine_id: str, incarnation: str, session: AtHome) -> tuple[str, _Copy]:
        """Copy and switch one: whole | partly | busy | went_on | unknown_session | stuck."""
        fleet = self._fleet_of(engine_id)
        target = None
        if fleet is not None:
            now = fleet.runtime.now()
            target = choose_target(fleet.core, engine_id, session.context_tokens, now)
        if fleet is None or target is None:
            return "stuck", _Copy("", "", reason=f"no other engine can be a home of {session.session_id}")
        copy = await self._copy(fleet, engine_id, incarnation, session, target)
        attempt = (session.key, session.tip)
        if not copy.whole:
            self._failed[attempt] = self._failed.get(attempt, 0) + 1
            if self._failed[attempt] < self._times.tries:
                return "stuck", copy
        checkpoints = fleet.core.checkpoints(copy.hashes, copy.page_tokens)
        answer = await self._store.switch(
            session, engine_id, target, copy.tip, checkpoints, copy.incarnation, self._session_ttl_s
        )
        self._failed.pop(attempt, None)
        if answer != "moved":
            return answer, replace(copy, pulled_bytes=0)
        fleet.runtime.post(
            SessionMoved(session.tenant, session.session_id, engine_id, target, copy.hashes, copy.page_tokens)
        )
        return "whole" if copy.whole else "partly", copy

    async def _copy(
        self, fleet: ModelFleet, engine_id: str, incarnation: str, session: AtHome, target: str
    ) -> _Copy:
        """Bring the session's KV to the target. What fails is told, not raised."""
        nothing = _Copy(target, fleet.incarnation(target))
        page_hash, tokens, held_by, holder = (session.tip.split("|") + [""] * 4)[:4]
        source, puller = self._engines.get(engine_id), self._engines.get(target)
        if (holder, held_by) != (engine_id, incarnation) or source is None or puller is None:
            return nothing  # it holds nothing of this session: there is nothing to bring
        if source.hello is None or puller.hello is None:
            return nothing
        page_tokens, times = puller.hello.page_size_tokens, self._times
        wanted = int(tokens) // page_tokens
        nothing = replace(nothing, page_tokens=page_tokens, wanted=wanted)
        predicted_s = fleet.core.books.transfer_s(target, engine_id, int(tokens))
        deadline_s = max(times.transfer_floor_s, times.transfer_slack * predicted_s)
        try:
            parent, hashes = await source.chain(bytes.fromhex(page_hash), deadline_s=times.directory_s)
            if len(hashes) != wanted:  # its end was evicted, and with it the way to the rest
                return replace(
                    nothing, wanted=wanted, reason=f"{engine_id} has {len(hashes)} of {wanted} pages"
                )
            async with asyncio.timeout(deadline_s + times.directory_s):
                came = await puller.prefetch(
                    source.record.kv_addresses, incarnation, parent, hashes, deadline_s=deadline_s
                )
        except (EngineError, TimeoutError) as error:
            return replace(nothing, reason=str(error) or f"no answer within {deadline_s:g} s")
        return replace(
            nothing, hashes=hashes[: came.pages], pulled_bytes=came.pulled_bytes, reason=came.reason
        )
