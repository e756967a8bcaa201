"""`edf`: earliest TTFT deadline first, as llm-d's `slo-deadline-ordering` (received + TTFT target).

Nothing starves: only rounds with an earlier deadline pass a round, and those arrive for a bounded time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.policies.base import ClusterView, RoundView


@dataclass(frozen=True, slots=True)
class EdfParameters:
    """`edf` has no parameters."""


@dataclass(frozen=True, slots=True)
class Edf:
    parameters: EdfParameters = field(default_factory=EdfParameters)

    @property
    def window(self) -> int:
        return 1

    def key(self, round: RoundView) -> float:
        """Its deadline, on the core's clock; a retried round keeps it."""
        return round.arrived_s + round.slo_ttft_s

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """Earliest deadline first, then by round id."""
        return sorted(queue, key=lambda round: (self.key(round), round.round_id))
