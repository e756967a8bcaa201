"""A round's life as tables: which event each phase takes, and which phases may follow.

Rules of this file: every change of phase goes through `Round.enter`; an event that its phase does not take is
`IllegalEvent`, raised before anything changed. The diagram in docs/architecture.md is made from these tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Enum

from msgspec import Struct, field
from msgspec.structs import replace

from antiphon.policies.base import LOCAL, Arm, Placement
from antiphon.scheduler.messages import (
    Claimed,
    ClaimLost,
    ClientGone,
    EngineFailed,
    Event,
    FirstToken,
    PrefetchDone,
    PrefillDone,
    RoundArrived,
    RoundFinished,
)
from antiphon.scheduler.outcomes import Try
from antiphon.scheduler.store_use import SessionKey


class Phase(Enum):
    __hash__ = object.__hash__  # members are single objects; Enum's own hash is Python, and slow

    CLAIMING = "claiming"
    """The ledger is asked for the lease."""
    QUEUED = "queued"
    """In one prefill engine's queue."""
    PULLING = "pulling"
    """The prefill engine fetches history."""
    PREFILLING = "prefilling"
    PUSHING = "pushing"
    """The home fetches what it lacks from the prefill engine; a new home, from where the session's KV is."""
    GENERATING = "generating"
    """Sent to the home; no token yet."""
    DECODING = "decoding"
    ENDED = "ended"


# By name: on Python 3.11 a look-up through an Enum's class costs as much as a call.
CLAIMING, QUEUED, PULLING, PREFILLING, PUSHING, GENERATING, DECODING, ENDED = Phase


PLACEABLE = frozenset({Phase.QUEUED, Phase.PUSHING, Phase.GENERATING, Phase.ENDED})
"""Where a (re)placement can lead: a prefill queue, a move to a new home, the home at once, or a refusal."""

SUCCESSORS: dict[Phase, frozenset[Phase]] = {
    Phase.CLAIMING: PLACEABLE,
    Phase.QUEUED: PLACEABLE | {Phase.PULLING, Phase.PREFILLING},
    Phase.PULLING: PLACEABLE | {Phase.PREFILLING},
    Phase.PREFILLING: PLACEABLE | {Phase.PUSHING},
    Phase.PUSHING: PLACEABLE,
    Phase.GENERATING: PLACEABLE | {Phase.DECODING},
    Phase.DECODING: PLACEABLE,
    Phase.ENDED: frozenset(),
}

ACCEPTS: dict[Phase, frozenset[type]] = {
    Phase.CLAIMING: frozenset({Claimed, ClaimLost, ClientGone}),
    Phase.QUEUED: frozenset({ClientGone}),
    Phase.PULLING: frozenset({PrefetchDone, EngineFailed, ClientGone}),
    Phase.PREFILLING: frozenset({PrefillDone, EngineFailed, ClientGone}),
    Phase.PUSHING: frozenset({PrefetchDone, EngineFailed, ClientGone}),
    Phase.GENERATING: frozenset({FirstToken, EngineFailed, ClientGone}),
    Phase.DECODING: frozenset({RoundFinished, EngineFailed, ClientGone}),
    Phase.ENDED: frozenset(),
}

PREFILL_PHASES = frozenset({Phase.PULLING, Phase.PREFILLING})
"""In flight at the prefill engine: what the limit of rounds per engine counts."""

PREFILL_RESERVED = frozenset({Phase.QUEUED, Phase.PULLING, Phase.PREFILLING})
"""A remote round's prefill work is reserved from the decision until it is done."""


TRANSFER_PHASES: dict[Arm, tuple[frozenset[Phase], frozenset[Phase]]] = {
    Arm.LOCAL: (frozenset(), frozenset()),
    Arm.REMOTE_RECOMPUTE: (frozenset(), PREFILL_RESERVED | {Phase.PUSHING}),
    Arm.REMOTE_PULL: (frozenset({Phase.QUEUED, Phase.PULLING}), PREFILL_RESERVED | {Phase.PUSHING}),
    Arm.MOVE: (frozenset({Phase.PUSHING}), frozenset()),
}
"""While which phases a round's transfers are reserved: that of history, that from the prefill engine home."""


class IllegalEvent(Exception):
    """An event that the core must not get now: a bug in a driver. Nothing was changed."""


class Round(Struct):
    """A round in flight. Written only by the core."""

    round_id: str
    arrived: RoundArrived
    arrived_s: float
    deadline_s: float
    """When it is refused if no token has come."""
    seed: int
    session_id: str
    session_key: SessionKey
    """Of its tenant and `session_id`."""
    phase: Phase = CLAIMING
    round_number: int = 1
    ends: bool = False
    """Its session is over with it."""
    degraded: bool = False
    likely_home: str | None = None
    """Where its session probably is at home, of a degraded round whose session has none that we know."""
    tries: list[Try] = field(default_factory=list)
    excluded: frozenset[str] = frozenset()
    all_unreachable: bool = True
    """No try reached an engine so far."""
    placement: Placement | None = None
    pools: str = ""
    """How many engines each pool had when it was placed last: "2p+2d"."""
    source: str | None = None
    """Where the placement has history pulled from; None = nothing is pulled."""
    history: Mapping[str, int] = field(default_factory=dict)
    """H(e) as believed at the decision."""
    history_tokens: int = 0
    """H(home) as believed at the decision."""
    queue_key: float = 0.0
    """Where it stands in its prefill engine's queue: what the ordering's `key` said."""
    postponed: int = 0
    """How often one behind it in a queue was started first."""
    rid: str = ""
    """Of the engine call under way; "" between calls."""
    tried_s: float = 0.0
    """When the present try began: the first one with the round's arrival."""
    dispatched_s: float | None = None
    entered_s: float = 0.0
    """When the present phase began."""
    prefilled_s: float = 0.0
    pull_s: float = 0.0
    push_s: float = 0.0
    prefill_cached_tokens: int | None = None
    """What the prefill engine did not compute, the least of all tries; None when no other engine computed."""
    pulled_tokens: int = 0
    bytes_decode_to_prefill: int = 0
    bytes_prefill_to_decode: int = 0
    bytes_home_to_home: int = 0
    first_token_s: float | None = None
    """The client's first one: a stream that breaks and goes on elsewhere has no other."""
    answered_by: int = -1
    """Which of the tries brought it."""
    carried_tokens: int = 0
    """At the end of the prompt in `arrived`: what is kept of an answer that broke."""
    notes: list[str] = field(default_factory=list)

    @property
    def arm(self) -> Arm | None:
        return self.placement.arm if self.placement else None

    def transfers(self) -> list[tuple[str, str, int]]:
        """(puller, source, tokens) as planned: of history, and from the prefill engine home."""
        if self.placement is None or self.placement.arm is LOCAL:
            return []
        home, engine_id, held = self.placement.home, self.placement.prefill_engine, self.history.get
        planned = []
        if self.source is not None:
            tokens = held(self.source, 0) - held(engine_id, 0)
            if tokens > 0:
                planned.append((engine_id, self.source, tokens))
        if home != engine_id:
            tokens = len(self.arrived.hashes) * self.arrived.page_size_tokens - held(home, 0)
            if tokens > 0:
                planned.append((home, engine_id, tokens))
        return planned

    @property
    def engine_id(self) -> str | None:
        """The engine that the call under way runs on (the one whose death ends it); None between calls."""
        if self.placement is None or self.phase in (CLAIMING, QUEUED, ENDED):
            return None
        return self.placement.prefill_engine if self.phase in PREFILL_PHASES else self.placement.home

    @property
    def prompt_tokens(self) -> int:
        """As the client sent it."""
        return self.arrived.prompt_tokens - self.carried_tokens

    def uses(self, engine_id: str) -> bool:
        """The round is placed there, or history is fetched from there."""
        placed = self.placement
        return placed is not None and engine_id in (placed.home, placed.prefill_engine, self.source)

    def depends_on(self, engine_id: str) -> bool:
        """The round cannot go on as placed without this engine."""
        if self.placement is None or self.phase in (CLAIMING, ENDED):
            return False
        if self.placement.home == engine_id:
            return True
        return self.placement.prefill_engine == engine_id and self.phase in PREFILL_RESERVED

    def check(self, event: Event) -> None:
        """Raise `IllegalEvent` unless the present phase takes this event."""
        if type(event) not in ACCEPTS[self.phase]:
            raise IllegalEvent(f"round {self.round_id} is {self.phase.value}: it does not take {event!r}")

    def enter(self, phase: Phase, now: float) -> None:
        if phase not in SUCCESSORS[self.phase]:
            raise IllegalEvent(f"round {self.round_id} cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase
        self.entered_s = now


def with_session(round: Round, claimed: Claimed) -> None:
    """Take over what a claim tells of the round's session: its name, and what it was created with."""
    if claimed.session_id != round.session_id:
        round.session_id = claimed.session_id
        round.session_key = (round.arrived.tenant, claimed.session_id)
    round.round_number = claimed.round_number
    arrived = round.arrived
    if claimed.slo_ttft_s or claimed.slo_itl_s:
        ttft_s, itl_s = claimed.slo_ttft_s or arrived.slo_ttft_s, claimed.slo_itl_s or arrived.slo_itl_s
        round.arrived = replace(arrived, slo_ttft_s=ttft_s, slo_itl_s=itl_s)
    if claimed.expected_rounds and arrived.remaining_rounds is None:
        round.ends = claimed.round_number >= claimed.expected_rounds


def new_round(arrived: RoundArrived, now: float, deadline_s: float) -> Round:
    """The record of a round that has just arrived."""
    digest = hashlib.sha256(f"{arrived.session_id}\0{arrived.round_id}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little")
    session_id, ends = arrived.session_id, arrived.remaining_rounds == 0
    key = arrived.tenant, session_id
    return Round(arrived.round_id, arrived, now, deadline_s, seed, session_id, key, ends=ends)
