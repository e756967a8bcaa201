"""Steps that several policies share: the least predicted TTFT, a candidate's placement, the way out.

The way out is for a policy that would prefill elsewhere where no prefill engine is usable: the home does it.
"""

from __future__ import annotations

from collections.abc import Iterable

from antiphon.policies import arms
from antiphon.policies.base import Candidate, EngineView, Placement, RoundView


def least_ttft(candidates: Iterable[Candidate]) -> Candidate:
    """Of at least one: the least predicted TTFT, then the prefill engine's id."""
    return min(candidates, key=_ttft)


def _ttft(candidate: Candidate) -> tuple[float, str]:
    return candidate.ttft_s, candidate.prefill_engine


def placement(
    home: EngineView, choice: Candidate, reason: str, considered: tuple[Candidate, ...] = ()
) -> Placement:
    """The candidate with this home; `considered` defaults to it alone."""
    return Placement(
        choice.arm, home.engine_id, choice.prefill_engine, reason, choice, considered or (choice,)
    )


def prefilled_at_home(round: RoundView, home: EngineView) -> Placement:
    """What is left when no prefill engine can compute the round for this home."""
    reason = f"no prefill engine is usable for {home.engine_id}: prefilled there"
    return placement(home, arms.local(round, home), reason)


def check_shortlist(shortlist: int) -> None:
    """ValueError for a number of engines that leaves none."""
    if shortlist < 1:
        raise ValueError(f"shortlist must be at least 1, got {shortlist}")


def check_not_negative(**tokens: int) -> None:
    """ValueError naming the parameter that is below 0."""
    for name, value in tokens.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
