"""How a round ended: its outcome, and the receipt of what was decided, predicted and measured. A leaf."""

from __future__ import annotations

from enum import Enum

from msgspec import Struct

from antiphon.policies.base import Arm, Placement


class Outcome(Enum):
    """How an accepted or refused round ended; few values, for metrics."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is Python, and slow

    COMPLETED = "completed"
    REFUSED = "refused"
    """Never started: no engine, no room."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """The client went away."""


class Try(Struct, frozen=True, gc=False):
    """One attempt at the round and how it ended ("" = it is the one that answered, or the end of it)."""

    placement: Placement
    failure: str = ""
    elapsed_s: float = 0.0
    """How long a failed one took."""


class Receipt(Struct, frozen=True, gc=False):
    """The record of one decision: what was considered, predicted and measured, and why."""

    round_id: str
    session_id: str
    round_number: int
    outcome: Outcome
    arm: Arm | None
    home: str | None
    prefill_engine: str | None
    reason: str
    tries: tuple[Try, ...]
    degraded: bool
    prompt_tokens: int
    history_tokens: int
    """H(home) as believed at the decision."""
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that no engine computed for this round."""
    bytes_decode_to_prefill: int
    bytes_prefill_to_decode: int
    pulled_tokens: int
    """History that the prefill engine pulled; of a `move`, the new home."""
    predicted_ttft_s: float
    ttft_s: float | None
    queue_s: float
    pull_s: float
    prefill_s: float
    push_s: float
    itl_s: float | None
    notes: tuple[str, ...] = ()
    """What did not go as planned: pages that did not come, and why."""
    bytes_home_to_home: int = 0
    """What a `move` brought to the new home; in neither of the other two."""
    slo_ttft_s: float = 0.0
    """The targets that it was placed for: the request's own, else the cluster's. 0 = not told."""
    slo_itl_s: float = 0.0
    pools: str = ""
    """The fleet that it was decided for, by pools: "2p+2d" has two engines each. "" = never placed."""
