"""How long each tool takes, learnt from its calls: what a scheduler can expect of the gap before a round."""

from __future__ import annotations

import threading

NEWEST_WEIGHT = 0.3
MAX_TOOLS = 10_000
"""Names are the program's, but may be made up by a model."""


class ToolTimes:
    """Moving averages by name; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._means_s: dict[str, float] = {}

    def learn(self, name: str, took_s: float) -> None:
        with self._lock:
            known_s = self._means_s.get(name, took_s)
            if name in self._means_s or len(self._means_s) < MAX_TOOLS:
                self._means_s[name] = known_s + NEWEST_WEIGHT * (took_s - known_s)

    def expected_s(self, name: str) -> float | None:
        """None = never seen."""
        with self._lock:
            return self._means_s.get(name)
