"""Residency that the ledger has lost is rebuilt from the engines' directories, prompt by prompt.

Asked only when neither the ledger nor we know of anybody who holds a prompt, and the ledger is away or has
lost data lately: never on the way of an ordinary round. First the beginning, of a few engines at once; then
those that have it say how far they go. What they do not answer in time is computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from antiphon.engines.base import EngineError
from antiphon.policies.base import Pool
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.engine_calls import EngineCalls
from antiphon.scheduler.messages import Claimed, ClaimLost, Holding
from antiphon.scheduler.rounds import LiveRound

LEAST_TOKENS = 256
"""Shorter prompts are computed faster than asked about."""
BEGINNING_PAGES = 16
MOST_PAGES = 8192
MOST_ENGINES = 16
DECODE = Pool.DECODE.value
ASK_DEADLINE_S = 0.15
"""For each of the two questions, all engines together."""


class Rebuilding:
    """For one event loop. `calls` reaches the engines that the core knows."""

    def __init__(self, core: Scheduler, calls: EngineCalls) -> None:
        self._core = core
        self._calls = calls

    async def told(
        self, answer: Claimed | ClaimLost, live: LiveRound, *, lost_data: bool
    ) -> Claimed | ClaimLost:
        """The claim's answer with the prompt's holders, if nobody else knows of any; `lost_data`: lately."""
        if isinstance(answer, Claimed) and (answer.home or answer.holdings or not lost_data):
            return answer
        found = await self.holders(live.hashes, live.page_tokens)
        if not found:
            return answer
        if isinstance(answer, ClaimLost):
            return replace(answer, holdings=found)
        return replace(answer, holdings=found, home=self._home(found))

    def _home(self, found: Sequence[Holding]) -> str | None:
        """The decode engine that holds most: there the session was at home."""
        books = self._core.books.fleet.books
        at_home = [h for h in found if h.engine_id in books and books[h.engine_id].up.pool == DECODE]
        return max(at_home, key=lambda holding: holding.tokens).engine_id if at_home else None

    async def holders(self, hashes: Sequence[bytes], page_tokens: int) -> tuple[Holding, ...]:
        """Who holds how much of the prompt, by the engines' own word; nothing if that is known anyway."""
        books = self._core.books
        if len(hashes) * page_tokens < LEAST_TOKENS or books.residency.held(hashes, page_tokens):
            return ()
        lives = {
            engine_id: book.up.incarnation
            for engine_id, book in sorted(books.fleet.books.items(), key=lambda item: item[1].up.pool)
            if book.up.can_transfer and engine_id not in self._core.standings.silent
        }
        begun = await self._ask(list(lives)[:MOST_ENGINES], hashes[:BEGINNING_PAGES])
        whole = [engine_id for engine_id, pages in begun.items() if pages == BEGINNING_PAGES]
        if whole and len(hashes) > BEGINNING_PAGES:
            begun |= await self._ask(whole, hashes[:MOST_PAGES])
        return tuple(
            Holding(engine_id, lives[engine_id], pages * page_tokens)
            for engine_id, pages in sorted(begun.items())
            if pages
        )

    async def _ask(self, engine_ids: Iterable[str], hashes: Sequence[bytes]) -> dict[str, int]:
        """Pages that each holds, of those that answer in time."""
        tasks = {asyncio.create_task(self._lookup(name, hashes)): name for name in engine_ids}
        if not tasks:
            return {}
        try:
            done, _ = await asyncio.wait(tasks, timeout=ASK_DEADLINE_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return {tasks[task]: task.result() for task in done}

    async def _lookup(self, engine_id: str, hashes: Sequence[bytes]) -> int:
        try:
            return await self._calls.engine(engine_id).lookup(hashes, deadline_s=ASK_DEADLINE_S)
        except EngineError:
            return 0
