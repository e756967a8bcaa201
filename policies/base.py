"""What a policy sees and what it answers. A leaf: it imports nothing of Antiphon but `latency`.

A policy is `place(round, cluster) -> Placement | Reject`, an ordering is `order(queue, cluster) -> queue`.
Both are pure: no clock, no I/O, no state; chance only through `RoundView.seed`; ties end at the engine id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from operator import attrgetter
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
    MOVE = "move"
    """The session gets a new home, which fetches its KV and prefills the rest."""


# By name: on Python 3.11 a look-up through an Enum's class costs as much as a call.
LOCAL, REMOTE_RECOMPUTE, REMOTE_PULL, MOVE = Arm


class Pool(Enum):
    __hash__ = object.__hash__

    PREFILL = "prefill"
    DECODE = "decode"


PREFILL, DECODE = Pool


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
    arrived_s: float = 0.0
    """When it arrived, on the core's clock: only differences mean anything."""
    expected_output_tokens: int = 0
    """What the core expects it to generate, from the rounds that ended; 0 = no idea."""
    work_s: float = 0.0
    """Of a placed round: predicted seconds of pull and prefill at its prefill engine."""
    push_s: float = 0.0
    """Of a placed round: predicted seconds from there to the first token's engine."""
    postponed: int = 0
    """Of a waiting round: how often one behind it was started first."""
    leaving: bool = False
    """Its home is to be stopped (and is one of `excluded`): what it holds can still be fetched."""

    def held(self, engine_id: str) -> int:
        return self.history_tokens.get(engine_id, 0)


class Corrections(Struct, frozen=True, gc=False):
    """What predictions for one engine are multiplied by: learnt from rounds that ended."""

    prefill: float = 1.0
    decode: float = 1.0
    transfer: float = 1.0


NEUTRAL = Corrections()


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
    corrections: Corrections = NEUTRAL
    incoming_bytes: float = 0.0
    """KV that rounds in flight have still to bring here."""
    outgoing_bytes: float = 0.0
    """KV that rounds in flight have still to fetch from here."""
    itl_slacks_s: tuple[float, ...] = ()
    """The least stalls, ascending, that rounds which decode there can still take before their mean ITL misses
    its target; at most SLACKS of them, those that have missed it left out."""
    arrivals_per_s: float = 0.0
    """Rounds that were placed there for prefill, per second of the past window."""
    prefill_share: float = 0.0
    """Seconds of prefill that were placed there, per second of the past window."""
    kv_share: float = 0.0
    """KV there of sessions that are expected back, as a share of its page store; above 1 it evicts some."""
    in_time_per_s: float = 0.0
    """Of `arrivals_per_s`, the rounds that were expected to meet their TTFT target."""


SLACKS = 16
"""Most `EngineView.itl_slacks_s`."""


def use_share(engine: EngineView) -> float:
    """The share of its device's KV that is in use."""
    return engine.used_tokens / (engine.pool_tokens or 1)


class ClusterView(Struct, frozen=True, gc=False):
    """Everything else a policy may look at. `engines` is ordered by engine id."""

    engines: Mapping[str, EngineView]

    def pool(self, pool: Pool, excluded: frozenset[str] = frozenset()) -> tuple[EngineView, ...]:
        return tuple(e for e in self.engines.values() if e.pool is pool and e.engine_id not in excluded)

    def by_queue(self) -> list[EngineView]:
        """The shortest queue first, then by engine id."""
        return sorted(self.engines.values(), key=_queue_s)

    def by_use(self) -> list[EngineView]:
        """The least share of KV in use first, then fewest sessions, then by engine id."""
        return sorted(sorted(self.engines.values(), key=_sessions), key=use_share)


def can_be_home(engine: EngineView, round: RoundView) -> bool:
    """Its KV pool holds the whole round, whatever is in it now, and it has not failed it already."""
    need_tokens = round.prompt_tokens + round.max_output_tokens
    return engine.engine_id not in round.excluded and need_tokens <= engine.pool_tokens


def possible_homes(round: RoundView, cluster: ClusterView) -> list[EngineView]:
    """Engines of the decode pool that can be its home; if there are none, those of the prefill pool."""
    usable = [engine for engine in cluster.engines.values() if can_be_home(engine, round)]
    return [engine for engine in usable if engine.pool is DECODE] or usable


_queue_s, _sessions = attrgetter("queue_s"), attrgetter("sessions")
# Sorting is stable: ties stay in the order of `engines`, by id, and no key has to be a tuple.


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
    home: str = ""
    """Where it would decode; "" = the placement's home."""
    itl_s: float | None = None
    """The round's own mean ITL there; None = not predicted."""
    misses: float | None = None
    """SLOs expected to be lost by this choice, the round's own included; None = not predicted."""

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
    source: str | None = None
    """Where history is pulled from (`remote_pull`, `move`); None = the home (`remote_pull`)."""


class Reject(Struct, frozen=True, gc=False):
    """No engine can take the round now."""

    reason: str
    retry_after_s: float


class Policy(Protocol):
    """`place` must be total: an answer for every cluster, a Reject when there is no usable engine."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject: ...


class Ordering(Protocol):
    """How a prefill engine's queue is served.

    The core keeps the queue sorted by (`key`, round id) and asks `order` about its first `window` rounds
    only: so a start costs the same however long the queue is.
    """

    @property
    def window(self) -> int:
        """At least 1; 1 = the key alone decides."""

    def key(self, round: RoundView) -> float:
        """Least first; computed once, when the round is queued."""

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """A permutation of `queue`, whatever order that is in; the first is started next."""
