"""The JSON of `antiphon plan`, for other programs: it stays as it is within a schema version."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from msgspec import Struct

from antiphon.eval.planner.ask import Ask, Rated, Rung, cost_per_1k_rounds
from antiphon.eval.planner.cases import Case
from antiphon.eval.planner.engine_types import LeftOut
from antiphon.eval.planner.lasting import lasts
from antiphon.eval.planner.planned import Planned, windows_of
from antiphon.eval.planner.plans import Group, Plan

SCHEMA = "antiphon.plan/1"


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
    rate, found, solved = planned.rounds_per_s, planned.found, planned.solved
    every = {rated.plan: rated for rated in (found.best, *found.rated, *planned.cheaper)}
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
