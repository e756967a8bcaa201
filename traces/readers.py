"""Files to sessions: one small reader per format, chosen by what the first readable line holds.

A file is JSON lines, plain or gzipped (told by its first bytes). Reading is a stream: one session in memory.
A bad line ends the reading with its file, line and fault, unless the caller brings a `BadLines` to count it.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import IO, Annotated, NamedTuple, cast

import msgspec
from msgspec import Meta

from antiphon.traces.schema import (
    MAX_TOKENS,
    SCHEMA,
    RoundTrace,
    Seconds,
    SessionTrace,
    SomeTokens,
    TraceError,
    session_fault,
)

MAX_LINE_BYTES = 64 * 1024 * 1024
BAD_LINES_SHOWN = 5
COARSEST_BLOCK_TOKENS = 512
"""Sources that count shared prefixes in blocks use at most this many tokens a block (Mooncake)."""


@dataclass(slots=True)
class BadLines:
    """Lines that were left out: how many, and what was wrong with the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        self.count += 1
        if len(self.first) < BAD_LINES_SHOWN:
            self.first.append(fault)


class Line(NamedTuple):
    number: int
    text: bytes


class Format(NamedTuple):
    """One way to write a trace down. `read` gets every line of the file, the first one included."""

    name: str
    matches: Callable[[dict[str, object]], bool]
    read: Callable[[Iterator[Line]], Iterator[tuple[Line, SessionTrace | str]]]
    """Yields, per session or bad line: where it ended, and the session or what is wrong."""


def read_trace(path: Path, bad_lines: BadLines | None = None) -> Iterator[SessionTrace]:
    """The sessions of one file, in its order, each checked by `session_fault`, no id twice.

    Raises `TraceError` when the file cannot be read or is of no known format, and at a bad line unless
    `bad_lines` is given to count it.
    """
    lines = _lines(path)
    first, form = _detect(path, lines, bad_lines)
    seen: dict[str, int] = {}
    for line, item in form.read(_rejoin(first, lines)):
        if isinstance(item, str):
            fault: str | None = item
        elif item.session_id in seen:
            fault = f"session {item.session_id!r} was there already in line {seen[item.session_id]}"
        else:
            fault = session_fault(item)
        if fault is None and not isinstance(item, str):
            seen[item.session_id] = line.number
            yield item
            continue
        _bad(path, line.number, f"{fault} ({form.name})", bad_lines)


def _bad(path: Path, number: int, fault: str, bad_lines: BadLines | None) -> None:
    where = f"{path}, line {number}: {fault}"
    if bad_lines is None:
        raise TraceError(f"{where}; correct it or skip bad lines")
    bad_lines.add(where)


def _rejoin(first: Line, rest: Iterator[Line]) -> Iterator[Line]:
    yield first
    yield from rest


def _lines(path: Path) -> Iterator[Line]:
    """Lines that hold anything, numbered from 1. Every way a file can fail to be read is a `TraceError`."""
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES:
                    raise TraceError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes")
                if text := raw.strip():
                    yield Line(number, text)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot be read after line {number}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if zipped:
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _detect(path: Path, lines: Iterator[Line], bad_lines: BadLines | None) -> tuple[Line, Format]:
    """The first line that is a JSON object, and the format that knows it."""
    for line in lines:
        try:
            head = msgspec.json.decode(line.text, type=dict[str, object])
        except (msgspec.MsgspecError, RecursionError) as error:
            _bad(path, line.number, f"not a JSON object: {error}", bad_lines)
            continue
        for form in FORMATS:
            if form.matches(head):
                return line, form
        known = ", ".join(form.name for form in FORMATS)
        keys = ", ".join(sorted(head)[:8])
        raise TraceError(f"{path}, line {line.number}: no known trace format (keys: {keys}; known: {known})")
    raise TraceError(f"{path}: holds no session")


# ---------------------------------------------------------------- antiphon.trace/1


def _read_own(lines: Iterator[Line]) -> Iterator[tuple[Line, SessionTrace | str]]:
    decoder = msgspec.json.Decoder(SessionTrace)
    for line in lines:
        try:
            session = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        if session.schema == SCHEMA:
            yield line, session
        else:
            yield line, f"schema {session.schema!r} is not {SCHEMA!r}"


# ---------------------------------------------------------------- normalised `rounds` files


class _Round(msgspec.Struct, frozen=True):
    """Tokens of a request as a source counted them. Fields are absent where the source has none."""

    prompt: SomeTokens
    out: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    new: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    cached: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    """Prefix shared with the previous request's PROMPT, in whole blocks of the source."""
    gap_s: float | None = None
    t: Seconds | None = None
    llm_s: Seconds | None = None
    row: int | None = None
    """Line of a recording of the whole service: `t` is then absolute, else since the session's start."""


class _Session(msgspec.Struct, frozen=True):
    session: str | int
    rounds: tuple[_Round, ...]


def _read_rounds(lines: Iterator[Line]) -> Iterator[tuple[Line, SessionTrace | str]]:
    decoder = msgspec.json.Decoder(_Session)
    for line in lines:
        try:
            yield line, _from_rounds(decoder.decode(line.text))
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)


def _from_rounds(source: _Session) -> SessionTrace:
    block_tokens = gcd(COARSEST_BLOCK_TOKENS, *(turn.cached for turn in source.rounds if turn.cached))
    rounds: list[RoundTrace] = []
    previous: _Round | None = None
    for turn in source.rounds:
        rounds.append(
            RoundTrace(
                prompt_tokens=turn.prompt,
                output_tokens=max(1, turn.out),
                kept_tokens=_kept(previous, turn, block_tokens) if previous else 0,
                gap_s=_gap_s(previous, turn),
            )
        )
        previous = turn
    first = source.rounds[0] if source.rounds else None
    start_s = first.t if first is not None and first.row is not None else None
    return SessionTrace(session_id=str(source.session), rounds=tuple(rounds), start_s=start_s)


def _kept(previous: _Round, turn: _Round, block_tokens: int) -> int:
    """Tokens of the previous prompt and output that begin this prompt.

    `cached` knows only of the previous prompt. If all of that was kept (but for a part of a block), then
    the output follows it, provided that it fits; an output that does not fit was not re-sent whole (unsent
    thinking), and then none of it is taken as kept. Without `cached`, `new` counts only what the user or
    the tool added.
    """
    there = previous.prompt + max(1, previous.out)
    if turn.cached is None:
        kept = turn.prompt - turn.new if turn.new is not None else there
    elif turn.cached < previous.prompt // block_tokens * block_tokens:
        kept = turn.cached
    elif turn.prompt > there:
        kept = there
    else:
        kept = max(previous.prompt, turn.cached)
    return max(0, min(kept, there, turn.prompt - 1))


def _gap_s(previous: _Round | None, turn: _Round) -> float:
    """The recorded gap; where only start times and LLM times are known, their difference; else 0."""
    if previous is None:
        return 0.0
    if turn.gap_s is not None:
        return max(0.0, turn.gap_s)
    if turn.t is None or previous.t is None or previous.llm_s is None:
        return 0.0
    return max(0.0, turn.t - previous.t - previous.llm_s)


FORMATS: tuple[Format, ...] = (
    Format(
        SCHEMA,
        lambda head: head.get("schema") == SCHEMA or ("session_id" in head and "rounds" in head),
        _read_own,
    ),
    Format("normalised rounds", lambda head: "session" in head and "rounds" in head, _read_rounds),
)
"""In the order of asking."""
