"""The simulation-backed search: successive halving over all plans, then refinement of those that lead.

1. A screen (`screen.py`) orders every plan within the budget; the first rung simulates the most promising
   of them for a short while, each further rung fewer plans for longer.
   On the window of the first the cheapest that keep up are tried under their menu's other policies too.
2. The leaders are varied (`refinement.py`): an engine fewer, more, moved, of another kind; then policy, C, K.
3. The last rung scores the leaders on windows that nothing was chosen by, and the plan is chosen there, of
   those that last (`lasting.py`).

A rung keeps plans that may still be the choice (as good as the best but for noise, then cheaper), and always
those that the answer names: the best co-located, disaggregated and of one kind of GPU, the equal split, and
what came from outside (the MILP's plans). Effort (`effort.py`) is counted in simulated rounds, never by a
clock: the same ask has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from time import perf_counter

from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask, Found, Infeasible, Rated, Rung, Solved, choose
from antiphon.eval.planner.candidates import candidates, equal_splits
from antiphon.eval.planner.effort import LAST, Effort, Schedule, views_at
from antiphon.eval.planner.engine_types import gpu_budget
from antiphon.eval.planner.lasting import Fits, any_plan, choose_lasting, lasting_leaders, lasts
from antiphon.eval.planner.neighbours import set_like
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.refinement import Refinement
from antiphon.eval.planner.screen import Screen
from antiphon.eval.planner.workload import Workload

OnProgress = Callable[[str], None]


FAR = 0.25
"""Plans that attain so much less than the best so far are given up within a simulation."""
TWINS = 3
"""Plans of a form that are tried under other policies before the search has leaders."""


def last_views(ask: Ask, found: Found) -> tuple[View, ...]:
    """The windows on which `found` was chosen."""
    return views_at(ask.seed, LAST, found.rungs[-1].rounds, found.rungs[-1].windows)


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


def _silent(message: str) -> None:
    pass


class _Search:
    def __init__(
        self, ask: Ask, types: Sequence[EngineType], pool: ScorePool, told: OnProgress, effort: Effort
    ) -> None:
        self.ask = replace(ask, budget=gpu_budget(ask))
        self.types, self.pool, self.told, self.effort = types, pool, told, effort
        self.schedule = Schedule.of(effort, ask.seed, pool.workload)
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
        for number in range(len(self.effort.rungs)):
            views = self.schedule.rung(number)
            rated = self._rung(staying, views)
            staying = self._staying(number, rated, given, equal)
            if not number and (twins := self._twins(rated, staying)):
                rated = self._in_order((*rated, *self._rung(twins, views)))
                staying = self._staying(number, rated, given, equal)
        leaders = self._refined(rated, views)
        alike = (set_like(plan, leaders[0]) for plan in leaders)
        finalists = dict.fromkeys((*leaders, *alike, *staying))
        rated = self._lasting(self._rung(tuple(finalists), self.schedule.last()))
        return self._found(rated, solved, equal, perf_counter() - began_s)

    # ---------------------------------------------------------------- rungs

    def _screened(self, plans: Sequence[Plan]) -> list[tuple[Plan, float]]:
        began_s = perf_counter()
        screen = Screen(self.pool.workload, self.ask.slo, self.types)
        screened = [(plan, screen.estimate(plan)) for plan in plans]
        self.told(f"{len(plans)} plans within the budget, screened in {perf_counter() - began_s:.1f} s")
        return screened

    def _rung(self, plans: Sequence[Plan], views: Sequence[View]) -> list[Rated]:
        """The plans simulated, the choice first, then by attainment."""
        began_s = perf_counter()
        rated = self.pool.rate(plans, views, FAR)
        took_s = perf_counter() - began_s
        self.rungs.append(Rung(len(plans), views[0].rounds, len(views), took_s))
        best = choose(rated, self.ask.tolerance)
        self.told(
            f"{len(plans)} plans x {len(views)} windows of {views[0].rounds} rounds in {took_s:.1f} s:"
            f" {best.score.attainment:.1%} by {best.plan.describe()}"
        )
        return self._in_order(rated)

    def _in_order(self, rated: Iterable[Rated]) -> list[Rated]:
        known = list(rated)
        best = choose_lasting(known, self.ask.tolerance)
        known.sort(key=lambda r: (r is not best, -r.score.attainment, r.plan.price_per_hour))
        return known

    def _kept(
        self,
        valued: Sequence[tuple[Plan, float]],
        count: int,
        margin: float,
        fixed: Iterable[Plan],
        of_form: int = 2,
    ) -> tuple[Plan, ...]:
        """`fixed`, the best `of_form` of each form, and about `count` more, in the order of their promise.

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
            ranked_so = [v for v in highest if form(v[0])]
            for each in ranked_so[:of_form]:
                kept.setdefault(*each)
        values = dict(valued)
        for plan in fixed:
            kept.setdefault(plan, values[plan])
        return tuple(sorted(kept, key=lambda plan: -kept[plan]))

    def _staying(
        self, number: int, rated: Sequence[Rated], given: Iterable[Plan], equal: Sequence[Plan]
    ) -> tuple[Plan, ...]:
        """From this rung for the next, or the last one."""
        following = (*self.effort.rungs[1:], self.effort.last)[number][0]
        valued = [(each.plan, each.score.attainment) for each in rated]
        margin = max(self.ask.tolerance, 2 * max(each.score.noise for each in rated[:3]))
        of_form = 1 if number == len(self.effort.rungs) - 1 else 2
        return self._kept(valued, following, margin, (*given, *self._best_equal(rated, equal)), of_form)

    def _twins(self, rated: Sequence[Rated], staying: Sequence[Plan]) -> tuple[Plan, ...]:
        """The cheapest of each form that are not far behind, under the other policies of the menu: with these
        a smaller fleet may do."""
        least = max(each.score.attainment for each in rated) - FAR
        near = [r.plan for r in rated if r.plan in staying and r.score.attainment >= least]
        near.sort(key=lambda plan: plan.price_per_hour)
        found: dict[Plan, None] = {}
        for form, menu in (
            (_colocated, self.ask.colocated_policies),
            (_disaggregated, self.ask.policies),
        ):
            for plan in [plan for plan in near if form(plan)][:TWINS]:
                found.update((replace(plan, policy=policy), None) for policy in menu if policy != plan.policy)
        return tuple(plan for plan in found if plan not in staying)

    def _forms(self) -> list[Fits]:
        """What the answer has a best of."""
        forms: list[Fits] = [_colocated, _disaggregated]
        return [*forms, _of_one_kind] if len({each.gpu for each in self.types}) > 1 else forms

    def _best_equal(self, rated: Iterable[Rated], equal: Sequence[Plan]) -> tuple[Plan, ...]:
        known = [each for each in rated if each.plan in equal]
        return (choose(known, 0.0).plan,) if known else ()

    def _refined(self, rated: Sequence[Rated], views: Sequence[View]) -> tuple[Plan, ...]:
        began_s = perf_counter()
        refinement = Refinement(self.ask, self.types, self.pool, self.schedule, rated, views)
        refined = refinement.run(self._forms())
        took_s = perf_counter() - began_s
        self.told(f"{refined.variations} variations of {refined.varied} leaders refined in {took_s:.1f} s")
        return refined.leaders

    def _lasting(self, rated: Sequence[Rated]) -> list[Rated]:
        """The choice first; it and the best of either form last, if any does."""
        began_s, forms = perf_counter(), (any_plan, _colocated, _disaggregated)
        known = lasting_leaders(rated, forms, self.ask, self.types, self.pool, self.schedule)
        looked = [each for each in known if each.long is not None]
        lasting, took_s = sum(map(lasts, looked)), perf_counter() - began_s
        if view := self.schedule.long():
            self.told(f"{lasting} of {len(looked)} leaders last for {view.rounds} rounds: {took_s:.1f} s")
        return self._in_order(known)

    # ---------------------------------------------------------------- the answer

    def _found(
        self, rated: Sequence[Rated], solved: Solved | None, equal: Sequence[Plan], took_s: float
    ) -> Found:
        tolerance = self.ask.tolerance

        def best(fits: Fits) -> Rated | None:
            known = [each for each in rated if fits(each.plan)]
            return choose_lasting(known, tolerance) if known else None

        def of(plan: Plan | None) -> Rated | None:
            return next((each for each in rated if each.plan == plan), None)

        kinds = {each.gpu for each in self.types}
        return Found(
            best=choose_lasting(rated, tolerance),
            colocated=best(_colocated),
            disaggregated=best(_disaggregated),
            single_tier=best(_of_one_kind) if len(kinds) > 1 else None,
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


def _of_one_kind(plan: Plan) -> bool:
    return len(plan.gpus) == 1
