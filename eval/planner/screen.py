"""Orders thousands of plans without any simulation.

The screen estimates the share of rounds within their targets, by the latency formulas and the workload's
means: utilisation (prefill that its pool cannot do is done where sessions are decoded), the wait for m
servers by Sakasegawa's formula, KV of live sessions. It does not know links, sessions' homes or bursts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, sqrt

from msgspec import Struct

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.workload import Workload

QUANTILES = 24
"""Of prefill times, that stand for all of them."""
BUSY = 0.01
"""Times its utilisation an estimate is less: of many that do well, first come those with most in hand."""
PASS_TOKENS = 2048
"""Of short prompts that wait as many share a pass, and its fixed cost, as fit it."""


class _Work(Struct, frozen=True):
    """What all of the workload is to one engine of a type."""

    prefill_load: float
    """Engines that its prefill keeps busy; prompts that wait share passes."""
    decode_load: float
    """The same of decode, at the largest batch that is within the target."""
    wait_s: float
    """Mean of a round's prefill time, with its spread, as a queue feels it: E[S^2] / 2 E[S]."""
    prefill_quantiles_s: tuple[float, ...]
    kv_load: float
    """Engines that the live sessions' KV fills."""
    token_rate: float
    """Output tokens per second, of all."""
    fixed_s: float
    """Of a decode step."""
    each_s: float
    """More for each request of the batch, at the mean context."""


class Screen:
    """Estimates the attainment of plans: about ten microseconds each."""

    def __init__(self, workload: Workload, slo: Slo, types: Iterable[EngineType]) -> None:
        self._slo = slo
        self._works = {each: _work(each, workload, slo) for each in types}

    def estimate(self, plan: Plan) -> float:
        """About the share of rounds within their targets, a little less for who is busier; at overload at
        most 0, the less the worse."""
        decodes = [(g.count, self._works[g.type]) for g in plan.pool("decode")]
        prefills = [(g.count, self._works[g.type]) for g in plan.pool("prefill")]
        used, prefill_here = self._utilisation(prefills, decodes)
        if used >= 1:
            return 1 - used
        ttft = self._ttft(prefills or decodes, used, plan.engines)
        itl = self._slo.itl_s / _gap_s(decodes, prefill_here)
        return ttft * min(1.0, itl) ** 2 * (1 - BUSY * used)

    def utilisation(self, plan: Plan) -> float:
        """Of its busiest part, or its KV memory; in proportion to the workload's rate."""
        decodes = [(g.count, self._works[g.type]) for g in plan.pool("decode")]
        prefills = [(g.count, self._works[g.type]) for g in plan.pool("prefill")]
        return self._utilisation(prefills, decodes)[0]

    def _utilisation(
        self, prefills: Sequence[tuple[int, _Work]], decodes: Sequence[tuple[int, _Work]]
    ) -> tuple[float, float]:
        """Of the busiest part; of the engines that decode, by prefill."""
        decode = _together([(count, work.decode_load) for count, work in decodes])
        here = _together([(count, work.prefill_load) for count, work in decodes])
        kv = _together([(count, work.kv_load) for count, work in decodes])
        if not prefills:
            return max(here + decode, kv), here
        there = _together([(count, work.prefill_load) for count, work in prefills])
        share = min(1.0, (here + decode) / (there + here))  # of the prefill that the prefill pool does
        left = (1 - share) * here
        return max(share * there, left + decode, kv), left

    def _ttft(self, engines: Sequence[tuple[int, _Work]], used: float, servers: int) -> float:
        """Share of prefills that wait and take no longer than the target."""
        total = sum(count for count, _ in engines)
        waits = used ** (sqrt(2 * (servers + 1)) - 1)
        good = 0.0
        for count, work in engines:
            mean_wait_s = work.wait_s / (servers * (1 - used))
            for seconds in work.prefill_quantiles_s:
                left_s = self._slo.ttft_s - seconds
                if left_s > 0:
                    good += count * (1 - waits * exp(-left_s / mean_wait_s))
        return good / total / QUANTILES


def _together(loads: Sequence[tuple[int, float]]) -> float:
    """Utilisation of engines that share work as each can: (how many, what all of it is to one of them)."""
    return 1 / sum(count / max(load, 1e-12) for count, load in loads)


def _gap_s(decodes: Sequence[tuple[int, _Work]], prefill: float) -> float:
    """Between two tokens, at the batch at which the engines keep up: by Little's law, equal shares.
    `prefill`: share of their time that it takes, while no token comes."""
    engines, free = sum(count for count, _ in decodes), 1 - min(0.95, prefill)
    worst_s = 0.0
    for _, work in decodes:
        most = min(0.98 * free, work.token_rate / engines * work.each_s)
        worst_s = max(worst_s, work.fixed_s / (free - most) + work.each_s / free)
    return worst_s


def _work(each: EngineType, workload: Workload, slo: Slo) -> _Work:
    latency, families = each.latency, len(workload.families)
    prefills_s: list[float] = []
    tokens = context_tokens = shared_s = 0.0
    for turn, cached in workload.rounds():
        new_tokens = turn.prompt_tokens - cached
        prefills_s.append(latency.prefill_s(new_tokens, cached))
        shared_s += latency.prefill.fixed_s * max(0.0, 1 - new_tokens / PASS_TOKENS)
        tokens += turn.output_tokens
        context_tokens += turn.output_tokens * (turn.prompt_tokens + turn.output_tokens / 2)
    prefills_s.sort()
    sum_s, squares = sum(prefills_s), sum(s * s for s in prefills_s)
    context = context_tokens / tokens
    fixed_s = latency.decode_step_s(1, 1)
    each_s = (latency.decode_step_s(17, round(17 * context)) - latency.decode_step_s(1, round(context))) / 16
    batch = max(1.0, min(256, each.device_tokens / context, (slo.itl_s - fixed_s) / max(each_s, 1e-12)))
    token_rate = workload.rate_per_s * tokens / families
    return _Work(
        prefill_load=workload.rate_per_s * (sum_s - shared_s) / families,
        decode_load=token_rate * latency.decode_step_s(int(batch), int(batch * context)) / int(batch),
        wait_s=squares / (2 * max(sum_s, 1e-12)),
        prefill_quantiles_s=tuple(
            prefills_s[int((n + 0.5) / QUANTILES * len(prefills_s))] for n in range(QUANTILES)
        ),
        kv_load=workload.live_tokens / max(each.device_tokens, each.store_tokens),
        token_rate=token_rate,
        fixed_s=fixed_s,
        each_s=each_s,
    )
