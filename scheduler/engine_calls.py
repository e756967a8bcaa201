"""The runtime's calls on engines that answer once: prefetch, prefill, abort, touch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from antiphon.engines.base import Engine, EngineError, FailureKind
from antiphon.scheduler.messages import Complete, Prefetch, PrefetchDone, Prefill, PrefillDone
from antiphon.scheduler.rounds import LiveRound, seed_of


@dataclass(frozen=True, slots=True)
class CallDeadlines:
    """Of what no command has a deadline for, in seconds."""

    event_s: float = 40.0
    """The most that an answer may bring nothing between two events, whatever the core expects."""
    abort_s: float = 5.0
    touch_s: float = 1.0
    prefetch_grace_s: float = 1.0
    """On top of the core's deadline for a transfer: the way there and back."""


class EngineCalls:
    """Raises only `EngineError`; `engines` is read at each call, since discovery changes it."""

    def __init__(self, engines: Mapping[str, Engine], deadlines: CallDeadlines) -> None:
        self._engines = engines
        self.deadlines = deadlines

    def engine(self, engine_id: str) -> Engine:
        engine = self._engines.get(engine_id)
        if engine is None:
            raise EngineError(FailureKind.UNREACHABLE, f"engine {engine_id} is not connected any more")
        return engine

    def indeterminate(self) -> frozenset[str]:
        """Engines that may sample other tokens for the same seed."""
        engines = self._engines.items()
        return frozenset(engine_id for engine_id, engine in engines if not engine.record.deterministic)

    async def prefetch(self, live: LiveRound, command: Prefetch) -> PrefetchDone:
        """Pages that do not come are only recomputed, so a failure here is an answer of 0 pages.

        A puller that gives no answer says nothing of the link: whether it lives, its other calls tell.
        """
        started_s = time.monotonic()
        wanted = live.hashes[command.first_page : command.first_page + command.pages]
        parent = live.hashes[command.first_page - 1] if command.first_page else seed_of(live.request)
        try:
            puller, source = self.engine(command.engine_id), self.engine(command.source_id)
            async with asyncio.timeout(command.deadline_s + self.deadlines.prefetch_grace_s):
                result = await puller.prefetch(
                    source.record.kv_addresses,
                    command.source_incarnation,
                    parent,
                    wanted,
                    deadline_s=command.deadline_s,
                )
        except (EngineError, TimeoutError) as error:
            reason = str(error) or f"no answer within {command.deadline_s:g} s"
            elapsed_s = time.monotonic() - started_s
            return PrefetchDone(command.round_id, command.engine_id, 0, 0, 0, elapsed_s, reason)
        return PrefetchDone(
            command.round_id,
            command.engine_id,
            command.first_page + result.pages,
            result.pulled_pages,
            result.pulled_bytes,
            result.elapsed_s,
            result.reason,
            result.blame,
        )

    async def prefill(self, live: LiveRound, command: Prefill) -> PrefillDone:
        result = await self.engine(command.engine_id).prefill(
            live.prompt,
            command.rid,
            session_id=live.handle.session_id,
            cache_salt=live.request.cache_salt,
            deadline_s=command.deadline_s,
        )
        return PrefillDone(command.round_id, result.cached_tokens)

    async def abort(self, engine_id: str, rid: str) -> None:
        """Nothing to do on an engine that is gone."""
        engine = self._engines.get(engine_id)
        if engine is not None and rid:
            await engine.abort(rid, deadline_s=self.deadlines.abort_s)

    async def touch(self, engine_id: str, live: LiveRound, history_tokens: int) -> None:
        """A full hit on the device never reaches the linker: tell its store that the chain is in use."""
        engine = self._engines.get(engine_id)
        pages = min(history_tokens // live.page_tokens, len(live.hashes))
        if engine is not None and engine.hello is not None and pages > 0:
            await engine.touch(live.hashes[pages - 1], deadline_s=self.deadlines.touch_s)

    async def link(self, live: LiveRound, command: Complete) -> None:
        """Tell the home's store which of its pages follow each other. SGLang offloads pieces of a chain and
        does not say where they belong; a drain asks the store for whole chains."""
        for chain in command.holdings:
            engine = self._engines.get(chain.engine_id)
            if chain.engine_id == command.home and engine is not None and engine.hello is not None:
                await engine.lookup(live.new_pages(chain), deadline_s=self.deadlines.touch_s)
