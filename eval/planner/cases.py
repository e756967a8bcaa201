"""`--cases`: where co-location is said to win over disaggregation, tried with the user's load.

Each case changes one thing of the ask. Both forms are searched alike, with little effort: at some price
levels the plans that the screen puts first, the promising ones for longer on other windows, with the defaults
of C, K and policy. The best of the one stands against the best of the other, on the same windows. What is
within two standard errors is called equal; then the cheaper wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from antiphon.eval.known_models import KnownModel
from antiphon.eval.planner.ask import Ask, Infeasible, PlanError, Rated, choose
from antiphon.eval.planner.candidates import candidates
from antiphon.eval.planner.engine_types import attainable, engine_types
from antiphon.eval.planner.plans import Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.prices import GpuPrice
from antiphon.eval.planner.screen import Screen
from antiphon.eval.planner.workload import Workload
from antiphon.traces.schema import SessionTrace, TraceError
from antiphon.traces.shape import Shape, shape

LEVELS = 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0
"""Of the dearest plan's price."""
SEEDS = 6_000_000
"""Windows that no search uses."""
SINGLE_NODE = 8
SHORTER = 8
RARER = 5
SLOW_BYTES_PER_S = 1.25e9
SMALL_MODEL = "qwen3-8b"
LEAST = 0.01
"""Where both attain less, nothing is won."""
ERRORS = 2.0
"""Standard errors that a difference must pass to count."""


class Effort(NamedTuple):
    """How much is simulated for one form in one case: some seconds."""

    levels: tuple[float, ...] = LEVELS
    of_level: int = 2
    first: tuple[int, int] = (300, 1)
    """Rounds of a window, windows."""
    last: tuple[int, int] = (900, 2)
    kept: int = 3
    """Of the cheapest that may be as good as the best, and as many of the best."""


class Case(Struct, frozen=True):
    """One case, searched."""

    name: str
    what: str
    """How it differs from the ask."""
    winner: str
    """co-located, disaggregated, equal or neither."""
    margin: str
    """By how much, with the noise."""
    colocated: Rated | None
    disaggregated: Rated | None
    rounds_per_s: float = 0.0


class _Variant(NamedTuple):
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
        found.append(_searched(variant, effort or Effort()))
        on_progress(f"case {variant.name}: {found[-1].winner} ({found[-1].margin})")
    return tuple(found)


def _variants(
    ask: Ask,
    model: KnownModel,
    models: Mapping[str, KnownModel],
    prices: Mapping[str, GpuPrice],
    sessions: Sequence[SessionTrace],
) -> Iterator[_Variant]:
    gpu = next(iter(ask.budget))
    gpus = min(SINGLE_NODE, prices[gpu].gpus_per_node, ask.budget[gpu])
    rate = ask.session_rate_per_s
    share = gpus / sum(ask.budget.values())
    yield _Variant(
        "single node",
        f"{gpus} x {gpu}, {rate * share:.3g} sessions/s (its share of the GPUs)",
        replace(ask, budget={gpu: gpus}, session_rate_per_s=rate * share),
        model, prices, sessions,
    )  # fmt: skip
    shorter = shape(sessions, Shape(divisor=SHORTER, window_tokens=model.window_tokens)).sessions
    yield _Variant("short prompts", f"all lengths / {SHORTER}", ask, model, prices, shorter)
    yield _Variant(
        "low concurrency", f"{rate / RARER:.3g} sessions/s", replace(ask, session_rate_per_s=rate / RARER),
        model, prices, sessions,
    )  # fmt: skip
    slow = {
        name: replace(price, nic_bytes_per_s=min(price.nic_bytes_per_s, SLOW_BYTES_PER_S))
        for name, price in prices.items()
    }
    yield _Variant("slow network", "links of 10 Gb/s", ask, model, slow, sessions)
    small = models[SMALL_MODEL]
    fitting = shape(sessions, Shape(window_tokens=small.window_tokens)).sessions
    asked = replace(ask, model=SMALL_MODEL, window_tokens=small.window_tokens)
    yield _Variant("small model", SMALL_MODEL, asked, small, prices, fitting)


def _searched(variant: _Variant, effort: Effort) -> Case:
    ask, sessions = variant.ask, variant.sessions
    try:
        longest = max((t.total_tokens for session in sessions for t in session.rounds), default=0)
        types = engine_types(ask, variant.model, variant.prices, longest).types
        idle = next((each for each in types if each.tp == 4), types[0]).latency
        workload = Workload.of(sessions, ask.session_rate_per_s, idle)
        attainable(types, workload, ask.slo)
        with ScorePool(workload, ask.slo, ask.window_tokens, ask.jobs) as pool:
            screen = Screen(workload, ask.slo, types)
            every = [(plan, screen.estimate(plan)) for plan in candidates(ask, types)]
            colocated, other = (
                best_of([each for each in every if each[0].colocated is form], ask, pool, effort)
                for form in (True, False)
            )
    except Infeasible as error:
        return Case(variant.name, variant.what, "neither", error.reason, None, None)
    except (PlanError, TraceError) as error:
        return Case(variant.name, variant.what, "neither", str(error), None, None)
    winner, margin = verdict(colocated, other, ask.tolerance)
    return Case(variant.name, variant.what, winner, margin, colocated, other, workload.rounds_per_s)


def best_of(
    screened: Sequence[tuple[Plan, float]], ask: Ask, pool: ScorePool, effort: Effort
) -> Rated | None:
    """The choice among plans of one form; None if there are none."""
    if not screened:
        return None
    dearest = max(plan.price_per_hour for plan, _ in screened)
    ordered = sorted(screened, key=lambda each: (-each[1], each[0].price_per_hour))
    chosen: dict[Plan, None] = {}
    for level in effort.levels:
        within = [plan for plan, _ in ordered if plan.price_per_hour <= level * dearest]
        chosen.update(dict.fromkeys(within[: effort.of_level]))
    rated = _rated(tuple(chosen), pool, SEEDS, effort.first)
    best = max(rated, key=lambda each: each.score.attainment)
    least = best.score.attainment - ask.tolerance - ERRORS * best.score.noise
    cheapest = sorted(rated, key=lambda each: each.plan.price_per_hour)
    good = [each.plan for each in cheapest if each.score.attainment >= least][: effort.kept]
    highest = sorted(rated, key=lambda each: -each.score.attainment)[: effort.kept]
    finalists = dict.fromkeys((*good, *(each.plan for each in highest)))
    return choose(_rated(tuple(finalists), pool, SEEDS + 100, effort.last), ask.tolerance)


def _rated(plans: Sequence[Plan], pool: ScorePool, seed: int, size: tuple[int, int]) -> list[Rated]:
    rounds, windows = size
    views = tuple(View(seed + n, rounds) for n in range(windows))
    return [Rated(plan, score) for plan, score in zip(plans, pool.score(plans, views), strict=True)]


def verdict(colocated: Rated | None, other: Rated | None, tolerance: float) -> tuple[str, str]:
    """Who wins and by how much."""
    if colocated is None or other is None:
        alone = "neither" if colocated is other else "co-located" if other is None else "disaggregated"
        return alone, "the other form has no plan within the budget"
    if max(colocated.score.attainment, other.score.attainment) < LEAST:
        return "neither", f"both attain less than {LEAST:.0%} of the rounds"
    gap = colocated.score.attainment - other.score.attainment
    noise = ERRORS * sqrt(colocated.score.noise**2 + other.score.noise**2)
    if abs(gap) > max(tolerance, noise):
        return (
            "co-located" if gap > 0 else "disaggregated",
            f"{abs(gap) * 100:.1f} ± {noise * 100:.1f} points",
        )
    price, others = colocated.plan.price_per_hour, other.plan.price_per_hour
    level = f"attainments equal within {max(tolerance, noise) * 100:.1f} points"
    if price == others:
        return "equal", f"{level}, same cost"
    cheap, dear = min(price, others), max(price, others)
    return ("co-located" if price < others else "disaggregated", f"{1 - cheap / dear:.0%} cheaper, {level}")
