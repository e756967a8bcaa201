"""Pure changes of a trace: what scaling, capping and fitting keep true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.traces.schema import RoundTrace, SessionTrace, session_fault
from antiphon.traces.shape import Shape, cap_gaps, fit_window, scale, shape


@st.composite
def sessions(draw: st.DrawFn) -> SessionTrace:
    """Sound sessions whose rounds keep all, the prompt, or a part of what was there."""
    rounds: list[RoundTrace] = []
    for _ in range(draw(st.integers(1, 8))):
        kept = 0
        if rounds:
            last = rounds[-1]
            kept = draw(
                st.sampled_from([last.total_tokens, last.prompt_tokens]) | st.integers(0, last.total_tokens)
            )
        prompt = kept + draw(st.integers(1, 5000))
        gap_s = draw(st.floats(0, 1000))
        rounds.append(RoundTrace(prompt, draw(st.integers(1, 2000)), kept_tokens=kept, gap_s=gap_s))
    shared = draw(st.integers(0, rounds[0].prompt_tokens))
    return SessionTrace("s", tuple(rounds), shared_prefix="p", shared_tokens=shared)


@given(sessions(), st.integers(1, 3000))
def test_scaled_sessions_are_sound(session: SessionTrace, divisor: int) -> None:
    """Scaling gives a sound session of as many rounds, each with a new and an output token."""
    scaled = scale(session, divisor)
    assert session_fault(scaled) is None
    assert len(scaled.rounds) == len(session.rounds)
    for before, after in zip(session.rounds, scaled.rounds, strict=True):
        assert after.output_tokens == max(1, before.output_tokens // divisor)
        assert after.new_tokens >= 1
        assert after.gap_s == before.gap_s


@given(sessions(), st.integers(1, 3000))
def test_scaling_keeps_what_extends_what(session: SessionTrace, divisor: int) -> None:
    """A round that kept everything, or the whole prompt, still does after scaling."""
    scaled = scale(session, divisor).rounds
    for index in range(1, len(scaled)):
        before, kept = session.rounds[index - 1], session.rounds[index].kept_tokens
        if kept == before.total_tokens:
            assert scaled[index].kept_tokens == scaled[index - 1].total_tokens
        elif kept == before.prompt_tokens:
            assert scaled[index].kept_tokens == scaled[index - 1].prompt_tokens


def test_scaling_does_not_drift() -> None:
    """After a hundred rounds the scaled prompt is the prompt divided, not a sum of rounding errors."""
    rounds, total = [], 0
    for _ in range(100):
        rounds.append(RoundTrace(total + 95, 47, kept_tokens=total))
        total = rounds[-1].total_tokens
    session = SessionTrace("s", tuple(rounds))
    assert scale(session, 16).rounds[-1].prompt_tokens == rounds[-1].prompt_tokens // 16


def test_dividing_by_one_changes_nothing() -> None:
    """Divisor 1 is the identity; below 1 is an error."""
    session = SessionTrace("s", (RoundTrace(10, 2), RoundTrace(20, 3, kept_tokens=12)))
    assert scale(session, 1) == session
    with pytest.raises(ValueError, match="at least 1"):
        scale(session, 0)


@given(sessions(), st.floats(0, 1000))
def test_gaps_are_capped(session: SessionTrace, max_gap_s: float) -> None:
    """No gap is longer than the cap, shorter ones are as they were."""
    for before, after in zip(session.rounds, cap_gaps(session, max_gap_s).rounds, strict=True):
        assert after.gap_s == min(before.gap_s, max_gap_s)


@given(sessions(), st.integers(1, 20_000))
def test_window_cuts_from_the_first_round_that_does_not_fit(
    session: SessionTrace, window_tokens: int
) -> None:
    """What is left is the longest beginning all of whose rounds fit."""
    fitted = fit_window(session, window_tokens).rounds
    assert fitted == session.rounds[: len(fitted)]
    assert all(turn.total_tokens <= window_tokens for turn in fitted)
    assert len(fitted) == len(session.rounds) or session.rounds[len(fitted)].total_tokens > window_tokens


def test_shape_counts_what_it_takes_away() -> None:
    """First sessions, scaled, capped, fitted; every gap, round and session changed or left out is counted."""
    small = SessionTrace("small", (RoundTrace(100, 20), RoundTrace(200, 20, kept_tokens=120, gap_s=90.0)))
    grows = SessionTrace(
        "grows", (RoundTrace(100, 20), RoundTrace(5000, 20, kept_tokens=120), RoundTrace(60, 1))
    )
    large = SessionTrace("large", (RoundTrace(9000, 20), RoundTrace(9100, 20, kept_tokens=9020)))
    unread = SessionTrace("unread", (RoundTrace(1, 1),))
    shaped = shape(
        [small, grows, large, unread], Shape(max_sessions=3, divisor=2, max_gap_s=60, window_tokens=1000)
    )
    assert [(session.session_id, len(session.rounds)) for session in shaped.sessions] == [
        ("small", 2),
        ("grows", 1),
    ]
    assert (shaped.capped_gaps, shaped.dropped_rounds, shaped.dropped_sessions) == (1, 4, 1)
    assert shaped.sessions[0].rounds == (RoundTrace(50, 10), RoundTrace(100, 10, kept_tokens=60, gap_s=60.0))


def test_shape_reads_no_more_than_it_needs() -> None:
    """A bound on sessions stops the reading: the rest of a large file is never parsed."""

    def endless() -> object:
        yield SessionTrace("first", (RoundTrace(1, 1),))
        raise AssertionError("read on")

    shaped = shape(endless(), Shape(max_sessions=1))  # type: ignore[arg-type]
    assert len(shaped.sessions) == 1
