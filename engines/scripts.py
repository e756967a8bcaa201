"""Scripted outputs of a simulated engine: what to answer instead of hashed tokens, from a JSONL file.

One answer per line:

    {"text": "Wait.", "tool_calls": [{"name": "search", "arguments": "{\\"q\\": 1}"}], "session_id": "s1"}

`reasoning` is what the model thinks before `text`. `session_id` lines answer that session's requests, in
their order ("s1/*": of each session whose id begins with "s1/"); the others answer whoever comes next and has
no line of its own. Each choice of `n` takes a line.
`token_ids` or `tokens` set the length (else: one token per word or fragment), `finish_reason` is "stop" or
"length". When the script is used up, outputs are hashed tokens again. Prefills take no line, and an answer
that was aborted goes back to where it came from.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

ARGUMENT_FRAGMENT_CHARS = 8


class ScriptedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call; `arguments` is the JSON text as a model would write it."""

    name: str
    arguments: str = "{}"


class ScriptLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ScriptedCall, ...] = ()
    session_id: str | None = None
    token_ids: tuple[int, ...] | None = None
    tokens: int | None = None
    finish_reason: Literal["stop", "length"] = "stop"

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.token_ids is not None and (not self.token_ids or min(self.token_ids) < 0):
            raise ValueError("token_ids must be a non-empty list of ids")
        if self.tokens is not None and self.token_ids is not None:
            raise ValueError("give token_ids or tokens, not both")

    @property
    def output_tokens(self) -> int:
        if self.token_ids is not None:
            return len(self.token_ids)
        return self.tokens if self.tokens is not None else max(1, len(pieces_of(self)))


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of an answer: text, reasoning, or of tool call number `call` its head (`name`) or arguments."""

    text: str = ""
    reasoning: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


def pieces_of(line: ScriptLine) -> tuple[Piece, ...]:
    """The answer in the bits in which it is streamed; their texts and arguments join to the whole."""
    pieces = [Piece(reasoning=word) for word in _words(line.reasoning)]
    pieces += [Piece(text=word) for word in _words(line.text)]
    for number, call in enumerate(line.tool_calls):
        pieces.append(Piece(call=number, name=call.name))
        step = ARGUMENT_FRAGMENT_CHARS
        pieces.extend(
            Piece(call=number, arguments=call.arguments[start : start + step])
            for start in range(0, len(call.arguments), step)
        )
    return tuple(pieces)


def cut_at_stop(line: ScriptLine, stops: Sequence[str]) -> tuple[ScriptLine, str | None]:
    """The line up to the first of the stop strings in its text, and which one that is."""
    found = [(at, stop) for stop in stops if stop and (at := line.text.find(stop)) >= 0]
    if not found:
        return line, None
    at, stop = min(found)
    changes = {"tool_calls": (), "token_ids": None, "tokens": None, "finish_reason": "stop"}
    return msgspec.structs.replace(line, text=line.text[:at], **changes), stop


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def detokenize(token_ids: Sequence[int]) -> str:
    """Text of hashed tokens: their ids, so that a reader can check them."""
    return "".join(f" {token_id}" for token_id in token_ids)


class Rendering:
    """Turns the tokens of one answer into pieces, any slice at a time."""

    def __init__(self, line: ScriptLine | None) -> None:
        self._pieces = pieces_of(line) if line is not None else None
        self._tokens = line.output_tokens if line is not None else 0

    def between(self, token_ids: Sequence[int], start: int, stop: int) -> tuple[Piece, ...]:
        """Pieces that tokens [start, stop) of the answer `token_ids` bring."""
        if self._pieces is None:
            return (Piece(text=detokenize(token_ids[start:stop])),) if stop > start else ()
        return self._pieces[self._reached(start) : self._reached(stop)]

    def reasoning_tokens(self, tokens: int) -> int:
        """How many of the first `tokens` tokens are reasoning."""
        if self._pieces is None:
            return 0
        thought = sum(1 for piece in self._pieces if piece.reasoning)
        return sum(1 for token in range(min(tokens, self._tokens)) if self._reached(token) < thought)

    def _reached(self, tokens: int) -> int:
        assert self._pieces is not None
        return -(-len(self._pieces) * min(tokens, self._tokens) // self._tokens)


class Script:
    """The lines that are still to be said."""

    def __init__(self, lines: Sequence[ScriptLine] = ()) -> None:
        self._lines: dict[str | None, deque[ScriptLine]] = {}
        self._by_prefix: dict[str, list[ScriptLine]] = {}
        for line in lines:
            if line.session_id is not None and line.session_id.endswith("*"):
                self._by_prefix.setdefault(line.session_id[:-1], []).append(line)
            else:
                self._lines.setdefault(line.session_id, deque()).append(line)

    def take(self, session_id: str | None) -> ScriptLine | None:
        """The next line for this session; None when its output is not scripted."""
        if session_id is not None and session_id not in self._lines:
            for prefix in filter(session_id.startswith, self._by_prefix):
                lines = self._by_prefix[prefix]
                self._lines[session_id] = deque(replace(line, session_id=session_id) for line in lines)
                break
        for key in (session_id, None):
            queue = self._lines.get(key)
            if queue:
                return queue.popleft()
        return None

    def give_back(self, line: ScriptLine) -> None:
        """It was not said to the end: whoever asks next gets it."""
        self._lines.setdefault(line.session_id, deque()).appendleft(line)


def load_script(path: Path) -> Script:
    """Read a JSONL script; raises ValueError naming the line that is wrong."""
    try:
        raw_lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"script {path} cannot be read: {error}") from error
    lines = []
    for number, raw in enumerate(raw_lines, start=1):
        if raw.strip():
            try:
                lines.append(msgspec.json.decode(raw, type=ScriptLine))
            except msgspec.MsgspecError as error:
                raise ValueError(f"script {path}, line {number}: {error}") from error
    return Script(lines)
