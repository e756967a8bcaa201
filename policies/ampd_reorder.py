"""`ampd_reorder`: AMPD's TTFT-aware reordering of a prefill queue (arXiv:2602.14516, section on reordering).

Of the first `window` rounds in order of arrival every permutation is tried: run one after the other, a
round meets its target if waited + work of those before it and its own + push <= its TTFT target. The
permutation with the most such rounds runs. A round that others passed `postponements` times runs next,
whatever the count.

The paper's: enumeration, count, a bound on postponement; the window of 3 is its first version's. Antiphon's:
the bound's value; ties (the first permutation in lexicographic order of arrival, so nobody is moved for
nothing); of several rounds at the bound the first to have arrived. What the engine is busy with already is
not in the estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from operator import attrgetter

from antiphon.policies.base import ClusterView, RoundView

LARGEST_WINDOW = 6
"""720 permutations: beyond it a decision takes milliseconds."""


@dataclass(frozen=True, slots=True)
class AmpdReorderParameters:
    window: int = 3
    """Rounds whose permutations are tried; 1 is first come first served."""
    postponements: int = 3
    """How often a round can be passed before it runs next. The value is Antiphon's."""

    def __post_init__(self) -> None:
        if not 1 <= self.window <= LARGEST_WINDOW:
            raise ValueError(f"window must be between 1 and {LARGEST_WINDOW}, got {self.window}")
        if self.postponements < 0:
            raise ValueError(f"postponements must be at least 0, got {self.postponements}")


@dataclass(frozen=True, slots=True)
class AmpdReorder:
    parameters: AmpdReorderParameters = field(default_factory=AmpdReorderParameters)

    @property
    def window(self) -> int:
        return self.parameters.window

    def key(self, round: RoundView) -> float:
        return round.arrived_s

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """The best permutation of the first `window` to have arrived, then the rest by arrival."""
        arrived = sorted(queue, key=_arrival)
        head, rest = arrived[: self.window], arrived[self.window :]
        limit = self.parameters.postponements
        due = [round for round in head if round.postponed >= limit][:1]
        if due:
            head.remove(due[0])
        first = tuple(due)
        best, most = first + tuple(head), -1
        for others in permutations(head):
            attained = _attained(first + others)
            if attained > most:
                best, most = first + others, attained
                if most == len(best):
                    break  # no other has more
        return [*best, *rest]


_arrival = attrgetter("arrived_s", "round_id")


def _attained(rounds: Sequence[RoundView]) -> int:
    """How many meet their TTFT target if they run in this order."""
    attained, busy_s = 0, 0.0
    for round in rounds:
        busy_s += round.work_s
        attained += round.waited_s + busy_s + round.push_s <= round.slo_ttft_s
    return attained
