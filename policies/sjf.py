"""`sjf`: shortest prefill first, with ageing: key = arrival + patience * work.

Pure shortest-first starves long rounds for as long as short ones arrive. Here a round whose prefill takes w
seconds is passed only by rounds that arrive within `patience` * w seconds after it: its wait is bounded, in
proportion to its own work. `patience` 0 is first come first served; the larger, the nearer to pure SJF.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.policies.base import ClusterView, RoundView


@dataclass(frozen=True, slots=True)
class SjfParameters:
    patience: float = 10.0
    """Seconds that a round can be passed for, per second of its own work. The value is Antiphon's."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.patience) and self.patience >= 0):
            raise ValueError(f"patience must be a number of at least 0, got {self.patience}")


@dataclass(frozen=True, slots=True)
class Sjf:
    parameters: SjfParameters = field(default_factory=SjfParameters)

    @property
    def window(self) -> int:
        return 1

    def key(self, round: RoundView) -> float:
        return round.arrived_s + self.parameters.patience * round.work_s

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """Least key first, then by round id."""
        return sorted(queue, key=lambda round: (self.key(round), round.round_id))
