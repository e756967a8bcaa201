"""How much the search simulates, on which windows, and what it looks at around the plans that lead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.eval.planner.ask import Rated, choose
from antiphon.eval.planner.effort import STRESS, Effort, Schedule
from antiphon.eval.planner.plans import Plan, group
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.refinement import Refinement, tuned
from antiphon.eval.planner.score import Score
from antiphon.eval.planner.workload import Workload
from tests.test_planner_search import H200, SHORT, SLO, ask, workload
from tests.test_planner_workload import WINDOW_TOKENS


@given(st.integers(0, 1000), st.floats(1.0, 5.0))
def test_no_window_is_used_twice(seed: int, stretch: float) -> None:
    """By two of the rungs, the quick looks and the last rung; nor by two seeds."""
    schedule = Schedule(Effort(), seed, stretch, 0.0)
    rungs = [schedule.rung(number) for number in range(len(Effort().rungs))]
    seeds = [view.seed for views in (*rungs, schedule.quick(), schedule.last()) for view in views]
    long = schedule.long()
    assert long is not None and long.rounds >= 5 * schedule.last()[0].rounds
    seeds.append(long.seed)
    assert len(set(seeds)) == len(seeds)
    other = {view.seed for view in Schedule(Effort(), seed + 1, stretch, 0.0).last()}
    assert not other & set(seeds)


def test_many_live_sessions_stretch_the_windows() -> None:
    """sqrt(2000 / 500) = 2, but for the first rung and quick looks."""
    few = workload(0.02)
    many = dataclasses.replace(few, rate_per_s=few.rate_per_s * 2000 / few.live_sessions)
    schedule = Schedule.of(Effort(), 0, many)
    assert [schedule.rung(n)[0].rounds for n in range(2)] == [500, 4000]
    assert Schedule.of(Effort(), 0, few).stretch == 1.0


class _Told(ScorePool):
    """Scores by a table instead of a simulation, and keeps what was asked."""

    def __init__(self, given: Workload, attained: dict[tuple[str, int, float], int]) -> None:
        super().__init__(given, SLO, WINDOW_TOKENS, 1)
        self.attained = attained
        self.asked: list[tuple[Plan, View]] = []

    def score(self, plans: object, views: Sequence[View], least: float = 0.0) -> tuple[Score, ...]:
        known = tuple(plans)  # type: ignore[arg-type, var-annotated]
        self.asked += [(plan, views[0]) for plan in known]
        self.simulated_rounds += len(known) * len(views) * 100
        return tuple(self._told(plan, views[0]) for plan in known)

    def _told(self, plan: Plan, view: View) -> Score:
        key = plan.policy, plan.groups[0].chunk_tokens, view.rate_factor
        attained = self.attained.get(key, 900)
        return Score(1000, attained, 0, 0, 0, 0.5, 0.5, 100)


def test_settings_are_looked_at_under_stress_and_other_fleets_under_the_load() -> None:
    """At the load itself C 2048 and C 8192 both attain all; with a little more only C 8192 does."""
    leader = Plan((group("decode", H200[0], 1),), "adaptive")
    assert leader.groups[0].chunk_tokens == 2048
    table = {
        ("adaptive", 2048, 1.0): 1000, ("adaptive", 8192, 1.0): 1000,
        ("adaptive", 2048, STRESS): 950, ("adaptive", 8192, STRESS): 990,
    }  # fmt: skip
    pool = _Told(workload(0.02), table)
    asked = ask({"h200": 8}, 0.02)
    schedule = Schedule.of(SHORT, 0, pool.workload)
    rated = [Rated(leader, pool.score((leader,), schedule.rung(0))[0])]
    refined = Refinement(asked, H200[:1], pool, schedule, rated, schedule.rung(0)).run(())
    stressed = {plan for plan, view in pool.asked if view.rate_factor == STRESS}
    assert leader in stressed and all(plan.gpus == leader.gpus for plan in stressed)
    calm = {plan for plan, view in pool.asked if view == schedule.quick()[0]}
    assert {plan.engines for plan in calm} == {1, 2}
    longer = {plan.groups[0].chunk_tokens for plan, view in pool.asked if view == schedule.rung(0)[0]}
    assert 8192 in longer and 1024 not in longer and 4096 not in longer
    assert refined.variations > 0 and refined.varied >= 1


def test_a_form_that_is_far_behind_is_left_as_it_is() -> None:
    """A co-located plan attains 60 %, one that is split 90: only that is varied."""
    together = Plan((group("decode", H200[0], 1),), "local")
    apart = Plan((group("prefill", H200[0], 1), group("decode", H200[0], 1)), "adaptive")
    pool = _Told(workload(0.02), {("local", 2048, 1.0): 600, ("adaptive", 8192, 1.0): 900})
    asked = replace(ask({"h200": 8}, 0.02), colocated_policies=("local",))
    schedule = Schedule.of(SHORT, 0, pool.workload)
    views = schedule.rung(0)
    rated = [Rated(plan, pool.score((plan,), views)[0]) for plan in (together, apart)]
    forms = (lambda plan: plan.colocated, lambda plan: not plan.colocated)
    refined = Refinement(asked, H200[:1], pool, schedule, rated, views).run(forms)
    looked_at = {plan for plan, view in pool.asked if view != views[0]}
    assert together in refined.leaders and together not in looked_at and apart in looked_at


def test_the_tuned_plan_is_the_best_that_one_change_at_a_time_finds() -> None:
    """2048 -> 4096 -> another policy at 4096."""
    leader = Plan((group("decode", H200[0], 2),), "adaptive")
    table = {
        ("adaptive", 2048, 1.0): 910, ("adaptive", 4096, 1.0): 930, ("local", 4096, 1.0): 960,
        ("local", 2048, 1.0): 905,
    }  # fmt: skip
    asked = replace(ask({"h200": 8}, 0.02), decode_intervals=(4,))
    best = tuned(leader, asked, _Told(workload(0.02), table), (View(1, 100),))
    assert (best.plan.policy, best.plan.groups[0].chunk_tokens) == ("local", 4096)
    assert choose([best], 0.0).score.attainment == 0.96


def test_long_sessions_lengthen_the_windows() -> None:
    """Sessions with 1,600 rounds lengthen them, and a quick look to 1,000 at most; 160 rounds are
    fewer than it has anyway."""
    schedule = Schedule(Effort(), 0, 1.0, 1600.0)
    assert schedule.quick()[0].rounds == 1000 and schedule.last()[0].rounds == 2000
    assert schedule.refinement_rounds == pytest.approx(40_000 * 2)
    short = Schedule(Effort(), 0, 1.0, 160.0)
    assert short.quick()[0].rounds == 500 and short.last()[0].rounds == 1500
    assert Schedule(Effort(), 0, 1.0, 1e6).quick()[0].rounds == 1000
