"""Our own two forms: a session a line (antiphon.trace/1), and rounds as `serve --record` wrote them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.recording import join_rounds
from antiphon.traces.schema import RECORDED_ROUND_SCHEMA, SCHEMA, RecordedRound, SessionTrace


def _is_own(head: dict[str, object]) -> bool:
    return head.get("schema") == SCHEMA or ("session_id" in head and "rounds" in head)


def _read_own(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
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


def _is_recorded(head: dict[str, object]) -> bool:
    return head.get("schema") == RECORDED_ROUND_SCHEMA


def _read_recorded(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    """One file of a recording by itself, which is held in memory; `read_recording` joins a whole folder.

    Sessions come when the file has ended, each at its last round's line. A file whose rounds all failed is
    a fault.
    """
    decoder = msgspec.json.Decoder(RecordedRound)
    rounds: list[RecordedRound] = []
    last: dict[str, Line] = {}
    end = Line(1, b"")
    for line in lines:
        end = Line(line.number, b"")
        try:
            item = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        if item.schema != RECORDED_ROUND_SCHEMA:
            yield line, f"schema {item.schema!r} is not {RECORDED_ROUND_SCHEMA!r}"
            continue
        rounds.append(item)
        last[item.session] = end
    sessions = join_rounds(rounds)
    if rounds and not sessions:
        yield end, "no round of this recording was completed"
    for session in sessions:
        yield last[session.session_id], session


FORMATS = (
    Format(SCHEMA, _is_own, _read_own),
    Format(RECORDED_ROUND_SCHEMA, _is_recorded, _read_recorded),
)
