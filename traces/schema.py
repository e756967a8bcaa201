"""One trace schema: a session per JSON line. A leaf: imports nothing of Antiphon."""

from __future__ import annotations

import msgspec

SCHEMA = "antiphon.trace/1"


class RoundTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request of a session, in tokens and seconds."""

    prompt_tokens: int
    output_tokens: int
    kept_tokens: int = 0
    """Prefix shared with the previous round's prompt and output; shrinks at a compaction."""
    gap_s: float = 0.0
    """From the end of the previous response to this request."""
    tool: str = ""


class SessionTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One conversation of one agent."""

    session_id: str
    rounds: tuple[RoundTrace, ...]
    start_s: float | None = None
    """Recorded start, where the source has one."""
    parent: str | None = None
    shared_prefix: str = ""
    """Sessions with the same id share their first `shared_tokens` tokens."""
    shared_tokens: int = 0
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    schema: str = SCHEMA
