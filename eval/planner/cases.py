"""`--cases`: where co-location is said to win over disaggregation, tried with the user's load.

Each case changes one thing of the ask. Both forms are searched alike, each alone and with little effort: at
each of some price levels the plans that the screen puts first, then one step around what leads, then the last
windows of a search, by which nothing was chosen before, and a long one for who leads there. The best of the
one stands against the best of the other; who does not last has lost. What is within two standard errors is
called equal; then the cheaper wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from time import perf_counter
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from antiphon.eval.known_models import KnownModel
from antiphon.eval.planner.ask import Ask, Infeasible, PlanError, Rated, choose
from antiphon.eval.planner.candidates import candidates, check_number
from antiphon.eval.planner.effort import Effort, Schedule
from antiphon.eval.planner.engine_types import attainable, engine_types, typical
from antiphon.eval.planner.lasting import any_plan, choose_lasting, lasting_leaders, lasts
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool
from antiphon.eval.planner.prices import GpuPrice
from antiphon.eval.planner.refinement import Refinement
from antiphon.eval.planner.score import ERRORS, difference_noise
from antiphon.eval.planner.screen import Screen
from antiphon.eval.planner.workload import Workload
from antiphon.traces.schema import SessionTrace, TraceError
from antiphon.traces.shape import Shape, shape

EFFORT = Effort(((24, 400),), (6, 1000, 3), 300, 2, 12_000, 10_000)
"""For one form: some twenty seconds on two cores. Its one rung has what `LEVELS` say."""
LEVELS = 0.05, 0.075, 0.1, 0.125, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.65, 0.8, 1.0
"""Of the dearest plan's price. Between two of them plans cost at most a third more than others."""
OF_LEVEL = 2
FAR = 0.1
"""Plans that attain so much less than the best dear one are given up."""
SINGLE_NODE = 8
SHORTER = 8
RARER = 5
SLOW_BYTES_PER_S = 1.25e9
SMALL_MODEL = "qwen3-8b"
LEAST = 0.01
"""Where both attain less, nothing is won."""
UNSURE = 0.02
"""Where only a smaller difference than this passes for noise are attainments called equal."""

CHEAPER = 0.1
"""Share of the price by which a form wins: nearer than that, a size that was not tried may be cheaper."""


class Case(Struct, frozen=True):
    """One case, searched."""

    name: str
    what: str
    """How it differs from the ask."""
    winner: str
    """co-located, disaggregated, equal, undecided or neither."""
    margin: str
    """By how much, with the noise."""
    colocated: Rated | None
    disaggregated: Rated | None
    rounds_per_s: float = 0.0


class Variant(NamedTuple):
    """What is asked in a case."""

    name: str
    what: str
    ask: Ask
    model: KnownModel
    prices: Mapping[str, GpuPrice]
    sessions: Sequence[SessionTrace]


def cases(
    ask: Ask,
    model: KnownModel,
    models: Mapping[str, KnownModel],
    prices: Mapping[str, GpuPrice],
    sessions: Sequence[SessionTrace],
    on_progress: Callable[[str], None],
    effort: Effort | None = None,
) -> tuple[Case, ...]:
    """All of the list. Raises `PoolError`."""
    found: list[Case] = []
    for variant in _variants(ask, model, models, prices, sessions):
        began_s = perf_counter()
        case = tried(variant, effort or EFFORT)
        took_s = perf_counter() - began_s
        on_progress(f"case {case.name}: {case.winner} ({case.margin}) in {took_s:.1f} s")
        found.append(case)
    return tuple(found)


def _variants(
    ask: Ask,
    model: KnownModel,
    models: Mapping[str, KnownModel],
    prices: Mapping[str, GpuPrice],
    sessions: Sequence[SessionTrace],
) -> Iterator[Variant]:
    gpu = next(iter(ask.budget))
    gpus = min(SINGLE_NODE, prices[gpu].gpus_per_node, ask.budget[gpu])
    rate = ask.session_rate_per_s
    share = gpus / sum(ask.budget.values())
    yield Variant(
        "single node",
        f"{gpus} x {gpu}, {rate * share:.3g} sessions/s (its share of the GPUs)",
        replace(ask, budget={gpu: gpus}, session_rate_per_s=rate * share),
        model, prices, sessions,
    )  # fmt: skip
    shorter = shape(sessions, Shape(divisor=SHORTER, window_tokens=model.window_tokens)).sessions
    yield Variant("short prompts", f"all lengths / {SHORTER}", ask, model, prices, shorter)
    yield Variant(
        "low concurrency", f"{rate / RARER:.3g} sessions/s", replace(ask, session_rate_per_s=rate / RARER),
        model, prices, sessions,
    )  # fmt: skip
    slow = {
        name: replace(price, nic_bytes_per_s=min(price.nic_bytes_per_s, SLOW_BYTES_PER_S))
        for name, price in prices.items()
    }
    yield Variant("slow network", "links of 10 Gb/s", ask, model, slow, sessions)
    small = models[SMALL_MODEL]
    fitting = shape(sessions, Shape(window_tokens=small.window_tokens)).sessions
    asked = replace(ask, model=SMALL_MODEL, window_tokens=small.window_tokens)
    yield Variant("small model", SMALL_MODEL, asked, small, prices, fitting)


def tried(variant: Variant, effort: Effort) -> Case:
    """Both forms searched for one ask. Raises `PoolError`."""
    ask, sessions = variant.ask, variant.sessions
    try:
        longest = max((t.total_tokens for session in sessions for t in session.rounds), default=0)
        types = engine_types(ask, variant.model, variant.prices, longest).types
        check_number(ask, types)
        idle = typical(types).latency
        workload = Workload.of(sessions, ask.session_rate_per_s, idle, ask.slo)
        attainable(types, workload, ask.slo)
        with ScorePool(workload, ask.slo, ask.window_tokens, ask.jobs) as pool:
            together, apart = (
                best_of(form, types, pool, effort)
                for form in (replace(ask, policies=()), replace(ask, colocated_policies=()))
            )
    except Infeasible as error:
        return Case(variant.name, variant.what, "neither", error.reason, None, None)
    except (PlanError, TraceError) as error:
        return Case(variant.name, variant.what, "neither", str(error), None, None)
    winner, margin = verdict(together, apart, ask.tolerance)
    return Case(variant.name, variant.what, winner, margin, together, apart, workload.rounds_per_s)


def best_of(ask: Ask, types: Sequence[EngineType], pool: ScorePool, effort: Effort) -> Rated | None:
    """Of an ask for one form; None if no plan of that form fits the budget."""
    plans = candidates(ask, types)
    if not plans:
        return None
    schedule = Schedule.of(effort, ask.seed, pool.workload)
    views = schedule.rung(0)
    rated = pool.rate(_at_levels(plans, Screen(pool.workload, ask.slo, types)), views, FAR)
    near = Refinement(ask, types, pool, schedule, rated, views).run(()).leaders
    leader = choose(rated, ask.tolerance)
    good = leader.score.attainment - ask.tolerance
    cheapest = sorted(rated, key=lambda each: each.plan.price_per_hour)
    kept = [each.plan for each in cheapest if each.score.attainment >= good][: effort.last[0] // 2]
    kept.append(max(rated, key=lambda each: each.score.attainment).plan)
    rated = pool.rate(dict.fromkeys((*near, *kept)), schedule.last())
    known = lasting_leaders(rated, (any_plan,), ask, types, pool, schedule)
    return choose_lasting(known, ask.tolerance)


def _at_levels(plans: Sequence[Plan], screen: Screen) -> tuple[Plan, ...]:
    """The most promising between each two levels of price; dear ones first."""
    ordered = sorted(plans, key=lambda plan: (-screen.estimate(plan), plan.price_per_hour))
    dearest = max(plan.price_per_hour for plan in plans)
    chosen: list[Plan] = []
    for above, level in reversed(list(pairwise((0.0, *LEVELS)))):
        between = (plan for plan in ordered if above * dearest < plan.price_per_hour <= level * dearest)
        chosen += islice(between, OF_LEVEL)
    return tuple(chosen)


def verdict(colocated: Rated | None, other: Rated | None, tolerance: float) -> tuple[str, str]:
    """Who wins and by how much."""
    if colocated is None or other is None:
        alone = "neither" if colocated is other else "co-located" if other is None else "disaggregated"
        return alone, "the other form has no plan within the budget"
    if max(colocated.score.attainment, other.score.attainment) < LEAST:
        return "neither", f"both attain less than {LEAST:.0%} of the rounds"
    if lasts(colocated) != lasts(other):
        return "co-located" if lasts(colocated) else "disaggregated", "the other form does not last"
    if not lasts(colocated):
        return "neither", "neither form lasts"
    gap = colocated.score.attainment - other.score.attainment
    noise = ERRORS * difference_noise(colocated.score, other.score)
    if abs(gap) > max(tolerance, noise):
        return (
            "co-located" if gap > 0 else "disaggregated",
            f"{abs(gap) * 100:.1f} ± {noise * 100:.1f} points",
        )
    if noise > UNSURE:
        return "undecided", f"{gap * 100:+.1f} points for co-located, of ± {noise * 100:.1f} by windows"
    price, others = colocated.plan.price_per_hour, other.plan.price_per_hour
    level = f"attainments equal within {max(tolerance, noise) * 100:.1f} points"
    if price == others:
        return "equal", f"{level}, same cost"
    saved = 1 - min(price, others) / max(price, others)
    cheaper = "co-located" if price < others else "disaggregated"
    if saved < CHEAPER:
        return "equal", f"{level}, {cheaper} {saved:.0%} cheaper"
    return cheaper, f"{saved:.0%} cheaper, {level}"
