"""Who leads at the end must do so in a long window too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.eval.planner import lasting
from antiphon.eval.planner.ask import Rated, choose
from antiphon.eval.planner.effort import LONG, Schedule
from antiphon.eval.planner.lasting import SAG, choose_lasting, lasts, looked_at
from antiphon.eval.planner.plans import Plan, group
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.score import Score
from antiphon.eval.planner.search import search
from tests.test_planner_search import H200, SHORT, SLO, ask, workload
from tests.test_planner_workload import WINDOW_TOKENS

LOAD = workload(0.02)
VIEW = View(99, 10_000)


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


def test_what_lasts() -> None:
    """99 % and 94 in the long window: it does; 93: it does not, unless the short windows said so little."""
    plan, sure = together(1), told(0.99, 10_000)
    assert lasts(Rated(plan, sure)) and lasts(Rated(plan, sure, told(0.94)))
    assert not lasts(Rated(plan, sure, told(0.93)))
    unsure = Score(1000, 900, 0, 0, 0, 0.5, 0.5, 1000, by_window=(0.98, 0.82))
    assert unsure.noise == pytest.approx(0.08)
    assert lasts(Rated(plan, unsure, told(0.75))) and not lasts(Rated(plan, unsure, told(0.73)))


def test_the_next_leads_when_the_first_drowns() -> None:
    """The cheapest drowns, the next two are looked at; nobody looks at who never leads."""
    attained = {together(1): 0.2, together(2): 0.99, together(3): 1.0, apart(1): 0.97, apart(2): 1.0}
    rated = [Rated(plan, told(1.0)) for plan in attained]
    pool = Long(attained)
    forms = (lambda plan: True, lambda plan: plan.colocated, lambda plan: not plan.colocated)
    looked = looked_at(rated, forms, pool, VIEW, 0.005)
    assert [plan for plan, _ in pool.asked] == [together(1), apart(1), together(2)]
    assert {least for _, least in pool.asked} == {1.0 - SAG}
    assert {each.plan for each in looked} == set(attained)
    assert choose(looked, 0.005).plan == together(1) and choose_lasting(looked, 0.005).plan in (
        apart(1),
        together(2),
    )
    assert [each.plan for each in looked if not lasts(each)] == [together(1)]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_choice_lasts_if_any_of_those_looked_at_does(known: list[tuple[float, float]]) -> None:
    rated = [Rated(together(n + 1), told(short)) for n, (short, _) in enumerate(known)]
    pool = Long({together(n + 1): long for n, (_, long) in enumerate(known)})
    looked = looked_at(rated, (lambda plan: True,), pool, VIEW, 0.005)
    best = choose_lasting(looked, 0.005)
    assert len(pool.asked) == len({plan for plan, _ in pool.asked}) <= lasting.MOST_LOOKS
    assert lasts(best) or not any(map(lasts, looked))
    if len(known) < lasting.MOST_LOOKS:  # it had time to find one
        assert best.long is not None or not lasts(best)


def test_a_fleet_that_drowns_late_is_not_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine attains all in short windows, and a fifth of a long one: two are the plan."""
    long_seed = Schedule.of(SHORT, 0, LOAD, SLO.ttft_s).seed * 10_000 + LONG * 100

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
