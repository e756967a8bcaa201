"""What a plan is told by: front, surroundings, explanation, cases, page. A real search on small windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import hypot
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.lines import Line2D
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.known_models import KnownModel, read_models
from antiphon.eval.planner.around import around, cheaper, front
from antiphon.eval.planner.ask import Ask, Found, Rated, Solved
from antiphon.eval.planner.cases import Case, cases, verdict
from antiphon.eval.planner.curves import make_curves
from antiphon.eval.planner.effort import Effort
from antiphon.eval.planner.engine_types import Menu, attainable, engine_types
from antiphon.eval.planner.explain import explain, left_out_lines
from antiphon.eval.planner.plan_document import document
from antiphon.eval.planner.plan_page import page
from antiphon.eval.planner.plan_plots import SIZE, aside, draw_front, front_png, rated_plans
from antiphon.eval.planner.plan_table import attained, cells
from antiphon.eval.planner.planned import Planned, headline, windows_of
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.eval.planner.pool import ScorePool
from antiphon.eval.planner.prices import read_prices
from antiphon.eval.planner.score import Score, rounds_of
from antiphon.eval.planner.search import last_views, search
from antiphon.eval.planner.solve import solve_by
from antiphon.eval.planner.workload import Workload
from antiphon.eval.report_style import drawing
from antiphon.policies.latency import load_latency_model
from tests.test_planner_workload import SESSIONS, WINDOW_TOKENS

SHORT = Effort(((8, 60), (5, 120)), (3, 150, 2), 60, 2, 1000, 0)
TINY = Effort(((6, 40),), (3, 80, 1), 20, 1, 200, 0)
MODELS, PRICES = read_models(), read_prices()
MODEL: KnownModel = MODELS["qwen3-32b"]
ASK = Ask(
    model="qwen3-32b", budget={"h100": 8, "a100": 8}, slo=Slo(2.0, 0.05), session_rate_per_s=0.03,
    window_tokens=WINDOW_TOKENS, tensor_parallel=(1, 4), jobs=1,
)  # fmt: skip


class World(NamedTuple):
    menu: Menu
    workload: Workload
    found: Found
    solved: Solved
    pool: ScorePool


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    sessions = SESSIONS["claude-code"]
    menu = engine_types(ASK, MODEL, PRICES, max(t.total_tokens for s in sessions for t in s.rounds))
    workload = Workload.of(sessions, ASK.session_rate_per_s, menu.types[0].latency)
    with ScorePool(workload, ASK.slo, ASK.window_tokens, 1) as pool:
        curves = make_curves(menu.types, workload, ASK.slo, ASK.window_tokens, rounds=60, seeds=(0,), jobs=1)
        solved = solve_by(curves, ASK, menu.types, workload)
        found = search(ASK, menu.types, workload, solved=solved, pool=pool, effort=SHORT)
        yield World(menu, workload, found, solved, pool)


@pytest.fixture(scope="module")
def planned(world: World) -> Planned:
    found = world.found
    window = world.workload.window(*last_views(ASK, found)[0])
    rounds = rounds_of(found.best.plan, window, ASK.slo, ASK.window_tokens)
    beside = around(ASK, found, world.pool)
    lines = explain(ASK, MODEL, world.workload, found, world.solved, beside, rounds)
    unloaded = attainable(world.menu.types, world.workload, ASK.slo)
    return Planned(
        ask=ASK,
        trace="<sessions> & more",
        trace_sha256="",
        sessions=len(SESSIONS["claude-code"]),
        rounds=sum(len(session.rounds) for session in SESSIONS["claude-code"]),
        rounds_per_s=world.workload.rounds_per_s,
        live_sessions=world.workload.live_sessions,
        live_tokens=world.workload.live_tokens,
        headline=headline(found, ASK.tolerance),
        found=found,
        cheaper=cheaper(ASK, world.menu.types, found, world.pool),
        solved=world.solved,
        left_out=world.menu.left_out,
        unloaded=unloaded,
        explanation=(*lines, *left_out_lines(world.menu.left_out, unloaded)),
        cases=(Case("short prompts", "all lengths / 8", "co-located", "25% cheaper", found.best, None),),
        commit="",
        took_s=1.0,
    )


# ---------------------------------------------------------------- the front

TYPE = EngineType("h100", 1, load_latency_model("qwen3-8b-h100-tp1"), 64_000, 64_000, 50e9, 1.0)


def rated(count: int, attained: int, pool: bool = False) -> Rated:
    groups: tuple[Group, ...] = (Group("decode", TYPE, count, 2048, 4),)
    if pool:
        groups = (Group("prefill", TYPE, 1, 8192, 4), *groups)
    return Rated(Plan(groups, "local"), Score(1000, attained, 1000 - attained, 0, 0, 0.5, 0.5, 1000))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1000)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_as_cheap_beats(values: list[tuple[int, int]]) -> None:
    every = [rated(count, attained) for count, attained in values]
    best = front(every)
    assert best[-1].score.attainment == max(each.score.attainment for each in every)
    for each in every:
        price, share = each.plan.price_per_hour, each.score.attainment
        assert any(b.plan.price_per_hour <= price and b.score.attainment >= share for b in best)
    for one, other in pairwise(best):
        assert one.plan.price_per_hour < other.plan.price_per_hour
        assert one.score.attainment < other.score.attainment


def test_what_was_given_up_is_not_on_the_front() -> None:
    """Nobody knows what it attains: it may even look better than it is."""
    cheap, dear = rated(1, 700), rated(2, 900)
    given_up = replace(cheap, score=replace(cheap.score, hopeless=True))
    assert front([dear, cheap]) == (cheap, dear)
    assert front([dear, given_up]) == (dear,)


def test_what_does_not_last_is_said_and_not_on_the_front(planned: Planned) -> None:
    """100 % on the windows by which it was chosen, 20 % of a long one; the other attains 90 and 91 %."""
    cheap, dear = rated(1, 1000), rated(2, 900, True)
    drowns = replace(cheap, long=replace(cheap.score, rounds=9000, attained=1800))
    holds = replace(dear, long=replace(dear.score, rounds=9000, attained=8190))
    assert front([holds, drowns]) == (holds,)
    found = Found(holds, drowns, holds, None, None, None, None, (holds, drowns), (), 0.0)
    first = headline(found, 0.005)
    assert "90.0% attained (91.0% of 9,000 rounds in a row) at USD" in first
    assert (
        first.endswith(" per hour")
        and "(it does not last: 20.0% of 9,000 rounds in a row) at USD" in first
        and "for long" not in first
    )
    told = replace(planned, found=found, cheaper=(), cases=(), headline=first)
    assert [told.comparable(each) for each in (holds, drowns)] == [True, False]
    plans = document(told).plans
    assert [(p.lasts, p.long_attainment, p.long_rounds) for p in plans] == [
        (True, 0.91, 9000),
        (False, 0.2, 9000),
    ]
    words = "100.0%, then drowns: 20% of 9,000 rounds"
    assert words in page(told) and words == list(cells(drowns, 1.0))[1]
    none = headline(replace(found, best=drowns, disaggregated=None), 0.005)
    assert none.startswith("no plan of this budget that was looked at does this load for long")


def test_cheaper_plans_are_cheaper_and_new(world: World, planned: Planned) -> None:
    best = world.found.best.plan
    known = {each.plan for each in world.found.rated}
    assert planned.cheaper
    for each in planned.cheaper:
        assert each.plan.price_per_hour < best.price_per_hour and each.plan.fits(ASK.budget)
        assert each.plan not in known
    again = cheaper(ASK, world.menu.types, world.found, world.pool)
    assert again == planned.cheaper
    assert len(rated_plans(planned)) == len({each.plan for each in rated_plans(planned)})


# ---------------------------------------------------------------- around and explanation


def test_an_engine_more_and_fewer(world: World) -> None:
    beside = around(ASK, world.found, world.pool)
    plan = world.found.best.plan
    assert beside.best.plan == plan
    counts = [change for change in beside.changes if change.kind == "count"]
    assert {"more" in change.what for change in counts} == {True, False} or plan.engines == 1
    for change in counts:
        if change.rated is None:
            assert "more" in change.what
        else:
            assert abs(change.rated.plan.engines - plan.engines) == 1
            assert change.rated.plan.fits(ASK.budget)
    kinds = {change.kind for change in beside.changes}
    assert kinds >= {"policy", "C", "K"}
    for change in beside.changes:
        if change.kind in ("policy", "C", "K"):
            assert change.rated is not None and change.rated.plan.engines == plan.engines
            assert change.rated.plan != plan


def test_the_explanation_has_its_numbers(planned: Planned) -> None:
    told = planned.explanation
    assert told[0].startswith("binding, by the MILP: ")
    score = planned.found.best.score
    assert any(f"TTFT by {score.ttft_missed / score.rounds:.2%}" in line for line in told)
    assert any(line.startswith("policy is ") for line in told)
    for name in ("C", "K"):
        assert any(line.startswith(f"{name} is ") and "points" in line for line in told)
    # 32,761,446,400 parameters of 2 bytes on 4 GPUs
    assert any("16.4 GB of weights" in line for line in told)
    device = sum(g.count * g.type.device_tokens for g in planned.found.best.plan.pool("decode"))
    (memory,) = (line for line in told if " sessions under way with " in line)
    assert f"{planned.live_tokens / 1e6:.2f} million tokens of KV" in memory
    assert f"hold {device / 1e6:.2f} million on their devices" in memory
    assert memory.endswith("they fit the devices") == (planned.live_tokens <= device)
    assert any(line.startswith("no engine 1xh100: ") for line in told)


def test_live_sessions_that_do_not_fit(world: World) -> None:
    """Memory is told by the load, whatever the plan attained."""
    crowded = dataclasses.replace(world.workload, rate_per_s=100 * world.workload.rate_per_s)
    beside = around(ASK, world.found, world.pool)
    lines = explain(ASK, MODEL, crowded, world.found, world.solved, beside, ())
    assert lines[-4:] and any(line.endswith("they do not fit") for line in lines)


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("colocated", "other", "winner", "margin"),
    [
        (rated(2, 990), rated(2, 900, True), "co-located", "9.0 ± 2.0 points"),
        (rated(2, 900), rated(2, 990, True), "disaggregated", "9.0 ± 2.0 points"),
        (rated(2, 990), rated(3, 990, True), "co-located", "50% cheaper"),
        (rated(4, 990), rated(1, 988, True), "disaggregated", "50% cheaper"),
        (rated(2, 990), rated(1, 989, True), "equal", "same cost"),
        (rated(20, 990), rated(18, 990, True), "equal", "disaggregated 5% cheaper"),
        (rated(2, 800), rated(3, 790, True), "undecided", "+1.0 points for co-located, of ± 3.6 by windows"),
        (rated(2, 5), rated(1, 0, True), "neither", "both attain less than 1% of the rounds"),
        (rated(2, 990), None, "co-located", "no plan within the budget"),
        (None, None, "neither", "no plan within the budget"),
    ],
)
def test_who_wins_a_case(colocated: Rated | None, other: Rated | None, winner: str, margin: str) -> None:
    told = verdict(colocated, other, 0.005)
    assert told[0] == winner
    assert margin in told[1]


def test_who_drowns_has_lost_a_case() -> None:
    """Whatever it attained in short windows; both told apart in the tables too."""
    colocated, other = rated(2, 1000), rated(3, 900, True)
    drowns = replace(colocated, long=replace(colocated.score, attained=200))
    assert verdict(drowns, other, 0.005) == ("disaggregated", "the other form does not last")
    assert verdict(other, drowns, 0.005) == ("co-located", "the other form does not last")
    late = replace(other, long=replace(other.score, attained=300))
    assert verdict(drowns, late, 0.005) == ("neither", "neither form lasts")
    assert attained(drowns) == "100.0%, then drowns: 20% of 1,000 rounds" and attained(other) == "90.0%"


def test_the_known_cases() -> None:
    said: list[str] = []
    tried = cases(ASK, MODEL, MODELS, PRICES, SESSIONS["claude-code"], said.append, TINY)
    assert [case.name for case in tried] == [
        "single node", "short prompts", "low concurrency", "slow network", "small model",
    ]  # fmt: skip
    assert len(said) == len(tried)
    by_name = {case.name: case for case in tried}
    for case in tried:
        assert case.colocated is not None and case.colocated.plan.colocated
        assert case.disaggregated is not None and not case.disaggregated.plan.colocated
        assert case.winner in ("co-located", "disaggregated", "equal", "undecided")
    assert by_name["single node"].disaggregated.plan.gpus.keys() == {"h100"}  # type: ignore[union-attr]
    slow = by_name["slow network"].disaggregated.plan  # type: ignore[union-attr]
    assert {group.type.link_bytes_per_s for group in slow.groups} == {1.25e9}
    small = by_name["small model"].colocated.plan  # type: ignore[union-attr]
    assert {group.type.latency.name.rpartition("-h")[0] for group in small.groups} <= {"qwen3-8b", ""}
    shares = {case.name: case.rounds_per_s for case in tried}
    assert shares["single node"] == pytest.approx(shares["slow network"] / 2)
    assert shares["low concurrency"] == pytest.approx(shares["slow network"] / 5)


def test_a_case_that_nothing_can_do() -> None:
    """Less than any prefill takes."""
    asked = replace(ASK, slo=Slo(0.001, 0.05))
    for case in cases(asked, MODEL, MODELS, PRICES, SESSIONS["claude-code"], print, TINY):
        assert (case.winner, case.colocated, case.disaggregated) == ("neither", None, None)
        assert "no round can have a first token in 0.001 s" in case.margin


# ---------------------------------------------------------------- page and picture


def test_the_page_and_its_picture(planned: Planned) -> None:
    png = front_png(planned)
    assert png.startswith(b"\x89PNG") and png == front_png(planned)
    html = page(planned)
    assert "&lt;sessions&gt; &amp; more" in html and "<sessions>" not in html
    assert "data:image/png;base64," in html
    assert planned.headline.replace("+", "&#43;") in html or planned.headline in html
    for name, _ in planned.named():
        assert name in html
    assert "short prompts" in html and "25% cheaper" in html
    for line in planned.explanation[:1]:
        assert line in html
    assert page(replace(planned, cases=(), explanation=(), cheaper=())).count("<section") == 4


def costs(line: Line2D) -> list[float]:
    """Where its marks stand."""
    return [float(x) for x in np.asarray(line.get_xdata(), dtype=float)]


def test_what_does_not_compare_is_marked(planned: Planned) -> None:
    """Finalists have two windows, cheaper plans one of them; one plan is given up besides."""
    found = planned.found
    named = (found.best, found.colocated, found.disaggregated)
    other = next(each for each in reversed(found.rated) if each not in named)
    poor = replace(other, score=replace(other.score, hopeless=True))
    one, two = len(planned.cheaper), len(found.rated)
    rest = (*(each for each in found.rated if each is not other), poor)
    found = replace(planned.found, rated=rest, single_tier=None, equal_split=None, eq5=None, solved=None)
    told = replace(planned, found=found, cases=())
    assert poor.plan not in [rated.plan for _, rated in told.named()] and one
    plans = document(told).plans
    assert [(each.windows, each.given_up) for each in plans] == (
        [(2, False)] * (two - 1) + [(2, True)] + [(1, False)] * one
    )
    table = page(told).partition("plans of the picture")[2].partition("</table>")[0]
    assert table.count(">2<") == two - 1 and table.count(">2 *<") == 1 and table.count(">1 *<") == one
    assert table.count("given up at ") == 1
    assert "those with * on the first of them only" in page(told) and "Hollow points" in page(told)
    assert "the same 2 windows. By these" in page(told) and "nothing was chosen by" not in page(told)
    with drawing(4) as figure:
        axis = figure.subplots()
        draw_front(axis, told)
        hollow = [costs(line) for line in axis.lines if line.get_markerfacecolor() == "white"]
        assert sum(map(len, hollow)) == one + 1
    alike = replace(planned, cheaper=())
    assert all(windows_of(each) == 2 for each in rated_plans(alike))
    assert " *<" not in page(alike) and "Hollow points" not in page(alike)


def test_plans_at_the_same_place_are_both_seen(planned: Planned) -> None:
    """The plan and the best of the other form cost and attain the same: two rings, and a point in each."""
    together, apart = rated(2, 950), rated(1, 950, True)
    found = Found(together, together, apart, None, None, None, None, (together, apart), (), 0.0)
    with drawing(4) as figure:
        axis = figure.subplots()
        draw_front(axis, replace(planned, found=found, cheaper=()))
        marks = [costs(line) for line in axis.lines if line.get_marker() not in ("None", "")]
        places = [x for xs in marks for x in xs]
        assert len(places) == 4 and len(set(places)) == 2
        (one, _), (other, _) = axis.transData.transform([(x, 95.0) for x in sorted(set(places))])
    assert (other - one) * 72 / figure.dpi > 2 * SIZE


@given(
    st.lists(
        st.tuples(st.sampled_from((0.0, 3.0, 200.0)), st.sampled_from((0.0, 2.0)), st.floats(4, 15)),
        max_size=6,
    )
)
def test_no_mark_covers_another(marks: list[tuple[float, float, float]]) -> None:
    shifts = aside(marks)
    assert shifts[:1] in ([], [0.0])
    places = [(x + shift, y, size) for (x, y, size), shift in zip(marks, shifts, strict=True)]
    for (a, b, size), (x, y, other) in combinations(places, 2):
        assert hypot(a - x, b - y) >= (size + other) / 2


def test_the_answer_has_what_json_can_say(planned: Planned) -> None:
    assert msgspec.json.decode(msgspec.json.encode(planned.explanation)) == list(planned.explanation)
