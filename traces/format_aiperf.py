"""AIPerf multi_turn: a conversation a line, each turn what is new in it.

`{"session_id": "s", "turns": [{"text": "...", "delay": 1000}, ...]}`; a prompt is all turns and answers
before it and its own text. What the source does not say:
- Tokens: `input_length` where a turn has it, else a quarter of the characters of `text` or `texts`, rounded
  up. Images, sound and video count nothing.
- Answers: the format has no length of them. A turn without `output_length` is taken to answer with 1 token.
- `delay` (ms) is from the end of the previous answer; of two `timestamp`s (ms) the difference is, and so
  includes the time of the call. The first turn's `timestamp` is the session's start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import MAX_TOKENS, RoundTrace, SessionTrace, SomeTokens, Tokens

CHARACTERS_PER_TOKEN = 4


_Milliseconds = Annotated[float, Meta(ge=0.0, le=4e11)]


class _Batch(msgspec.Struct, frozen=True):
    contents: tuple[str, ...] = ()


class _Turn(msgspec.Struct, frozen=True):
    text: str | None = None
    texts: tuple[str | _Batch, ...] | None = None
    input_length: SomeTokens | None = None
    output_length: Tokens | None = None
    delay: _Milliseconds | None = None
    timestamp: _Milliseconds | None = None


class _Conversation(msgspec.Struct, frozen=True):
    turns: tuple[_Turn, ...]
    session_id: str | None = None


def _matches(head: dict[str, object]) -> bool:
    return isinstance(head.get("turns"), list)


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    """A conversation without an id is named after its line."""
    decoder = msgspec.json.Decoder(_Conversation)
    for line in lines:
        try:
            source = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        yield line, _session(source, source.session_id or f"line-{line.number}")


def _session(source: _Conversation, session_id: str) -> SessionTrace | str:
    if not source.turns:
        return "turns: holds none"
    rounds: list[RoundTrace] = []
    there = 0
    for number, turn in enumerate(source.turns):
        new = _new_tokens(turn)
        if new is None:
            return f"turns[{number}]: neither input_length nor text nor texts"
        output = max(1, turn.output_length or 0)
        if there + new > MAX_TOKENS:
            return f"turns[{number}]: the conversation exceeds {MAX_TOKENS} tokens"
        gap_s = _gap_s(source.turns[number - 1], turn) if number else 0.0
        rounds.append(RoundTrace(there + new, output, there, gap_s))
        there += new + output
    first_ms = source.turns[0].timestamp
    return SessionTrace(session_id, tuple(rounds), start_s=None if first_ms is None else first_ms / 1000)


def _new_tokens(turn: _Turn) -> int | None:
    if turn.input_length is not None:
        return turn.input_length
    if turn.text is None and turn.texts is None:
        return None
    characters = len(turn.text or "")
    for piece in turn.texts or ():
        characters += len(piece) if isinstance(piece, str) else sum(map(len, piece.contents))
    return max(1, -(-characters // CHARACTERS_PER_TOKEN))


def _gap_s(previous: _Turn, turn: _Turn) -> float:
    if turn.delay is not None:
        return turn.delay / 1000
    if turn.timestamp is None or previous.timestamp is None:
        return 0.0
    return max(0.0, turn.timestamp - previous.timestamp) / 1000


FORMAT = Format("aiperf multi_turn", _matches, _read)
