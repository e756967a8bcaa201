"""Mooncake's FAST'25 traces: requests with arrival, lengths and block ids, but no word of sessions.

The sessions are recovered. An id stands for a whole prefix, so a request continues an earlier one if it has
the last full block of it (of at least two: the first is one system prompt, shared by all). The one that
shares most is its parent; among equals one that nobody continued yet, then the longest. A parent's prompt
and output have to fit: `input_length >= parent's input_length + output_length - 64`. All that hangs together
is one session, in order of arrival. What the source does not say:
- There is no end of a request: a gap is the difference of two arrivals, and so includes the service time.
- Kept prefixes are known to a block of 512 tokens (`blocks.kept_tokens`); what a round after a session's
  first shares with other sessions is lost, and of the first what one prefix cannot tell (`shared_blocks`).
- How many continuations are missed is not known. In a trace of questions on common documents (Mooncake's
  `synthetic`) most of what is found is chance; its conversation trace fits far better than chance.
The file is held in memory, ids as 8 bytes each: any request may be continued later.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from antiphon.traces.blocks import kept_tokens, shared_tokens
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import RoundTrace, SessionTrace, SomeTokens, Tokens
from antiphon.traces.shared_blocks import BlockSize, shared_beginnings

LEAST_PARENT_BLOCKS = 2
SLACK_TOKENS = 64
"""A template may drop so many tokens of what was said."""

Milliseconds = Annotated[float, Meta(ge=0.0, le=1e15)]


class _Row(msgspec.Struct, frozen=True):
    timestamp: Milliseconds
    input_length: SomeTokens
    output_length: Tokens
    hash_ids: list[int] = []


class Request(NamedTuple):
    """A row; also of the form with sessions (`format_mooncake_sessions`)."""

    line: int
    prompt: int
    output: int
    """At least 1."""
    ids: array[int]
    arrived_s: float | None
    delay_s: float | None = None
    """After the end of the request before it."""

    def full_blocks(self, block_tokens: int) -> array[int]:
        return self.ids[: self.prompt // block_tokens]


def block_ids(tokens: int, ids: Sequence[int], size: BlockSize) -> array[int] | str:
    """Ids in little room; or, in words, why they cannot be those of a prompt of so many tokens."""
    if not size.fits(tokens, len(ids)):
        return f"{len(ids)} hash_ids for {tokens} tokens: no block size fits this row and those before it"
    try:
        return array("Q", ids)
    except OverflowError:
        return "hash_ids: each has to be a whole number from 0 to 2**64 - 1"


def _matches(head: dict[str, object]) -> bool:
    return "session_id" not in head and {"timestamp", "input_length", "output_length"} <= head.keys()


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    decoder = msgspec.json.Decoder(_Row)
    size = BlockSize()
    requests: list[Request] = []
    for line in lines:
        try:
            row = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        ids = block_ids(row.input_length, row.hash_ids, size)
        if isinstance(ids, str):
            yield line, ids
            continue
        arrived_s = row.timestamp / 1e3
        requests.append(Request(line.number, row.input_length, max(1, row.output_length), ids, arrived_s))
    requests.sort(key=lambda request: request.arrived_s or 0.0)
    block_tokens = size.tokens()
    chains = _chains(requests, block_tokens)
    shared = shared_beginnings([chain[0].full_blocks(block_tokens) for chain in chains], block_tokens)
    for number, (chain, (prefix, tokens)) in enumerate(zip(chains, shared, strict=True)):
        rounds = known_rounds(chain, block_tokens)
        start_s = (chain[0].arrived_s or 0.0) - (requests[0].arrived_s or 0.0)
        session = SessionTrace(str(number), rounds, start_s, shared_prefix=prefix, shared_tokens=tokens)
        yield Line(chain[-1].line, b""), session


def known_rounds(chain: Sequence[Request], block_tokens: int) -> tuple[RoundTrace, ...]:
    """Rounds of a session whose requests name their whole prompt. Without ids, all is taken as kept."""
    rounds = [RoundTrace(chain[0].prompt, chain[0].output)]
    for before, request in pairwise(chain):
        named = before.ids and request.ids
        shared = shared_tokens(before.ids, request.ids, block_tokens) if named else before.prompt
        kept = kept_tokens(before.prompt, before.output, shared, block_tokens, request.prompt)
        rounds.append(RoundTrace(request.prompt, request.output, kept, gap_s(before, request)))
    return tuple(rounds)


def gap_s(before: Request, request: Request) -> float:
    """The delay if it is there, else arrival to arrival, else 0."""
    if request.delay_s is not None:
        return round(request.delay_s, 6)
    if request.arrived_s is None or before.arrived_s is None:
        return 0.0
    return round(max(0.0, request.arrived_s - before.arrived_s), 6)


# ---------------------------------------------------------------- who continues whom


class _Ends:
    """Requests whose last full block is the same: sorted by prompt + output, continued ones apart."""

    __slots__ = ("continued", "fresh")

    def __init__(self) -> None:
        self.fresh: list[tuple[int, ...]] = []
        self.continued: list[tuple[int, ...]] = []

    def take(self, prompt: int) -> int | None:
        """The longest that this prompt can continue, a fresh one first; it is continued from now on."""
        too_long = (prompt + SLACK_TOKENS + 1,)
        if place := bisect_left(self.fresh, too_long):
            taken = self.fresh.pop(place - 1)
            insort(self.continued, taken)
            return taken[1]
        place = bisect_left(self.continued, too_long)
        return self.continued[place - 1][1] if place else None


def _chains(requests: Sequence[Request], block_tokens: int) -> list[list[Request]]:
    """Requests in order of arrival to sessions in order of their first ones."""
    ends: dict[int, _Ends] = {}
    chain_of: list[list[Request]] = []
    chains: list[list[Request]] = []
    for number, request in enumerate(requests):
        parent = None
        for block in reversed(request.ids[LEAST_PARENT_BLOCKS - 1 :]):
            if block in ends:
                parent = ends[block].take(request.prompt)
                if parent is not None:
                    break
        if parent is None:
            chains.append([])
        chain = chains[-1] if parent is None else chain_of[parent]
        chain.append(request)
        chain_of.append(chain)
        full = request.full_blocks(block_tokens)
        if len(full) >= LEAST_PARENT_BLOCKS:
            there = (request.prompt + request.output, number)
            insort(ends.setdefault(full[-1], _Ends()).fresh, there)
    return chains


FORMAT = Format("mooncake", _matches, _read)
