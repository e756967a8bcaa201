"""`fcfs`: the default ordering of a prefill queue, first come first served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.policies.base import ClusterView, RoundView


@dataclass(frozen=True, slots=True)
class FcfsParameters:
    """`fcfs` has no parameters."""


@dataclass(frozen=True, slots=True)
class Fcfs:
    parameters: FcfsParameters = field(default_factory=FcfsParameters)

    @property
    def window(self) -> int:
        return 1

    def key(self, round: RoundView) -> float:
        """A retried round keeps its arrival."""
        return round.arrived_s

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """First arrived first, then by round id."""
        return sorted(queue, key=_arrival)


def _arrival(round: RoundView) -> tuple[float, str]:
    return round.arrived_s, round.round_id
