"""What a replay is told, and what it is going to send: all that is known before the first request."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from antiphon.traces.arrivals import Arrivals, Start
from antiphon.traces.formats import Form
from antiphon.traces.gateway_client import ReplayError
from antiphon.traces.prompts import Vocabulary
from antiphon.traces.provenance import commit, machine
from antiphon.traces.readers import BadLines, ReadOptions, read_trace, trace_sha256
from antiphon.traces.results import Conditions, Load, TraceInfo
from antiphon.traces.schema import SessionTrace, TraceError
from antiphon.traces.shape import Shape, shape

DEFAULT_CONCURRENCY = 4
"""Live sessions when neither a rate, nor the recorded starts, nor a bound was asked for."""
MAX_SESSION_ID_CHARACTERS = 255
MAX_RUN_ID_CHARACTERS = 64
ORDINARY_IDS = Vocabulary(32, 500)
"""Words or bytes in common tokenizers, none of their special tokens."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What `antiphon replay` can be told. Checked when the replay starts (`ReplayError`)."""

    trace: Path
    url: str
    model: str | None = None
    """None = the first that the gateway lists."""
    session_rate: float | None = None
    """Poisson session starts per second."""
    as_recorded: bool = False
    concurrency: int | None = None
    """Most live sessions; alone, it makes a closed loop."""
    max_sessions: int | None = None
    """The first so many of the trace."""
    divide: int = 1
    """Lengths are divided by it."""
    max_gap_s: float = 60.0
    window_tokens: int | None = None
    """Prompt + output of a round; None = what the gateway says of the model, if it does."""
    vocabulary: Vocabulary = ORDINARY_IDS
    """Ids of filler tokens."""
    seed: int = 0
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    """Targets for every round; None = the session's own, if it has one."""
    timeout_s: float = 120.0
    """For one try of a round, from sending to the end of its answer."""
    retries: int = 1
    skip_bad: bool = False
    share_system: bool = False
    form: Form = "auto"
    run_id: str = ""
    """Goes in front of every session id, so that two runs never share a session; "" = a random one."""
    json_path: Path | None = None
    rounds_path: Path | None = None
    """One JSON line for each round; the result file has none."""
    verify_log: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be sent, known before the first request."""

    sessions: tuple[SessionTrace, ...]
    trace: TraceInfo
    conditions: Conditions
    bad_lines: tuple[str, ...] = ()
    """The first few, in words."""


def choose_arrivals(options: ReplayOptions) -> Arrivals:
    """Raises `ReplayError` for options that contradict each other or make no sense."""
    if options.session_rate is not None and options.as_recorded:
        raise ReplayError("a session rate and the recorded starts exclude each other: give one")
    if min(options.divide, options.timeout_s) <= 0 or min(options.max_gap_s, options.retries) < 0:
        raise ReplayError("divide and timeout must be above 0, the gap cap and retries not below 0")
    if len(options.run_id) > MAX_RUN_ID_CHARACTERS or not _visible_ascii(options.run_id):
        raise ReplayError(f"a run id is at most {MAX_RUN_ID_CHARACTERS} visible ASCII characters")
    if min(options.max_sessions or 1, options.window_tokens or 1) < 1:
        raise ReplayError("a bound on sessions or on the window must be at least 1")
    start, max_live = Start.AT_ONCE, options.concurrency
    if options.session_rate is not None:
        start = Start.POISSON
    elif options.as_recorded:
        start = Start.RECORDED
    elif max_live is None:
        max_live = DEFAULT_CONCURRENCY
    try:
        return Arrivals(start, options.session_rate or 0.0, options.seed, max_live)
    except ValueError as error:
        raise ReplayError(str(error)) from error


def offered_load(arrivals: Arrivals) -> Load:
    """How the result names these arrivals."""
    if arrivals.start is Start.POISSON:
        return Load("session_rate", arrivals.rate_per_s, arrivals.rate_per_s)
    if arrivals.start is Start.RECORDED:
        return Load("as_recorded")
    return Load("concurrency", arrivals.max_live)


def choose_model(models: Sequence[Mapping[str, Any]], options: ReplayOptions) -> Mapping[str, Any]:
    """The model that was asked for, or the first; raises `ReplayError`."""
    if options.model is None:
        return models[0]
    for model in models:
        if model["id"] == options.model:
            return model
    names = ", ".join(str(model["id"]) for model in models)
    raise ReplayError(f"the gateway does not serve {options.model!r}; it serves {names}")


def make_plan(options: ReplayOptions, arrivals: Arrivals, model: Mapping[str, Any]) -> Plan:
    """Read and shape the trace. Raises `TraceError`."""
    window = options.window_tokens or model.get("max_model_len")
    window_tokens = window if isinstance(window, int) else None
    bad = BadLines()
    read = ReadOptions(options.share_system, options.form)
    trace = read_trace(options.trace, bad if options.skip_bad else None, options=read)
    shaped = shape(trace, Shape(options.max_sessions, options.divide, options.max_gap_s, window_tokens))
    if not shaped.sessions:
        raise TraceError(f"{options.trace}: no session is left to send (window {window_tokens} tokens)")
    info = TraceInfo(
        path=str(options.trace),
        sha256=trace_sha256(options.trace),
        sessions=len(shaped.sessions),
        rounds=sum(len(session.rounds) for session in shaped.sessions),
        bad_lines=bad.count,
        dropped_rounds=shaped.dropped_rounds,
        dropped_sessions=shaped.dropped_sessions,
        capped_gaps=shaped.capped_gaps,
    )
    conditions = Conditions(
        url=options.url,
        model=str(model["id"]),
        run_id=options.run_id or secrets.token_hex(4),
        arrivals=arrivals.describe(),
        concurrency=arrivals.max_live,
        divide=options.divide,
        max_gap_s=options.max_gap_s,
        window_tokens=window_tokens,
        timeout_s=options.timeout_s,
        retries=options.retries,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
    )
    return Plan(shaped.sessions, info, conditions, tuple(bad.first))


def wire_session_id(run_id: str, session_id: str) -> str:
    """Run and session in one id that a gateway accepts: visible ASCII, at most 255 characters."""
    joined = f"{run_id}/{session_id}"
    if len(joined) <= MAX_SESSION_ID_CHARACTERS and _visible_ascii(joined):
        return joined
    return f"{run_id}/{hashlib.sha256(session_id.encode()).hexdigest()}"


def _visible_ascii(text: str) -> bool:
    return all("!" <= character <= "~" for character in text)
