"""What a policy sees and what it answers. A leaf: it imports nothing of Antiphon but `latency`.

A policy is `place(round, cluster) -> Placement | Reject`, an ordering is `order(queue, cluster) -> queue`.
Both are pure: no clock, no I/O, no state; chance only through `RoundView.seed`; ties end at the engine id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Protocol

from msgspec import Struct

from antiphon.policies.latency import LatencyModel


class Arm(Enum):
    """One way to run a round (home d, prefill engine p)."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is Python, and slow

    LOCAL = "local"
    REMOTE_RECOMPUTE = "remote_recompute"
    REMOTE_PULL = "remote_pull"


class Pool(Enum):
    __hash__ = object.__hash__

    PREFILL = "prefill"
    DECODE = "decode"


class RoundView(Struct, frozen=True, gc=False):
    """The round to place, as known when it is placed."""

    round_id: str
    session_id: str
    seed: int
    """Hash of session and round: the only source of chance for policies that draw."""
    prompt_tokens: int
    max_output_tokens: int
    slo_ttft_s: float
    slo_itl_s: float
    home: str | None
    """The engine that decodes this session; None before the first placement, or when that engine is gone."""
    waited_s: float
    """Seconds since the round arrived."""
    history_tokens: Mapping[str, int] = MappingProxyType({})
    """H(e): engine id -> tokens of this prompt whose KV it is believed to hold. Absent = 0."""
    excluded: frozenset[str] = frozenset()
    """Engines that failed this round already."""

    def held(self, engine_id: str) -> int:
        return self.history_tokens.get(engine_id, 0)


class EngineView(Struct, frozen=True, gc=False):
    """Aggregates of one live engine: own reservations plus the other replicas'."""

    engine_id: str
    pool: Pool
    can_transfer: bool
    """It has our linker: pages can be pulled from it and into it."""
    batch: int
    """Rounds that decode there."""
    context_tokens: int
    """Total context of those rounds."""
    queue_s: float
    """Predicted seconds of prefill work reserved there and not done."""
    queued_rounds: int
    pool_tokens: int
    used_tokens: int
    """Device KV that rounds in flight and idle homes occupy, as reserved."""
    sessions: int
    """Sessions whose home it is."""
    latency: LatencyModel
    """What work costs on this engine: the GPUs of a fleet may differ."""
    window_ttft_s: float | None = None
    """Mean TTFT of rounds prefilled there in the past window (10 s); None = none ended."""
    window_itl_s: float | None = None
    tightest_itl_slo_s: float | None = None
    """Smallest ITL target among the rounds that decode there."""
    chunk_tokens: int = 0
    """--chunked-prefill-size (C); 0 = unknown."""
    decode_interval: int = 0
    """--prefill-decode-interval (K): decode steps between two chunks; 0 = prefill first."""


class ClusterView(Struct, frozen=True, gc=False):
    """Everything else a policy may look at. `engines` is ordered by engine id."""

    engines: Mapping[str, EngineView]

    def pool(self, pool: Pool, excluded: frozenset[str] = frozenset()) -> tuple[EngineView, ...]:
        return tuple(e for e in self.engines.values() if e.pool is pool and e.engine_id not in excluded)


class Candidate(Struct, frozen=True, gc=False):
    """One arm that was considered, with its predictions in seconds. `ttft_s` is their sum."""

    arm: Arm
    prefill_engine: str
    queue_s: float
    prefill_s: float
    pull_s: float
    """Transfer of history to the prefill engine."""
    push_s: float
    """Transfer of the rest to the home."""

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s + self.pull_s + self.push_s


class Placement(Struct, frozen=True, gc=False):
    """A decision. For `local`, `prefill_engine` is the home."""

    arm: Arm
    home: str
    prefill_engine: str
    reason: str
    """In words, for the receipt."""
    predicted: Candidate
    considered: tuple[Candidate, ...] = ()


class Reject(Struct, frozen=True, gc=False):
    """No engine can take the round now."""

    reason: str
    retry_after_s: float


class Policy(Protocol):
    """`place` must be total: an answer for every cluster, a Reject when there is no usable engine."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject: ...


class Ordering(Protocol):
    """The order in which a prefill engine's queue is served; a permutation of `queue`, first = next."""

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]: ...
