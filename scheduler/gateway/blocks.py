"""A streamed chat answer as blocks: reasoning, text, tool calls. What other APIs' answers are made of.

Pure: `feed` takes the events of relay.py and says what opens, grows and closes. One block is open at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

Event = dict[str, Any]


class Kind(Enum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True, eq=False)
class Block:
    """A part of an answer; `text` is a call's arguments."""

    number: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Change(Enum):
    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


class Step(NamedTuple):
    """`piece` and `logprobs` are what a block grew by."""

    change: Change
    block: Block
    piece: str = ""
    logprobs: tuple[Any, ...] = ()


class Blocks:
    """What has come of one choice so far."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish_reason = ""
        self.matched_stop: Any = None
        self.created = 0
        self.usage: dict[str, Any] = {}
        self.session: dict[str, Any] | None = None
        self._open: Block | None = None
        self._calls: dict[int, Block] = {}

    def feed(self, event: Event) -> Iterator[Step]:
        """One event of a streamed chat answer."""
        self.created = self.created or event.get("created", 0)
        self.usage = event.get("usage") or self.usage
        self.session = event.get("session") or self.session
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            logprobs = tuple((choice.get("logprobs") or {}).get("content") or ())
            if reasoning := delta.get("reasoning_content"):
                yield from self._grow(Kind.REASONING, reasoning, ())
            if text := delta.get("content"):  # log probabilities without text are of what is not shown
                yield from self._grow(Kind.TEXT, text, logprobs)
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            matched = choice.get("matched_stop")
            self.matched_stop = self.matched_stop if matched is None else matched

    def end(self) -> Iterator[Step]:
        """There is no more."""
        if self._open is not None:
            yield Step(Change.CLOSED, self._open)
            self._open = None

    def nothing_said(self) -> Iterator[Step]:
        """An answer without a block gets an empty text."""
        if not self.blocks:
            yield from self._begin(Block(0, Kind.TEXT))

    def message(self) -> dict[str, Any]:
        """The whole answer as a message of a chat, as the chat route gives it."""
        said: dict[Kind, str] = {kind: "" for kind in Kind}
        for block in self.blocks:
            said[block.kind] += block.text
        calls = [
            {
                "id": block.call_id,
                "type": "function",
                "function": {"name": block.name, "arguments": block.text},
            }
            for block in self.blocks
            if block.kind is Kind.CALL
        ]
        text = said[Kind.TEXT]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if said[Kind.REASONING]:
            message["reasoning_content"] = said[Kind.REASONING]
        if calls:
            message["tool_calls"] = calls
        return message

    def _grow(self, kind: Kind, piece: str, logprobs: tuple[Any, ...]) -> Iterator[Step]:
        block = self._open
        if block is None or block.kind is not kind:
            block = Block(len(self.blocks), kind)
            yield from self._begin(block)
        yield self._add(block, piece, logprobs)

    def _call(self, delta: dict[str, Any]) -> Iterator[Step]:
        """A call comes as one delta with id and name, then deltas with pieces of its arguments."""
        index = delta.get("index") or 0
        function = delta.get("function") or {}
        block = self._calls.get(index)
        if block is None:
            name, call_id = function.get("name") or "", delta.get("id") or f"call_{index}"
            block = self._calls[index] = Block(len(self.blocks), Kind.CALL, call_id, name)
            yield from self._begin(block)
        if arguments := function.get("arguments"):
            yield self._add(block, arguments, ())

    def _begin(self, block: Block) -> Iterator[Step]:
        yield from self.end()
        self._open = block
        self.blocks.append(block)
        yield Step(Change.OPENED, block)

    def _add(self, block: Block, piece: str, logprobs: tuple[Any, ...]) -> Step:
        block.pieces.append(piece)
        block.logprobs.extend(logprobs)
        return Step(Change.GREW, block, piece, logprobs)
