"""An asyncio loop whose clock jumps to the next timer instead of waiting.

For code without I/O; or, with patience, whose I/O is all within the loop: both ends of every connection are
in it, and no thread is waited for. What the code costs is then no time at all, however busy the machine is.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


FAR_S, FAR_PATIENCE = 1.0, 200
"""So much longer nothing may be on its way before the clock jumps by more than a second: to a deadline."""


class _Jumping(selectors.SelectSelector):
    """A selector that never waits: it moves the loop's clock to the next timer."""

    loop: VirtualTimeLoop
    patience_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.patience_s:  # what one end wrote is at the other at once, or nearly so
            far = timeout is None or timeout > FAR_S
            ready = super().select(FAR_PATIENCE * self.patience_s if far else self.patience_s)
        if not ready:
            self.loop.jump()
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. A wait that no timer ends is an error, not a hang."""

    def __init__(self, patience_s: float = 0.0) -> None:
        """`patience_s`, really waited: for I/O before the clock jumps."""
        selector = _Jumping()
        selector.loop = self
        selector.patience_s = patience_s
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


def run_virtually(work: Coroutine[Any, Any, T], patience_s: float = 0.0) -> T:
    """`asyncio.run` on virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(patience_s)) as runner:
        return runner.run(work)
