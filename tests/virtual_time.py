"""An asyncio loop whose clock jumps to the next timer instead of waiting. Only for code without I/O."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Jumping(selectors.SelectSelector):
    """A selector that never waits: it moves the loop's clock to the next timer."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and (timeout is None or timeout > 0):
            self.loop.jump()
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. A wait that no timer ends is an error, not a hang."""

    def __init__(self) -> None:
        selector = _Jumping()
        selector.loop = self
        self._now_s = 0.0
        super().__init__(selector)
        self._clock_resolution = 1e-9
        """Timers due within it run together, in their order."""

    def time(self) -> float:
        return self._now_s

    def jump(self) -> None:
        timers = self._scheduled  # type: ignore[attr-defined]
        if not timers:
            raise RuntimeError("everything waits, and no timer is set")
        self._now_s = max(self._now_s, timers[0]._when)


def run_virtually(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` on virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(work)
