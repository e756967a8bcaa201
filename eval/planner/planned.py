"""The answer of `antiphon plan` as a whole, and its JSON.

The JSON (`Document`) is for other programs and stays as it is within a schema version; what is inside
(`Planned`) is for the table, the page and the files.
"""

from __future__ import annotations

from math import isfinite
from typing import Literal

from msgspec import Struct

from antiphon.eval.planner.ask import Ask, Found, Rated, Rung, Solved, cost_per_1k_rounds
from antiphon.eval.planner.cases import Case
from antiphon.eval.planner.engine_types import LeftOut, Unloaded
from antiphon.eval.planner.lasting import lasts
from antiphon.eval.planner.plans import Group, Plan
from antiphon.eval.planner.score import ERRORS, difference_noise

SCHEMA = "antiphon.plan/1"

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


# ---------------------------------------------------------------- JSON


class GroupDocument(Struct, frozen=True, forbid_unknown_fields=True):
    pool: Literal["prefill", "decode"]
    gpu: str
    tensor_parallel: int
    engines: int
    chunk_tokens: int
    decode_interval: int
    profile: str
    device_tokens: int
    store_tokens: int
    usd_per_hour: float


class PlanDocument(Struct, frozen=True, forbid_unknown_fields=True):
    names: tuple[str, ...]
    """What it is among the plans: plan, co-located, ...; () = it was simulated, no more."""
    policy: str
    colocated: bool
    groups: tuple[GroupDocument, ...]
    usd_per_hour: float
    usd_per_1k_rounds: float
    attainment: float
    attainment_error: float
    """Standard error: of independent rounds, or by the spread between windows where that is more."""
    rounds: int
    """That the attainment is a share of."""
    windows: int
    """On which it was simulated: all of `plans` on the same, but those that were looked for below the price
    of the first, on one of them."""
    given_up: bool
    """It was certain to attain much less than the best: no figure of it is exact."""
    lasts: bool | None
    """It attains about as much in one long window; None: nobody has looked."""
    long_attainment: float | None
    """There; of a plan that does not last only until that was certain."""
    long_rounds: int | None
    """That this is a share of."""
    ttft_p95_of_target: float | None
    """None: so many had no first token."""
    itl_p95_of_target: float | None
    refused: int


class CaseDocument(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    what: str
    winner: str
    margin: str
    colocated: PlanDocument | None
    disaggregated: PlanDocument | None


class Document(Struct, frozen=True, forbid_unknown_fields=True):
    """`--json`. The first of `plans` is the plan."""

    schema: str
    headline: str
    ask: Ask
    trace: str
    trace_sha256: str
    sessions: int
    rounds: int
    rounds_per_s: float
    live_sessions: float
    live_tokens: float
    plans: tuple[PlanDocument, ...]
    milp_z: float | None
    """Of the completed form; None: infinite."""
    eq5_z: float | None
    milp_curves_s: float
    milp_solve_s: float
    search_s: float
    rungs: tuple[Rung, ...]
    binding: tuple[str, ...]
    explanation: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    attainable: float
    """Share of rounds that the best engine would answer in time if nothing waited."""
    cases: tuple[CaseDocument, ...]
    commit: str
    took_s: float


def document(planned: Planned) -> Document:
    names: dict[Plan, list[str]] = {}
    for name, rated in planned.named():
        names.setdefault(rated.plan, []).append(name)
    others = (*planned.found.rated, *planned.cheaper)
    every = {rated.plan: rated for rated in (planned.found.best, *others)}
    others = (*(rated for _, rated in planned.named()), *planned.cheaper)
    every |= {rated.plan: rated for rated in others if rated.plan not in every}
    rate, found, solved = planned.rounds_per_s, planned.found, planned.solved
    return Document(
        schema=SCHEMA,
        headline=planned.headline,
        ask=planned.ask,
        trace=planned.trace,
        trace_sha256=planned.trace_sha256,
        sessions=planned.sessions,
        rounds=planned.rounds,
        rounds_per_s=rate,
        live_sessions=planned.live_sessions,
        live_tokens=planned.live_tokens,
        plans=tuple(_plan(rated, rate, tuple(names.get(plan, ()))) for plan, rated in every.items()),
        milp_z=_finite(solved.plan_z),
        eq5_z=_finite(solved.eq5_z),
        milp_curves_s=solved.curves_s,
        milp_solve_s=solved.solve_s,
        search_s=found.took_s,
        rungs=found.rungs,
        binding=solved.binding,
        explanation=planned.explanation,
        left_out=planned.left_out,
        attainable=planned.unloaded.share,
        cases=tuple(_case(case) for case in planned.cases),
        commit=planned.commit,
        took_s=planned.took_s,
    )


def _plan(rated: Rated, rounds_per_s: float, names: tuple[str, ...] = ()) -> PlanDocument:
    plan, score = rated.plan, rated.score
    return PlanDocument(
        names=names,
        policy=plan.policy,
        colocated=plan.colocated,
        groups=tuple(_group(group) for group in plan.groups),
        usd_per_hour=plan.price_per_hour,
        usd_per_1k_rounds=cost_per_1k_rounds(plan, rounds_per_s),
        attainment=score.attainment,
        attainment_error=score.noise,
        rounds=score.rounds,
        windows=windows_of(rated),
        given_up=score.hopeless,
        lasts=None if rated.long is None else lasts(rated),
        long_attainment=None if rated.long is None else rated.long.attainment,
        long_rounds=None if rated.long is None else rated.long.rounds,
        ttft_p95_of_target=_finite(score.ttft_p95),
        itl_p95_of_target=_finite(score.itl_p95),
        refused=score.refused,
    )


def _group(group: Group) -> GroupDocument:
    each = group.type
    return GroupDocument(
        pool=group.pool,
        gpu=each.gpu,
        tensor_parallel=each.tp,
        engines=group.count,
        chunk_tokens=group.chunk_tokens,
        decode_interval=group.decode_interval,
        profile=each.latency.name,
        device_tokens=each.device_tokens,
        store_tokens=each.store_tokens,
        usd_per_hour=group.count * each.price_per_hour,
    )


def _case(case: Case) -> CaseDocument:
    colocated, other, rounds_per_s = case.colocated, case.disaggregated, case.rounds_per_s
    return CaseDocument(
        name=case.name,
        what=case.what,
        winner=case.winner,
        margin=case.margin,
        colocated=None if colocated is None else _plan(colocated, rounds_per_s),
        disaggregated=None if other is None else _plan(other, rounds_per_s),
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
