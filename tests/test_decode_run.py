"""Arithmetic of decode runs: times, pages, promises and gaps, against counting step by step."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.closed_form_kv import ClosedFormKv
from antiphon.engines.closed_form_request import EngineRequest
from antiphon.engines.decode_batch import DecodeBatch, promise
from antiphon.engines.decode_run import GapHistogram, PageGrowth, StepTimes
from antiphon.policies.latency import DecodeCost

COSTS = st.builds(
    DecodeCost,
    st.sampled_from([0.0, 0.01, 0.003]),
    st.sampled_from([0.0, 0.001]),
    st.sampled_from([0.0, 1e-7, 1e-3]),
)


@settings(max_examples=200, deadline=None)
@given(COSTS, st.integers(1, 300), st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 5000))
def test_steps_until_is_exact(cost: DecodeCost, batch: int, context: int, most: int, steps: int) -> None:
    """The run is cut at the first step that ends at or after the moment, also at a step's very end."""
    times = StepTimes(cost)
    times.set(batch, context + batch)
    for seconds in (times.seconds(steps), times.seconds(steps) * 1.0000001, times.seconds(steps) * 0.77):
        got = times.steps_until(seconds, most)
        assert 1 <= got <= most
        assert got == most or times.seconds(got) >= seconds
        assert got == 1 or times.seconds(got - 1) < seconds or times.seconds(most) <= seconds


def test_seconds_are_the_sum_of_steps() -> None:
    """The closed form is the sum of what the latency model says of every step."""
    cost = DecodeCost(0.01, 0.001, 1e-6)
    times = StepTimes(cost)
    times.set(7, 12_345)
    step_s = [cost.fixed_s + 7 * cost.per_request_s + (12_345 + 7 * n) * 1e-6 for n in range(400)]
    assert times.seconds(400) == pytest.approx(sum(step_s), rel=1e-12)
    assert times.steps_until(-1.0, 400) == 1


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 17),
    st.lists(st.integers(0, 100), max_size=12),
    st.integers(0, 50),
    st.integers(0, 60),
    st.integers(0, 30),
)
def test_page_growth_counts_every_page(
    page: int, tokens: list[int], now: int, steps: int, pages: int
) -> None:
    """New pages of a run, and how far a number of pages goes, as if counted request by request."""
    growth = PageGrowth(page)
    dues = [growth.join(count, now) for count in tokens]

    def counted(after: int) -> int:
        return sum(-(-(count + after) // page) + count // -page for count in tokens)

    assert growth.pages(now, steps) == counted(steps)
    assert growth.pages(now + 5, steps) == counted(steps + 5) - counted(5)
    fitting = max(after for after in range(steps + 1) if counted(after) <= pages)
    assert growth.steps_within(now, pages, steps) == fitting
    for due in dues:
        growth.leave(due)
    assert growth.pages(now, 100) == growth.batch == 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 30, 500, 4096, 5000, 20_000]), max_size=8),
    st.integers(-10, 10),
    st.booleans(),
)
def test_promises_are_exact(lefts: list[int], off: int, far: bool) -> None:
    """However admission comes to its answer, it is that of adding up all promises."""
    batch = DecodeBatch(DecodeCost(0.01), 10)
    for number, left in enumerate(lefts):
        request = EngineRequest(number, Chain(Branch(number), 1), 10, left + 1)
        request.emitted = 1
        batch.join(request, 0.0)
    promised = sum(map(promise, lefts))
    room = promised + off * (1000 if far else 1)
    assert batch.leaves_room(room) == (room >= promised)


def test_retracted_answer_that_nobody_else_knows() -> None:
    """Without an end chain only the prompt's pages are looked for: what follows them is somebody else's."""
    kv = ClosedFormKv(100, 100, 10)
    branch = Branch(0)
    kv.device.take(20)
    tip, _ = kv.device.adopt(None, 0, branch, 20)
    kv.device.unlock(tip, 20)
    request = EngineRequest("a", Chain(branch, 10), 105, 50)
    request.emitted = 40
    assert kv.match(request) == (tip, 10, 10)


def test_gap_histogram() -> None:
    """Quantiles are right to a quarter of a percent, the mean is exact, and two add up."""
    gaps, more = GapHistogram(), GapHistogram()
    assert gaps.summary().p99 == 0.0
    for milliseconds in range(1, 101):
        (gaps if milliseconds % 2 else more).add(milliseconds / 1000, 10)
    more.add(0.0, 1)
    gaps.merge(more)
    summary = gaps.summary()
    assert summary.count == 1001
    assert summary.mean == pytest.approx(50.5 / 1001)
    assert summary.p50 == pytest.approx(0.050, rel=0.0026)
    assert summary.p90 == pytest.approx(0.090, rel=0.0026)
    assert summary.p99 == pytest.approx(0.099, rel=0.0026)
    assert gaps.quantile(0.0) == 0.0


def test_histogram_of_one_value() -> None:
    """Whatever the share, the only value there is."""
    rng = random.Random(1)
    for _ in range(50):
        gap_s = rng.random() * 10 ** rng.randrange(-6, 3)
        gaps = GapHistogram()
        gaps.add(gap_s, 3)
        assert [gaps.quantile(share) for share in (0.1, 1.0)] == pytest.approx([gap_s] * 2, rel=0.0026)
