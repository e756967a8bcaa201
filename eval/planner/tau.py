"""A table of tau: how slow one engine type is in one role, by the load of each replica. No simulation here.

Rates are sessions that arrive per second at one replica (with their sub-agents), taus P95 over the target.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import ceil, log2
from typing import Literal

from msgspec import Struct

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.workload import Workload
from antiphon.policies.latency import LatencyModel

Role = Literal["prefill", "decode", "colocated"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "colocated")

POOLED = 4
"""Replicas of a prefill pool that are simulated together at most, beside one alone."""
MOST_RUNNING = 256
"""Requests at once in an engine, as `EngineGroup` has it."""

Point = tuple[float, float]
"""Rate, tau."""


class Line(Struct, frozen=True):
    """Points, and lines between them. Tau does not fall with the rate."""

    rates: tuple[float, ...]
    """Ascending; the first is 0: nothing waits."""
    taus: tuple[float, ...]

    def tau(self, rate: float) -> float:
        rates, values = self.rates, self.taus
        place = bisect_left(rates, rate)
        if place == 0:
            return values[0]
        if place < len(rates):
            share = (rate - rates[place - 1]) / (rates[place] - rates[place - 1])
            return values[place - 1] + share * (values[place] - values[place - 1])
        last, slope = values[-1], values[-1] / rates[-1]
        slope = max(slope, (last - values[-2]) / (rates[-1] - rates[-2]))
        return last + slope * (rate - rates[-1])


class Curve(Struct, frozen=True):
    """One type in one role."""

    role: Role
    type: EngineType
    alone: Line
    """One replica."""
    pooled: Line
    """One of several replicas that share a queue, as a prefill pool does; elsewhere the same as alone."""
    kv_rate: float
    """Above this the KV of the sessions under way does not fit; inf for prefill, which keeps none."""
    pooled_replicas: int = POOLED

    def tau(self, rate: float, replicas: int = 1, kv_factor: float = 1.0) -> float:
        """P95 as a share of the target, at this rate per replica. `kv_factor`: times the memory for KV."""
        if rate > self.kv_rate * kv_factor:
            return float("inf")
        return self._of(replicas, self.alone.tau(rate), self.pooled.tau(rate))

    def _of(self, replicas: int, alone: float, pooled: float) -> float:
        """Between the two by the logarithm of the size; a larger pool is taken for one that was simulated."""
        share = min(1.0, log2(replicas) / log2(max(2, self.pooled_replicas)))
        return alone + share * (min(alone, pooled) - alone)


Curves = Mapping[tuple[Role, str], Curve]
"""By role and the type's name."""


def line(idle: Point, points: Sequence[Point]) -> Line:
    """Through what is known exactly, at rate 0, and what was simulated. `points` by rate, at least one."""
    rates, taus = zip(*points, strict=True)
    return Line((0.0, *rates), (idle[1], *(max(idle[1], tau) for tau in rising(taus))))


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
    for turn, cached in workload.rounds():
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


def idle_point(each: EngineType, role: Role, workload: Workload, slo: Slo) -> Point:
    """What it does when it has nothing else to do."""
    ttfts_s, itls_s = unloaded(each.latency, workload)
    ttft, itl = p95(ttfts_s) / slo.ttft_s, p95(itls_s) / slo.itl_s
    return 0.0, {"prefill": ttft, "decode": itl, "colocated": max(ttft, itl)}[role]


def unloaded(latency: LatencyModel, workload: Workload) -> tuple[list[float], list[float]]:
    """(TTFT, mean gap) of every round of the workload on an engine that it has for itself; no gap: 0."""
    ttfts_s: list[float] = []
    itls_s: list[float] = []
    for turn, cached in workload.rounds():
        ttfts_s.append(latency.prefill_s(max(1, turn.prompt_tokens - cached), cached))
        context = turn.prompt_tokens + turn.output_tokens // 2
        itls_s.append(latency.decode_step_s(1, context) if turn.output_tokens > 1 else 0.0)
    return ttfts_s, itls_s


def p95(values: Sequence[float]) -> float:
    return sorted(values)[max(0, ceil(0.95 * len(values)) - 1)]
