"""tau of AMPD's Eq. 5 (arXiv:2602.14516, section 5): how slow one engine is at which load, by simulation.

The paper has tau as the "estimated P95 latency of the bottleneck worker", from simulation, and leaves open
in what unit two phases are compared and that it depends on the load per replica. Our reading: P95 of TTFT
(prefill) or ITL (decode) as a share of its target, at the load of one replica. One replica of a type is
simulated in its role at several rates, the other phase being ideal: engines to which work costs nothing,
links without end. Prefill engines share their queue, so a pool of `POOLED`, or of as many as the budget
allows, is simulated too (ours: tau of the paper has no size). A co-located engine does both phases, and its
tau is the worse of both. What the form cannot see, and the search does: links, the router's choices, homes
that are not loaded evenly.

Nothing here raises for a load that is too high: tau is large there, infinite where the sessions' KV does not
fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

from msgspec import Struct
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import EngineType, Plan, group
from antiphon.eval.planner.score import Score, costless, score
from antiphon.eval.planner.tau import (
    POOLED,
    ROLES,
    Curve,
    Curves,
    Line,
    Point,
    Role,
    busy_rate,
    idle_point,
    kv_tokens,
    line,
)
from antiphon.eval.planner.workload import Workload

FRACTIONS = (0.07, 0.2, 0.4, 0.7, 0.9)
"""Of the rate at which an engine would be busy all the time: where a curve is simulated."""
BEYOND = (1.0, 1.25)
"""And of decode: more at once make its steps longer, and that is seen at once. Prefill at such a rate waits
ever longer, which no short window shows: there tau is `STEEP`."""
MIDDLE = 1
STEEP = 4.0
"""A curve ends where tau is beyond this: it goes on as a line from there."""
CALM = 0.5
"""It starts where tau is below this, or little above that of an idle engine: a lower rate betters no plan."""
HARDLY = 1.1
"""Times a rate is hardly above it: one of the two tells enough."""
NEAR = 1.2
"""Times tau of an idle engine: little above it."""
UNANSWERED = 10.0
"""The largest tau that is simulated, and that where more than 5 % of the rounds get no answer."""
ENDLESS = 10**9
"""Tokens, and of links GB/s, of what is ideal."""


class CurveTask(Struct, frozen=True):
    """All that a process needs to make one curve."""

    role: Role
    type: EngineType
    workload: Workload
    slo: Slo
    window_tokens: int
    policy: str
    """Of a co-located engine."""
    rounds: int
    """Of each window, about."""
    seeds: tuple[int, ...]
    """One window each."""
    pooled: int = POOLED
    """Replicas of a prefill pool that are simulated together."""


def make_curves(
    types: Sequence[EngineType],
    workload: Workload,
    slo: Slo,
    window_tokens: int,
    *,
    policy: str = "local",
    rounds: int = 200,
    seeds: tuple[int, ...] = (0,),
    roles: Sequence[Role] = ROLES,
    budget: Mapping[str, int] | None = None,
    jobs: int = 2,
    executor: Executor | None = None,
) -> Curves:
    """(role, type's name) -> its curve. `budget`: GPUs of each kind; no pool is larger. `executor`: used
    instead of `jobs` processes of its own."""

    def pooled(each: EngineType) -> int:
        return POOLED if budget is None else max(1, min(POOLED, budget[each.gpu] // each.tp))

    tasks = [
        CurveTask(role, each, workload, slo, window_tokens, policy, rounds, seeds, pooled(each))
        for each in types
        for role in roles
    ]
    tasks.sort(key=lambda task: (task.role == "prefill", task.type.tp), reverse=True)  # the longest first
    if executor is not None:
        curves = list(executor.map(make_curve, tasks))
    elif jobs <= 1:
        curves = [make_curve(task) for task in tasks]
    else:
        with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as own:
            curves = list(own.map(make_curve, tasks))
    made = {(curve.role, curve.type.name): curve for curve in curves}
    return {(role, each.name): made[role, each.name] for each in types for role in roles}


def make_curve(task: CurveTask) -> Curve:
    """One replica, and of a prefill pool also several together."""
    kv_rate = float("inf")
    if task.role != "prefill":
        kv_rate = kv_tokens(task.type) * task.workload.rate_per_s / task.workload.live_tokens
    idle = idle_point(task.type, task.role, task.workload, task.slo)
    pooled = alone = _line(task, 1, kv_rate, idle)
    if task.role == "prefill" and task.pooled > 1:
        pooled = _line(task, task.pooled, kv_rate, idle)
    return Curve(task.role, task.type, alone, pooled, kv_rate, task.pooled)


def _line(task: CurveTask, replicas: int, kv_rate: float, idle: Point) -> Line:
    """Simulates from the middle of `FRACTIONS` upwards until tau is steep, then down until it is calm.
    Pools are calm for longer."""
    busy = busy_rate(task.type, task.role, task.workload, task.slo)
    most = min(task.workload.rate_per_s / min(replicas, 2), kv_rate)  # pools begin with two
    shares = (*FRACTIONS[:-1], *BEYOND) if task.role == "decode" else FRACTIONS
    grid = _grid([share * busy for share in shares], most)
    middle = min(MIDDLE + (replicas > 1), len(grid) - 1)
    points: list[Point] = []
    for rate in grid[middle:]:
        points.append(_simulated(task, replicas, rate))
        if points[-1][1] > STEEP:
            break
    for rate in reversed(grid[:middle]):
        if points[0][1] <= max(CALM, NEAR * idle[1]):
            break
        points.insert(0, _simulated(task, replicas, rate))
    if task.role != "decode" and points[-1][0] < busy:
        points.append((busy, max(STEEP, points[-1][1])))
    return line(idle, points)


def _grid(rates: Sequence[float], most: float) -> list[float]:
    """Of ascending ones those up to `most`, which stands for whatever is hardly below it or beyond."""
    last = min(most, rates[-1])
    return [*(rate for rate in rates if rate * HARDLY < last), last]


# ---------------------------------------------------------------- one replica


def _simulated(task: CurveTask, replicas: int, rate: float) -> Point:
    """At that rate per replica."""
    workload, factor = task.workload, rate * replicas / task.workload.rate_per_s
    plan = role_plan(task.type, task.role, task.policy, replicas)
    windows = (workload.window(seed, max(1, int(task.rounds / factor)), factor) for seed in task.seeds)
    scores = [score(plan, window, task.slo, task.window_tokens) for window in windows]
    taus = [_tau(task.role, each) for each in scores]
    return rate, sum(taus) / len(taus)


def _tau(role: Role, scored: Score) -> float:
    ttft, itl = min(scored.ttft_p95, UNANSWERED), min(scored.itl_p95, UNANSWERED)
    return {"prefill": ttft, "decode": itl, "colocated": max(ttft, itl)}[role]


def role_plan(each: EngineType, role: Role, policy: str, replicas: int = 1) -> Plan:
    """Real engines in their role. Every round goes to the other pool for its prefill, with its history."""
    if role == "colocated":
        return Plan((group("decode", each, replicas),), policy)
    real = replace(each, link_bytes_per_s=ENDLESS * 1e9)
    ideal = replace(real, latency=costless(each.latency), device_tokens=ENDLESS, store_tokens=ENDLESS)
    if role == "prefill":
        groups = group("prefill", real, replicas), group("decode", ideal, 1)
    else:
        groups = group("prefill", ideal, 1), group("decode", real, replicas)
    return Plan(groups, "remote_pull_always")
