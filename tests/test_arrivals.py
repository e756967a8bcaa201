"""When sessions start."""

from __future__ import annotations

from itertools import pairwise

import pytest

from antiphon.traces.arrivals import Arrivals, Start, schedule
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError


def session(name: str, start_s: float | None = None) -> SessionTrace:
    return SessionTrace(name, (RoundTrace(1, 1),), start_s=start_s)


MANY = [session(str(number)) for number in range(4_000)]


def test_poisson_has_the_rate_and_the_spread() -> None:
    """Gaps between Poisson starts have mean 1/rate and a coefficient of variation of 1; the first is at 0."""
    starts = [start_s for start_s, _ in schedule(MANY, Arrivals(Start.POISSON, 5.0, seed=3))]
    gaps = [after - before for before, after in pairwise(starts)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert starts[0] == 0.0
    assert mean == pytest.approx(0.2, rel=0.06)
    assert variance**0.5 / mean == pytest.approx(1.0, rel=0.06)


def test_seed_decides_the_starts() -> None:
    """Equal seeds give equal starts, other seeds others, and a longer trace only adds to them."""
    first = schedule(MANY[:50], Arrivals(Start.POISSON, 1.0, seed=1))
    assert first == schedule(MANY[:50], Arrivals(Start.POISSON, 1.0, seed=1))
    assert first == schedule(MANY, Arrivals(Start.POISSON, 1.0, seed=1))[:50]
    assert first != schedule(MANY[:50], Arrivals(Start.POISSON, 1.0, seed=2))


def test_recorded_starts_are_sorted_and_shifted_to_zero() -> None:
    """Recorded starts are kept relative to the first; ties stay in the order of the trace."""
    recorded = [session("late", 9.0), session("a", 4.0), session("b", 4.0)]
    starts = schedule(recorded, Arrivals(Start.RECORDED))
    assert [(start_s, item.session_id) for start_s, item in starts] == [(0.0, "a"), (0.0, "b"), (5.0, "late")]


def test_recorded_starts_must_be_there() -> None:
    """A session without a recorded start is named, with what to do instead."""
    with pytest.raises(TraceError, match=r"'x' has no recorded start: give a session rate"):
        schedule([session("a", 1.0), session("x")], Arrivals(Start.RECORDED))


def test_all_at_once_starts_everything_at_zero() -> None:
    """Without a rate every session may start at 0, in the order of the trace."""
    assert schedule(MANY[:3], Arrivals()) == [(0.0, item) for item in MANY[:3]]


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, float("nan")])
def test_impossible_rates_are_refused(rate_per_s: float) -> None:
    """A Poisson process needs a rate above 0."""
    with pytest.raises(ValueError, match="above 0"):
        Arrivals(Start.POISSON, rate_per_s)


def test_bound_on_live_sessions_is_at_least_one() -> None:
    """With room for no session nothing would ever run."""
    with pytest.raises(ValueError, match="at least one"):
        Arrivals(max_live=0)
