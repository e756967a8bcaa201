"""The simulation-backed search: successive halving over all plans, then refinement of those that lead.

1. A screen (`screen.py`) orders every plan within the budget; the first rung simulates the most promising
   of them for a short while, each further rung fewer plans for longer.
2. The leaders are varied: a policy, C or K of the menus, an engine fewer, more, moved, of another kind.
3. The last rung scores the leaders on windows that nothing was chosen by, and the plan is chosen there.

A rung keeps plans that may still be the choice (as good as the best but for noise, then cheaper), and always
those that the answer names: the best co-located, disaggregated and of one kind of GPU, the equal split, and
what came from outside (the MILP's plans). Effort is counted in simulated rounds, never by a clock: the same
ask has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from math import sqrt
from time import perf_counter
from typing import NamedTuple

from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask, Found, Infeasible, Rated, Rung, Solved, choose
from antiphon.eval.planner.candidates import candidates, equal_splits
from antiphon.eval.planner.engine_types import gpu_budget
from antiphon.eval.planner.neighbours import neighbours, set_like, settings
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.screen import Screen
from antiphon.eval.planner.workload import Workload

OnProgress = Callable[[str], None]


class Effort(NamedTuple):
    """How much is simulated. A rung: (plans, rounds of a window, windows)."""

    rungs: tuple[tuple[int, int, int], ...] = ((60, 400, 1), (18, 900, 1), (7, 1400, 2))
    last: tuple[int, int, int] = (5, 1800, 3)
    quick_rounds: int = 600
    """Of the one window by which variations of a leader are looked at first."""
    shortlist: int = 3
    """Of a leader's variations: so many are simulated as long as the leader was."""
    refinement_rounds: int = 45_000
    """Simulated for the refinement; it ends at the step that passes them."""


FEW_LIVE = 200
"""Live sessions up to which rounds are as `Effort` says; beyond, they grow as the root of their number."""
FAR = 0.25
"""Plans that attain so much less than the best so far are given up within a simulation."""
DROWNING_TARGETS = 30
"""TTFT targets that a window of the last rung lasts: the queue of a fleet that is 3 % too small has grown by
one by then."""


class _Seeds(NamedTuple):
    """Windows of the rungs, of quick looks and of the last rung have nothing in common."""

    base: int

    def views(self, rung: int, rounds: int, windows: int) -> tuple[View, ...]:
        first = self.base * 10_000 + rung * 100
        return tuple(View(first + n, rounds) for n in range(windows))


LAST = 90
"""The last rung's place among the windows."""


def last_views(ask: Ask, found: Found) -> tuple[View, ...]:
    """The windows on which `found` was chosen."""
    return _Seeds(ask.seed).views(LAST, found.rungs[-1].rounds, found.rungs[-1].windows)


def search(
    ask: Ask,
    types: Sequence[EngineType],
    workload: Workload,
    seeds: Sequence[Plan] = (),
    on_progress: OnProgress | None = None,
    *,
    solved: Solved | None = None,
    pool: ScorePool | None = None,
    effort: Effort | None = None,
) -> Found:
    """The plan for an ask. `seeds`: plans that come to the last rung whatever they do at first, beside those
    of `solved`. `pool`: processes that are there already.

    Raises `Infeasible` when no plan of the ask fits its budget, `PoolError` when a process dies.
    """
    own = pool or ScorePool(workload, ask.slo, ask.window_tokens, ask.jobs)
    try:
        return _Search(ask, types, own, on_progress or _silent, effort or Effort()).run(seeds, solved)
    finally:
        if pool is None:
            own.close()


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


def _silent(message: str) -> None:
    pass


class _Search:
    def __init__(
        self, ask: Ask, types: Sequence[EngineType], pool: ScorePool, told: OnProgress, effort: Effort
    ) -> None:
        self.ask = replace(ask, budget=gpu_budget(ask))
        self.types, self.pool, self.told, self.effort = types, pool, told, effort
        self.stretch = max(1.0, sqrt(pool.workload.live_sessions / FEW_LIVE))
        self.windows = _Seeds(ask.seed)
        self.rungs: list[Rung] = []

    def run(self, seeds: Sequence[Plan], solved: Solved | None) -> Found:
        began_s = perf_counter()
        given = list(seeds)
        if solved is not None:
            given += [plan for plan in (solved.eq5, solved.plan) if plan is not None]
        given = [plan for plan in dict.fromkeys(given) if plan.fits(self.ask.budget)]
        equal = equal_splits(self.ask, self.types)
        plans = tuple(dict.fromkeys((*given, *candidates(self.ask, self.types))))
        if not plans:
            raise Infeasible("no plan fits the budget", "more GPUs, or smaller tensor-parallel degrees")
        screened = self._screened(plans)
        staying = self._kept(screened, self.effort.rungs[0][0], 0.1, (*given, *equal))
        rated: list[Rated] = []
        for number, (_, rounds, windows) in enumerate(self.effort.rungs):
            views = self.windows.views(number, self._rounds(rounds), windows)
            rated = self._rung(staying, views)
            following = (*self.effort.rungs[1:], self.effort.last)[number][0]
            valued = [(each.plan, each.score.attainment) for each in rated]
            margin = max(self.ask.tolerance, 2 * max(each.score.noise for each in rated[:3]))
            fixed = (*given, *self._best_equal(rated, equal))
            staying = self._kept(valued, following, margin, fixed)
        leaders = self._refined(rated, views)
        last = self.effort.last
        alike = (set_like(plan, leaders[0]) for plan in leaders)
        finalists = dict.fromkeys((*leaders, *alike, *staying))
        views = self.windows.views(LAST, self._last_rounds(last[1]), last[2])
        rated = self._rung(tuple(finalists), views)
        return self._found(rated, solved, equal, perf_counter() - began_s)

    # ---------------------------------------------------------------- rungs

    def _rounds(self, rounds: int) -> int:
        return round(rounds * self.stretch)

    def _last_rounds(self, rounds: int) -> int:
        """Long enough to see a fleet drown that is a little too small, at most three times the rounds."""
        usual = self._rounds(rounds)
        lasting = self.pool.workload.rounds_per_s * DROWNING_TARGETS * self.ask.slo.ttft_s
        return max(usual, min(3 * usual, round(lasting)))

    def _screened(self, plans: Sequence[Plan]) -> list[tuple[Plan, float]]:
        began_s = perf_counter()
        screen = Screen(self.pool.workload, self.ask.slo, self.types)
        screened = [(plan, screen.estimate(plan)) for plan in plans]
        self.told(f"{len(plans)} plans within the budget, screened in {perf_counter() - began_s:.1f} s")
        return screened

    def _rung(self, plans: Sequence[Plan], views: Sequence[View]) -> list[Rated]:
        """The plans simulated, the choice first, then by attainment."""
        began_s = perf_counter()
        rated = self._rated(plans, views)
        took_s = perf_counter() - began_s
        self.rungs.append(Rung(len(plans), views[0].rounds, len(views), took_s))
        best = choose(rated, self.ask.tolerance)
        self.told(
            f"{len(plans)} plans x {len(views)} windows of {views[0].rounds} rounds in {took_s:.1f} s:"
            f" {best.score.attainment:.1%} by {best.plan.describe()}"
        )
        return self._in_order(rated)

    def _rated(self, plans: Sequence[Plan], views: Sequence[View]) -> list[Rated]:
        """In order. The first few say what is far behind: the others are given up when they are."""
        few = plans[:6]
        rated = [Rated(p, s) for p, s in zip(few, self.pool.score(few, views), strict=True)]
        least = max((each.score.attainment for each in rated), default=0.0) - FAR
        rest = plans[6:]
        scores = self.pool.score(rest, views, max(0.0, least))
        return rated + [Rated(p, s) for p, s in zip(rest, scores, strict=True)]

    def _in_order(self, rated: Iterable[Rated]) -> list[Rated]:
        known = list(rated)
        best = choose(known, self.ask.tolerance)
        known.sort(key=lambda r: (r is not best, -r.score.attainment, r.plan.price_per_hour))
        return known

    def _kept(
        self, valued: Sequence[tuple[Plan, float]], count: int, margin: float, fixed: Iterable[Plan]
    ) -> tuple[Plan, ...]:
        """`fixed`, the best of each form, and about `count` more, in the order of their promise.

        By turns: the cheapest that may be as good as the best; the best; those that nothing cheaper beats.
        """
        best = max(value for _, value in valued)
        good = best - self.ask.tolerance - margin
        by_price = sorted(valued, key=lambda v: (v[0].price_per_hour, -v[1]))
        cheapest = [v for v in by_price if v[1] >= good]
        highest = sorted(valued, key=lambda v: (-v[1], v[0].price_per_hour))
        regrets: list[tuple[float, tuple[Plan, float]]] = []
        cheaper = float("-inf")
        for each in by_price:
            cheaper = max(cheaper, each[1])
            regrets.append((cheaper - each[1], each))
        front = [each for _, each in sorted(regrets, key=lambda r: (r[0], -r[1][1]))]
        kept: dict[Plan, float] = {}
        for ranks in zip_longest(cheapest, highest, front):
            for ranked in ranks:
                if ranked is not None and len(kept) < count:
                    kept.setdefault(*ranked)
        for form in self._forms():
            of_form = [v for v in highest if form(v[0])]
            for each in of_form[:2]:
                kept.setdefault(*each)
        values = dict(valued)
        for plan in fixed:
            kept.setdefault(plan, values[plan])
        return tuple(sorted(kept, key=lambda plan: -kept[plan]))

    def _forms(self) -> list[Callable[[Plan], bool]]:
        """What the answer has a best of."""
        forms: list[Callable[[Plan], bool]] = [_colocated, _disaggregated]
        gpus = dict.fromkeys(each.gpu for each in self.types)
        if len(gpus) > 1:
            forms += [lambda plan, gpu=gpu: set(plan.gpus) == {gpu} for gpu in gpus]  # type: ignore[misc]
        return forms

    def _best_equal(self, rated: Iterable[Rated], equal: Sequence[Plan]) -> tuple[Plan, ...]:
        known = [each for each in rated if each.plan in equal]
        return (choose(known, 0.0).plan,) if known else ()

    # ---------------------------------------------------------------- refinement

    def _refined(self, rated: Sequence[Rated], views: Sequence[View]) -> list[Plan]:
        """The best of all, then of each form, with the best settings and neighbours that were found."""
        began_s, simulated = perf_counter(), self.pool.simulated_rounds
        tried = {each.plan: each for each in rated}
        quick = self.windows.views(80, self._rounds(self.effort.quick_rounds), 1)
        forms: list[Callable[[Plan], bool]] = [lambda plan: True, *self._forms()]
        found: list[Plan] = []
        looked: set[Plan] = set()
        for number, form in enumerate(forms):
            # each form has its share of what is left: the choice half of it
            spent = self.pool.simulated_rounds - simulated
            left = self.effort.refinement_rounds * self.stretch - spent
            limit = self.pool.simulated_rounds + left / (2 if number == 0 else len(forms) - number)
            known = [each for each in tried.values() if form(each.plan)]
            while known and self.pool.simulated_rounds < limit:
                leader = choose(known, self.ask.tolerance)
                if leader.plan in looked:
                    break
                looked.add(leader.plan)
                self._vary(leader, quick, views, tried)
                known = [each for each in tried.values() if form(each.plan)]
            if known:
                found.append(choose(known, self.ask.tolerance).plan)
                found.append(choose(known, 0.0).plan)
        self.told(
            f"{len(tried) - len(rated)} variations of {len(looked)} leaders refined"
            f" in {perf_counter() - began_s:.1f} s"
        )
        best = choose(tried.values(), self.ask.tolerance).plan
        return list(dict.fromkeys((best, *found)))

    def _vary(
        self, leader: Rated, quick: Sequence[View], views: Sequence[View], tried: dict[Plan, Rated]
    ) -> None:
        """Looks at all that is one step from `leader`; what promises most is added to `tried`."""
        near = (*settings(leader.plan, self.ask), *neighbours(leader.plan, self.ask, self.types))
        fresh = tuple(plan for plan in dict.fromkeys(near) if plan not in tried)
        if not fresh:
            return
        (own,) = self.pool.score((leader.plan,), quick)
        scores = self.pool.score(fresh, quick, max(0.0, own.attainment - 0.03))
        valued = [(plan, score.attainment) for plan, score in zip(fresh, scores, strict=True)]
        # what is worth a longer look: better, or cheaper and hardly worse
        hopeful = [
            (plan, value)
            for plan, value in valued
            if value >= own.attainment
            or (plan.price_per_hour < leader.plan.price_per_hour and value >= own.attainment - 0.02)
        ]
        hopeful.sort(key=lambda v: (-v[1], v[0].price_per_hour))
        cheaper = [v for v in hopeful if v[0].price_per_hour < leader.plan.price_per_hour]
        chosen = [plan for plan, _ in (*hopeful[: self.effort.shortlist - 1], *cheaper[:1])]
        chosen = list(dict.fromkeys(chosen))
        for plan, score in zip(chosen, self.pool.score(chosen, views), strict=True):
            tried[plan] = Rated(plan, score)

    # ---------------------------------------------------------------- the answer

    def _found(
        self, rated: Sequence[Rated], solved: Solved | None, equal: Sequence[Plan], took_s: float
    ) -> Found:
        tolerance = self.ask.tolerance

        def best(fits: Callable[[Plan], bool]) -> Rated | None:
            known = [each for each in rated if fits(each.plan)]
            return choose(known, tolerance) if known else None

        def of(plan: Plan | None) -> Rated | None:
            return next((each for each in rated if each.plan == plan), None)

        kinds = {each.gpu for each in self.types}
        return Found(
            best=choose(rated, tolerance),
            colocated=best(_colocated),
            disaggregated=best(_disaggregated),
            single_tier=best(lambda plan: len(plan.gpus) == 1) if len(kinds) > 1 else None,
            equal_split=best(lambda plan: plan in equal),
            eq5=of(solved.eq5) if solved else None,
            solved=of(solved.plan) if solved else None,
            rated=tuple(rated),
            rungs=tuple(self.rungs),
            took_s=took_s,
        )


def _colocated(plan: Plan) -> bool:
    return plan.colocated


def _disaggregated(plan: Plan) -> bool:
    return not plan.colocated
