"""Admission: what only would wait is refused at once, what is long is not; what has begun goes on longer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.policies.base import LOCAL, Candidate, Placement
from antiphon.scheduler.admission import LEAST_RETRY_S, MOST_RETRY_S, OVERLOADED, WOULD_WAIT, why_refused
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.errors import from_refusal
from antiphon.scheduler.rounds import RoundRefused

TIMES = st.floats(0.0, 1e6)
FACTORS = st.floats(0.0, 100.0)


def placed(queue_s: float, prefill_s: float = 0.1) -> Placement:
    return Placement(LOCAL, "d0", "d0", "", Candidate(LOCAL, "d0", queue_s, prefill_s, 0.0, 0.0))


def config(queued: int = 0, first: float = 0.0, under_way: float = 0.0) -> CoreConfig:
    return CoreConfig(max_queued_rounds=queued, admission=first, admission_under_way=under_way)


@given(TIMES, st.floats(0.01, 100.0), FACTORS, FACTORS, st.booleans())
def test_only_a_wait_over_the_factor_is_refused(
    wait_s: float, target_s: float, first: float, more: float, under_way: bool
) -> None:
    """The factor of rounds under way is the larger one; a retry is not promised for later than it must be."""
    refusal = why_refused(placed(wait_s), 0, target_s, under_way, config(0, first, first + more))
    factor = first + more if under_way else first
    assert (refusal is not None) == (factor > 0 and wait_s > factor * target_s)
    if refusal is not None:
        assert refusal.code == WOULD_WAIT
        assert LEAST_RETRY_S <= refusal.retry_after_s <= min(MOST_RETRY_S, max(LEAST_RETRY_S, wait_s))


@given(st.floats(0.0, 1e6))
def test_on_an_idle_fleet_nothing_is_refused_however_long_it_is(prefill_s: float) -> None:
    """Its own work is no wait."""
    assert why_refused(placed(0.005, prefill_s), 0, 1.0, False, config(4, 1.0, 1.0)) is None


@pytest.mark.parametrize(("queued", "refused"), [(0, False), (3, False), (4, True), (5, True)])
def test_a_full_queue_takes_no_more(queued: int, refused: bool) -> None:
    refusal = why_refused(placed(1e9), queued, 1.0, True, config(queued=4))
    assert (refusal is not None) == refused
    if refusal is not None:
        assert (refusal.code, refusal.retry_after_s) == (OVERLOADED, MOST_RETRY_S)


@pytest.mark.parametrize(("code", "status"), [(OVERLOADED, 503), (WOULD_WAIT, 429)])
def test_clients_see_one_code_and_when_to_come_again(code: str, status: int) -> None:
    error = from_refusal(RoundRefused(code, "it would wait", 2.5))
    assert (error.status, error.code, error.kind) == (status, "overloaded", "overloaded_error")
    assert error.headers() == {"retry-after-ms": "2500", "Retry-After": str(math.ceil(2.5))}
