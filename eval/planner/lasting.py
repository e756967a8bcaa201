"""Does a plan last? Who leads at the end is simulated in one long window; who drowns there does not lead.

Short windows see a fleet that is a little too small do well: it takes some unlucky minutes until slow rounds
have put so many sessions under way that none is fast any more (8 H200 as 4 x 2, 65 `hotpotqa` sessions per
second: 100 % in windows of 3,000 rounds, 27 % of 18,000). A long window for every plan would cost more than
the search, so only the choice and the best of either form have one. Where one drowns, fleets that are a step
larger are looked at too: in short windows they were as good and dearer, so that none of them is left.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask, Rated, choose
from antiphon.eval.planner.effort import Schedule
from antiphon.eval.planner.neighbours import neighbours
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool, View

SAG = 0.05
"""Of attainment: a plan that loses more in a long window does not last."""
FAR = 0.25
"""A form whose best attains so much less than the best of all is left as it is."""
LARGER = 3
"""Fleets a step larger that are looked at for one that drowns, the cheapest."""

Fits = Callable[[Plan], bool]
Larger = Callable[[Plan, Container[Plan]], Sequence[Rated]]
"""What is to be considered where a plan does not last, but for what is known."""


def any_plan(plan: Plan) -> bool:
    """The form of all."""
    return True


def lasts(rated: Rated) -> bool:
    """True of plans at which nobody has looked."""
    return rated.long is None or rated.long.attainment >= rated.score.attainment - SAG


def drowned(plan: Plan, rated: Iterable[Rated]) -> bool:
    """Whether one with these engines in these pools was found not to last, whatever its settings."""
    return any(not lasts(each) and _fleet(each.plan) == _fleet(plan) for each in rated)


def _fleet(plan: Plan) -> list[tuple[str, str, int]]:
    return sorted((group.pool, group.type.name, group.count) for group in plan.groups)


def choose_lasting(rated: Iterable[Rated], tolerance: float) -> Rated:
    """The choice, where what drowns is worth no more than it attains in the long window, and what was given
    up nothing, for nobody knows."""
    every = list(rated)
    known = {each.plan: each for each in [e for e in every if not e.score.hopeless] or every}
    return known[choose(map(_by_worth, known.values()), tolerance).plan]


def _by_worth(rated: Rated) -> Rated:
    return rated if rated.long is None or lasts(rated) else replace(rated, score=rated.long)


def looked_at(
    rated: Sequence[Rated],
    forms: Sequence[Fits],
    pool: ScorePool,
    view: View,
    tolerance: float,
    larger: Larger,
) -> list[Rated]:
    """`rated` and what `larger` has for those that drown; the choice of each of `forms` was simulated on
    `view`. Raises `PoolError`."""
    known = {each.plan: each for each in rated}
    while True:
        of_forms = ([each for each in known.values() if form(each.plan)] for form in forms)
        leaders = [choose_lasting(every, tolerance) for every in of_forms if every]
        far = max(_by_worth(each).score.attainment for each in leaders) - FAR
        unseen = {each.plan: each for each in leaders if each.long is None and not each.score.hopeless}
        fresh = [each for each in unseen.values() if each.score.attainment >= far]
        if not fresh:
            return list(known.values())
        least = min(each.score.attainment for each in fresh) - SAG
        longer = pool.score([each.plan for each in fresh], (view,), max(0.0, least))
        for each, long in zip(fresh, longer, strict=True):
            seen = known[each.plan] = replace(each, long=long)
            if not lasts(seen):
                known = {other.plan: other for other in larger(each.plan, known)} | known


def lasting_leaders(
    rated: Sequence[Rated],
    forms: Sequence[Fits],
    ask: Ask,
    types: Sequence[EngineType],
    pool: ScorePool,
    schedule: Schedule,
) -> list[Rated]:
    """`looked_at` on the long window of a schedule, if it has one; larger fleets on its last rung's."""
    view = schedule.long()
    if view is None:
        return list(rated)
    larger = larger_fleets(ask, types, pool, schedule.last())
    return looked_at(rated, forms, pool, view, ask.tolerance, larger)


def larger_fleets(ask: Ask, types: Sequence[EngineType], pool: ScorePool, views: Sequence[View]) -> Larger:
    """Of the same form, rated on `views`."""

    def larger(plan: Plan, known: Container[Plan]) -> Sequence[Rated]:
        dearer = [
            each
            for each in neighbours(plan, ask, types)
            if each.price_per_hour > plan.price_per_hour and each.colocated == plan.colocated
        ]
        dearer.sort(key=lambda each: each.price_per_hour)
        return pool.rate([each for each in dearer[:LARGER] if each not in known], views)

    return larger
