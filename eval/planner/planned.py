"""The answer of `antiphon plan` as a whole, for the table, the page, the files and the JSON."""

from __future__ import annotations

from msgspec import Struct

from antiphon.eval.planner.ask import Ask, Found, Rated, Solved
from antiphon.eval.planner.cases import Case
from antiphon.eval.planner.engine_types import LeftOut, Unloaded
from antiphon.eval.planner.lasting import lasts
from antiphon.eval.planner.score import ERRORS, difference_noise

DOES_IT = 0.8
"""Attainment below which it is said first of all that the budget does not do the load."""


class Planned(Struct, frozen=True):
    """Everything that is told of a plan."""

    ask: Ask
    trace: str
    """As the user named it."""
    trace_sha256: str
    """"" of generated sessions."""
    sessions: int
    """That the trace has, sub-agents included."""
    rounds: int
    rounds_per_s: float
    live_sessions: float
    """Under way at any time, if nothing waits."""
    live_tokens: float
    """Their KV."""
    headline: str
    found: Found
    cheaper: tuple[Rated, ...]
    """Plans below the choice's price, for the front; () where nobody asked for it."""
    solved: Solved
    left_out: tuple[LeftOut, ...]
    unloaded: Unloaded
    explanation: tuple[str, ...]
    cases: tuple[Case, ...]
    commit: str
    took_s: float

    def named(self) -> tuple[tuple[str, Rated], ...]:
        """The plans that have a name: the choice, the best of a form, the MILP's; what there is not is left
        out, and one plan may have several names."""
        found = self.found
        named = (
            ("plan", found.best),
            ("co-located", found.colocated),
            ("disaggregated", found.disaggregated),
            ("one kind of GPU", found.single_tier),
            ("equal split", found.equal_split),
            ("Eq. 5 alone (AMPD)", found.eq5),
            ("Eq. 5 completed", found.solved),
        )
        return tuple((name, rated) for name, rated in named if rated is not None)

    def comparable(self, rated: Rated) -> bool:
        """With the choice: simulated to the end, on the same windows, and not found to drown later."""
        return not rated.score.hopeless and lasts(rated) and windows_of(rated) == windows_of(self.found.best)


def windows_of(rated: Rated) -> int:
    """On how many it was simulated."""
    return len(rated.score.by_window) or 1


def same_windows(best: Rated) -> str:
    """Those of the choice, in words."""
    number = windows_of(best)
    return "one window" if number == 1 else f"the same {number} windows"


def headline(found: Found, tolerance: float) -> str:
    """The plan in one line: first that the load is too much, if it is; where co-location wins, that it does
    and by how much."""
    best, other = found.best, found.disaggregated if found.best.plan.colocated else found.colocated
    said = f"{best.plan.describe()}: {_does(best)}"
    if best.plan.colocated and lasts(best):
        said = f"do not disaggregate: {said}"
    if best.score.attainment < DOES_IT:
        said = (
            "no plan of this budget does this load within these targets, the best attains"
            f" {best.score.attainment:.1%}: ask for fewer sessions, more GPUs or looser targets; {said}"
        )
    elif not lasts(best):
        said = (
            "no plan of this budget that was looked at does this load for long: sooner or later it drowns:"
            f" ask for fewer sessions, more GPUs or looser targets; {said}"
        )
    if other is None:
        return said
    kind = "disaggregated" if best.plan.colocated else "co-located"
    said += f"; the best {kind} plan ({other.plan.describe()}): {_does(other)}"
    if not lasts(other):
        return said
    gap = best.score.attainment - other.score.attainment
    price = other.plan.price_per_hour - best.plan.price_per_hour
    level = max(tolerance, ERRORS * difference_noise(best.score, other.score))
    if abs(gap) > level:
        wins = f"{gap * 100:+.1f} ± {level * 100:.1f} points"
    elif price > 0:
        wins = f"as good for USD {price:.2f} less per hour"
    elif price < 0:
        wins = f"within ± {level * 100:.1f} points, which is noise, for USD {-price:.2f} more per hour"
    else:
        wins = f"within ± {level * 100:.1f} points, which is noise, at the same price"
    return f"{said} ({wins})"


def _does(rated: Rated) -> str:
    attained = f"{rated.score.attainment:.1%} attained"
    if rated.long is not None:
        in_a_row = f"{rated.long.attainment:.1%} of {rated.long.rounds:,} rounds in a row"
        attained += f" ({in_a_row})" if lasts(rated) else f" (it does not last: {in_a_row})"
    return f"{attained} at USD {rated.plan.price_per_hour:.2f} per hour"


def under_way(live_sessions: float, live_tokens: float) -> str:
    """`0.3 sessions under way with 1,200 tokens of KV`; of a heavier load in millions."""
    sessions = f"{live_sessions:.0f}" if live_sessions >= 10 else f"{live_sessions:.2g}"
    tokens = f"{live_tokens / 1e6:.2f} million" if live_tokens >= 1e5 else f"{live_tokens:,.0f}"
    return f"{sessions} sessions under way with {tokens} tokens of KV"
