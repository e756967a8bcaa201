"""Who leads at the end must do so in a long window too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.eval.planner.ask import Rated, choose
from antiphon.eval.planner.effort import LONG, Schedule
from antiphon.eval.planner.lasting import (
    LARGER,
    SAG,
    any_plan,
    choose_lasting,
    drowned,
    larger_fleets,
    lasts,
    looked_at,
)
from antiphon.eval.planner.plans import Plan, group
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.score import Score
from antiphon.eval.planner.search import search
from tests.test_planner_search import H200, SHORT, SLO, ask, workload
from tests.test_planner_workload import WINDOW_TOKENS

LOAD = workload(0.02)
VIEW = View(99, 10_000)
FORMS = (any_plan, lambda plan: plan.colocated, lambda plan: not plan.colocated)


def told(attained: float, rounds: int = 1000) -> Score:
    return Score(rounds, round(attained * rounds), 0, 0, 0, 0.5, 0.5, rounds)


def together(engines: int) -> Plan:
    return Plan((group("decode", H200[0], engines),), "adaptive")


def apart(engines: int) -> Plan:
    return Plan((group("prefill", H200[0], 1), group("decode", H200[0], engines)), "adaptive")


class Long(ScorePool):
    """Knows how each plan does in the long window, and who was asked for."""

    def __init__(self, attained: dict[Plan, float]) -> None:
        super().__init__(LOAD, SLO, WINDOW_TOKENS, 1)
        self.attained = attained
        self.asked: list[tuple[Plan, float]] = []

    def score(self, plans: Iterable[Plan], views: Sequence[View], least: float = 0.0) -> tuple[Score, ...]:
        assert views == (VIEW,)
        known = tuple(plans)
        self.asked += [(plan, least) for plan in known]
        return tuple(told(self.attained[plan], 10_000) for plan in known)


def nothing(plan: Plan, known: Container[Plan]) -> Sequence[Rated]:
    return ()


def test_what_lasts() -> None:
    """99 % and 94 in the long window: it does; 93: it does not, however the short ones differ."""
    plan, sure = together(1), told(0.99, 10_000)
    assert lasts(Rated(plan, sure)) and lasts(Rated(plan, sure, told(0.94)))
    assert not lasts(Rated(plan, sure, told(0.93)))
    unsure = replace(sure, by_window=(1.0, 0.7))
    assert not lasts(Rated(plan, unsure, told(0.93)))


def test_what_drowns_is_worth_what_it_attains_then() -> None:
    """A drowns at 90 %, B holds 3 %: A is the choice, and is known not to last. At 50 % it is C, which holds
    82. What was given up is worth nothing, unless there is nothing else."""
    a, b, c = Rated(together(1), told(1.0)), Rated(together(2), told(0.03)), Rated(together(3), told(0.82))
    assert choose_lasting([a, b, c], 0.005) is a
    late = replace(a, long=told(0.9))
    assert choose_lasting([late, b], 0.005) is late and not lasts(late)
    assert choose_lasting([replace(a, long=told(0.5)), b, c], 0.005) is c
    given_up = replace(c, score=replace(c.score, hopeless=True))
    assert choose_lasting([given_up, b], 0.005) is b and choose_lasting([given_up], 0.005) is given_up


def test_who_is_known_to_drown() -> None:
    """Whatever its settings; not with another engine."""
    drowns = Rated(together(1), told(1.0), told(0.2))
    other = replace(together(1), policy="local")
    assert drowned(other, [drowns]) and not drowned(together(2), [drowns])
    assert not drowned(other, [replace(drowns, long=told(1.0))]) and not drowned(apart(1), [drowns])


def test_the_next_leads_when_the_first_drowns() -> None:
    """The cheapest drowns, the next two are looked at; nobody looks at who never leads, or is far behind."""
    attained = {together(1): 0.2, together(2): 0.99, together(3): 1.0, apart(1): 0.97, apart(2): 1.0}
    rated = [Rated(plan, told(1.0)) for plan in attained]
    pool = Long(attained)
    looked = looked_at(rated, FORMS, pool, VIEW, 0.005, nothing)
    assert [plan for plan, _ in pool.asked] == [together(1), apart(1), together(2)]
    assert {least for _, least in pool.asked} == {1.0 - SAG}
    assert {each.plan for each in looked} == set(attained)
    assert choose(looked, 0.005).plan == together(1)
    assert choose_lasting(looked, 0.005).plan in (apart(1), together(2))
    assert [each.plan for each in looked if not lasts(each)] == [together(1)]
    far = [each for each in rated if each.plan.colocated] + [Rated(apart(1), told(0.7))]
    pool = Long(attained)
    looked_at(far, FORMS, pool, VIEW, 0.005, nothing)
    assert [plan for plan, _ in pool.asked] == [together(1), together(2)]


def test_larger_fleets_take_the_place_of_those_that_drown() -> None:
    """One engine drowns, and two; three last. None but the first was left by the rungs."""
    attained = {together(n): 1.0 if n > 2 else 0.2 for n in (1, 2, 3, 4)}
    pool = Long(attained)
    asked: list[Plan] = []

    def larger(plan: Plan, known: Container[Plan]) -> Sequence[Rated]:
        asked.append(plan)
        return [Rated(together(plan.groups[0].count + 1), told(1.0))]

    looked = looked_at([Rated(together(1), told(1.0))], FORMS, pool, VIEW, 0.005, larger)
    assert choose_lasting(looked, 0.005).plan == together(3)
    assert asked == [together(1), together(2)] and len(looked) == 3


def test_larger_fleets_are_dearer_of_the_same_form_and_not_known() -> None:
    pool, plan = Long(defaultdict(lambda: 1.0)), together(1)
    larger = larger_fleets(ask({"h200": 8}, 0.02), H200, pool, (VIEW,))
    found = [each.plan for each in larger(plan, ())]
    assert together(2) in found and len(found) <= LARGER
    assert all(each.price_per_hour > plan.price_per_hour and each.colocated for each in found)
    assert [each.plan for each in larger(plan, {together(2)})] == [p for p in found if p != together(2)]
    assert larger(plan, found) == [] and len(pool.asked) == 2 * len(found) - 1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_nobody_leads_at_whom_nobody_looked(known: list[tuple[float, float]]) -> None:
    """Nor anything that is worth less than another at which somebody has looked."""
    rated = [Rated(together(n + 1), told(short)) for n, (short, _) in enumerate(known)]
    pool = Long({together(n + 1): long for n, (_, long) in enumerate(known)})
    looked = looked_at(rated, (any_plan,), pool, VIEW, 0.005, nothing)
    best = choose_lasting(looked, 0.005)
    assert best.long is not None
    assert len(pool.asked) == len({plan for plan, _ in pool.asked})
    worth = best.score.attainment if lasts(best) else best.long.attainment
    for each in looked:
        if each.long is not None:
            other = each.score.attainment if lasts(each) else each.long.attainment
            assert other <= worth + 0.005 + 1e-9


def test_a_fleet_that_drowns_late_is_not_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine attains all in short windows, and a fifth of a long one: two are the plan."""
    long_seed = Schedule.of(SHORT, 0, LOAD).seed * 10_000 + LONG * 100

    def scored(
        pool: ScorePool, plans: Iterable[Plan], views: Sequence[View], least: float = 0.0
    ) -> tuple[Score, ...]:
        late = views[0].seed == long_seed
        return tuple(told(0.2 if late and plan.engines == 1 else 1.0) for plan in plans)

    monkeypatch.setattr(ScorePool, "score", scored)
    asked = ask({"h200": 8}, 0.02, policies=(), colocated_policies=("adaptive",))
    said: list[str] = []

    def best_engines(long_rounds: int) -> int:
        effort = SHORT._replace(long_rounds=long_rounds)
        return search(asked, H200[:1], LOAD, (), said.append, effort=effort).best.plan.engines

    assert best_engines(0) == 1 and not any("last for" in line for line in said)
    assert best_engines(5000) == 2
    assert "1 of 2 leaders last for 5000 rounds" in said[-1]
