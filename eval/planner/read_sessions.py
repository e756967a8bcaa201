"""The sessions that a plan is for: of a trace, or made from a workload's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from antiphon.eval.simulation_plan import check_parents
from antiphon.traces.formats import FORMS, Form
from antiphon.traces.generate import generate, take
from antiphon.traces.profiles import load_profile, profile_names
from antiphon.traces.readers import BadLines, ReadOptions, read_trace, trace_sha256
from antiphon.traces.schema import SessionTrace, TraceError
from antiphon.traces.shape import Shape, shape

GENERATED_SESSIONS = 300
"""That arrive; their sub-agents come on top."""


class Sessions(NamedTuple):
    """What was read."""

    sessions: tuple[SessionTrace, ...]
    """Gaps capped, each cut before its first round that does not fit the model's window."""
    sha256: str
    """Of the trace; "" where they were generated."""
    described: str
    """In words, for the user."""


class Reading(Protocol):
    """Those of the command's options that decide what is read."""

    @property
    def trace(self) -> str: ...
    @property
    def share_system(self) -> bool: ...
    @property
    def form(self) -> Form: ...
    @property
    def skip_bad(self) -> bool: ...
    @property
    def max_gap_s(self) -> float: ...
    @property
    def max_sessions(self) -> int | None: ...
    @property
    def divide(self) -> int: ...
    @property
    def seed(self) -> int: ...


def read_sessions(options: Reading, window_tokens: int) -> Sessions:
    """Raises `TraceError`: nothing there, nothing readable, nothing that fits the window."""
    most = options.max_sessions
    if not options.max_gap_s >= 0 or options.divide < 1 or (most is not None and most < 1):
        raise TraceError("--max-gap must not be below 0, --divide and --max-sessions not below 1")
    if options.form not in FORMS:
        raise TraceError(f"--form {options.form}: must be one of {', '.join(FORMS)}")
    path, bad = Path(options.trace), BadLines()
    statistics = path.suffix == ".toml" or (options.trace in profile_names() and not path.exists())
    if statistics:
        _refuse_trace_options(options)
        read, sha256 = _generated(options.trace, options.seed, window_tokens), ""
    elif path.exists():
        read = read_trace(
            path, bad if options.skip_bad else None, options=ReadOptions(options.share_system, options.form)
        )
        sha256 = trace_sha256(path)
    else:
        raise TraceError(
            f"{options.trace}: neither a trace (there is no such file) nor a workload profile"
            f" ({', '.join(profile_names())}, or a .toml file)"
        )
    how = Shape(options.max_sessions, options.divide, options.max_gap_s, window_tokens)
    shaped = shape(read, how)
    check_parents(shaped.sessions)
    if not shaped.sessions:
        raise TraceError(f"{options.trace}: no session is left to plan for (window {window_tokens} tokens)")
    rounds = sum(len(session.rounds) for session in shaped.sessions)
    described = f"{options.trace}: {len(shaped.sessions)} sessions, {rounds} rounds"
    if statistics:
        described += f", generated, seed {options.seed}"
    if shaped.dropped_rounds:
        described += f" ({shaped.dropped_rounds} more do not fit the window of {window_tokens} tokens)"
    if bad.count:
        described += f" ({bad.count} lines could not be read)"
    return Sessions(shaped.sessions, sha256, described)


def _refuse_trace_options(options: Reading) -> None:
    """Those of a recorded trace's format: they would be ignored."""
    given = {
        "--form": options.form != ReadOptions().form,
        "--share-system": options.share_system,
        "--skip-bad": options.skip_bad,
    }
    if named := [name for name, is_given in given.items() if is_given]:
        raise TraceError(
            f"{' and '.join(named)}: for recorded traces only; {options.trace} is a workload profile, of"
            " which sessions are generated"
        )


def _generated(name: str, seed: int, window_tokens: int) -> Iterator[SessionTrace]:
    arrived = 0
    for session in take(generate(Path(name).stem, load_profile(name), seed, window_tokens)):
        arrived += session.parent is None
        if arrived > GENERATED_SESSIONS:
            return
        yield session
