"""How much the search simulates, and on which windows. Counted in rounds, never by a clock."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from antiphon.eval.planner.pool import View
from antiphon.eval.planner.workload import Workload


class Effort(NamedTuple):
    """How much is simulated."""

    rungs: tuple[tuple[int, int], ...] = ((16, 500), (5, 2000))
    """(plans, rounds) of each: of plans some more, so that each form has its best there; one window, for its
    beginning costs as much as hundreds of rounds."""
    last: tuple[int, int, int] = (4, 1500, 2)
    """(plans, rounds, windows): these say how far figures vary."""
    quick_rounds: int = 500
    """Of the one window by which variations of a leader are looked at first."""
    shortlist: int = 3
    """Of a leader's variations: so many are simulated as long as the leader was."""
    refinement_rounds: int = 40_000
    """Simulated for the refinement, about; its last step may pass them by half of that step."""
    long_rounds: int = 12_000
    """Of the window that says whether the choice lasts; 0 = there is none."""


FEW_LIVE = 500
"""Live sessions up to which rounds are as `Effort` says; beyond, they grow as the root of their number, but
for the first rung and quick looks: their windows would cost more than they tell."""
MANY_SESSIONS = 30
"""As many sessions' rounds has a quick look, and a quarter more a window of the last rung, since windows
differ by whose rounds they have; at most twice and three times what `Effort` says."""
STRESS = 1.15
"""Times the rate at which settings are looked at: short windows are kind, and at the rate that was asked for
a fleet that does well does as well with any of them."""
QUICK = 80
"""The quick looks' place among the windows."""
LAST = 90
"""The last rung's."""
LONG = 99
"""That of the long window."""
LONGER = 5
"""Times as long as a window of the last rung it is at least."""


class Schedule(NamedTuple):
    """The windows of one search. Those of the rungs, of quick looks, of the last rung and the long one have
    nothing in common."""

    effort: Effort
    seed: int
    stretch: float
    """Times the rounds that `effort` says."""
    many_rounds: float
    """Of `MANY_SESSIONS`."""

    @classmethod
    def of(cls, effort: Effort, seed: int, workload: Workload) -> Schedule:
        stretch = max(1.0, sqrt(workload.live_sessions / FEW_LIVE))
        many = MANY_SESSIONS * workload.rounds_per_s / workload.rate_per_s
        return cls(effort, seed, stretch, many)

    def rung(self, number: int) -> tuple[View, ...]:
        _, rounds = self.effort.rungs[number]
        return views_at(self.seed, number, round(rounds * self.stretch) if number else rounds, 1)

    def quick(self, rate_factor: float = 1.0) -> tuple[View, ...]:
        return views_at(self.seed, QUICK, round(self.effort.quick_rounds * self._varied), 1, rate_factor)

    def last(self) -> tuple[View, ...]:
        _, rounds, windows = self.effort.last
        longer = round(max(rounds * self.stretch, min(3 * rounds, 1.25 * self.many_rounds)))
        return views_at(self.seed, LAST, longer, windows)

    def long(self) -> View | None:
        """By which it is seen whether a plan lasts."""
        if not self.effort.long_rounds:
            return None
        rounds = max(self.effort.long_rounds, LONGER * self.last()[0].rounds)
        return views_at(self.seed, LONG, rounds, 1)[0]

    @property
    def refinement_rounds(self) -> float:
        return self.effort.refinement_rounds * self.stretch * self._varied

    @property
    def _varied(self) -> float:
        """Times the rounds of quick looks."""
        return min(2.0, max(1.0, self.many_rounds / self.effort.quick_rounds))


def views_at(seed: int, place: int, rounds: int, windows: int, rate_factor: float = 1.0) -> tuple[View, ...]:
    """Equal seeds and places have equal windows."""
    first = seed * 10_000 + place * 100
    return tuple(View(first + n, rounds, rate_factor) for n in range(windows))
