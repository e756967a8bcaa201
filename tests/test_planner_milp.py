"""The MILP against plain enumeration, and its answers to asks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.ask import Ask, Infeasible, PlanError
from antiphon.eval.planner.milp import (
    EIGHTHS,
    Choice,
    Column,
    Form,
    cheapest,
    columns_of,
    completed,
    eq5,
    least_z,
    plan_of,
)
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.score import score
from antiphon.eval.planner.solve import rounded_down, solve, solve_by
from antiphon.eval.planner.solver import Program
from antiphon.eval.planner.tau import ROLES, Curve, Curves, Line, Role
from antiphon.eval.planner.workload import Workload
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost
from antiphon.traces.schema import RoundTrace, SessionTrace

IDLE = LatencyModel(
    "by-hand", "by hand", PrefillCost(0.0, 0.001), DecodeCost(0.01), TransferCost(0.0, 1e9, 1000)
)
TYPES = tuple(
    EngineType(gpu, tp, IDLE, 10_000, 10_000, 1e9, price)
    for gpu, price in (("big", 3.0), ("small", 1.0))
    for tp in (1, 2)
)
RATE = 8.0
INFINITE = float("inf")


# ---------------------------------------------------------------- enumeration

Use = tuple[EngineType, int, int]
"""Replicas of a type, and the eighths that they take."""


def pools(role: Role, curves: Curves, budget: Mapping[str, int], mixed: bool) -> Iterator[list[Use]]:
    """Every way to run one phase."""
    options: list[list[Use | None]] = [
        [None, *((each, r, s) for r in range(1, budget[each.gpu] // each.tp + 1) for s in range(1, 9))]
        for each in TYPES
    ]
    for uses in product(*options):
        used = [use for use in uses if use is not None]
        if sum(s for _, _, s in used) != EIGHTHS:
            continue
        if not mixed and len({each.tp for each, _, _ in used}) > 1:
            continue
        yield used


def z_of(role: Role, uses: list[Use], curves: Curves) -> float:
    return max(curves[role, each.name].tau(RATE * s / EIGHTHS / r, r) for each, r, s in uses)


def spent(uses: list[Use]) -> tuple[float, dict[str, int]]:
    gpus = {"big": 0, "small": 0}
    for each, r, _ in uses:
        gpus[each.gpu] += r * each.tp
    return sum(r * each.price_per_hour for each, r, _ in uses), gpus


Fleet = tuple[float, float, bool]
"""Z, price, co-located."""


def fleets(curves: Curves, budget: Mapping[str, int], mixed: bool) -> list[Fleet]:
    """All of them. Of one pool only the best Z per size is of use."""
    best: dict[Role, dict[tuple[int, ...], tuple[float, float, set[int]]]] = {}
    for role in ROLES:
        found = best.setdefault(role, {})
        for uses in pools(role, curves, budget, mixed):
            sizes = tuple(sum(r for e, r, _ in uses if e is each) for each in TYPES)
            price, gpus = spent(uses)
            if any(gpus[gpu] > budget[gpu] for gpu in gpus):
                continue
            z = z_of(role, uses, curves)
            if z < found.get(sizes, (INFINITE,))[0]:
                found[sizes] = z, price, {each.tp for each, _, _ in uses}
    known = [(z, price, True) for z, price, _ in best["colocated"].values()]
    for (p, (pz, p_price, p_tp)), (d, (dz, d_price, d_tp)) in product(
        best["prefill"].items(), best["decode"].items()
    ):
        gpus = {"big": 0, "small": 0}
        for each, x, y in zip(TYPES, p, d, strict=True):
            gpus[each.gpu] += (x + y) * each.tp
        if all(gpus[gpu] <= budget[gpu] for gpu in gpus) and (mixed or len(p_tp | d_tp) == 1):
            known.append((max(pz, dz), p_price + d_price, False))
    return known


# ---------------------------------------------------------------- the same optimum


def curve(role: Role, each: EngineType, steps: list[float], kv_rate: float, pooled: float = 1.0) -> Curve:
    """tau grows by each of the steps, from one rate to the next. `pooled`: times that, in a pool."""
    rates = tuple(RATE * share for share in (0.125, 0.5, 1.0))
    taus = tuple(sum(steps[: n + 1]) for n in range(3))
    alone = Line((0.0, *rates), (taus[0], *taus))
    return Curve(role, each, alone, replace(alone, taus=tuple(pooled * tau for tau in alone.taus)), kv_rate)


@st.composite
def tables(draw: st.DrawFn) -> dict[tuple[Role, str], Curve]:
    step = st.integers(0, 40).map(lambda n: n / 32)
    kv = st.sampled_from((INFINITE, RATE, RATE / 2, RATE / 4))
    return {
        (role, each.name): curve(
            role,
            each,
            draw(st.lists(step, min_size=3, max_size=3)),
            INFINITE if role == "prefill" else draw(kv),
            draw(st.sampled_from((0.5, 1.0))) if role == "prefill" else 1.0,
        )
        for role in ROLES
        for each in TYPES
    }


def check(choice: Choice | None, form: Form, curves: Curves) -> None:
    """What holds for every choice, whatever it is best at."""
    if choice is None:
        return
    by_role: dict[Role, list[Column]] = {}
    for column in choice.columns:
        by_role.setdefault(column.role, []).append(column)
        assert column.replicas >= 1  # all replicas 0 satisfies the paper's form
        rate = RATE * column.eighths / EIGHTHS / column.replicas
        assert column.tau == curves[column.role, column.type.name].tau(rate, column.replicas) < INFINITE
    assert set(by_role) in ({"colocated"}, {"prefill", "decode"})
    for columns in by_role.values():
        assert sum(column.eighths for column in columns) == EIGHTHS
        assert len({column.type.name for column in columns}) == len(columns)
    if not form.mixed:
        assert len({column.type.tp for column in choice.columns}) == 1
    ask = Ask(
        model="m", budget=dict(form.budget), slo=Slo(1.0, 1.0), session_rate_per_s=RATE, window_tokens=1
    )
    plan = plan_of(choice, ask)
    assert plan.fits(dict(form.budget))
    assert plan.colocated == ("colocated" in by_role)
    assert plan.price_per_hour == pytest.approx(choice.price)
    assert all(group.count for group in plan.groups)


@settings(max_examples=40, deadline=None)
@given(tables(), st.fixed_dictionaries({"big": st.integers(0, 3), "small": st.integers(0, 3)}), st.booleans())
def test_the_optimum_is_that_of_enumeration(
    curves: dict[tuple[Role, str], Curve], budget: dict[str, int], mixed: bool
) -> None:
    if mixed:
        budget = {gpu: min(count, 2) for gpu, count in budget.items()}
    form = Form(columns_of(TYPES, curves, RATE, budget), budget, mixed)
    known = fleets(curves, budget, mixed)
    alone, least, best = eq5(form), least_z(form), completed(form)
    for choice in (alone, least, best):
        check(choice, form, curves)
    split = [(z, price) for z, price, colocated in known if not colocated]
    if not split:
        assert alone is None
    else:
        assert alone is not None
        z = min(z for z, _ in split)
        assert alone.z == pytest.approx(z, abs=2e-6)
        assert alone.price == pytest.approx(min(price for at, price in split if at <= z + 2e-6))
        assert not plan_is_colocated(alone)
    if not known:
        assert least is None and best is None
        return
    assert least is not None and best is not None
    z = min(z for z, _, _ in known)
    assert least.z == pytest.approx(z, abs=2e-6)
    price, at = min((price, at) for at, price, _ in known if at <= max(1.0, z) + 2e-6)
    assert best.price == pytest.approx(price)
    assert best.z == pytest.approx(at, abs=4e-6)


def plan_is_colocated(choice: Choice) -> bool:
    return any(column.role == "colocated" for column in choice.columns)


# ---------------------------------------------------------------- by hand


def flat(**taus: float) -> dict[tuple[Role, str], Curve]:
    """tau at the whole rate on one engine of that role; half of it at half of the rate."""
    return {
        (role, each.name): curve(role, each, [taus[role] / 8, taus[role] * 3 / 8, taus[role] / 2], INFINITE)
        for role in ROLES
        for each in TYPES
    }


def test_columns_leave_out_what_more_replicas_do_not_better() -> None:
    curves = flat(prefill=1.0, decode=1.0, colocated=1.0)
    columns = columns_of(TYPES[:1], curves, RATE, {"big": 16}, roles=("prefill",))
    by_share = {s: [c.replicas for c in columns if c.eighths == s] for s in (1, 8)}
    assert by_share == {1: [1], 8: [1, 2, 3, 4, 5, 6, 7, 8]}  # nothing is known below an eighth of the rate
    assert [c.tau for c in columns if (c.eighths, c.replicas) in ((8, 1), (8, 2), (4, 1))] == [0.5, 1.0, 0.5]


def test_colocated_where_it_is_as_good_and_cheaper() -> None:
    form = Form(columns_of(TYPES, flat(prefill=0.9, decode=0.9, colocated=1.0), RATE, {"big": 2, "small": 2}),
                {"big": 2, "small": 2})  # fmt: skip
    best = completed(form)
    assert best is not None and plan_is_colocated(best) and best.price == 1.0
    dearer = completed(form, within_z=0.95)
    assert dearer is not None and dearer.price == 2.0
    alone = eq5(form)
    assert alone is not None and not plan_is_colocated(alone)


def test_of_equals() -> None:
    """No engine of the dear kind changes Z: decode is slow, and only cheap engines decode in time at all."""
    curves = flat(prefill=0.2, decode=1.0, colocated=9.0)
    two = TYPES[::2]
    for each in two:  # more of them prefill a little faster, which Z does not show
        curves["prefill", each.name] = curve("prefill", each, [0.1, 0.05, 0.05], INFINITE)
    curves["decode", "1xbig"] = curve("decode", two[0], [9.0, 0.0, 0.0], INFINITE)
    budget = {"big": 2, "small": 3}
    slow = Form(columns_of(two, curves, RATE, budget), budget)
    for choice in (eq5(slow), completed(slow, within_z=0.1)):  # all three, and so one dear one
        assert choice is not None
        assert (choice.z, choice.price) == pytest.approx((1 / 3, 6.0), abs=0.01)
    curves["decode", "1xbig"] = curve("decode", two[0], [0.6, 0.0, 0.0], INFINITE)
    both = Form(columns_of(two, curves, RATE, {"big": 1, "small": 1}), {"big": 1, "small": 1})
    best = completed(both)  # for the same price either way round: the one that decodes faster
    assert best is not None
    assert (best.z, best.price) == (0.6, 4.0)


def test_one_engine_alone_has_no_eq5() -> None:
    curves = flat(prefill=1.0, decode=1.0, colocated=1.0)
    form = Form(columns_of(TYPES, curves, RATE, {"big": 1, "small": 0}), {"big": 1, "small": 0})
    assert eq5(form) is None
    assert cheapest(form, 0.1) is None


WORKLOAD = Workload.of(
    [SessionTrace("s", (RoundTrace(prompt_tokens=100, output_tokens=101),))], RATE, IDLE
)  # 1.1 s and 201 tokens


def ask(**budget: int) -> Ask:
    return Ask(
        model="m", budget=budget, slo=Slo(1.0, 1.0), session_rate_per_s=RATE, window_tokens=1000, jobs=1
    )


GPUS = {"big": "h100", "small": "a100"}
REAL_TYPES = tuple(replace(each, gpu=GPUS[each.gpu]) for each in TYPES)


def real(curves: dict[tuple[Role, str], Curve]) -> dict[tuple[Role, str], Curve]:
    named = {each.name: real_type for each, real_type in zip(TYPES, REAL_TYPES, strict=True)}
    return {(role, named[name].name): replace(c, type=named[name]) for (role, name), c in curves.items()}


def test_solved_and_what_binds() -> None:
    """Nothing is within its targets on 2 + 0 GPUs: Z is 1.5, of the prefill. One engine more halves it."""
    curves = real(flat(prefill=1.5, decode=1.0, colocated=4.0))
    solved = solve_by(curves, ask(h100=2), REAL_TYPES, WORKLOAD)
    assert solved.eq5 == solved.plan
    assert solved.plan.describe() == "prefill 1 x 1xh100, decode 1 x 1xh100, adaptive"
    assert (solved.eq5_z, solved.plan_z, solved.gap) == (1.5, 1.5, 0.0)
    first, second, *none = solved.binding
    assert first == "1 more h100: the worst P95 at 1.00 instead of 1.50 of its target (-33.3%)"
    assert second == "targets 10 % looser: the worst P95 at 1.36 instead of 1.50 of its target (-9.1%)"
    assert not none


def test_what_binds_the_price() -> None:
    """Two of the cheap kind are too slow by little. Half of the load on one of the dear kind is in time."""
    curves = real(flat(prefill=9.0, decode=9.0, colocated=1.9))
    table = dict(curves)
    for key, fast in curves.items():
        if "a100" in key[1]:
            slow = replace(fast.alone, taus=tuple(1.1 * tau for tau in fast.alone.taus))
            table[key] = replace(fast, alone=slow, pooled=slow)
    solved = solve_by(table, ask(h100=2, a100=2), REAL_TYPES[::2], WORKLOAD)
    assert solved.plan.describe() == "co-located 1 x 1xh100 + 2 x 1xa100, adaptive"
    assert solved.binding == (
        "targets 10 % looser: USD 2.00 instead of 5.00 per hour (-60.0%)",
        "1 more a100: USD 3.00 instead of 5.00 per hour (-40.0%)",
    )


def test_nothing_binds_the_smallest_fleet() -> None:
    """And where 10 % change nothing, the first that do are told."""
    curves = real(flat(prefill=0.1, decode=0.1, colocated=0.1))
    (told,) = solve_by(curves, ask(h100=2), REAL_TYPES[:1], WORKLOAD).binding
    assert told == "none: even targets and memory for KV that are 4 times as large change nothing"
    slow = real(flat(prefill=9.0, decode=9.0, colocated=1.4))
    solved = solve_by(slow, ask(h100=2), REAL_TYPES[:1], WORKLOAD)
    assert solved.binding == ("targets 50 % looser: USD 3.00 instead of 6.00 per hour (-50.0%)",)


def test_solved_from_its_own_simulations() -> None:
    """Rounds of 0.1 s and 1 s, 8 per second: one engine prefills them at 80 % of its time, two in time."""
    roomy = replace(REAL_TYPES[0], device_tokens=200_000, store_tokens=400_000)
    asked = msgspec.structs.replace(ask(h100=8), slo=Slo(0.3, 0.02))
    solved = solve(asked, [roomy], WORKLOAD)
    assert solved.curves_s > 0 and solved.gap == 0
    assert solved.plan_z <= 1
    seen = score(solved.plan, WORKLOAD.window(9, 300), asked.slo, asked.window_tokens)
    assert seen.attainment > 0.9
    assert solved.plan.engines >= 2


def test_kv_that_fits_no_fleet() -> None:
    """Each engine holds the KV of an eighth of the load; there are four."""
    curves = real(flat(prefill=0.1, decode=0.1, colocated=0.1))
    tight = {key: replace(c, kv_rate=RATE / 8) for key, c in curves.items()}
    with pytest.raises(Infeasible) as told:
        solve_by(tight, ask(h100=4), REAL_TYPES, WORKLOAD)
    assert "9 sessions are under way" in told.value.reason
    assert told.value.nearest == (
        "4 sessions per second, or h100:8: the KV would fit, which says nothing of the targets"
    )
    fits = dataclasses.replace(WORKLOAD, rate_per_s=4.0)
    assert solve_by(tight, ask(h100=4), REAL_TYPES, fits).plan.fits({"h100": 4})
    assert solve_by(tight, ask(h100=8), REAL_TYPES, WORKLOAD).plan.fits({"h100": 8})


@given(st.floats(1e-9, 1e9))
def test_a_bound_that_is_told_is_within_it(rate: float) -> None:
    told = float(rounded_down(rate))
    assert 0.99 * rate < told <= rate


def test_without_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)  # as if it were not installed
    with pytest.raises(PlanError, match=r'pip install "antiphon\[eval\]"'):
        Program(1.0)


def test_no_time_for_any_answer() -> None:
    budget = {"big": 40, "small": 40}
    curves = flat(prefill=9.0, decode=8.0, colocated=19.0)
    form = Form(columns_of(TYPES, curves, RATE, budget), budget, time_limit_s=0.0)
    with pytest.raises(PlanError, match="Time limit reached; allow it more time"):
        least_z(form)


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    program = Program(10.0)
    a, b = program.binary(), program.positive()
    program.row({a: 3.0, b: 2.0}, least=5.0)
    answer = program.minimise({a: 1.0, b: 1.0})
    assert answer is not None
    assert answer == ([1.0, 1.0], 2.0, 0.0)
    assert capfd.readouterr() == ("", "")
