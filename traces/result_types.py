"""What a run found, as data: the result object "antiphon.result/1" and the record of one round.

`replay` and `simulate` fill the same object; what only one of them can know is null in the other's.
Lengths are in tokens, times in seconds, sizes in bytes. docs/evaluation.md says what each figure means.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

RESULT_SCHEMA = "antiphon.result/1"
LoadKind = Literal["session_rate", "rho", "as_recorded", "concurrency"]


class RoundRecord(msgspec.Struct, kw_only=True, gc=False):
    """One round as the client saw it, and what its receipt adds. Filled in by the run, then left alone.

    Holds only numbers and texts, so the garbage collector need not look at it.
    """

    session: str
    """Id in the trace; on the wire it carries the run's id in front."""
    round: int
    """1 for a session's first."""
    prompt_tokens: int
    kept_tokens: int
    status: str = "failed"
    """completed | refused | failed"""
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
    tool: str = ""
    """Whose result the round brings, where the trace says."""
    gap_s: float = 0.0
    """From the end of the session's previous answer to this request."""
    sent_s: float = 0.0
    """From the beginning of the run; the last try."""
    ttft_s: float | None = None
    itl_s: float | None = None
    """Mean over the round's tokens after the first; None with one token."""
    e2e_s: float | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    unloaded_ttft_s: float | None = None
    """What the best arm would take with nothing else in the fleet."""
    receipt: bool = False
    """Whether the fields below are known."""
    bytes_decode_to_prefill: int = 0
    bytes_prefill_to_decode: int = 0
    bytes_home_to_home: int = 0
    pulled_tokens: int = 0
    predicted_ttft_s: float | None = None
    gateway_ttft_s: float | None = None
    queue_s: float | None = None
    """In the scheduler, from the arrival to the first call of an engine."""
    pull_s: float | None = None
    prefill_s: float | None = None
    """At the prefill engine; 0 for `local`."""
    push_s: float | None = None
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
        return self.status == "completed" and ttft_ok and itl_ok


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
    """Percentiles interpolate linearly between the two nearest ranks."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


class TraceInfo(msgspec.Struct, frozen=True):
    """What was to be sent."""

    path: str
    sha256: str
    sessions: int
    rounds: int
    """What was to be sent, after shaping."""
    bad_lines: int = 0
    dropped_rounds: int = 0
    dropped_sessions: int = 0
    capped_gaps: int = 0


class ClusterInfo(msgspec.Struct, frozen=True):
    """The fleet of a simulation, as its file describes it."""

    name: str
    path: str
    description: str = ""
    engines: list[dict[str, Any]] = []
    """One entry for each group of equal engines, keys as in the cluster file."""


class Load(msgspec.Struct, frozen=True):
    """How sessions arrived."""

    kind: LoadKind
    value: float | None = None
    """Sessions per second, rho, most live sessions; null for as_recorded."""
    sessions_per_s: float | None = None
    """Offered; null where it is not fixed before the run."""


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Under what the figures came about. In a simulation url, model, run id and start are empty."""

    arrivals: str
    """In words."""
    max_gap_s: float
    commit: str | None
    machine: dict[str, Any]
    url: str = ""
    model: str = ""
    run_id: str = ""
    concurrency: int | None = None
    divide: int = 1
    window_tokens: int | None = None
    timeout_s: float | None = None
    retries: int = 0
    started_at: str = ""
    """Wall clock, UTC, ISO 8601; not in a simulation, which gives equal bytes whenever it runs."""


class RunResult(msgspec.Struct, kw_only=True):
    """One run. In memory it carries its rounds; the result file does not (`results.write_result`)."""

    schema: str = RESULT_SCHEMA
    kind: Literal["replay", "simulation"] = "replay"
    trace: TraceInfo
    cluster: ClusterInfo | None = None
    """None: a replay does not know its fleet."""
    policy: str | None
    ordering: str | None = None
    variant: str = ""
    """Of a sweep: what it calls the policy with these parameters; "" = by its own name."""
    policy_parameters: dict[str, Any] = {}
    """Those that were given; the others have their defaults."""
    seed: int
    slo: dict[str, float | None]
    """ttft_s, itl_s: targets of rounds whose session brings none of its own (of all, in a replay)."""
    load: Load | None = None
    conditions: Conditions
    interrupted: bool
    sessions_completed: int
    rounds_total: int
    rounds_completed: int
    rounds_refused: int = 0
    rounds_failed: int
    rounds_not_sent: int
    rounds_retried: int
    receipts_missing: int
    """Completed rounds without a receipt: their bytes are not in the sums."""
    attainment: dict[str, float] | None
    """Share of rounds, and of sessions all of whose rounds attain, of all that were to be sent."""
    attainable: float | None = None
    """Share of rounds whose unloaded TTFT is within its target: what no policy can exceed."""
    ttft_s: Distribution | None
    ttft_first_s: Distribution | None
    ttft_later_s: Distribution | None
    itl_s: Distribution | None
    """Over rounds, each by the mean over its tokens."""
    e2e_s: Distribution | None
    token_gap_s: Distribution | None = None
    """Over single tokens after the first; what stalls show in. None in a replay."""
    arms: dict[str, int]
    bytes_moved: int = 0
    bytes_decode_to_prefill: int
    bytes_prefill_to_decode: int
    bytes_home_to_home: int = 0
    """Fetched by new homes, with the arm `move`; 0 in files from before there was one."""
    prefill_tokens_computed: int | None = None
    prefill_tokens_reused: int | None = None
    prompt_tokens_total: int
    cached_tokens_total: int
    output_tokens_total: int
    gpu_seconds: float | None = None
    cost_per_1k_rounds: float | None = None
    """None without prices in the cluster file."""
    simulated_s: float | None = None
    flips: list[str] | UnsetType = UNSET
    """Of a simulation whose engines change pool: each change in words. Not there otherwise."""
    wall_s: float
    rounds: list[RoundRecord] = []
