"""The MILP's answer to an ask: tables of tau, AMPD's form alone, the completed form, and what binds it.

A constraint binds if the answer is better with it a little looser: each is loosened alone, the form solved
again, and the gain told, of the price (USD per hour) where the targets are met, else of Z (the worst P95 over
its target).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from antiphon.eval.planner.ask import Ask, Infeasible, Solved
from antiphon.eval.planner.curves import make_curves
from antiphon.eval.planner.engine_types import gpu_budget
from antiphon.eval.planner.milp import (
    SLACK,
    TIME_LIMIT_S,
    Choice,
    Form,
    cheapest,
    columns_of,
    completed,
    eq5,
    least_z,
    plan_of,
)
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.tau import Curves
from antiphon.eval.planner.workload import Workload

LOOSER = 1.1, 1.25, 1.5, 2.0, 4.0
"""Times the targets, or the memory for KV, when they are loosened: the next where the last gains nothing."""
LEAST_GAIN = 0.001
"""Share of price or Z: less is no gain."""
MOST_FLEETS = 64
"""Times the budget that is tried before it is said that no number of GPUs helps."""


class Timing(NamedTuple):
    """Of one budget."""

    gpus: int
    columns: int
    """Binaries z."""
    eq5_s: float
    completed_s: float
    gap: float


def solve(
    ask: Ask,
    types: Sequence[EngineType],
    workload: Workload,
    *,
    executor: Executor | None = None,
    curves: Curves | None = None,
    margin: float = 0.0,
    time_limit_s: float = TIME_LIMIT_S,
) -> Solved:
    """`curves`: made before, for these types and this workload. `margin`: how far below its target every P95
    must be, as a share, for a plan to count as within the targets.

    Raises `Infeasible` where the KV of the sessions fits in no way, `PlanError` where there is no solver.
    """
    began_s = time.perf_counter()
    if curves is None:
        curves = curves_for(ask, types, workload, executor)
    made_s = time.perf_counter()
    asked = _Asked(ask, types, curves, workload, 1 - margin, time_limit_s)
    form = asked.form()
    alone, best = eq5(form), completed(form, asked.within_z)
    if best is None:
        raise asked.infeasible()
    return Solved(
        eq5=None if alone is None else plan_of(alone, ask),
        eq5_z=float("inf") if alone is None else alone.z,
        plan=plan_of(best, ask),
        plan_z=best.z,
        binding=asked.binding(best),
        curves_s=made_s - began_s,
        solve_s=time.perf_counter() - made_s,
        gap=max(best.gap, 0.0 if alone is None else alone.gap),
    )


def curves_for(
    ask: Ask, types: Iterable[EngineType], workload: Workload, executor: Executor | None = None
) -> Curves:
    """The tables of tau that an ask needs."""
    return make_curves(
        types,
        workload,
        ask.slo,
        ask.window_tokens,
        policy=ask.colocated_policies[0],
        seeds=(ask.seed,),
        jobs=ask.jobs,
        executor=executor,
    )


def timings(
    ask: Ask,
    types: Sequence[EngineType],
    curves: Curves,
    workload: Workload,
    budgets: Iterable[Mapping[str, int]],
) -> list[Timing]:
    """How long the solver takes, by budget, the tables being there; the load grows with the budget."""
    asked_gpus = sum(gpu_budget(ask).values())
    found: list[Timing] = []
    for budget in budgets:
        gpus = sum(budget.values())
        rate_per_s = workload.rate_per_s * gpus / asked_gpus
        form = Form(columns_of(types, curves, rate_per_s, budget), budget, ask.mixed_tensor_parallel)
        began_s = time.perf_counter()
        alone = eq5(form)
        between_s = time.perf_counter()
        best = completed(form)
        ended_s = time.perf_counter()
        gap = max(choice.gap for choice in (alone, best) if choice) if alone or best else 0.0
        found.append(Timing(gpus, len(form.columns), between_s - began_s, ended_s - between_s, gap))
    return found


class _Asked(NamedTuple):
    """All that a form is made of."""

    ask: Ask
    types: Sequence[EngineType]
    curves: Curves
    workload: Workload
    within_z: float
    time_limit_s: float

    def form(
        self,
        budget: Mapping[str, int] | None = None,
        *,
        mixed: bool = False,
        kv_factor: float = 1.0,
        looser: float = 1.0,
        load: float = 1.0,
    ) -> Form:
        """As asked, or with one thing loosened."""
        budget = budget or gpu_budget(self.ask)
        rate_per_s = self.workload.rate_per_s * load
        columns = columns_of(self.types, self.curves, rate_per_s, budget, kv_factor=kv_factor, looser=looser)
        mixed = mixed or self.ask.mixed_tensor_parallel
        return Form(columns, budget, mixed, time_limit_s=self.time_limit_s)

    def binding(self, best: Choice) -> tuple[str, ...]:
        """In words, the largest gain first; at least one."""
        within = best.z <= self.within_z * (1 + 2 * SLACK)
        for number, looser in enumerate(LOOSER, 1):
            gains: list[tuple[float, str]] = []
            for what, form in self._loosened(best, number, looser):
                if within:
                    found = cheapest(form, self.within_z)
                    before, after = best.price, best.price if found is None else found.price
                    told = f"{what}: USD {after:.2f} instead of {before:.2f} per hour"
                else:
                    found = least_z(form)
                    before, after = best.z, best.z if found is None else found.z
                    told = f"{what}: the worst P95 at {after:.2f} instead of {before:.2f} of its target"
                gain = (before - after) / before
                if gain > LEAST_GAIN:
                    gains.append((gain, f"{told} ({-gain:+.1%})"))
            if gains:
                return tuple(told for _, told in sorted(gains, key=lambda each: -each[0]))
        return (
            f"none: even targets and memory for KV that are {LOOSER[-1]:g} times as large change nothing",
        )

    def _loosened(self, best: Choice, number: int, looser: float) -> Iterator[tuple[str, Form]]:
        """`number`: engines more, of each kind."""
        budget = gpu_budget(self.ask)
        step = number * max(column.type.tp for column in best.columns)
        for gpu in budget:
            if any(each.gpu == gpu for each in self.types):
                yield f"{step} more {gpu}", self.form({**budget, gpu: budget[gpu] + step})
        percent = f"{100 * (looser - 1):.0f} %"
        yield f"targets {percent} looser", self.form(looser=looser)
        yield f"{percent} more memory for KV", self.form(kv_factor=looser)
        if not self.ask.mixed_tensor_parallel and len({each.tp for each in self.types}) > 1:
            yield "engines of different tensor-parallel degrees", self.form(mixed=True)

    def infeasible(self) -> Infeasible:
        """The KV of the sessions is too much: how many sessions fit, and how many GPUs would do."""
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (middle, high) if self._runs(load=middle) else (low, middle)
        ways = [] if not low else [f"{_down(self.workload.rate_per_s * low)} sessions per second"]
        budget = gpu_budget(self.ask)
        for times in range(2, MOST_FLEETS + 1):
            more = {gpu: count * times for gpu, count in budget.items()}
            if self._runs(more):
                ways.append(",".join(f"{gpu}:{count}" for gpu, count in more.items() if count))
                break
        sessions, tokens = self.workload.live_sessions, self.workload.live_tokens
        return Infeasible(
            f"{sessions:.0f} sessions are under way at any time, and their KV, {tokens / 1e6:.2f} million "
            "tokens, fits no fleet of this budget",
            ", or ".join(ways) or "a budget of more kinds of GPUs",
        )

    def _runs(self, budget: Mapping[str, int] | None = None, load: float = 1.0) -> bool:
        return cheapest(self.form(budget, load=load), float("inf")) is not None


def _down(rate: float) -> str:
    """Three digits, none of them rounded up."""
    text = f"{rate:.3g}"
    return text if float(text) <= rate else f"{rate * 0.99:.3g}"
