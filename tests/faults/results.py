"""What a run is given and what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.faults.cells import Cell
from tests.faults.conversation import KINDS, Kind
from tests.faults.history import LogicalRound, Verdict


@dataclass(frozen=True, slots=True)
class Scale:
    """How large rounds are, and how patient clients."""

    first_tokens: int = 300
    new_tokens: Mapping[str, int] = field(
        default_factory=lambda: {"idle": 200, "prefill": 1000, "transfer": 600, "decode": 200}
    )
    """Of the watched round, by phase."""
    output_tokens: Mapping[str, int] = field(
        default_factory=lambda: {"idle": 24, "prefill": 24, "transfer": 24, "decode": 100}
    )
    background: int = 3
    """Other sessions."""
    background_tokens: int = 60
    background_output_tokens: int = 16
    pause_s: float = 0.3
    deadline_s: float = 30.0
    """Of a logical round."""
    attempt_s: float = 6.0
    kinds: tuple[Kind, ...] = KINDS
    checks_answers: bool = True
    """Here, as those of simulated engines; else later (`real.py`)."""


@dataclass(slots=True)
class TrialResult:
    """What a run showed."""

    cell: Cell
    variant: str
    engines: str
    seed: int
    phase_hit: bool
    verdict: Verdict
    leaks: list[str]
    note: str
    forks: int
    """Answers that came from a fork, though no session asks two things at once."""
    duration_s: float
    unchecked: list[LogicalRound]
    """Answered rounds whose answers nobody has compared."""

    @property
    def clean(self) -> bool:
        return self.verdict.clean and not self.leaks
