"""The plans that lead are varied, one step at a time; what is better leads then.

A step: an engine fewer, more, moved, of another kind; for who still leads then, another policy, C or K.

Settings are looked at under a little more load than was asked for (`effort.STRESS`): they cost nothing, and
where all of them do well the one is wanted that has most in hand. Other fleets are looked at under the load
itself, since a cheaper one need not have any. Neither look decides: what promises most is simulated on the
windows that the leaders were simulated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from antiphon.eval.planner.ask import Ask, Rated, choose
from antiphon.eval.planner.effort import STRESS, Schedule
from antiphon.eval.planner.lasting import FAR, Fits, any_plan
from antiphon.eval.planner.neighbours import neighbours, settings
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.screen import Screen

WORSE = 0.03
"""A variation that attains so much less than its leader is given up."""
HARDLY_WORSE = 0.02
"""A cheaper one may be that much worse in a quick look."""

SHARE = 2 / 3
"""Of the effort that is left: what the choice has, then each form."""
DROWNING = 0.1
"""A fleet of which the screen says that it is so much too small (`Screen.estimate`) is not looked at."""

Gains = list[tuple[Plan, float]]
"""Plans, and what each attains more than a leader."""
Look = Callable[[Plan], Gains]


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
        self._varied: dict[Plan, list[Look]] = {}
        """Leaders, and at what of their surroundings to look yet; the last comes first."""
        self._step_rounds = 0
        """Simulated for the last look."""

    def run(self, forms: Sequence[Fits]) -> Refined:
        """The choice has two thirds of the effort, each of `forms` that is not far behind two thirds of the
        rest, and the choice what they leave."""
        tolerance, before = self._ask.tolerance, len(self._tried)
        limit = self._pool.simulated_rounds + self._schedule.refinement_rounds
        self._climb(any_plan, SHARE, limit)
        for form in forms:
            if self._is_near(form):
                self._climb(form, SHARE, limit)
        self._climb(any_plan, 1.0, limit)
        found: list[Plan] = []
        for form in (any_plan, *forms):
            if known := self._of(form):
                found += choose(known, tolerance).plan, choose(known, 0.0).plan
        return Refined(tuple(dict.fromkeys(found)), len(self._tried) - before, len(self._varied))

    def _is_near(self, form: Fits) -> bool:
        best = max(each.score.attainment for each in self._tried.values())
        return any(each.score.attainment >= best - FAR for each in self._of(form))

    def _of(self, form: Fits) -> list[Rated]:
        return [each for each in self._tried.values() if form(each.plan)]

    def _climb(self, form: Fits, share: float, limit: float) -> None:
        """Other fleets until the leader stays the leader, then its settings; or until half of a step like the
        last would pass this share of the rounds that are left until `limit`."""
        limit = self._pool.simulated_rounds + share * (limit - self._pool.simulated_rounds)
        while (known := self._of(form)) and self._pool.simulated_rounds + self._step_rounds / 2 < limit:
            leader = choose(known, self._ask.tolerance)
            looks = self._varied.setdefault(leader.plan, [self._settings, self._other_fleets])
            if not looks:
                return
            began = self._pool.simulated_rounds
            self._vary(leader, looks.pop())
            self._step_rounds = self._pool.simulated_rounds - began

    def _vary(self, leader: Rated, look: Look) -> None:
        """Looks at what is one step from `leader`; what promises most is simulated for longer."""
        price = leader.plan.price_per_hour
        hopeful = look(leader.plan)
        hopeful = [(p, gain) for p, gain in hopeful if gain >= 0 or p.price_per_hour < price]
        hopeful.sort(key=lambda each: (-each[1], each[0].price_per_hour))
        cheaper = [plan for plan, _ in hopeful if plan.price_per_hour < price]
        first = [plan for plan, _ in hopeful[: self._schedule.effort.shortlist - 1]]
        chosen = tuple(dict.fromkeys((*first, *cheaper[:1])))
        self._tried.update((rated.plan, rated) for rated in self._pool.rate(chosen, self._views))

    def _settings(self, leader: Plan) -> Gains:
        return self._gains(leader, settings(leader, self._ask), STRESS)

    def _other_fleets(self, leader: Plan) -> Gains:
        least = min(0.0, self._screen.estimate(leader)) - DROWNING
        near = neighbours(leader, self._ask, self._types)
        return self._gains(leader, (plan for plan in near if self._screen.estimate(plan) >= least), 1.0)

    def _gains(self, leader: Plan, near: Iterable[Plan], rate_factor: float) -> Gains:
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
    (best,), tried = pool.rate((plan,), views), {plan}
    while True:
        near = tuple(each for each in dict.fromkeys(settings(best.plan, ask)) if each not in tried)
        tried.update(near)
        least = max(0.0, best.score.attainment - 0.05)
        rated = [Rated(p, s) for p, s in zip(near, pool.score(near, views, least), strict=True)]
        better = max(rated, key=lambda each: each.score.attainment, default=best)
        if better.score.attainment <= best.score.attainment:
            return best
        best = better
