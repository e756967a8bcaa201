"""The normalised `rounds` form: a session a line, tokens of each request as a source counted them."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Annotated

import msgspec
from msgspec import Meta

from antiphon.traces.blocks import kept_tokens
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import MAX_TOKENS, RoundTrace, Seconds, SessionTrace, SomeTokens

COARSEST_BLOCK_TOKENS = 512
"""Sources that count shared prefixes in blocks use at most this many tokens a block (Mooncake)."""


class _Round(msgspec.Struct, frozen=True):
    """Tokens of a request as a source counted them. Fields are absent where the source has none."""

    prompt: SomeTokens
    out: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    new: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    cached: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    """Prefix shared with the previous request's PROMPT, in whole blocks of the source."""
    gap_s: float | None = None
    t: Seconds | None = None
    llm_s: Seconds | None = None
    row: int | None = None
    """Line of a recording of the whole service: `t` is then absolute, else since the session's start."""


class _Session(msgspec.Struct, frozen=True):
    session: str | int
    rounds: tuple[_Round, ...]


def _matches(head: dict[str, object]) -> bool:
    return "session" in head and "rounds" in head


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    decoder = msgspec.json.Decoder(_Session)
    for line in lines:
        try:
            yield line, _from_rounds(decoder.decode(line.text))
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)


def _from_rounds(source: _Session) -> SessionTrace:
    block_tokens = gcd(COARSEST_BLOCK_TOKENS, *(turn.cached for turn in source.rounds if turn.cached))
    rounds: list[RoundTrace] = []
    previous: _Round | None = None
    for turn in source.rounds:
        rounds.append(
            RoundTrace(
                prompt_tokens=turn.prompt,
                output_tokens=max(1, turn.out),
                kept_tokens=_kept(previous, turn, block_tokens) if previous else 0,
                gap_s=_gap_s(previous, turn),
            )
        )
        previous = turn
    first = source.rounds[0] if source.rounds else None
    start_s = first.t if first is not None and first.row is not None else None
    return SessionTrace(session_id=str(source.session), rounds=tuple(rounds), start_s=start_s)


def _kept(previous: _Round, turn: _Round, block_tokens: int) -> int:
    """Tokens of the previous prompt and output that begin this prompt.

    `cached` knows only of the previous prompt (`blocks.kept_tokens`). Without it, `new` counts only what
    the user or the tool added.
    """
    output = max(1, previous.out)
    if turn.cached is not None:
        return kept_tokens(previous.prompt, output, turn.cached, block_tokens, turn.prompt)
    there = previous.prompt + output
    kept = turn.prompt - turn.new if turn.new is not None else there
    return max(0, min(kept, there, turn.prompt - 1))


def _gap_s(previous: _Round | None, turn: _Round) -> float:
    """The recorded gap; where only start times and LLM times are known, their difference; else 0.

    Of a recording of the whole service, arrival to arrival, as from its original (`format_mooncake`): there
    the gaps are people's, minutes long, beside which the service time that is in them is small.
    """
    if previous is None:
        return 0.0
    if turn.gap_s is not None:
        return max(0.0, turn.gap_s)
    llm_s = previous.llm_s
    if llm_s is None and turn.row is not None:
        llm_s = 0.0
    if turn.t is None or previous.t is None or llm_s is None:
        return 0.0
    return max(0.0, turn.t - previous.t - llm_s)


FORMAT = Format("normalised rounds", _matches, _read)
