"""What `antiphon serve --record DIR` wrote, joined into sessions.

A recording is a folder with `recording.json` in it. Every replica that records there appends to a file of
its own, `rounds-*.jsonl`, one line (`schema.RecordedRound`) per round that ended; a session's rounds may be
spread over several of them. A last line without its end was cut off by a crash and is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from antiphon.traces.schema import (
    RECORDED_ROUND_SCHEMA,
    RecordedRound,
    RoundTrace,
    SessionTrace,
    TraceError,
)

MARKER = "recording.json"
ROUND_FILES = "rounds-*.jsonl"


def is_recording(path: Path) -> bool:
    """Whether `path` is a folder that `serve --record` wrote."""
    return (path / MARKER).is_file()


def read_recording(directory: Path, on_bad: Callable[[str], None] | None = None) -> list[SessionTrace]:
    """Every session with a completed round, in the order of their first arrivals.

    Raises `TraceError` (file, line, what is wrong) if nothing can be read, and at a bad line unless `on_bad`
    takes it.
    """
    if not is_recording(directory):
        raise TraceError(f"{directory}: not a recording: it has no {MARKER}")
    rounds = [item for path in sorted(directory.glob(ROUND_FILES)) for item in _read(path, on_bad)]
    sessions = join_rounds(rounds)
    if not sessions:
        raise TraceError(f"{directory}: holds no completed round")
    return sessions


def recorded_rounds(directory: Path) -> list[RecordedRound]:
    """Every recorded round, however it ended, in the order of arrival. Raises `TraceError`."""
    rounds = [item for path in sorted(directory.glob(ROUND_FILES)) for item in _read(path, None)]
    return sorted(rounds, key=lambda item: item.arrived_s)


def join_rounds(rounds: Iterable[RecordedRound]) -> list[SessionTrace]:
    """Sessions of completed rounds. Times become seconds since the first arrival of the recording.

    Where nobody knew what a round kept (its predecessor ran on another replica), it is taken to have kept
    all that was there. A fork is a session of its own, which starts when it did, not when its parent does.
    """
    by_session: defaultdict[str, list[RecordedRound]] = defaultdict(list)
    for item in rounds:
        by_session[item.session].append(item)
    began_s = min((item.arrived_s for items in by_session.values() for item in items), default=0.0)
    sessions = [
        _join(sorted(items, key=lambda item: (item.arrived_s, item.round)), began_s)
        for items in by_session.values()
    ]
    found = [session for session in sessions if session.rounds]
    found.sort(key=lambda session: (session.start_s or 0.0, session.session_id))
    return _with_shared_prefixes(found, by_session)


def _join(items: Sequence[RecordedRound], began_s: float) -> SessionTrace:
    """One session; without rounds if none was completed."""
    turns: list[RoundTrace] = []
    there, ended_s = 0, 0.0
    first: RecordedRound | None = None
    for item in items:
        if item.outcome == "completed":
            kept = there if item.kept_tokens is None else item.kept_tokens
            turns.append(
                RoundTrace(
                    prompt_tokens=item.prompt_tokens,
                    output_tokens=max(1, item.output_tokens),
                    kept_tokens=min(kept, there, item.prompt_tokens - 1),
                    gap_s=max(0.0, item.arrived_s - ended_s) if turns else 0.0,
                    tool=item.tool,
                )
            )
            there = turns[-1].total_tokens
            first = first or item
        ended_s = max(ended_s, item.ended_s)
    start = first or items[0]
    return SessionTrace(
        session_id=start.session,
        rounds=tuple(turns),
        start_s=start.arrived_s - began_s,
        slo_ttft_s=start.slo_ttft_s,
        slo_itl_s=start.slo_itl_s,
    )


def _with_shared_prefixes(
    sessions: Sequence[SessionTrace], by_session: dict[str, list[RecordedRound]]
) -> list[SessionTrace]:
    """Sessions whose first prompts began alike get one shared prefix, called after the first of them."""
    tokens: defaultdict[str, int] = defaultdict(int)
    source: dict[str, str] = {}
    for session in sessions:
        said = next((item for item in by_session[session.session_id] if item.shared_with), None)
        if said is not None and said.shared_with in by_session and said.shared_with != said.session:
            source[said.session] = said.shared_with
            for name in (said.session, said.shared_with):
                tokens[name] = max(tokens[name], said.shared_tokens)
    joined = []
    for session in sessions:
        shared = min(tokens[session.session_id], session.rounds[0].prompt_tokens)
        if shared:
            root = _root(session.session_id, source)
            session = msgspec.structs.replace(session, shared_prefix=root, shared_tokens=shared)
        joined.append(session)
    return joined


def _root(name: str, source: dict[str, str]) -> str:
    seen: set[str] = set()
    while name in source and name not in seen:
        seen.add(name)
        name = source[name]
    return name


def _read(path: Path, on_bad: Callable[[str], None] | None) -> Iterable[RecordedRound]:
    decoder = msgspec.json.Decoder(RecordedRound)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines[:-1], 1):  # behind the last line end: nothing, or a line cut off
        try:
            item = decoder.decode(line)
            if item.schema != RECORDED_ROUND_SCHEMA:
                raise msgspec.ValidationError(f"schema {item.schema!r} is not {RECORDED_ROUND_SCHEMA!r}")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            fault = f"{path}, line {number}: {error}"
            if on_bad is None:
                raise TraceError(f"{fault}; correct it or skip bad lines") from error
            on_bad(fault)
            continue
        yield item
