"""One trace schema: a session per JSON line. A leaf: imports nothing of Antiphon."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

SCHEMA = "antiphon.trace/1"
RECORDED_ROUND_SCHEMA = "antiphon.round/1"
MAX_TOKENS = 100_000_000
"""No real round comes near; a larger number is a broken file, not a workload."""

Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
SomeTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
MAX_S = 1e9
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_S)]


class TraceError(Exception):
    """A trace cannot be used: where (file, line), what is wrong and, where it helps, what to do."""


class RoundTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request of a session, in tokens and seconds."""

    prompt_tokens: SomeTokens
    output_tokens: SomeTokens
    kept_tokens: Tokens = 0
    """Prefix shared with the previous round's prompt and output; shrinks at a compaction."""
    gap_s: Seconds = 0.0
    """From the end of the previous response to this request."""
    tool: str = ""

    @property
    def new_tokens(self) -> int:
        return self.prompt_tokens - self.kept_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


class SessionTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One conversation of one agent."""

    session_id: str
    rounds: tuple[RoundTrace, ...]
    start_s: Seconds | None = None
    """Recorded start, where the source has one."""
    parent: str | None = None
    after_round: Annotated[int, Meta(ge=0)] = 0
    """With a parent in the same trace: starts when that round of the parent ended (0 = with its first)."""
    shared_prefix: str = ""
    """Sessions with the same id share their first `shared_tokens` tokens."""
    shared_tokens: Tokens = 0
    slo_ttft_s: Seconds | None = None
    slo_itl_s: Seconds | None = None
    schema: str = SCHEMA


class RecordedRound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One round as `antiphon serve --record` writes it down: lengths and times, no content."""

    schema: str
    session: str
    round: int
    """The gateway's count, 1 for a session's first."""
    round_id: str
    """As in its receipt."""
    arrived_s: float
    """Unix time, as `ended_s`."""
    ended_s: float
    prompt_tokens: SomeTokens
    output_tokens: Tokens
    kept_tokens: Tokens | None = None
    """Prefix shared with the session's previous prompt and output; None = its recorder did not see that."""
    outcome: str = "completed"
    tool: str = ""
    parent: str | None = None
    """The session that it is a fork of."""
    shared_with: str | None = None
    """A session whose first prompt began with the same `shared_tokens` tokens."""
    shared_tokens: Tokens = 0
    slo_ttft_s: Seconds | None = None
    slo_itl_s: Seconds | None = None


def session_fault(session: SessionTrace) -> str | None:
    """What makes this session impossible, in words; None if it is sound.

    Sound: it has an id and rounds; every round keeps at most what was there (the previous prompt and output)
    and brings at least one new token; the shared prefix lies inside the first prompt; no length and no time
    is beyond its bounds.
    """
    if not session.session_id or not session.rounds:
        return "a session needs an id and at least one round"
    if session.shared_tokens > session.rounds[0].prompt_tokens:
        return f"shared_tokens {session.shared_tokens} exceed the first prompt"
    if session.shared_tokens and not session.shared_prefix:
        return "shared_tokens without a shared_prefix id"
    if session.start_s is not None and not 0.0 <= session.start_s <= MAX_S:
        return f"start_s {session.start_s} is not between 0 and {MAX_S:g}"
    there = 0
    for number, turn in enumerate(session.rounds, 1):
        if turn.kept_tokens > there:
            return f"round {number} keeps {turn.kept_tokens} tokens of {there} that were there"
        if turn.new_tokens < 1:
            return f"round {number} brings no new token: prompt {turn.prompt_tokens}, kept {turn.kept_tokens}"
        if max(turn.prompt_tokens, turn.output_tokens) > MAX_TOKENS or turn.output_tokens < 1:
            return f"round {number} has {turn.prompt_tokens} + {turn.output_tokens} tokens: 1 to {MAX_TOKENS}"
        if not 0.0 <= turn.gap_s <= MAX_S:
            return f"round {number}: gap_s {turn.gap_s} is not between 0 and {MAX_S:g}"
        there = turn.total_tokens
    return None
