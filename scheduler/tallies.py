"""What an engine's book keeps as it changes: windows, sums, stall budgets, the prefill queue. No decisions.

Every one of them is read far more often than written, and none is ever added up anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

INFINITY = float("inf")

WINDOW_S = 10.0
"""AMPD's window of latency statistics (reference: section 2 of the paper's readings)."""


@dataclass(slots=True)
class Window:
    """Values of the past WINDOW_S seconds."""

    samples: deque[tuple[float, float]] = field(default_factory=deque)
    total: float = 0.0
    expires_s: float = INFINITY
    """When the oldest of `samples` leaves; infinity without any."""

    def add(self, now: float, value: float) -> None:
        self.samples.append((now, value))
        self.total += value
        if self.expires_s == INFINITY:
            self.expires_s = now + WINDOW_S
        elif self.expires_s <= now:
            self.trim(now)

    def trim(self, now: float) -> None:
        samples = self.samples
        while samples and samples[0][0] + WINDOW_S <= now:
            self.total -= samples.popleft()[1]
        self.expires_s = samples[0][0] + WINDOW_S if samples else INFINITY
        if not samples:
            self.total = 0.0

    def mean(self, now: float) -> float | None:
        if self.expires_s <= now:
            self.trim(now)
        samples = self.samples
        return self.total / len(samples) if samples else None

    def rates(self, now: float) -> tuple[float, float]:
        """How many came, and how much in all, per second of the window."""
        if self.expires_s <= now:
            self.trim(now)
        return len(self.samples) / WINDOW_S, self.total / WINDOW_S


@dataclass(slots=True)
class Owed:
    """Bytes that rounds in flight still have to move; whole numbers, so that the sum is exact."""

    parts: dict[str, int] = field(default_factory=dict)
    """Round id -> bytes: a round moves KV into an engine once at most at a time, and out of it once."""
    total: int = 0

    def add(self, round_id: str, count: int) -> None:
        self.total += count - self.parts.get(round_id, 0)
        self.parts[round_id] = count

    def drop(self, round_id: str) -> None:
        self.total -= self.parts.pop(round_id, 0)


class Slacks:
    """How long the rounds that decode on one engine may still be stalled before their mean ITL is missed.

    A stall takes the same from all, so that what is kept in order is budget + stalls so far: a stall costs
    one addition, a round the logarithm of their number.
    """

    __slots__ = ("_ordered", "_rounds", "stalled_s")

    def __init__(self) -> None:
        self.stalled_s = 0.0
        """Seconds of prefill that were ever put upon this engine; only grows."""
        self._ordered: list[tuple[float, str]] = []
        """(budget + `stalled_s` at the time, round id)."""
        self._rounds: dict[str, tuple[float, float]] = {}
        """Round id -> (what it stands at in `_ordered`, budget)."""

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[str]:
        """Round ids, the least slack first."""
        return (round_id for _, round_id in self._ordered)

    def stall(self, seconds: float) -> None:
        """Every round here waits for a prefill of so many seconds."""
        self.stalled_s += seconds

    def add(self, round_id: str, budget_s: float, ahead_s: float = 0.0) -> None:
        """`ahead_s`: of the stalls so far, what is still to come and will hit this round too."""
        if round_id in self._rounds:
            self.drop(round_id)
        key = budget_s + self.stalled_s - ahead_s
        self._rounds[round_id] = key, budget_s
        insort(self._ordered, (key, round_id))

    def begin(self, round_id: str, ahead_s: float) -> None:
        """Its first token is out: prefills before that did not stall it, those still reserved will."""
        known = self._rounds.get(round_id)
        if known is not None:
            self.add(round_id, known[1], ahead_s)

    def drop(self, round_id: str) -> None:
        known = self._rounds.pop(round_id, None)
        if known is not None:
            del self._ordered[bisect_left(self._ordered, (known[0], round_id))]

    def least(self, count: int) -> tuple[float, ...]:
        """The `count` least slacks of at least 0, ascending, in seconds."""
        ordered, stalled_s = self._ordered, self.stalled_s
        if not ordered:
            return ()
        first = bisect_left(ordered, (stalled_s,))
        return tuple([key - stalled_s for key, _ in ordered[first : first + count]])


class PrefillQueue:
    """Rounds that wait for their prefill, sorted by (key, round id).

    Taking one from the front, or putting one at the end, costs the same however long the queue is.
    """

    __slots__ = ("_first", "_waiting", "length")

    def __init__(self) -> None:
        self.length = 0
        self._waiting: list[tuple[float, str]] = []
        self._first = 0
        """What stands before it has been taken."""

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        """Round ids in order."""
        return (round_id for _, round_id in self._waiting[self._first :])

    def add(self, key: float, round_id: str) -> None:
        insort(self._waiting, (key, round_id), lo=self._first)
        self.length += 1

    def head(self, count: int) -> list[str]:
        """Ids of the first `count` rounds, or of all if there are fewer."""
        return [round_id for _, round_id in self._waiting[self._first : self._first + count]]

    def remove(self, key: float, round_id: str) -> bool:
        """Take one out, wherever it stands; False if it does not wait here."""
        waiting, first = self._waiting, self._first
        at = bisect_left(waiting, (key, round_id), lo=first)
        if at == len(waiting) or waiting[at] != (key, round_id):
            return False
        self.length -= 1
        if at - first > len(waiting) - at:
            del waiting[at]
            return True
        waiting[first + 1 : at + 1] = waiting[first:at]
        self._first = first + 1
        if self._first * 2 > len(waiting):
            del waiting[: self._first]
            self._first = 0
        return True
