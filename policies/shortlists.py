"""The few engines that `adaptive` weighs, however many the fleet has: from the front of a few orders.

Queues are looked at pool by pool: engines of one pool are alike, and idle ones of a slow pool must not keep
out those of a fast one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from antiphon.policies.base import ClusterView, EngineView, Pool, RoundView

POOLS = tuple(Pool)
Usable = Callable[[EngineView], bool]


class Shortlists:
    """Of one decision: its orders are made once. Of each the first `count` that are usable are taken."""

    __slots__ = ("_by_history", "_cluster", "_count", "_queues")

    def __init__(self, round: RoundView, cluster: ClusterView, count: int) -> None:
        held = round.history_tokens
        self._count = count
        self._cluster = cluster
        by_queue = cluster.by_queue()
        self._queues = [[engine for engine in by_queue if engine.pool is pool] for pool in POOLS]
        self._by_history = [engine for engine in by_queue if held.get(engine.engine_id)]
        self._by_history.sort(key=lambda engine: held[engine.engine_id], reverse=True)  # stable, as all sorts

    def prefillers(self, usable: Usable) -> list[EngineView]:
        """Those of each pool with the shortest queue, and those with most history; by engine id."""
        return self._take(usable, *self._queues, self._by_history)

    def homes(self, usable: Usable) -> list[EngineView]:
        """Those, and the ones with least KV in use."""
        return self._take(usable, *self._queues, self._by_history, self._cluster.by_use())

    def _take(self, usable: Usable, *orders: Iterable[EngineView]) -> list[EngineView]:
        chosen: dict[str, EngineView] = {}
        for order in orders:
            left = self._count
            for engine in order:
                if usable(engine):
                    chosen[engine.engine_id] = engine
                    left -= 1
                    if not left:
                        break
        return [chosen[engine_id] for engine_id in sorted(chosen)]
