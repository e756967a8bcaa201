"""Bailian (Qwen anonymous traces): a request a line, each naming the request that it continues.

A session is a chain by `parent_chat_id`; -1, or a parent that is not earlier in the file, begins one. The
second and later continuations of one request begin sessions of their own, with the chain they left as parent.
What the source does not say:
- Hash ids name blocks of 16 tokens, so what a request kept is known to a block; without ids, all before is
  taken as kept. What first prompts share
  with each other is counted in 512 tokens; what a branch shares with the rest of its parent is lost.
- A gap is the difference of two arrivals, and so includes the time of the call.
Sessions come out when the file has ended, which is held in memory: any request may be continued later.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from antiphon.traces.blocks import compact, count_fault, kept_tokens, shared_tokens
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import RoundTrace, Seconds, SessionTrace, SomeTokens, Tokens
from antiphon.traces.shared_blocks import shared_beginnings

BLOCK_TOKENS = 16
SHARED_TOKENS = 512
"""A tree of all first prompts, 16 tokens a node, would not fit into a usual memory."""
NO_PARENT = -1


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    chat_id: int
    parent_chat_id: int = NO_PARENT
    timestamp: Seconds
    input_length: SomeTokens
    output_length: Tokens
    hash_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class _Chain:
    session_id: str
    last_line: Line
    start_s: float
    parent: str | None = None
    after_round: int = 0
    rounds: list[RoundTrace] = field(default_factory=list)
    beginning: list[int] = field(default_factory=list)
    """Names of what the first prompt begins with, one per `SHARED_TOKENS`."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A request that a later one may continue."""

    chain: _Chain
    round: int
    """Its place in the chain, 1 for the first."""
    timestamp: float
    hash_ids: array[int]


def _matches(head: dict[str, object]) -> bool:
    return "chat_id" in head and "input_length" in head


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
        fault = count_fault(row.input_length, len(row.hash_ids), BLOCK_TOKENS) if row.hash_ids else None
        if fault:
            yield line, f"hash_ids: {fault}"
            continue
        before = None if row.parent_chat_id == NO_PARENT else seen.get(row.parent_chat_id)
        if before is not None and before.round == len(before.chain.rounds):
            chain = before.chain
            chain.rounds.append(_next_round(before, row))
        else:
            chain = _begin(before, row, line)
            chains.append(chain)
        chain.last_line = Line(line.number, b"")
        seen[row.chat_id] = _Seen(chain, len(chain.rounds), row.timestamp, compact(row.hash_ids))
    shared = shared_beginnings([chain.beginning for chain in chains], SHARED_TOKENS)
    for chain, (prefix, tokens) in zip(chains, shared, strict=True):
        rounds = tuple(chain.rounds)
        yield (
            chain.last_line,
            SessionTrace(
                chain.session_id, rounds, chain.start_s, chain.parent, chain.after_round, prefix, tokens
            ),
        )


def _begin(before: _Seen | None, row: _Row, line: Line) -> _Chain:
    chain = _Chain(str(row.chat_id), line, row.timestamp)
    if before is not None:
        chain.parent = before.chain.session_id
        chain.after_round = before.round
    chain.rounds.append(RoundTrace(row.input_length, max(1, row.output_length)))
    chain.beginning = _beginning(row)
    return chain


def _beginning(row: _Row) -> list[int]:
    """Names of as much as begins the prompt, whether or not the source's ids name what is before them."""
    step = SHARED_TOKENS // BLOCK_TOKENS
    full = min(row.input_length // BLOCK_TOKENS, len(row.hash_ids)) // step
    names, so_far = [], 0
    for number in range(full):
        so_far = hash((so_far, row.hash_ids[number * step : (number + 1) * step]))
        names.append(so_far)
    return names


def _next_round(before: _Seen, row: _Row) -> RoundTrace:
    previous = before.chain.rounds[-1]
    shared = previous.prompt_tokens
    if before.hash_ids and row.hash_ids:
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
