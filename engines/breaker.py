"""A circuit breaker per peer: who keeps failing is left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """After `failures` in a row a peer is skipped for `open_s`, doubled by every further failure up to
    `max_open_s`; then one caller may try. Thread-safe; the clock is a parameter."""

    def __init__(
        self,
        *,
        failures: int = 3,
        open_s: float = 1.0,
        max_open_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = failures
        self._open_s = open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._lock = threading.Lock()
        self._peers: dict[str, tuple[int, float]] = {}
        """Peer -> (failures in a row, may be tried again at)."""

    def allows(self, peer: str) -> bool:
        """May this peer be asked now? After a pause the first caller is the probe, and keeps others away."""
        with self._lock:
            failures, retry_at = self._peers.get(peer, (0, 0.0))
            if failures < self._limit:
                return True
            if self._clock() < retry_at:
                return False
            self._peers[peer] = (failures, self._clock() + self._pause_s(failures))
            return True

    def succeeded(self, peer: str) -> None:
        with self._lock:
            self._peers.pop(peer, None)

    def failed(self, peer: str) -> None:
        with self._lock:
            failures = self._peers.get(peer, (0, 0.0))[0] + 1
            self._peers[peer] = (failures, self._clock() + self._pause_s(failures))

    def _pause_s(self, failures: int) -> float:
        return min(self._max_open_s, self._open_s * 2.0 ** min(30, max(0, failures - self._limit)))
