"""Mooncake's rows with a `session_id` (AIPerf, AISimulate): sessions, grouped or interleaved, in two forms.

Cumulative: `input_length` and `hash_ids` are those of the whole prompt. Delta: rows after a session's first
bring only what is new, and all that was there before is kept. Told apart by content: in the cumulative form
a prompt begins with the first block of the one before it, in the delta form it does not. Where that cannot
be seen, or some rows say this and some that, the form has to be given.

`delay` or `delay_ms` is the gap after the response before it. Where only timestamps are known, a gap is the
difference of two arrivals, and so includes the service time. Sessions that all start at one and the same
time (generated ones) have no recorded start. Ids stand for whole prefixes; what one prefix
cannot tell of the first prompts (`shared_blocks`), and what later ones share with other sessions, is lost.
A row that cannot be read is left out of its session. The file is held in memory, ids as 8 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from antiphon.traces.format_mooncake import Milliseconds, Request, block_ids, gap_s, known_rounds
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import MAX_TOKENS, RoundTrace, SessionTrace, SomeTokens, Tokens, TraceError
from antiphon.traces.shared_blocks import BlockSize, shared_beginnings

RARE = 0.1
"""A form that at most this share of the rows speaks for is taken for an accident (a compaction, a reset)."""


class _Row(msgspec.Struct, frozen=True):
    session_id: Annotated[str, Meta(min_length=1)] | int
    input_length: SomeTokens
    output_length: Tokens
    hash_ids: list[int] = []
    timestamp: Milliseconds | None = None
    delay: Milliseconds | None = None
    delay_ms: Milliseconds | None = None

    def request(self, line: int, size: BlockSize) -> Request | str:
        """A fault in words if the ids cannot be right."""
        ids = block_ids(self.input_length, self.hash_ids, size)
        if isinstance(ids, str):
            return ids
        delay = self.delay_ms if self.delay is None else self.delay
        return Request(
            line,
            self.input_length,
            max(1, self.output_length),
            ids,
            None if self.timestamp is None else self.timestamp / 1e3,
            None if delay is None else delay / 1e3,
        )


def _matches(head: dict[str, object]) -> bool:
    return {"session_id", "input_length", "output_length"} <= head.keys()


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    decoder = msgspec.json.Decoder(_Row)
    size = BlockSize()
    sessions: dict[str, list[Request]] = {}
    for line in lines:
        try:
            row = decoder.decode(line.text)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        request = row.request(line.number, size)
        if isinstance(request, str):
            yield line, request
        else:
            sessions.setdefault(str(row.session_id), []).append(request)
    for requests in sessions.values():
        if all(request.arrived_s is not None for request in requests):
            requests.sort(key=lambda request: request.arrived_s or 0.0)
    block_tokens = size.tokens()
    form = _form(sessions.values(), block_tokens) if options.form == "auto" else options.form
    starts = [requests[0].arrived_s for requests in sessions.values()]
    began_s = min((start for start in starts if start is not None), default=0.0)
    timed = len(starts) < 2 or len(set(starts)) > 1
    firsts = [requests[0].full_blocks(block_tokens) for requests in sessions.values()]
    shared = shared_beginnings(firsts, block_tokens)
    for (session_id, requests), (prefix, tokens) in zip(sessions.items(), shared, strict=True):
        rounds = known_rounds(requests, block_tokens) if form == "cumulative" else _grown_rounds(requests)
        end = Line(requests[-1].line, b"")
        if rounds[-1].prompt_tokens > MAX_TOKENS:
            yield end, f"session {session_id!r} grows to {rounds[-1].prompt_tokens} tokens (form {form})"
            continue
        arrived_s = requests[0].arrived_s
        start_s = arrived_s - began_s if timed and arrived_s is not None else None
        yield end, SessionTrace(session_id, rounds, start_s, shared_prefix=prefix, shared_tokens=tokens)


def _form(sessions: Iterable[Sequence[Request]], block_tokens: int) -> Literal["cumulative", "delta"]:
    """What the rows say. Raises `TraceError` if they do not. For one-round sessions both are right."""
    cumulative = delta = rows = 0
    line = 0
    for requests in sessions:
        for before, request in pairwise(requests):
            rows += 1
            line = request.line
            if before.prompt >= block_tokens and before.ids and request.ids:
                if before.ids[0] == request.ids[0]:
                    cumulative += 1
                else:
                    delta += 1
    if not rows or (cumulative and delta <= RARE * rows):
        return "cumulative"
    if delta and cumulative <= RARE * rows:
        return "delta"
    raise TraceError(
        f"whether input_length counts whole prompts cannot be told: of {rows} rows that continue a session "
        f"{cumulative} begin as the row before them, {delta} do not, of the others hash_ids say nothing "
        f"(such as line {line}): say --form cumulative or --form delta"
    )


def _grown_rounds(requests: Sequence[Request]) -> tuple[RoundTrace, ...]:
    """Rounds of which each keeps all that was there and brings what its row counts."""
    rounds = [RoundTrace(requests[0].prompt, requests[0].output)]
    for before, request in pairwise(requests):
        there = rounds[-1].total_tokens
        rounds.append(RoundTrace(there + request.prompt, request.output, there, gap_s(before, request)))
    return tuple(rounds)


FORMAT = Format("mooncake with sessions", _matches, _read)
