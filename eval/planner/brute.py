"""Every plan of a budget simulated, under every policy of the menus: what the search is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from msgspec import Struct
from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask, choose
from antiphon.eval.planner.candidates import candidates
from antiphon.eval.planner.lasting import any_plan, choose_lasting, looked_at
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.refinement import tuned

BRUTE_SEEDS = 4_000_000
FAR = 0.06
"""Plans that are so far behind the best in a first window, half as long, are not simulated in the others."""
WINDOWS = 3


class Brute(Struct, frozen=True):
    """The best of all plans."""

    plan: Plan
    plans: int
    """That were simulated."""
    took_s: float


def all_plans(ask: Ask, types: Sequence[EngineType]) -> tuple[Plan, ...]:
    """All candidates with the defaults of C and K, under each policy of their menu."""
    plans = (
        replace(plan, policy=policy)
        for plan in candidates(ask, types)
        for policy in (ask.colocated_policies if plan.colocated else ask.policies)
    )
    return tuple(dict.fromkeys(plans))


def brute_force(
    ask: Ask, types: Sequence[EngineType], pool: ScorePool, rounds: int, told: Callable[[str], None]
) -> Brute:
    """The choice among all plans, on windows of `rounds`; then policy, C and K of it and of the best of each
    form are tuned by `refinement.tuned`, on the same windows, and the choice is made among all of them that
    last (`lasting.py`)."""
    began_s = perf_counter()
    plans = all_plans(ask, types)
    first = View(BRUTE_SEEDS, rounds // 2)
    views = tuple(View(BRUTE_SEEDS + 1 + n, rounds) for n in range(WINDOWS))
    few = pool.score(plans[:12], (first,))
    least = max(score.attainment for score in few) - FAR
    scores = (*few, *pool.score(plans[12:], (first,), max(0.0, least)))
    best = max(score.attainment for score in scores)
    near = [p for p, s in zip(plans, scores, strict=True) if s.attainment >= best - FAR]
    rated = pool.rate(near, views)
    leaders = [choose(rated, ask.tolerance).plan]
    for colocated in (True, False):
        of_form = [each for each in rated if each.plan.colocated is colocated]
        leaders += [choose(of_form, 0.0).plan] if of_form else []
    tuned_plans = [tuned(plan, ask, pool, views) for plan in dict.fromkeys(leaders)]
    every = {each.plan: each for each in (*rated, *tuned_plans)}
    long = View(BRUTE_SEEDS + 1 + WINDOWS, 10 * rounds)
    lasting = looked_at(tuple(every.values()), (any_plan,), pool, long, ask.tolerance, lambda plan, known: ())
    plan = choose_lasting(lasting, ask.tolerance).plan
    took_s = perf_counter() - began_s
    told(f"brute force: {len(plans)} plans, {len(near)} to the end, in {took_s:.1f} s: {plan.describe()}")
    return Brute(plan, len(plans), took_s)
