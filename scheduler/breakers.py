"""Circuit breakers, as pure state: whoever keeps failing is left alone for a while. No clock, no I/O.

    closed    used; `failures` in a row, or a bad one, open it
    open      not used until its pause is over; each further opening doubles that, up to a cap
    half open the pause is over: whoever comes next is the probe
    probing   one tries: success closes, failure opens again; others keep away meanwhile

Calls that were under way when it opened are heard too: a success closes, a failure changes nothing.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from typing import Generic, TypeVar

from msgspec import Struct

KeyT = TypeVar("KeyT", bound=Hashable)

CLOSED, OPEN, HALF_OPEN, PROBING = "closed", "open", "half_open", "probing"


class _Breaker(Struct):
    failures: int = 0
    """In a row, while closed."""
    openings: int = 0
    """In a row; 0 = closed."""
    retry_s: float = 0.0
    """When the pause of an open one is over."""
    probe: str = ""
    """Who tries."""


class Breakers(Generic[KeyT]):
    """One per key; a key that never failed costs nothing."""

    def __init__(self, failures: int, open_s: float, max_open_s: float) -> None:
        self._limit = failures
        self._open_s = open_s
        self._max_open_s = max_open_s
        self._known: dict[KeyT, _Breaker] = {}
        self.opened = 0
        """How often one opened, in all."""
        self.not_closed = 0
        """How many are not closed now: while 0, everything is allowed."""

    def state(self, key: KeyT, now: float) -> str:
        breaker = self._known.get(key)
        if breaker is None or not breaker.openings:
            return CLOSED
        if breaker.probe:
            return PROBING
        return OPEN if now < breaker.retry_s else HALF_OPEN

    def allows(self, key: KeyT, now: float) -> bool:
        return not self.not_closed or self.state(key, now) in (CLOSED, HALF_OPEN)

    def refused(self, now: float) -> frozenset[KeyT]:
        """Those that are not to be used now."""
        return frozenset(key for key in self._known if not self.allows(key, now))

    def not_closed_now(self, now: float) -> dict[KeyT, str]:
        """Those that are not closed -> state."""
        return {key: self.state(key, now) for key, breaker in self._known.items() if breaker.openings}

    def trying(self, key: KeyT, who: str, now: float) -> None:
        """`who` uses it: the probe, if it is half open."""
        if self.not_closed and self.state(key, now) == HALF_OPEN:
            self._known[key].probe = who

    def failed(self, key: KeyT, who: str, now: float, *, at_once: bool = False) -> None:
        """`at_once`: this failure alone opens it."""
        breaker = self._known.setdefault(key, _Breaker())
        if not breaker.openings:
            breaker.failures += 1
            if at_once or breaker.failures >= self._limit:
                self.not_closed += 1
                self._open(breaker, now)
        elif breaker.probe == who:
            self._open(breaker, now)

    def succeeded(self, key: KeyT) -> None:
        if self._known and key in self._known:
            self.forget(key)

    def forget(self, key: KeyT) -> None:
        """It starts anew."""
        breaker = self._known.pop(key, None)
        if breaker is not None and breaker.openings:
            self.not_closed -= 1

    def forget_if_about(self, name: str) -> None:
        """Of pairs: every one with `name` in it."""
        for key in [key for key in self._known if isinstance(key, tuple) and name in key]:
            self.forget(key)

    def left(self, who: str) -> None:
        """`who` is over, without a word on how it went: another may be the probe."""
        if self.not_closed:
            for breaker in self._known.values():
                if breaker.probe == who:
                    breaker.probe = ""

    def check(self, living: Container[str]) -> None:
        """Raise AssertionError if something contradicts itself: nobody waits for a probe that is over."""
        assert self.not_closed == sum(b.openings > 0 for b in self._known.values()), "open ones miscounted"
        for key, breaker in self._known.items():
            assert breaker.openings or breaker.failures, f"{key}: nothing to remember"
            assert breaker.failures < self._limit, f"{key}: {breaker.failures} failures and still closed"
            assert not breaker.probe or (breaker.openings and breaker.probe in living), f"{key}: a dead probe"

    def _open(self, breaker: _Breaker, now: float) -> None:
        pause_s = min(self._max_open_s, self._open_s * 2.0 ** min(30, breaker.openings))
        breaker.openings += 1
        breaker.failures, breaker.probe, breaker.retry_s = 0, "", now + pause_s
        self.opened += 1
