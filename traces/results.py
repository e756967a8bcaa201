"""Adding up a run: percentiles, attainment, the result object. What a caller needs of the files is here too.

Shares are of all rounds that were to be sent; times and sums are over completed rounds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from antiphon.traces.result_files import (
    ResultError,
    read_result,
    read_rounds,
    result_object,
    write_result,
    write_rounds,
)
from antiphon.traces.result_types import (
    RESULT_SCHEMA,
    ClusterInfo,
    Conditions,
    Distribution,
    Load,
    RoundRecord,
    RunResult,
    TraceInfo,
    VerifyRecord,
)

__all__ = [
    "RESULT_SCHEMA", "ClusterInfo", "Conditions", "Distribution", "Load", "ResultError", "RoundRecord",
    "RunResult", "TraceInfo", "VerifyRecord", "add_receipts", "attainment", "distribution", "percentile",
    "read_result", "read_rounds", "result_object", "summarise", "weighted_distribution", "write_result",
    "write_rounds",
]  # fmt: skip

# ---------------------------------------------------------------- adding up


def summarise(
    *,
    trace: TraceInfo,
    conditions: Conditions,
    policy: str | None,
    seed: int,
    slo: Mapping[str, float | None],
    session_rounds: Mapping[str, int],
    records: Sequence[RoundRecord],
    wall_s: float,
    interrupted: bool = False,
    kind: Literal["replay", "simulation"] = "replay",
    cluster: ClusterInfo | None = None,
    ordering: str | None = None,
    load: Load | None = None,
    attainable: float | None = None,
    token_gap_s: Distribution | None = None,
    prefill_tokens_computed: int | None = None,
    prefill_tokens_reused: int | None = None,
    gpu_seconds: float | None = None,
    cost_per_1k_rounds: float | None = None,
    simulated_s: float | None = None,
) -> RunResult:
    """Adds up `records` in one pass; `session_rounds` says how many rounds each session was to have.

    What is not given of attainable and the prefill figures is taken from the records.
    """
    sums = _Sums()
    sums.add(records)
    total = sum(session_rounds.values())
    if attainable is None and sums.unloaded_known:
        attainable = sums.attainable / max(1, total)
    if prefill_tokens_computed is None:
        prefill_tokens_computed = sums.prompt_tokens - sums.cached_tokens
    if prefill_tokens_reused is None:
        prefill_tokens_reused = sums.cached_tokens
    return RunResult(
        kind=kind,
        trace=trace,
        cluster=cluster,
        policy=policy,
        ordering=ordering,
        seed=seed,
        slo=dict(slo),
        load=load,
        conditions=conditions,
        interrupted=interrupted,
        rounds_total=total,
        rounds_not_sent=total - len(records),
        attainable=attainable,
        token_gap_s=token_gap_s,
        prefill_tokens_computed=prefill_tokens_computed,
        prefill_tokens_reused=prefill_tokens_reused,
        gpu_seconds=gpu_seconds,
        cost_per_1k_rounds=cost_per_1k_rounds,
        simulated_s=simulated_s,
        wall_s=wall_s,
        rounds=list(records),
        **sums.figures(session_rounds, len(records)),
    )


@dataclass(slots=True)
class _Sums:
    """What one pass over the records collects."""

    ttft_first_s: list[float] = field(default_factory=list)
    ttft_later_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By session, as the next."""
    attained: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    arms: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    with_slo: bool = False
    refused: int = 0
    retried: int = 0
    receipts: int = 0
    unloaded_known: int = 0
    attainable: int = 0
    bytes_decode_to_prefill: int = 0
    bytes_prefill_to_decode: int = 0
    bytes_home_to_home: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, records: Iterable[RoundRecord]) -> None:
        for record in records:
            self.retried += record.tries > 1
            unloaded_s, target_s = record.unloaded_ttft_s, record.slo_ttft_s
            if target_s is not None or record.slo_itl_s is not None:
                self.with_slo = True
            if unloaded_s is not None:
                self.unloaded_known += 1
                self.attainable += target_s is None or unloaded_s <= target_s
            if record.status == "completed":
                self._add_completed(record)
            elif record.status == "refused":
                self.refused += 1

    def _add_completed(self, record: RoundRecord) -> None:
        self.done[record.session] += 1
        self.arms[record.arm or "unknown"] += 1
        if record.attained:
            self.attained[record.session] += 1
        self.receipts += record.receipt
        self.bytes_decode_to_prefill += record.bytes_decode_to_prefill
        self.bytes_prefill_to_decode += record.bytes_prefill_to_decode
        self.bytes_home_to_home += record.bytes_home_to_home
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.output_tokens += record.output_tokens
        if record.ttft_s is not None:
            (self.ttft_first_s if record.round == 1 else self.ttft_later_s).append(record.ttft_s)
        if record.itl_s is not None:
            self.itl_s.append(record.itl_s)
        if record.e2e_s is not None:
            self.e2e_s.append(record.e2e_s)

    def figures(self, session_rounds: Mapping[str, int], records: int) -> dict[str, Any]:
        """Fields of `RunResult`, by name."""
        completed = sum(self.done.values())
        done = self.done
        return {
            "sessions_completed": sum(done.get(name, 0) == count for name, count in session_rounds.items()),
            "rounds_completed": completed,
            "rounds_refused": self.refused,
            "rounds_failed": records - completed - self.refused,
            "rounds_retried": self.retried,
            "receipts_missing": completed - self.receipts,
            "attainment": _shares(self.attained, session_rounds) if self.with_slo else None,
            "ttft_s": distribution(self.ttft_first_s + self.ttft_later_s),
            "ttft_first_s": distribution(self.ttft_first_s),
            "ttft_later_s": distribution(self.ttft_later_s),
            "itl_s": distribution(self.itl_s),
            "e2e_s": distribution(self.e2e_s),
            "arms": dict(self.arms),
            "bytes_moved": self.bytes_decode_to_prefill
            + self.bytes_prefill_to_decode
            + self.bytes_home_to_home,
            "bytes_decode_to_prefill": self.bytes_decode_to_prefill,
            "bytes_prefill_to_decode": self.bytes_prefill_to_decode,
            "bytes_home_to_home": self.bytes_home_to_home,
            "prompt_tokens_total": self.prompt_tokens,
            "cached_tokens_total": self.cached_tokens,
            "output_tokens_total": self.output_tokens,
        }


def attainment(records: Iterable[RoundRecord], session_rounds: Mapping[str, int]) -> dict[str, float]:
    """Shares of the rounds that were to be sent, and of the sessions all of whose rounds attain."""
    attained: dict[str, int] = defaultdict(int)
    for record in records:
        attained[record.session] += record.attained
    return _shares(attained, session_rounds)


def _shares(attained: Mapping[str, int], session_rounds: Mapping[str, int]) -> dict[str, float]:
    rounds, sessions = sum(session_rounds.values()), len(session_rounds)
    whole = sum(attained.get(name, 0) == count for name, count in session_rounds.items())
    return {"rounds": sum(attained.values()) / max(1, rounds), "sessions": whole / max(1, sessions)}


# ---------------------------------------------------------------- distributions


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """None if there is no value."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    p50, p90, p99 = (percentile(known, share) for share in (0.5, 0.9, 0.99))
    return Distribution(len(known), math.fsum(known) / len(known), p50, p90, p99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, at least one; linear between the two nearest ranks."""
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def weighted_distribution(runs: Iterable[tuple[float, int]]) -> Distribution | None:
    """As `distribution` of the list in which each value stands as often as its weight says."""
    weights: dict[float, int] = defaultdict(int)
    for value, weight in runs:
        weights[value] += weight
    known = sorted(item for item in weights.items() if item[1] > 0)
    if not known:
        return None
    count = sum(weight for _, weight in known)
    p50, p90, p99 = (_weighted_percentile(known, count, share) for share in (0.5, 0.9, 0.99))
    mean = math.fsum(value * weight for value, weight in known) / count
    return Distribution(count, mean, p50, p90, p99)


def _weighted_percentile(known: Sequence[tuple[float, int]], count: int, share: float) -> float:
    rank = share * (count - 1)
    low = math.floor(rank)
    end = 0
    for index, (value, weight) in enumerate(known):
        end += weight
        if low < end:
            after = value if low + 1 < end or index + 1 == len(known) else known[index + 1][0]
            return value + (after - value) * (rank - low)
    raise AssertionError("a rank lies inside the list")


# ---------------------------------------------------------------- receipts


def add_receipts(records: Iterable[RoundRecord], receipts: Iterable[Mapping[str, Any]]) -> None:
    """Fill each record from the receipt of its round id."""
    by_id = {receipt.get("round_id"): receipt for receipt in receipts}
    for record in records:
        receipt = by_id.get(record.round_id) if record.round_id else None
        if receipt is None:
            continue
        record.receipt = True
        record.bytes_decode_to_prefill = receipt.get("bytes_decode_to_prefill") or 0
        record.bytes_prefill_to_decode = receipt.get("bytes_prefill_to_decode") or 0
        record.bytes_home_to_home = receipt.get("bytes_home_to_home") or 0
        record.pulled_tokens = receipt.get("pulled_tokens") or 0
        record.predicted_ttft_s = receipt.get("predicted_ttft_s")
        record.gateway_ttft_s = receipt.get("ttft_s")
        record.queue_s, record.pull_s = receipt.get("queue_s"), receipt.get("pull_s")
        record.prefill_s, record.push_s = receipt.get("prefill_s"), receipt.get("push_s")
        record.home, record.prefill_engine = receipt.get("home"), receipt.get("prefill_engine")
        record.reason = receipt.get("reason") or ""
        record.degraded = bool(receipt.get("degraded"))
