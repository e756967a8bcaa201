"""tau of AMPD's Eq. 5 (arXiv:2602.14516, section 5): how slow one engine is at which load, by simulation.

The paper has tau as the "estimated P95 latency of the bottleneck worker", from simulation, and leaves open
in what unit two phases are compared and that it depends on the load per replica. Our reading: P95 of TTFT
(prefill) or ITL (decode) as a share of its target, at the load of one replica. One replica of a type is
simulated in its role at several rates, the other phase being ideal: engines to which work costs nothing,
links without end. A co-located engine does both phases, and its tau is the worse of both. What the form
cannot see, and the search does: links, the router's choices, replicas that are not loaded evenly.

Rates are sessions that arrive per second at one replica (with their sub-agents), taus shares of the target.
Nothing here raises for a load that is too high: tau is large there, infinite where the sessions' KV does not
fit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.eval.planner.score import Score, costless, score, together
from antiphon.eval.planner.workload import Workload

Role = Literal["prefill", "decode", "colocated"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "colocated")

PREFILL_CK = 8192, 4
"""C and K of prefill engines before anything is searched."""
DECODE_CK = 2048, 4

FRACTIONS = (0.03, 0.08, 0.2, 0.4, 0.7, 1.0, 1.25)
"""Of the rate at which an engine would be busy all the time: where a curve is simulated."""
MIDDLE = 2
STEEP = 4.0
"""A curve ends where tau is beyond this: it goes on as a line from there."""
CALM = 0.5
"""It starts where tau is below this: a lower rate makes no plan better."""
UNANSWERED = 10.0
"""The largest tau that is simulated, and that where more than 5 % of the rounds get no answer."""
MOST_RUNNING = 256
"""Requests at once in an engine, as `EngineGroup` has it."""
ENDLESS = 10**9
"""Tokens, and of links GB/s, of what is ideal."""


class Curve(Struct, frozen=True):
    """One type in one role. Between two points a line; neither tau nor misses fall with the rate."""

    role: Role
    type: EngineType
    rates: tuple[float, ...]
    """Simulated, ascending."""
    taus: tuple[float, ...]
    missed: tuple[float, ...]
    """Shares of rounds that miss their target in this role."""
    kv_rate: float
    """Above this the KV of the sessions under way does not fit; inf for prefill, which keeps none."""

    def tau(self, rate: float, kv_factor: float = 1.0) -> float:
        """P95 as a share of the target at this rate per replica. `kv_factor`: times the memory for KV."""
        return float("inf") if rate > self.kv_rate * kv_factor else self._at(rate, self.taus)

    def miss(self, rate: float) -> float:
        """Share of rounds that miss at this rate per replica."""
        return 1.0 if rate > self.kv_rate else min(1.0, self._at(rate, self.missed))

    def _at(self, rate: float, values: Sequence[float]) -> float:
        rates = self.rates
        if rate <= rates[0]:
            return values[0]
        place = bisect_left(rates, rate)
        if place < len(rates):
            share = (rate - rates[place - 1]) / (rates[place] - rates[place - 1])
            return values[place - 1] + share * (values[place] - values[place - 1])
        last = values[-1]
        slope = last / rates[-1]
        if len(rates) > 1:
            slope = max(slope, (last - values[-2]) / (rates[-1] - rates[-2]))
        return last + slope * (rate - rates[-1])


Curves = Mapping[tuple[Role, str], Curve]
"""By role and the type's name."""


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


def make_curves(
    types: Iterable[EngineType],
    workload: Workload,
    slo: Slo,
    window_tokens: int,
    *,
    policy: str = "local",
    rounds: int = 250,
    seeds: tuple[int, ...] = (0, 1),
    roles: Sequence[Role] = ROLES,
    jobs: int = 2,
    executor: Executor | None = None,
) -> Curves:
    """(role, type's name) -> its curve. `executor`: used instead of `jobs` processes of its own."""
    tasks = [
        CurveTask(role, each, workload, slo, window_tokens, policy, rounds, seeds)
        for each in types
        for role in roles
    ]
    if executor is not None:
        curves = list(executor.map(make_curve, tasks))
    elif jobs <= 1:
        curves = [make_curve(task) for task in tasks]
    else:
        with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as own:
            curves = list(own.map(make_curve, tasks))
    return {(curve.role, curve.type.name): curve for curve in curves}


def make_curve(task: CurveTask) -> Curve:
    """Simulates from the middle of `FRACTIONS` upwards until tau is steep, then down until it is calm."""
    workload, kv_rate = task.workload, float("inf")
    if task.role != "prefill":
        kv_rate = kv_tokens(task.type) * workload.rate_per_s / workload.live_tokens
    busy, most = busy_rate(task.type, task.role, workload, task.slo), min(workload.rate_per_s, kv_rate)
    grid = list(dict.fromkeys(min(share * busy, most) for share in FRACTIONS))
    middle = min(MIDDLE, len(grid) - 1)
    points: list[tuple[float, float, float]] = []
    for rate in grid[middle:]:
        points.append((rate, *_simulated(task, rate)))
        if points[-1][1] > STEEP:
            break
    for rate in reversed(grid[:middle]):
        if points[0][1] <= CALM:
            break
        points.insert(0, (rate, *_simulated(task, rate)))
    rates, taus, misses = zip(*points, strict=True)
    return Curve(task.role, task.type, rates, rising(taus), rising(misses), kv_rate)


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest sequence that never falls: neighbours out of order, which is noise, share their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return tuple(mean for mean, size in blocks for _ in range(size))


def kv_tokens(each: EngineType) -> int:
    """KV of sessions that an engine keeps: what is on its device is in its store too, as long as it fits."""
    return max(each.device_tokens, each.store_tokens)


def busy_rate(each: EngineType, role: Role, workload: Workload, slo: Slo) -> float:
    """Sessions per second that would keep one replica busy all the time: where its curve is looked at.

    Prefill: the mean seconds of prefill of a session. Decode: the largest batch whose step is within the
    target and whose KV fits. Co-located: both in turn.
    """
    families = len(workload.families)
    prefill_s = tokens = context = 0.0
    for family in workload.families:
        for session, *_ in family:
            for number, turn in enumerate(session.rounds):
                cached = turn.kept_tokens if number else session.shared_tokens
                prefill_s += each.latency.prefill_s(turn.prompt_tokens - cached, cached)
                tokens += turn.output_tokens
                context += turn.output_tokens * (turn.prompt_tokens + turn.output_tokens / 2)
    prefills = families / prefill_s
    if role == "prefill":
        return prefills
    mean_context, step_s = context / tokens, each.latency.decode_step_s
    one_s = step_s(1, int(mean_context))
    more_s = step_s(2, int(2 * mean_context)) - one_s
    most = min(each.device_tokens / mean_context, MOST_RUNNING)
    if more_s > 0:
        most = min(most, 1 + (slo.itl_s - one_s) / more_s)
    batch = max(1, int(most + 1e-9))
    decodes = batch / step_s(batch, int(batch * mean_context)) * families / tokens
    return decodes if role == "decode" else 1 / (1 / prefills + 1 / decodes)


# ---------------------------------------------------------------- one replica


def _simulated(task: CurveTask, rate: float) -> tuple[float, float]:
    """(tau, share that missed) at that rate."""
    workload, factor = task.workload, rate / task.workload.rate_per_s
    plan = role_plan(task.type, task.role, task.policy)
    windows = (workload.window(seed, int(task.rounds / factor), factor) for seed in task.seeds)
    scores = [score(plan, window, task.slo, task.window_tokens) for window in windows]
    taus = [_tau(task.role, each) for each in scores]
    return sum(taus) / len(taus), _missed(task.role, together(scores))


def _tau(role: Role, scored: Score) -> float:
    ttft, itl = min(scored.ttft_p95, UNANSWERED), min(scored.itl_p95, UNANSWERED)
    return {"prefill": ttft, "decode": itl, "colocated": max(ttft, itl)}[role]


def _missed(role: Role, scored: Score) -> float:
    """Share of the rounds. One that is refused misses in every role."""
    own = {"prefill": scored.ttft_missed, "decode": scored.itl_missed}
    missed = own[role] + scored.refused if role in own else scored.rounds - scored.attained
    return missed / max(1, scored.rounds)


def role_plan(each: EngineType, role: Role, policy: str) -> Plan:
    """One real engine in its role. Every round goes to the other pool for its prefill, with its history."""
    if role == "colocated":
        return Plan((Group("decode", each, 1, *DECODE_CK),), policy)
    real = replace(each, link_bytes_per_s=ENDLESS * 1e9)
    ideal = replace(real, latency=costless(each.latency), device_tokens=ENDLESS, store_tokens=ENDLESS)
    prefill, decode = (real, ideal) if role == "prefill" else (ideal, real)
    groups = Group("prefill", prefill, 1, *PREFILL_CK), Group("decode", decode, 1, *DECODE_CK)
    return Plan(groups, "remote_pull_always")
