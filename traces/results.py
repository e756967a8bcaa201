"""What a replay found: per-round records, the result file "antiphon.result/1".

Rates and shares are over completed rounds. Percentiles interpolate linearly between the two nearest ranks.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

RESULT_SCHEMA = "antiphon.result/1"


class RoundRecord(msgspec.Struct, kw_only=True):
    """One round as the client saw it, and what its receipt adds. Filled in by the replay, then left alone."""

    session: str
    """Id in the trace; on the wire it carries the run's id in front."""
    round: int
    """1 for a session's first."""
    prompt_tokens: int
    kept_tokens: int
    status: str = "failed"
    """completed | failed"""
    http_status: int = 0
    """Of the last try; 0 = none came."""
    message: str = ""
    """Why the last try failed, or, of a completed round, why the one before did."""
    tries: int = 0
    request_id: str = ""
    """X-Request-ID, as in the gateway's log."""
    round_id: str = ""
    """As in its receipt."""
    session_round: int | None = None
    """X-Session-Round: the gateway's own count."""
    arm: str = ""
    sent_s: float = 0.0
    """From the beginning of the run; the last try."""
    ttft_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    receipt: bool = False
    """Whether the fields below are known."""
    bytes_decode_to_prefill: int = 0
    bytes_prefill_to_decode: int = 0
    pulled_tokens: int = 0
    predicted_ttft_s: float | None = None
    gateway_ttft_s: float | None = None
    home: str | None = None
    prefill_engine: str | None = None
    reason: str = ""
    degraded: bool = False

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    @property
    def attained(self) -> bool:
        """Completed with TTFT and mean ITL within their targets; a single token's ITL is."""
        ttft_ok = self.slo_ttft_s is None or (self.ttft_s is not None and self.ttft_s <= self.slo_ttft_s)
        itl_ok = self.slo_itl_s is None or self.itl_s is None or self.itl_s <= self.slo_itl_s
        return self.completed and ttft_ok and itl_ok


class VerifyRecord(msgspec.Struct, frozen=True):
    """A line of the verify log: the very ids of one completed round, in the order of completion."""

    session: str
    round: int
    kept_tokens: int
    prompt_ids: list[int]
    output_ids: list[int]
    arm: str = ""
    round_id: str = ""


class Distribution(msgspec.Struct, frozen=True):
    count: int
    mean: float
    p50: float
    p90: float
    p99: float


class TraceInfo(msgspec.Struct, frozen=True):
    path: str
    sha256: str
    sessions: int
    rounds: int
    """What was to be sent, after shaping."""
    bad_lines: int
    dropped_rounds: int
    dropped_sessions: int
    capped_gaps: int


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Under what the figures came about."""

    url: str
    model: str
    run_id: str
    arrivals: str
    concurrency: int | None
    divide: int
    max_gap_s: float
    window_tokens: int | None
    timeout_s: float
    retries: int
    started_at: str
    """Wall clock, UTC, ISO 8601."""
    commit: str | None
    machine: dict[str, Any]


class ReplayResult(msgspec.Struct, kw_only=True):
    """The result file. Lengths in tokens, times in seconds."""

    schema: str = RESULT_SCHEMA
    trace: TraceInfo
    policy: str | None
    seed: int
    slo: dict[str, float | None]
    conditions: Conditions
    interrupted: bool
    sessions_completed: int
    rounds_total: int
    rounds_completed: int
    rounds_failed: int
    rounds_not_sent: int
    rounds_retried: int
    receipts_missing: int
    """Completed rounds without a receipt: their bytes are not in the sums."""
    arms: dict[str, int]
    bytes_decode_to_prefill: int
    bytes_prefill_to_decode: int
    prompt_tokens_total: int
    cached_tokens_total: int
    output_tokens_total: int
    ttft_s: Distribution | None
    ttft_first_s: Distribution | None
    ttft_later_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    attainment: dict[str, float] | None
    """Share of rounds, and of sessions all of whose rounds attain, of all that were to be sent."""
    wall_s: float
    rounds: list[RoundRecord]


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
    interrupted: bool,
) -> ReplayResult:
    """Adds up `records`; `session_rounds` says how many rounds each session was to have."""
    done = [record for record in records if record.completed]
    total = sum(session_rounds.values())
    per_session = Counter(record.session for record in done)
    with_slo = any(r.slo_ttft_s is not None or r.slo_itl_s is not None for r in records)
    return ReplayResult(
        trace=trace,
        policy=policy,
        seed=seed,
        slo=dict(slo),
        conditions=conditions,
        interrupted=interrupted,
        sessions_completed=sum(per_session[name] == count for name, count in session_rounds.items()),
        rounds_total=total,
        rounds_completed=len(done),
        rounds_failed=len(records) - len(done),
        rounds_not_sent=total - len(records),
        rounds_retried=sum(record.tries > 1 for record in records),
        receipts_missing=sum(not record.receipt for record in done),
        arms=dict(Counter(record.arm or "unknown" for record in done)),
        bytes_decode_to_prefill=sum(record.bytes_decode_to_prefill for record in done),
        bytes_prefill_to_decode=sum(record.bytes_prefill_to_decode for record in done),
        prompt_tokens_total=sum(record.prompt_tokens for record in done),
        cached_tokens_total=sum(record.cached_tokens for record in done),
        output_tokens_total=sum(record.output_tokens for record in done),
        ttft_s=distribution(record.ttft_s for record in done),
        ttft_first_s=distribution(record.ttft_s for record in done if record.round == 1),
        ttft_later_s=distribution(record.ttft_s for record in done if record.round > 1),
        itl_s=distribution(record.itl_s for record in done),
        e2e_s=distribution(record.e2e_s for record in done),
        attainment=attainment(records, session_rounds) if with_slo else None,
        wall_s=wall_s,
        rounds=list(records),
    )


def attainment(records: Iterable[RoundRecord], session_rounds: Mapping[str, int]) -> dict[str, float]:
    attained = Counter(record.session for record in records if record.attained)
    rounds, sessions = sum(session_rounds.values()), len(session_rounds)
    whole = sum(attained[name] == count for name, count in session_rounds.items())
    return {"rounds": attained.total() / max(1, rounds), "sessions": whole / max(1, sessions)}


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
        record.pulled_tokens = receipt.get("pulled_tokens") or 0
        record.predicted_ttft_s = receipt.get("predicted_ttft_s")
        record.gateway_ttft_s = receipt.get("ttft_s")
        record.home, record.prefill_engine = receipt.get("home"), receipt.get("prefill_engine")
        record.reason = receipt.get("reason") or ""
        record.degraded = bool(receipt.get("degraded"))


def write_result(result: ReplayResult, path: Path) -> None:
    """Whole or not at all: written beside and renamed. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    beside.replace(path)
