"""Bailian (Qwen anonymous traces): a request a line, each naming the request that it continues.

A session is a chain by `parent_chat_id`; -1, or a parent that is not earlier in the file, begins one. The
second and later continuations of one request begin sessions of their own, with the chain they left as parent.
What the source does not say:
- Hash ids name blocks of 16 tokens, so what a request kept is known to a block. A branch's first prompt
  counts as new, though it begins as the chain that it left.
- A gap is the difference of two arrivals, and so includes the time of the call.
Sessions come out when the file has ended, which is held in memory: any request may be continued later.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from antiphon.traces.blocks import kept_tokens, shared_tokens
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import RoundTrace, Seconds, SessionTrace, SomeTokens, Tokens

BLOCK_TOKENS = 16
NO_PARENT = -1

_Id = Annotated[int, Meta(ge=-(2**63), lt=2**63)]


class _Row(msgspec.Struct, frozen=True):
    chat_id: _Id
    parent_chat_id: _Id
    timestamp: Seconds
    input_length: SomeTokens
    output_length: Tokens
    hash_ids: list[_Id]


@dataclass(slots=True)
class _Chain:
    session_id: str
    last_line: Line
    start_s: float
    parent: str | None = None
    after_round: int = 0
    rounds: list[RoundTrace] = field(default_factory=list)

    def session(self) -> SessionTrace:
        return SessionTrace(
            self.session_id,
            tuple(self.rounds),
            self.start_s,
            parent=self.parent,
            after_round=self.after_round,
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """A request that a later one may continue."""

    chain: _Chain
    round: int
    """Its place in the chain, 1 for the first."""
    timestamp: float
    hash_ids: array[int]


def _matches(head: dict[str, object]) -> bool:
    return "chat_id" in head and "parent_chat_id" in head


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    decoder = msgspec.json.Decoder(_Row)
    seen: dict[int, _Seen] = {}
    chains: list[_Chain] = []
    for line in lines:
        try:
            row = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        if row.chat_id in seen:
            yield line, f"chat_id: {row.chat_id} was there already"
            continue
        before = None if row.parent_chat_id == NO_PARENT else seen.get(row.parent_chat_id)
        if before is not None and before.round == len(before.chain.rounds):
            chain = before.chain
            chain.rounds.append(_next_round(before, row))
        else:
            chain = _begin(before, row, line)
            chains.append(chain)
        chain.last_line = Line(line.number, b"")
        seen[row.chat_id] = _Seen(chain, len(chain.rounds), row.timestamp, array("q", row.hash_ids))
    for chain in chains:
        yield chain.last_line, chain.session()


def _begin(before: _Seen | None, row: _Row, line: Line) -> _Chain:
    chain = _Chain(str(row.chat_id), line, row.timestamp)
    if before is not None:
        chain.parent = before.chain.session_id
        chain.after_round = before.round
    chain.rounds.append(RoundTrace(row.input_length, max(1, row.output_length)))
    return chain


def _next_round(before: _Seen, row: _Row) -> RoundTrace:
    previous = before.chain.rounds[-1]
    shared = shared_tokens(before.hash_ids, row.hash_ids, BLOCK_TOKENS)
    return RoundTrace(
        prompt_tokens=row.input_length,
        output_tokens=max(1, row.output_length),
        kept_tokens=kept_tokens(
            previous.prompt_tokens, previous.output_tokens, shared, BLOCK_TOKENS, row.input_length
        ),
        gap_s=round(max(0.0, row.timestamp - before.timestamp), 6),
    )


FORMAT = Format("bailian", _matches, _read)
