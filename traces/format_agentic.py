"""Agentic Mooncake v1: a request a line, each naming the requests that it waits for.

A session is a chain of waits: a request continues what it waits for unless that was continued already, names
it among its `branches`, or is of another `session_id`; then it begins a session that has the other as parent.
`prefix_reset` keeps nothing. The gap is `delay` and `tool_wait_ms` together; the tool is the first event's
class. What is lost or not said:
- Of several waits the request continues one: the last of its own `session_id`, else the first. The others
  are joins, and no session of ours waits for another's end. A branch starts without its delay.
- The tokens of a block are not in the rows, but told from lengths and numbers of ids (`BlockSize`). Where
  hash ids are absent, everything before is taken as kept.
- Of what first prompts share, what one prefix cannot tell is lost (`shared_blocks`).
Sessions come out when the file has ended, which is held in memory: any request may be continued later.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from antiphon.traces.blocks import compact, kept_tokens, shared_tokens
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import RoundTrace, SessionTrace, SomeTokens, Tokens
from antiphon.traces.shared_blocks import BlockSize, shared_beginnings

TOOL = "tool"


_Milliseconds = Annotated[float, Meta(ge=0.0, le=4e11)]


class _ToolEvent(msgspec.Struct, frozen=True):
    tool_class: str = ""


class _Row(msgspec.Struct, frozen=True):
    request_id: str
    input_length: SomeTokens
    output_length: Tokens
    session_id: str | None = None
    hash_ids: tuple[int, ...] | None = None
    timestamp: _Milliseconds | None = None
    delay: _Milliseconds | None = None
    tool_wait_ms: _Milliseconds | None = None
    wait_for: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    prefix_reset: bool | None = None
    tool_events: tuple[_ToolEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class _Call:
    """What is remembered of a row."""

    prompt: int
    output: int
    gap_s: float
    tool: str
    reset: bool
    blocks: array[int]

    def full_blocks(self, block_tokens: int) -> array[int]:
        return self.blocks[: self.prompt // block_tokens]


@dataclass(slots=True)
class _Chain:
    name: str
    session_id: str | None
    last_line: Line
    start_s: float | None = None
    parent: str | None = None
    after_round: int = 0
    calls: list[_Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row went."""

    chain: _Chain
    round: int
    branches: frozenset[str]


def _matches(head: dict[str, object]) -> bool:
    return "request_id" in head and "input_length" in head


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    decoder = msgspec.json.Decoder(_Row)
    size = BlockSize()
    places: dict[str, _Place] = {}
    chains: dict[str, _Chain] = {}
    for line in lines:
        try:
            row = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        fault = _fault(row, places, size)
        if fault is not None:
            yield line, fault
            continue
        chain = _chain_of(row, places, chains, line)
        chain.calls.append(_call(row))
        chain.last_line = Line(line.number, b"")  # its text is not held
        places[row.request_id] = _Place(chain, len(chain.calls), frozenset(row.branches))
    block_tokens = size.tokens()
    firsts = [chain.calls[0].full_blocks(block_tokens) for chain in chains.values()]
    shared = shared_beginnings(firsts, block_tokens)
    for chain, (prefix, tokens) in zip(chains.values(), shared, strict=True):
        yield chain.last_line, _session(chain, block_tokens, prefix, tokens)


def _fault(row: _Row, places: dict[str, _Place], size: BlockSize) -> str | None:
    if not row.request_id:
        return "request_id: is empty"
    if row.request_id in places:
        return f"request_id: {row.request_id!r} was there already"
    for request_id in row.wait_for:
        if request_id not in places:
            return f"wait_for: {request_id!r} is no request of an earlier line"
    ids = len(row.hash_ids or ())
    if not size.fits(row.input_length, ids):
        return (
            f"hash_ids: {ids} for {row.input_length} tokens: no block size fits this row and those before it"
        )
    return None


def _chain_of(row: _Row, places: dict[str, _Place], chains: dict[str, _Chain], line: Line) -> _Chain:
    """The chain that the row continues, or a new one, named after its session or else itself."""
    waits = [places[request_id] for request_id in row.wait_for]
    own = [place for place in waits if row.session_id and place.chain.session_id == row.session_id]
    before = max(own, key=lambda place: place.round) if own else next(iter(waits), None)
    if before is not None and _continues(row, before):
        return before.chain
    name = row.session_id or row.request_id
    if name in chains:
        name = f"{name}/{row.request_id}"
    chain = chains[name] = _Chain(name, row.session_id, line)
    if before is not None:
        chain.parent, chain.after_round = before.chain.name, before.round
    elif row.timestamp is not None:
        chain.start_s = row.timestamp / 1000
    return chain


def _continues(row: _Row, before: _Place) -> bool:
    other = row.session_id is not None and before.chain.session_id not in (None, row.session_id)
    tail = before.round == len(before.chain.calls)
    return tail and not other and row.request_id not in before.branches


def _call(row: _Row) -> _Call:
    named = next((event.tool_class for event in row.tool_events if event.tool_class), "")
    return _Call(
        prompt=row.input_length,
        output=max(1, row.output_length),
        gap_s=((row.delay or 0.0) + (row.tool_wait_ms or 0.0)) / 1000,
        tool=named or (TOOL if row.tool_wait_ms or row.tool_events else ""),
        reset=bool(row.prefix_reset),
        blocks=compact(row.hash_ids or ()),
    )


def _session(chain: _Chain, block_tokens: int, prefix: str, shared: int) -> SessionTrace:
    rounds: list[RoundTrace] = []
    previous: _Call | None = None
    for call in chain.calls:
        kept, gap_s = 0, 0.0
        if previous is not None:
            kept, gap_s = _kept(previous, call, block_tokens), call.gap_s
        rounds.append(RoundTrace(call.prompt, call.output, kept, gap_s, call.tool))
        previous = call
    return SessionTrace(
        chain.name, tuple(rounds), chain.start_s, chain.parent, chain.after_round, prefix, shared
    )


def _kept(previous: _Call, call: _Call, block_tokens: int) -> int:
    if call.reset:
        return 0
    shared = previous.prompt
    if previous.blocks and call.blocks:
        shared = shared_tokens(previous.blocks, call.blocks, block_tokens)
    return kept_tokens(previous.prompt, previous.output, shared, block_tokens, call.prompt)


FORMAT = Format("agentic mooncake", _matches, _read)
