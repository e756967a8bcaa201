"""Traces to sessions: a file, folder or archive, each file read by the format that its content shows.

Reading is a stream: one session in memory, of formats that have a document a session one document, and of
those that need all of a file to tell its sessions (Mooncake, Bailian, recordings) one file.
A bad line ends the reading with its file, line and fault, unless the caller brings a `BadLines` to count it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec

from antiphon.traces.containers import Part, lines, parts, trace_sha256
from antiphon.traces.format_agentic import FORMAT as AGENTIC
from antiphon.traces.format_aiperf import FORMAT as AIPERF
from antiphon.traces.format_azure import FORMAT as AZURE
from antiphon.traces.format_bailian import FORMAT as BAILIAN
from antiphon.traces.format_mooncake import FORMAT as MOONCAKE
from antiphon.traces.format_mooncake_sessions import FORMAT as MOONCAKE_SESSIONS
from antiphon.traces.format_own import FORMATS as OWN
from antiphon.traces.format_rounds import FORMAT as ROUNDS
from antiphon.traces.format_weka import FORMAT as WEKA
from antiphon.traces.formats import Format, Line, ReadOptions, column_names
from antiphon.traces.recording import is_recording, read_recording
from antiphon.traces.schema import RECORDED_ROUND_SCHEMA, SessionTrace, TraceError, session_fault

__all__ = ["FORMATS", "BadLines", "ReadOptions", "read_trace", "trace_sha256"]

BAD_LINES_SHOWN = 5
MAX_DOCUMENT_BYTES = 256 * 1024 * 1024

FORMATS: tuple[Format, ...] = (
    *OWN,
    ROUNDS,
    WEKA,
    AGENTIC,
    BAILIAN,
    AIPERF,
    MOONCAKE_SESSIONS,
    MOONCAKE,
    AZURE,
)
"""In the order of asking."""


@dataclass(slots=True)
class BadLines:
    """Lines that were left out: how many, and what was wrong with the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        self.count += 1
        if len(self.first) < BAD_LINES_SHOWN:
            self.first.append(fault)


class _NoFormat(Exception):
    """A file holds nothing that a format knows, and why."""


class _Place(NamedTuple):
    """Where a session was read."""

    name: str
    source: Path
    line: int


def read_trace(
    path: Path,
    bad_lines: BadLines | None = None,
    *,
    options: ReadOptions = ReadOptions(),  # noqa: B008
    ignored: list[str] | None = None,
) -> Iterator[SessionTrace]:
    """The sessions of a file, folder or archive, in its order, each checked by `session_fault`, no id twice.

    Of a folder or an archive all files that hold a trace are read, sorted by name; the others are left
    out, and `ignored`, if given, gets a line on each. A folder that `serve --record` wrote is read as one.
    Raises `TraceError` when nothing can be read or is of no known format, when two files of a folder hold
    the same session, and at a bad line unless `bad_lines` is given to count it.
    """
    left_out = [] if ignored is None else ignored
    if is_recording(path):
        yield from _of_recording(path, bad_lines)
        return
    seen: dict[str, _Place] = {}
    used = False
    for part in parts(path, left_out):
        try:
            form, content = _detect(part, bad_lines)
        except _NoFormat as error:
            if part.alone:
                raise TraceError(str(error)) from None
            left_out.append(str(error))
            continue
        used = True
        yield from _sessions(
            part, form.name, _read(part, form, _utf8(part, content, bad_lines), options), seen, bad_lines
        )
    if not used:
        shown = "; ".join(left_out[:BAD_LINES_SHOWN]) or "it has no files"
        raise TraceError(f"{path}: holds no session: no file of a known trace format in it ({shown})")


def _of_recording(path: Path, bad_lines: BadLines | None) -> Iterator[SessionTrace]:
    for session in read_recording(path, None if bad_lines is None else bad_lines.add):
        if fault := session_fault(session):
            _bad(f"{path}: session {session.session_id!r}: {fault}", bad_lines)
        else:
            yield session


def _utf8(part: Part, content: Iterator[Line], bad_lines: BadLines | None) -> Iterator[Line]:
    """Lines of text; formats never see others: their decoders raise different errors for them."""
    for line in content:
        try:
            line.text.decode()
        except UnicodeDecodeError as error:
            _bad(f"{part.name}, line {line.number}: {error}", bad_lines)
        else:
            yield line


_Found = tuple[Line, SessionTrace | str]


def _read(part: Part, form: Format, content: Iterator[Line], options: ReadOptions) -> Iterator[_Found]:
    """A format's errors do not name the file: it does not know it."""
    try:
        yield from form.read(content, options)
    except TraceError as error:
        if str(error).startswith(part.name):
            raise
        raise TraceError(f"{part.name}: {error} ({form.name})") from error


def _sessions(
    part: Part, form: str, found: Iterator[_Found], seen: dict[str, _Place], bad_lines: BadLines | None
) -> Iterator[SessionTrace]:
    for line, item in found:
        if isinstance(item, str):
            _bad(f"{part.name}, line {line.number}: {item} ({form})", bad_lines)
            continue
        before = seen.get(item.session_id)
        fault = session_fault(item) if before is None else _twice(item.session_id, part, form, before)
        if fault is not None:
            _bad(f"{part.name}, line {line.number}: {fault} ({form})", bad_lines)
            continue
        seen[item.session_id] = _Place(part.name, part.source, line.number)
        yield item


def _twice(session_id: str, part: Part, form: str, before: _Place) -> str:
    """What is wrong with a session whose id was there. Raises `TraceError` if that was in another file."""
    if part.source != before.source:
        raise TraceError(
            f"{part.name}: session {session_id!r} is in {before.name} too: "
            "give one of them as the trace, or take one of them out of the folder"
        )
    where = "" if part.name == before.name else f"{before.name}, "
    fault = f"session {session_id!r} was there already in {where}line {before.line}"
    return f"{fault}; unpack a recording and give its folder" if form == RECORDED_ROUND_SCHEMA else fault


def _bad(fault: str, bad_lines: BadLines | None) -> None:
    if bad_lines is None:
        raise TraceError(f"{fault}; correct it or skip bad lines")
    bad_lines.add(fault)


# ---------------------------------------------------------------- which format


def _detect(part: Part, bad_lines: BadLines | None) -> tuple[Format, Iterator[Line]]:
    """The format of a file and all that it holds. Raises `_NoFormat`, and `TraceError` as `read_trace` does.

    Told by the first line that is a JSON object, else by the file as one JSON object, else by a table's
    header. A file that the user did not name has to begin with one of these, or with a broken object.
    """
    if not part.alone and b"\0" in part.file.peek(1)[:512]:
        raise _NoFormat(f"{part.name}: not a text file")
    content = lines(part)
    first = next(content, None)
    if first is None:
        raise _NoFormat(f"{part.name}: holds no session")
    head = _object(first.text)
    if not isinstance(head, str):
        return _choose(part, first, head), chain((first,), content)
    for form in _knowing(dict.fromkeys(column_names(first.text)), ("csv",)):
        return form, chain((first,), content)
    held = [first]
    if first.text.startswith(b"{"):
        held += _up_to(content, MAX_DOCUMENT_BYTES)
        whole = Line(1, b"\n".join(line.text for line in held))
        document = _object(whole.text)
        if not isinstance(document, str):
            return _choose(part, whole, document), iter((whole,))
    elif not part.alone:
        raise _NoFormat(f"{part.name}: neither JSON objects nor a known table")
    return _first_object(part, chain(held, content), bad_lines)


def _first_object(
    part: Part, content: Iterator[Line], bad_lines: BadLines | None
) -> tuple[Format, Iterator[Line]]:
    """Lines before the first object are bad ones, if it turns out that the file holds a trace."""
    faults: list[str] = []
    for line in content:
        head = _object(line.text)
        if not isinstance(head, str):
            form = _choose(part, line, head)
            for fault in faults:
                _bad(fault, bad_lines)
            return form, chain((line,), content)
        fault = f"{part.name}, line {line.number}: not a JSON object: {head}"
        if part.alone:
            _bad(fault, bad_lines)
        else:
            faults.append(fault)
    raise _NoFormat(f"{part.name}: holds no session")


def _up_to(content: Iterator[Line], most_bytes: int) -> Iterator[Line]:
    for line in content:
        yield line
        most_bytes -= len(line.text)
        if most_bytes < 0:
            return


def _object(text: bytes) -> dict[str, object] | str:
    """The JSON object, or why it is none."""
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return str(error)


def _choose(part: Part, line: Line, head: dict[str, object]) -> Format:
    for form in _knowing(head, ("lines", "document")):
        return form
    if not part.alone:
        raise _NoFormat(f"{part.name}: JSON of no known trace format")
    known = ", ".join(form.name for form in FORMATS)
    keys = ", ".join(sorted(head)[:8])
    raise _NoFormat(f"{part.name}, line {line.number}: no known trace format (keys: {keys}; known: {known})")


def _knowing(head: dict[str, object], kinds: tuple[str, ...]) -> Iterator[Format]:
    return (form for form in FORMATS if form.kind in kinds and form.matches(head))
