"""Events in, commands out: all that the core and a driver say to each other. No logic here.

Times are seconds on the driver's monotonic clock. Page hashes are 32-byte digests (`engines/page_hash.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct

from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.outcomes import Outcome, Receipt


class Holding(Struct, frozen=True, gc=False):
    """An engine holds the KV of the first `tokens` tokens of a prompt."""

    engine_id: str
    incarnation: str
    tokens: int


class Totals(Struct, frozen=True, gc=False):
    """What one replica has reserved on one engine."""

    prefill_s: float = 0.0
    prefill_rounds: int = 0
    decode_rounds: int = 0
    context_tokens: int = 0


# ---------------------------------------------------------------- events


class RoundArrived(Struct, frozen=True, gc=False):
    """A checked request. `hashes` are those of every whole page of the prompt."""

    round_id: str
    session_id: str
    tenant: str
    prompt_tokens: int
    hashes: tuple[bytes, ...]
    page_size_tokens: int
    max_output_tokens: int
    slo_ttft_s: float
    slo_itl_s: float
    expected_output_tokens: int | None = None
    """As the client says; None = not told, as in the next ones."""
    next_output_tokens: int | None = None
    """Of the session's next round."""
    remaining_rounds: int | None = None
    """After this one; 0 = the session ends with it."""
    expected_gap_s: float | None = None
    """From the end of this answer to the next request."""
    priority: int = 0


class Claimed(Struct, frozen=True, gc=False):
    """The ledger gave us the round: what it knows of the session and of the others' load."""

    round_id: str
    fence: int
    session_id: str
    """Another than asked for when the session had a round in flight: an implicit fork."""
    round_number: int
    """1 for a session's first round."""
    parent_id: str | None = None
    home: str | None = None
    holdings: tuple[Holding, ...] = ()
    others: Mapping[str, Totals] = MappingProxyType({})
    """Engine id -> the other replicas' reservations there, summed."""
    tip: tuple[bytes, Holding] | None = None
    """Where the session's last round ended: the hash of its last whole page, and who holds it up to there."""
    ttl_s: float = 0.0
    """How long the session is kept when idle: for the answer, not for the core."""
    slo_ttft_s: float = 0.0
    """The session's own targets, where the round names none; 0 = it has none."""
    slo_itl_s: float = 0.0
    expected_rounds: int = 0
    """As the session was created with; 0 = not told."""
    replaces: str = ""
    """An earlier try of the same call, which is to end: for the driver, not for the core."""


class ClaimLost(Struct, frozen=True, gc=False):
    """The ledger could not answer: go on with what the core knows (degraded)."""

    round_id: str
    reason: str
    holdings: tuple[Holding, ...] = ()
    """Who holds the prompt, by the engines' own word."""


class PrefetchDone(Struct, frozen=True, gc=False):
    """The puller has `pages` of what was asked, from the first on; fewer (even 0) only costs recomputing."""

    round_id: str
    engine_id: str
    pages: int
    pulled_pages: int
    pulled_bytes: int
    elapsed_s: float
    reason: str = ""
    link_failed: bool = False
    """The puller blames the way between the two engines, or the source: not what it has, nor its own room."""


class PrefillDone(Struct, frozen=True, gc=False):
    round_id: str
    cached_tokens: int


class FirstToken(Struct, frozen=True, gc=False):
    round_id: str


class RoundFinished(Struct, frozen=True, gc=False):
    """The stream ended well. `hashes` now cover prompt and output: every whole page with KV at the home."""

    round_id: str
    completion_tokens: int
    cached_tokens: int
    hashes: tuple[bytes, ...]
    reader_lagged: bool = False
    """The client's reading held the stream back: the time that it took says nothing of the engine."""


class GoesOn(Struct, frozen=True, gc=False):
    """What a broken answer can go on from elsewhere: its prompt, longer by the tokens that are kept of it."""

    prompt_tokens: int
    """Those of `RoundArrived` and the kept ones."""
    hashes: tuple[bytes, ...]
    """Of every whole page of that."""
    max_output_tokens: int
    """What is left to generate."""
    said_tokens: int
    """How many the engines had sent."""
    excluded: frozenset[str] = frozenset()
    """Engines that would go on otherwise."""


class EngineFailed(Struct, frozen=True, gc=False):
    """A call for this round failed on this engine (kind as in `engines.base.FailureKind`)."""

    round_id: str
    engine_id: str
    kind: str
    message: str
    goes_on: GoesOn | str = ""
    """After the first token: how the answer can go on, or why it cannot ("" = nobody has looked)."""


class EngineUp(Struct, frozen=True, gc=False):
    """An engine said hello. A new incarnation of a known engine voids what was believed of the old one."""

    engine_id: str
    incarnation: str
    pool: str
    can_transfer: bool
    page_size_tokens: int
    pool_tokens: int
    kv_bytes_per_token: int = 0
    chunk_tokens: int = 0
    decode_interval: int = 0
    latency: LatencyModel | None = None
    """None: the core's default profile."""
    store_tokens: int = 0
    """What its page store can hold; 0 = not told."""


class EngineDown(Struct, frozen=True, gc=False):
    engine_id: str
    incarnation: str
    """Only this incarnation is down; a newer one is not touched."""
    reason: str
    goes_on: Mapping[str, GoesOn | str] = MappingProxyType({})
    """By round id, of those that decode there: as in `EngineFailed`."""


class EngineSuspect(Struct, frozen=True, gc=False):
    """A probe of this incarnation failed, or one succeeds again. Nobody knows yet whether it is down."""

    engine_id: str
    incarnation: str
    suspect: bool


class EngineDraining(Struct, frozen=True, gc=False):
    """The engine is to be stopped, or not any more; told by its name, whatever process has it."""

    engine_id: str
    draining: bool


class LoadReported(Struct, frozen=True, gc=False):
    """What an engine itself says: corrects drift of the books, never added to them."""

    engine_id: str
    used_tokens: int
    """Device KV that its running requests hold."""


class ClientGone(Struct, frozen=True, gc=False):
    round_id: str


class SessionEnded(Struct, frozen=True, gc=False):
    """The session is over, as its client says: its KV is not expected to be asked for again."""

    tenant: str
    session_id: str


class SessionMoved(Struct, frozen=True, gc=False):
    """Between rounds, the session's KV was brought to another home, and the ledger says so."""

    tenant: str
    session_id: str
    from_home: str
    to_home: str
    hashes: tuple[bytes, ...]
    """The pages that are at the new home: the first ones of the session's chain."""
    page_size_tokens: int


class SessionsAged(Struct, frozen=True, gc=False):
    """Sessions that are not expected back any more shall not count at their homes: where pools change, an
    engine that has just become a home must not look empty beside those that have been one all day."""


class Tick(Struct, frozen=True, gc=False):
    """`next_deadline()` has come."""


Event = (
    RoundArrived | Claimed | ClaimLost | PrefetchDone | PrefillDone | FirstToken | RoundFinished
    | EngineFailed | EngineUp | EngineDown | EngineSuspect | EngineDraining | LoadReported
    | ClientGone | SessionEnded | SessionMoved | SessionsAged | Tick
)  # fmt: skip


# ---------------------------------------------------------------- commands


class Claim(Struct, frozen=True, gc=False):
    """Ask the ledger for lease, session record, the others' totals, and who holds how much of the prompt.

    At which places of the prompt's chain to ask: `Scheduler.checkpoints`, for a driver with a ledger.
    """

    round_id: str


class Prefetch(Struct, frozen=True, gc=False):
    """Have `engine_id` pull pages [first_page, first_page + pages) of the round's prompt from `source_id`."""

    round_id: str
    engine_id: str
    source_id: str
    source_incarnation: str
    first_page: int
    pages: int
    deadline_s: float
    """Seconds from now."""


class Prefill(Struct, frozen=True, gc=False):
    """Compute the prompt on `engine_id`, generate nothing."""

    round_id: str
    engine_id: str
    rid: str
    deadline_s: float = 0.0
    """Seconds from now."""


class Generate(Struct, frozen=True, gc=False):
    """Answer the round on `engine_id`, streaming to the client."""

    round_id: str
    engine_id: str
    rid: str
    deadline_s: float = 0.0
    """For the first token, in seconds from now. For the next ones: `Scheduler.silence_s`."""


class Abort(Struct, frozen=True, gc=False):
    """Stop the call under way: cancel it here and abort `rid` on the engine ("" = nothing to abort there)."""

    round_id: str
    engine_id: str
    rid: str


class Reserved(Struct, frozen=True, gc=False):
    """Our reservations on one engine changed: publish without waiting."""

    engine_id: str
    totals: Totals


class Rehome(Struct, frozen=True, gc=False):
    """`move`: the new home has the session's KV. Compare-and-set its home in the ledger, without waiting."""

    round_id: str
    from_home: str
    to_home: str


class HeldChain(Struct, frozen=True, gc=False):
    """An engine holds all pages of a chain. What a ledger keeps of it is told by `Scheduler.checkpoints`."""

    engine_id: str
    incarnation: str
    hashes: tuple[bytes, ...]


class Complete(Struct, frozen=True, gc=False):
    """The round is over: record it, free the lease."""

    round_id: str
    outcome: Outcome
    receipt: Receipt
    home: str | None
    holdings: tuple[HeldChain, ...] = ()
    """Who holds what after this round; the home first."""


class Refuse(Struct, frozen=True, gc=False):
    """Answer the client with an error; nothing was streamed yet. `Complete` follows."""

    round_id: str
    code: str
    """no_engine_available | upstream_failed | bad_upstream_request | overloaded | would_wait"""
    message: str
    retry_after_s: float


class Broke(Struct, frozen=True, gc=False):
    """The stream broke after its first token: end it with a clean error event. `Complete` follows."""

    round_id: str
    message: str


Command = Claim | Prefetch | Prefill | Generate | Abort | Reserved | Rehome | Complete | Refuse | Broke
