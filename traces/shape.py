"""Pure changes of a trace: scale lengths, cap gaps, fit a window. What they leave out is counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from antiphon.traces.schema import RoundTrace, SessionTrace


@dataclass(frozen=True, slots=True)
class Shape:
    """How to change a trace, in the order of the fields. None = leave as it is."""

    max_sessions: int | None = None
    divisor: int = 1
    max_gap_s: float | None = None
    window_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Shaped:
    """The sessions to run and what was taken away to get there."""

    sessions: tuple[SessionTrace, ...]
    capped_gaps: int
    dropped_rounds: int
    """Did not fit the window, or came after one that did not."""
    dropped_sessions: int
    """Whose first round did not fit already; their rounds are in `dropped_rounds`."""


@dataclass(slots=True)
class LeftOut:
    """What `shape_each` has taken away so far; fields as in `Shaped`."""

    capped_gaps: int = 0
    dropped_rounds: int = 0
    dropped_sessions: int = 0


def shape(sessions: Iterable[SessionTrace], how: Shape) -> Shaped:
    """The first sessions, scaled, capped and fitted; reads no more sessions than it needs."""
    left_out = LeftOut()
    kept = tuple(shape_each(sessions, how, left_out))
    return Shaped(kept, left_out.capped_gaps, left_out.dropped_rounds, left_out.dropped_sessions)


def shape_each(sessions: Iterable[SessionTrace], how: Shape, left_out: LeftOut) -> Iterator[SessionTrace]:
    """The same as a stream: one session in memory; what is taken away is counted on the way."""
    for whole in itertools.islice(sessions, how.max_sessions):
        session = scale(whole, how.divisor)
        if how.max_gap_s is not None:
            left_out.capped_gaps += sum(turn.gap_s > how.max_gap_s for turn in session.rounds)
            session = cap_gaps(session, how.max_gap_s)
        if how.window_tokens is not None:
            fitted = fit_window(session, how.window_tokens)
            left_out.dropped_rounds += len(session.rounds) - len(fitted.rounds)
            session = fitted
        if session.rounds:
            yield session
        else:
            left_out.dropped_sessions += 1


def scale(session: SessionTrace, divisor: int) -> SessionTrace:
    """Lengths divided by `divisor`, rounded down; a round keeps at least 1 new and 1 output token.

    What extends its predecessor fully still does: a round that kept all of the previous prompt and output,
    or all of the prompt, keeps all of the scaled one. Prompts are scaled as totals, so rounding does not add
    up over a session.
    """
    if divisor < 1:
        raise ValueError(f"divisor must be at least 1, not {divisor}")
    if divisor == 1:
        return session
    rounds: list[RoundTrace] = []
    for index, turn in enumerate(session.rounds):
        kept_tokens = 0
        if index:
            kept_tokens = _scaled_kept(session.rounds[index - 1], rounds[-1], turn.kept_tokens, divisor)
        rounds.append(
            msgspec.structs.replace(
                turn,
                prompt_tokens=max(turn.prompt_tokens // divisor, kept_tokens + 1),
                output_tokens=max(turn.output_tokens // divisor, 1),
                kept_tokens=kept_tokens,
            )
        )
    return msgspec.structs.replace(
        session, rounds=tuple(rounds), shared_tokens=session.shared_tokens // divisor
    )


def _scaled_kept(before: RoundTrace, scaled: RoundTrace, kept_tokens: int, divisor: int) -> int:
    if kept_tokens == before.total_tokens:
        return scaled.total_tokens
    if kept_tokens == before.prompt_tokens:
        return scaled.prompt_tokens
    return min(kept_tokens // divisor, scaled.total_tokens)


def cap_gaps(session: SessionTrace, max_gap_s: float) -> SessionTrace:
    """No gap longer than `max_gap_s` seconds."""
    rounds = tuple(msgspec.structs.replace(turn, gap_s=min(turn.gap_s, max_gap_s)) for turn in session.rounds)
    return msgspec.structs.replace(session, rounds=rounds)


def fit_window(session: SessionTrace, window_tokens: int) -> SessionTrace:
    """The rounds before the first whose prompt and output exceed the window; maybe none."""
    fitting = itertools.takewhile(lambda turn: turn.total_tokens <= window_tokens, session.rounds)
    return msgspec.structs.replace(session, rounds=tuple(fitting))
