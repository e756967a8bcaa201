"""What `make plan-eval` asks of a trace and a budget: the targets, and a load by one rule for all."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.known_models import KnownModel
from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.candidates import candidates
from antiphon.eval.planner.engine_types import engine_types, typical
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.prices import read_prices
from antiphon.eval.planner.screen import Screen
from antiphon.eval.planner.workload import Workload
from antiphon.traces.schema import SessionTrace
from antiphon.traces.shape import Shape, shape

MODEL = "qwen3-32b"
SLO = Slo(ttft_s=2.0, itl_s=0.05)
SHARES = 0.8, 0.65, 0.5, 0.4, 0.3
"""Of the rate at which the whole budget, co-located, would be busy all the time: beyond it a fleet may look
well in a short window, and drown."""
WANTED = 0.93
"""That is attained in one window of each of `LOOKS`."""
LOOKS = 1200, 18_000
"""Rounds: plans that do not get through the first have no second."""
OTHER_SEEDS = 5_000_000
"""Windows that no search uses: those of the comparison; the two before them say which load is asked for."""


class Question(msgspec.Struct, frozen=True):
    """One case: a trace on a budget."""

    ask: Ask
    types: tuple[EngineType, ...]
    workload: Workload
    share: float
    """Of the budget's time."""


def question(
    sessions: Sequence[SessionTrace], budget: dict[str, int], model: KnownModel, jobs: int
) -> Question:
    """The load is the largest of `SHARES` at which one of the six plans that the screen puts first attains
    `WANTED`, for long too (else the least of them)."""
    fitted = shape(sessions, Shape(window_tokens=model.window_tokens)).sessions
    ask = Ask(
        model=MODEL,
        budget=budget,
        slo=SLO,
        session_rate_per_s=1.0,
        window_tokens=model.window_tokens,
        jobs=jobs,
    )
    longest = max(turn.total_tokens for session in fitted for turn in session.rounds)
    types = engine_types(ask, model, read_prices(), longest).types
    idle = typical(types).latency
    one = Workload.of(fitted, 1.0, idle)
    full_rate = busy_rate(ask, types, one)
    for share in SHARES:
        rate = share * full_rate
        asked = replace(ask, session_rate_per_s=rate)
        workload = Workload.of(fitted, rate, idle, SLO)
        screen = Screen(workload, ask.slo, types)
        first = sorted(candidates(asked, types), key=lambda plan: -screen.estimate(plan))[:6]
        with ScorePool(workload, ask.slo, ask.window_tokens, jobs) as pool:
            for number, rounds in enumerate(LOOKS, 1):
                view = View(OTHER_SEEDS - number, rounds)
                rated = zip(first, pool.score(first, (view,), WANTED), strict=True)
                first = [plan for plan, score in rated if score.attainment >= WANTED]
        if first:
            break
    return Question(asked, types, workload, share)


def busy_rate(ask: Ask, types: Sequence[EngineType], workload: Workload) -> float:
    """Sessions per second that keep the busiest part of the least busy co-located plan busy."""
    screen = Screen(workload, ask.slo, types)
    plans = (plan for plan in candidates(ask, types) if plan.colocated)
    return workload.rate_per_s / min(screen.utilisation(plan) for plan in plans)
