"""The heartbeat of a replica: while it beats, the replica's leases and totals count in the ledger."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from antiphon.scheduler.ledger import Ledger, LedgerUnavailable

log = logging.getLogger(__name__)


class Heartbeat:
    """`run()` is a task of the caller's TaskGroup and never ends by itself.

    Being cancelled retires the replica. A ledger that is away is logged once and tried again.
    """

    def __init__(
        self,
        ledger: Ledger,
        replica: str,
        *,
        ttl_s: float = 5.0,
        interval_s: float = 1.0,
        on_replaced: Callable[[str], None] = lambda round_id: None,
    ) -> None:
        """`on_replaced` is told of each round of ours whose lease a retry has taken, on any replica."""
        if not 0 < interval_s < ttl_s:
            raise ValueError(f"interval_s ({interval_s}) must be positive and less than ttl_s ({ttl_s})")
        self._ledger = ledger
        self._replica = replica
        self._ttl_s = ttl_s
        self._interval_s = interval_s
        self._on_replaced = on_replaced
        self.beats = 0
        self.away = False
        """The last beat failed: we are on our own."""

    async def run(self) -> None:
        try:
            while True:
                await self._beat()
                await asyncio.sleep(self._interval_s)
        finally:
            try:
                await self._ledger.retire(self._replica)
            except LedgerUnavailable as error:
                log.info("replica %s is left to its TTL: %s", self._replica, error)

    async def _beat(self) -> None:
        try:
            replaced = await self._ledger.heartbeat(self._replica, self._ttl_s)
        except LedgerUnavailable as error:
            if not self.away:
                log.warning("%s; rounds go on without it", error)
            self.away = True
            return
        if self.away:
            log.info("the ledger is back")
        self.away = False
        self.beats += 1
        for round_id in replaced:
            self._on_replaced(round_id)
