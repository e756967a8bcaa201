"""The MILP's answer to an ask: tables of tau, AMPD's form alone, the completed form, and what binds it.

A constraint binds if the answer is better with it a little looser: each is loosened alone, the form solved
again, and the gain told, of the price (USD per hour) where the targets are met, else of Z (the worst P95 over
its target).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from decimal import ROUND_DOWN, Context
from typing import NamedTuple

from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask, Infeasible, Solved
from antiphon.eval.planner.curves import make_curves
from antiphon.eval.planner.engine_types import gpu_budget
from antiphon.eval.planner.milp import (
    SLACK,
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


def solve(
    ask: Ask, types: Sequence[EngineType], workload: Workload, executor: Executor | None = None
) -> Solved:
    """Raises `Infeasible` where the KV of the sessions fits in no way, `PlanError` without a solver."""
    began_s = time.perf_counter()
    curves = make_curves(
        types,
        workload,
        ask.slo,
        ask.window_tokens,
        policy=ask.colocated_policies[0],
        seeds=(ask.seed,),
        budget=gpu_budget(ask),
        jobs=ask.jobs,
        executor=executor,
    )
    curves_s = time.perf_counter() - began_s
    return replace(solve_by(curves, ask, types, workload), curves_s=curves_s)


def solve_by(curves: Curves, ask: Ask, types: Sequence[EngineType], workload: Workload) -> Solved:
    """With the tables of tau there already, of these types and this workload; raises what `solve` does."""
    began_s = time.perf_counter()
    asked = _Asked(ask, types, curves, workload)
    form = asked.form()
    alone, best = eq5(form), completed(form)
    if best is None:
        raise asked.infeasible()
    return Solved(
        eq5=None if alone is None else plan_of(alone, ask),
        eq5_z=float("inf") if alone is None else alone.z,
        plan=plan_of(best, ask),
        plan_z=best.z,
        binding=asked.binding(best),
        curves_s=0.0,
        solve_s=time.perf_counter() - began_s,
        gap=max(best.gap, 0.0 if alone is None else alone.gap),
    )


class _Asked(NamedTuple):
    """All that a form is made of."""

    ask: Ask
    types: Sequence[EngineType]
    curves: Curves
    workload: Workload

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
        return Form(columns, budget, mixed or self.ask.mixed_tensor_parallel)

    def binding(self, best: Choice) -> tuple[str, ...]:
        """In words, the largest gain first; at least one."""
        within = best.z <= 1 + 2 * SLACK
        for number, looser in enumerate(LOOSER, 1):
            gains: list[tuple[float, str]] = []
            for what, form in self._loosened(best, number, looser):
                if within:
                    found = cheapest(form, 1.0)
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
        ways = [] if not low else [f"{rounded_down(self.workload.rate_per_s * low)} sessions per second"]
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
            f"{', or '.join(ways)}: the KV would fit, which says nothing of the targets"
            if ways
            else "a budget of more kinds of GPUs",
        )

    def _runs(self, budget: Mapping[str, int] | None = None, load: float = 1.0) -> bool:
        return cheapest(self.form(budget, load=load), float("inf")) is not None


def rounded_down(rate: float) -> str:
    """Three digits: a bound that is told can be asked for."""
    return f"{float(Context(prec=3, rounding=ROUND_DOWN).create_decimal(repr(rate))):.3g}"
