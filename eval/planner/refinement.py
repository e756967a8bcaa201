"""The plans that lead are varied, one step at a time; what is better leads then.

A step: another policy, C or K of the menus; an engine fewer, more, moved, of another kind.

Settings are looked at under a little more load than was asked for (`effort.STRESS`): they cost nothing, and
where all of them do well the one is wanted that has most in hand. Other fleets are looked at under the load
itself, since a cheaper one need not have any. Neither look decides: what promises most is simulated on the
windows that the leaders were simulated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from antiphon.eval.planner.ask import Ask, Rated, choose
from antiphon.eval.planner.effort import STRESS, Schedule
from antiphon.eval.planner.neighbours import neighbours, settings
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.screen import Screen

WORSE = 0.03
"""A variation that attains so much less than its leader is given up."""
HARDLY_WORSE = 0.02
"""A cheaper one may be that much worse in a quick look."""

DROWNING = 0.1
"""A fleet of which the screen says that it is so much too small (`Screen.estimate`) is not looked at."""

Fits = Callable[[Plan], bool]


class Refined(NamedTuple):
    """What came of it."""

    leaders: tuple[Plan, ...]
    """The best of all, then of each form."""
    variations: int
    """That were simulated as long as the leaders."""
    varied: int
    """Leaders whose surroundings were looked at."""


class Refinement:
    """Of the plans that one rung has rated."""

    def __init__(
        self,
        ask: Ask,
        types: Sequence[EngineType],
        pool: ScorePool,
        schedule: Schedule,
        rated: Sequence[Rated],
        views: Sequence[View],
    ) -> None:
        """`views`: on which `rated` were simulated."""
        self._ask, self._types, self._pool, self._schedule = ask, types, pool, schedule
        self._views = views
        self._screen = Screen(pool.workload, ask.slo, types)
        self._tried = {each.plan: each for each in rated}
        self._varied: set[Plan] = set()

    def run(self, forms: Sequence[Fits]) -> Refined:
        """The choice has half of the effort, each of `forms` its share of the rest."""
        pool, tolerance, before = self._pool, self._ask.tolerance, len(self._tried)
        began = pool.simulated_rounds
        found: list[Plan] = []
        for number, form in enumerate((lambda plan: True, *forms)):
            left = self._schedule.refinement_rounds - (pool.simulated_rounds - began)
            shares = 2 if number == 0 else len(forms) + 1 - number
            self._climb(form, pool.simulated_rounds + left / shares)
            known = self._of(form)
            if known:
                found += choose(known, tolerance).plan, choose(known, 0.0).plan
        leaders = choose(self._tried.values(), tolerance).plan, *found
        return Refined(tuple(dict.fromkeys(leaders)), len(self._tried) - before, len(self._varied))

    def _of(self, form: Fits) -> list[Rated]:
        return [each for each in self._tried.values() if form(each.plan)]

    def _climb(self, form: Fits, limit: float) -> None:
        """Until the leader stays the leader, or so many rounds have been simulated."""
        while (known := self._of(form)) and self._pool.simulated_rounds < limit:
            leader = choose(known, self._ask.tolerance)
            if leader.plan in self._varied:
                return
            self._varied.add(leader.plan)
            self._vary(leader)

    def _vary(self, leader: Rated) -> None:
        """Looks at all that is one step from `leader`; what promises most is simulated for longer."""
        price = leader.plan.price_per_hour
        hopeful = self._gains(leader.plan, settings(leader.plan, self._ask), STRESS)
        hopeful += self._gains(leader.plan, self._other_fleets(leader.plan), 1.0)
        hopeful = [(p, gain) for p, gain in hopeful if gain >= 0 or p.price_per_hour < price]
        hopeful.sort(key=lambda each: (-each[1], each[0].price_per_hour))
        cheaper = [plan for plan, _ in hopeful if plan.price_per_hour < price]
        first = [plan for plan, _ in hopeful[: self._schedule.effort.shortlist - 1]]
        chosen = tuple(dict.fromkeys((*first, *cheaper[:1])))
        for plan, score in zip(chosen, self._pool.score(chosen, self._views), strict=True):
            self._tried[plan] = Rated(plan, score)

    def _other_fleets(self, leader: Plan) -> Iterator[Plan]:
        least = min(0.0, self._screen.estimate(leader)) - DROWNING
        for plan in neighbours(leader, self._ask, self._types):
            if self._screen.estimate(plan) >= least:
                yield plan

    def _gains(self, leader: Plan, near: Iterable[Plan], rate_factor: float) -> list[tuple[Plan, float]]:
        """By how much each attains more than the leader in a quick look, but for those far behind."""
        fresh = tuple(plan for plan in dict.fromkeys(near) if plan not in self._tried)
        if not fresh:
            return []
        quick = self._schedule.quick(rate_factor)
        (own,) = self._pool.score((leader,), quick)
        scores = self._pool.score(fresh, quick, max(0.0, own.attainment - WORSE))
        gains = ((p, score.attainment - own.attainment) for p, score in zip(fresh, scores, strict=True))
        return [(plan, gain) for plan, gain in gains if gain >= -HARDLY_WORSE]


def tuned(plan: Plan, ask: Ask, pool: ScorePool, views: Sequence[View]) -> Rated:
    """The plan with the best of policy, C and K that changing one at a time finds, by attainment."""
    (score,) = pool.score((plan,), views)
    best, tried = Rated(plan, score), {plan}
    while True:
        near = tuple(each for each in dict.fromkeys(settings(best.plan, ask)) if each not in tried)
        tried.update(near)
        least = max(0.0, best.score.attainment - 0.05)
        rated = [Rated(p, s) for p, s in zip(near, pool.score(near, views, least), strict=True)]
        better = max(rated, key=lambda each: each.score.attainment, default=best)
        if better.score.attainment <= best.score.attainment:
            return best
        best = better
