"""What the core can be told: its own knobs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """The core's own knobs; seconds and counts."""

    max_tries: int = 3
    prefill_in_flight: int = 2
    """Rounds that pull or prefill on one engine at once, per replica."""
    max_queued_rounds: int = 0
    """That wait for one prefill engine, per replica: one more is refused; 0 = no bound."""
    admission: float = 0.0
    """A session's first round is refused if it would wait for over so many TTFT targets; 0 = never."""
    admission_under_way: float = 0.0
    """The same for rounds of sessions that have begun."""
    first_token_deadline_s: float = 120.0
    """A round without a token by then is refused."""
    transfer_floor_s: float = 0.5
    """Every transfer may take this long; a predicted longer one takes four times its prediction."""
    call_floor_s: float = 10.0
    """So long any call may wait for its first token, prefill or next token, while a further try has time."""
    call_slack: float = 4.0
    """A call may take so many times what is predicted of it, or its target, if that is longer."""
    breaker_failures: int = 3
    """In a row: then an engine, or the link between two, is left alone for a while."""
    breaker_open_s: float = 1.0
    """The first such pause; each further one in a row is twice as long."""
    breaker_max_open_s: float = 30.0
    retry_after_s: float = 1.0
    session_ttl_s: float = 3600.0
    max_sessions: int = 100_000
    corrections: bool = True
    """Whether rounds that finish correct the latency model (`corrections.py`)."""
    publish: bool = True
    """Whether anybody else counts our reservations: without, no `Reserved` is commanded."""
