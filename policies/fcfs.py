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

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """Longest waiting first, then by round id; a retried round keeps its arrival."""
        return sorted(queue, key=_arrival)


def _arrival(round: RoundView) -> tuple[float, str]:
    return -round.waited_s, round.round_id
