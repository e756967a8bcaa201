"""Claims that nobody waited for: their leases are given back at once, and until that has worked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from antiphon.scheduler.ledger_connection import LedgerUnavailable

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 2.0
TRIES = 8
"""Then the lease ends with its time, or with the replica."""

Owned = tuple[str, str]
"""(replica, round id)."""


class Settling:
    """A release that was answered settles the claim for good: one that comes later is refused."""

    def __init__(self, release: Callable[[str, str], Awaitable[bool]]) -> None:
        """`release` raises `LedgerUnavailable`."""
        self._release = release
        self._open: dict[Owned, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, replica: str, round_id: str) -> None:
        owned = replica, round_id
        if owned not in self._open:
            self._open[owned] = asyncio.get_running_loop().create_task(self._settle(owned))

    def forget(self, replica: str, round_id: str) -> None:
        """Its completion is on the way, which frees the lease too."""
        task = self._open.pop((replica, round_id), None)
        if task is not None:
            task.cancel()

    async def now(self) -> None:
        """Try all that are open, until one fails: the ledger has just answered."""
        for owned in list(self._open):
            if not await self._try(owned):
                return

    async def close(self) -> None:
        tasks = list(self._open.values())
        self._open.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(self, owned: Owned) -> None:
        pause_s = FIRST_PAUSE_S
        for _ in range(TRIES):
            if owned not in self._open or await self._try(owned):
                return
            await asyncio.sleep(pause_s)
            pause_s = min(LAST_PAUSE_S, 2 * pause_s)
        self._open.pop(owned, None)

    async def _try(self, owned: Owned) -> bool:
        try:
            await self._release(*owned)
        except LedgerUnavailable:
            return False
        task = self._open.pop(owned, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        return True
