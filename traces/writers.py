"""Sessions to files, one writer per format, each a stream: what is remembered is no content.

A format keeps what it can say:
- `antiphon.trace/1`, also as `antiphon`: everything.
- `mooncake`: rows without sessions, at start and gaps added up (answers take no time), with the ids of 512
  tokens. Rows lie session by session, not by time. Parents, tools and targets are lost.
- `mooncake-sessions`: the same with `session_id`, later rows with `delay`, whole prompts, ids of 64 tokens.
- `agentic-mooncake` (v1): ids of 64 tokens, waits for the round before, sub-agents wait for their parent's
  round, tools as events. A sub-agent whose parent does not come before it, or that starts with the parent's
  first round, waits for nothing.
In the last three, what a round kept is read back in whole blocks; where all whole blocks of the previous
prompt are kept, a reader takes the answer after it as kept too, if it fits. Times are in ms; a start that is
not known is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import IO

import msgspec

from antiphon.traces.schema import SCHEMA, RoundTrace, SessionTrace

MOONCAKE_BLOCK_TOKENS = 512
BLOCK_TOKENS = 64

Writer = Callable[[Iterable[SessionTrace], IO[bytes]], None]
"""Writes all sessions, in their order. Raises what the file raises."""


class _Row(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    request_id: str | None = None
    session_id: str | None = None
    timestamp: int | float | None = None
    delay: int | float | None = None
    input_length: int
    output_length: int
    hash_ids: list[int]
    wait_for: list[str] = []
    prefix_reset: bool = False
    tool_wait_ms: int | float | None = None
    tool_events: list[dict[str, str | int | float]] = []


class _Blocks:
    """Ids for the blocks of prompts, the same where and only where all up to a block's end is the same."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._fresh = count()
        self._prefixes: dict[str, list[int]] = {}
        """Of shared prefixes, as far as a session needed them."""

    def of(self, session: SessionTrace) -> Iterator[tuple[RoundTrace, list[int]]]:
        """Each round with the ids of its prompt; a part of a block at the end has one of its own."""
        there = self._shared(session)
        for number, turn in enumerate(session.rounds):
            kept_tokens = turn.kept_tokens if number else session.shared_tokens
            there = there[: kept_tokens // self._block_tokens]
            self._grow(there, turn.prompt_tokens)
            part = [next(self._fresh)] if turn.prompt_tokens % self._block_tokens else []
            yield turn, there + part

    def _shared(self, session: SessionTrace) -> list[int]:
        if not session.shared_tokens:
            return []
        known = self._prefixes.setdefault(session.shared_prefix, [])
        self._grow(known, session.shared_tokens)
        return list(known)

    def _grow(self, ids: list[int], tokens: int) -> None:
        """Whole blocks of so many tokens."""
        ids.extend(next(self._fresh) for _ in range(tokens // self._block_tokens - len(ids)))


def _write_own(sessions: Iterable[SessionTrace], out: IO[bytes]) -> None:
    encoder = msgspec.json.Encoder()
    for session in sessions:
        out.write(encoder.encode(session) + b"\n")


def _write_mooncake(sessions: Iterable[SessionTrace], out: IO[bytes]) -> None:
    blocks = _Blocks(MOONCAKE_BLOCK_TOKENS)
    _write_rows((row for session in sessions for row in _mooncake_rows(session, blocks)), out)


def _write_mooncake_sessions(sessions: Iterable[SessionTrace], out: IO[bytes]) -> None:
    blocks = _Blocks(BLOCK_TOKENS)
    _write_rows((row for session in sessions for row in _session_rows(session, blocks)), out)


def _write_agentic(sessions: Iterable[SessionTrace], out: IO[bytes]) -> None:
    blocks = _Blocks(BLOCK_TOKENS)
    rounds: dict[str, int] = {}

    def rows() -> Iterator[_Row]:
        for session in sessions:
            yield from _agentic_rows(session, blocks, rounds)
            rounds[session.session_id] = len(session.rounds)

    _write_rows(rows(), out)


def _mooncake_rows(session: SessionTrace, blocks: _Blocks) -> Iterator[_Row]:
    at_s = session.start_s or 0.0
    for number, (turn, ids) in enumerate(blocks.of(session)):
        at_s += turn.gap_s if number else 0.0
        yield _Row(
            timestamp=_ms(at_s),
            input_length=turn.prompt_tokens,
            output_length=turn.output_tokens,
            hash_ids=ids,
        )


def _session_rows(session: SessionTrace, blocks: _Blocks) -> Iterator[_Row]:
    for number, (turn, ids) in enumerate(blocks.of(session)):
        yield _Row(
            session_id=session.session_id,
            timestamp=_ms(session.start_s or 0.0) if number == 0 else None,
            delay=_ms(turn.gap_s) if number else None,
            input_length=turn.prompt_tokens,
            output_length=turn.output_tokens,
            hash_ids=ids,
        )


def _agentic_rows(session: SessionTrace, blocks: _Blocks, rounds: Mapping[str, int]) -> Iterator[_Row]:
    """`rounds` of the sessions that were written, of which the parent may be one."""
    waits = _waits_for_parent(session, rounds)
    at_s = session.start_s or 0.0
    for number, (turn, ids) in enumerate(blocks.of(session), 1):
        later, tool = number > 1, number > 1 and bool(turn.tool)
        gap_ms = _ms(turn.gap_s)
        yield _Row(
            request_id=_request_id(session.session_id, number),
            session_id=session.session_id,
            timestamp=None if later or waits else _ms(at_s),
            delay=gap_ms if later and not tool else None,
            input_length=turn.prompt_tokens,
            output_length=turn.output_tokens,
            hash_ids=ids,
            wait_for=[_request_id(session.session_id, number - 1)] if later else waits,
            prefix_reset=not later or turn.kept_tokens == 0,
            tool_wait_ms=gap_ms if tool else None,
            tool_events=[_tool_event(session.session_id, number, turn, at_s)] if tool else [],
        )
        at_s += turn.gap_s if later else 0.0


def _waits_for_parent(session: SessionTrace, rounds: Mapping[str, int]) -> list[str]:
    known = rounds.get(session.parent, 0) if session.parent is not None else 0
    if session.parent is None or not 1 <= session.after_round <= known:
        return []
    return [_request_id(session.parent, session.after_round)]


def _tool_event(session_id: str, number: int, turn: RoundTrace, at_s: float) -> dict[str, str | int | float]:
    """On the trace's own clock, on which answers take no time."""
    start_ms, gap_ms = round(at_s * 1000), _ms(turn.gap_s)
    return {
        "tool_call_id": f"{_request_id(session_id, number)}/tool",
        "tool_class": turn.tool,
        "started_at_unix_ms": start_ms,
        "ended_at_unix_ms": start_ms + round(gap_ms),
        "duration_ms": gap_ms,
        "status": "succeeded",
    }


def _request_id(session_id: str, number: int) -> str:
    return f"{session_id}#{number}"


def _ms(seconds: float) -> int | float:
    """Milliseconds, to the microsecond; whole ones as whole numbers."""
    value = round(seconds * 1000, 3)
    return int(value) if value.is_integer() else value


def _write_rows(rows: Iterable[_Row], out: IO[bytes]) -> None:
    encoder = msgspec.json.Encoder()
    for row in rows:
        out.write(encoder.encode(row) + b"\n")


WRITERS: Mapping[str, Writer] = {
    SCHEMA: _write_own,
    "antiphon": _write_own,
    "mooncake": _write_mooncake,
    "mooncake-sessions": _write_mooncake_sessions,
    "agentic-mooncake": _write_agentic,
}
"""By the name that is asked for."""
