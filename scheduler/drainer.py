"""Empties engines that are to be stopped: one task of a replica. What is marked is known to all replicas.

Every replica tells its cores of the marks and the ledger that it has. One of them, at a time and for each
engine, brings the KV of the sessions that rest there to other homes: copy, then compare-and-set the owner. A
session that has a round meanwhile is left to that round, which moves it by itself (`policies/leaving.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from msgspec import structs

from antiphon.engines.base import Engine
from antiphon.scheduler.drain_copy import Copy, DrainTimes, bring
from antiphon.scheduler.drain_store import AtHome, DrainStore, Work
from antiphon.scheduler.drain_targets import choose_target
from antiphon.scheduler.ledger_connection import LedgerUnavailable
from antiphon.scheduler.messages import EngineDraining, SessionMoved
from antiphon.scheduler.model_fleet import ModelFleet

log = logging.getLogger(__name__)


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
        spared_after_s: Callable[[str], float | None] = lambda engine_id: None,
        times: DrainTimes | None = None,
    ) -> None:
        """`fleet_of`: engine id -> its model's core and driver; None if it is not up.

        `on_moved` gets how each move ended (whole | partly | busy | went_on | stuck) and its bytes.
        `spared_after_s`: engine id -> for how long a session may have been idle to be moved off it, where the
        engine stays and only changes pool; None = every session moves.
        """
        self._store = store
        self._replica = replica
        self._engines = engines
        self._fleet_of = fleet_of
        self._session_ttl_s = session_ttl_s
        self._on_moved = on_moved
        self._spared_after_s = spared_after_s
        self._times = times or DrainTimes()
        self._told: dict[str, tuple[str, ModelFleet]] = {}
        """Engine -> its incarnation, and whose core has been told."""
        self._leading: set[str] = set()
        """Engines whose sessions this replica moves at the moment."""
        self._failed: dict[tuple[str, str], int] = {}
        """(session's key, tip) -> copies that did not come whole."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again_and_again(self._look))
            tasks.create_task(self._again_and_again(self._empty_all))

    async def _again_and_again(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except LedgerUnavailable as error:
                log.debug("drains are not looked at: %s", error)  # what the cores were told goes on
            await asyncio.sleep(self._times.poll_s)

    async def _look(self) -> None:
        """Soon after a mark came or went, also while copies are under way."""
        self._tell_cores(await self._store.marks())
        for engine_id, (incarnation, fleet) in dict(self._told).items():
            rounds = fleet.runtime.needing(engine_id)
            await self._store.seen(engine_id, incarnation, self._replica, rounds)
        for engine_id in list(self._leading):
            if not await self._lead(engine_id):
                self._leading.discard(engine_id)

    def _tell_cores(self, marks: Mapping[str, str]) -> None:
        """An engine drains from when a mark names the incarnation that is up, until it names no more the one
        that was: if that one is away for a while, it comes back as one that drains."""
        for engine_id, (incarnation, fleet) in list(self._told.items()):
            up = self._fleet_of(engine_id)
            away = up is None or up.incarnation(engine_id) == incarnation
            if marks.get(engine_id) != incarnation or not away or up not in (None, fleet):
                del self._told[engine_id]
                log.info("engine %s does not drain any more", engine_id)
                fleet.runtime.post(EngineDraining(engine_id, False))
        if not self._told:
            self._failed.clear()
        for engine_id in marks.keys() - self._told.keys():
            up = self._fleet_of(engine_id)
            if up is not None and up.incarnation(engine_id) == marks[engine_id]:
                self._told[engine_id] = marks[engine_id], up
                log.info("engine %s drains", engine_id)
                up.runtime.post(EngineDraining(engine_id, True))

    # ---------------------------------------------------------------- the moves

    async def _lead(self, engine_id: str) -> int:
        return await self._store.lead(engine_id, self._replica, self._times.lead_ttl_s)

    async def _empty_all(self) -> None:
        for engine_id, (incarnation, _) in dict(self._told).items():
            if began_ms := await self._lead(engine_id):
                self._leading.add(engine_id)
                try:
                    await self._empty(engine_id, incarnation, began_ms)
                finally:
                    self._leading.discard(engine_id)

    async def _empty(self, engine_id: str, incarnation: str, began_ms: int) -> None:
        """Try to move every session that is there now, and tell how many are left."""
        work = await self._store.work(engine_id)
        if work.incarnation != incarnation:
            work = Work(incarnation=incarnation)
        if self._fleet_of(engine_id) is None:
            if not work.began_ms or work.left:
                await self._store.tell(engine_id, structs.replace(work, stuck=f"{engine_id} is not up"))
            return
        clock = asyncio.get_running_loop().time
        began = clock()
        sessions = await self._store.at_home(engine_id)
        pause_s = self._times.pause_factor * (clock() - began)
        spared_s = self._spared_after_s(engine_id)
        if spared_s is not None:
            since_ms = began_ms - 1000 * spared_s
            sessions = [s for s in sessions if s.in_flight or s.updated_ms >= since_ms]
        left, stuck = len(sessions), ""
        resting = [session for session in sessions if not session.in_flight]
        resting.sort(key=lambda session: -session.updated_ms)  # who is most likely to be back soon goes first
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
            if engine_id not in self._leading or engine_id not in self._told:
                return  # the lead is another's by now, or the drain was taken back
            await self._store.tell(engine_id, structs.replace(work, left=left, stuck=stuck))
        done = structs.replace(work, began_ms=began_ms, left=left, stuck=stuck)
        await self._store.tell(engine_id, done)
        await asyncio.sleep(pause_s)

    async def _move(self, engine_id: str, incarnation: str, session: AtHome) -> tuple[str, Copy]:
        """Copy and switch one: whole | partly | busy | went_on | unknown_session | stuck."""
        fleet = self._fleet_of(engine_id)
        target = None
        if fleet is not None:
            now = fleet.runtime.now()
            target = choose_target(fleet.core, engine_id, session.context_tokens, now)
        if fleet is None or target is None:
            return "stuck", Copy(reason=f"no other engine can be a home of {session.session_id}")
        engines, times = self._engines, self._times
        copy = await bring(session, engine_id, incarnation, target, fleet=fleet, engines=engines, times=times)
        attempt = (session.key, session.tip)
        if not copy.whole:
            self._failed[attempt] = self._failed.get(attempt, 0) + 1
            if self._failed[attempt] < self._times.tries:
                return "stuck", copy
        checkpoints = fleet.core.checkpoints(copy.hashes, copy.page_tokens)
        try:
            answer = await self._store.switch(
                session, engine_id, target, copy.tip, checkpoints, copy.incarnation, self._session_ttl_s
            )
        except LedgerUnavailable as error:  # it may have been switched: the next look tells
            return "stuck", replace(copy, reason=str(error))
        self._failed.pop(attempt, None)
        if not copy.whole:
            log.warning("%s leaves %s in part: %s", session.session_id, engine_id, copy.reason)
        if answer != "moved":
            return answer, replace(copy, pulled_bytes=0)
        fleet.runtime.post(
            SessionMoved(session.tenant, session.session_id, engine_id, target, copy.hashes, copy.page_tokens)
        )
        return "whole" if copy.whole else "partly", copy
