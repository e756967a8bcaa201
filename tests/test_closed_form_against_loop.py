"""The closed-form engine against the token-by-token batch loop: the same requests, the same times.

What is drawn here is the same in every run; `make fuzz` draws what nobody has seen yet (closed_form_pair.py).
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from antiphon.engines.decode_batch import DecodeBatch
from tests.closed_form_pair import (
    Shape,
    difference,
    draw_scenario,
    fitting,
    long_answers,
    main,
    make_arrivals,
    run_closed_form,
    with_aborts,
)

SHAPES = st.builds(
    Shape,
    chunk_tokens=st.sampled_from([0, 4, 12, 64, 250]),
    decode_interval=st.sampled_from([0, 0, 1, 3]),
    pool_pages=st.just(4000),
    max_running=st.sampled_from([1, 3, 64]),
)
SEEDS = st.integers(0, 10**6)
PACES_S = st.sampled_from([0.02, 0.2, 1.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES, SEEDS, PACES_S)
def test_same_times_with_room(shape: Shape, seed: int, pace_s: float) -> None:
    """With room for all, both admit, batch, chunk and decode at the same moments, also untried in between."""
    arrivals = make_arrivals(seed, sessions=6, rounds=4, longest=150, output=40, pace_s=pace_s)
    assert not difference(shape, arrivals, retry_steps=0)


@settings(max_examples=100, deadline=None, derandomize=True)
@example(Shape(0, 0, 91, max_running=3), 78, 0.02, 91)  # a step takes pages, then retracts for want of one
@given(SHAPES, SEEDS, PACES_S, st.integers(90, 300))
def test_same_times_under_pressure(shape: Shape, seed: int, pace_s: float, pool_pages: int) -> None:
    """In a pool that is too small, both evict, load, hold back and retract the same."""
    shape = replace(shape, pool_pages=pool_pages)
    arrivals = make_arrivals(seed, sessions=8, rounds=3, longest=120, output=90, pace_s=pace_s)
    assert not difference(shape, fitting(shape, arrivals))


@settings(max_examples=60, deadline=None, derandomize=True)
@example(Shape(64, 0, 198), 30451, 1.0, 198, 29)  # in these four one is aborted in another's last step
@example(Shape(0, 3, 117), 849847, 1.0, 117, 12)
@example(Shape(0, 1, 183, max_running=3), 2479, 1.0, 183, 15)
@example(Shape(64, 0, 118, max_running=3), 725522, 1.0, 118, 88)
@given(SHAPES, SEEDS, PACES_S, st.sampled_from([100, 200, 4000]), SEEDS)
def test_same_times_with_aborts(
    shape: Shape, seed: int, pace_s: float, pool_pages: int, abort_seed: int
) -> None:
    """Whenever a request is aborted, both let it go at the same moment, and go on the same."""
    shape = replace(shape, pool_pages=pool_pages)
    arrivals = make_arrivals(seed, sessions=8, rounds=3, longest=120, output=90, pace_s=pace_s)
    assert not difference(shape, with_aborts(fitting(shape, arrivals), random.Random(abort_seed)))


@pytest.mark.parametrize("chunk_tokens", [0, 12])
def test_same_retractions(chunk_tokens: int) -> None:
    """Long answers, which admission underestimates: both retract the same requests, again and again."""
    retractions = 0
    for seed in range(8):
        shape = Shape(chunk_tokens, seed % 3, pool_pages=110)
        arrivals = long_answers(random.Random(seed), 12)
        assert not difference(shape, arrivals)
        _, engine = run_closed_form(shape, arrivals, retry_steps=1)
        retractions += engine.totals.retractions
        answered = sum(arrival.output_tokens for arrival in arrivals)
        assert engine.totals.output_tokens == answered
        assert engine.gaps.count == answered - len(arrivals)
    assert retractions > 5


def test_the_long_comparison_finds_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes here; an engine that lets requests of one step go in another order does not, and is named."""
    assert main(["--scenarios", "20"]) == 0
    assert "seed 1: 20 scenarios" in capsys.readouterr().out
    end_run = DecodeBatch.end_run
    monkeypatch.setattr(DecodeBatch, "end_run", lambda self, now: end_run(self, now)[::-1])
    seed = next(seed for seed in range(200, 1000) if difference(*draw_scenario(seed)))
    assert main(["--only", str(seed)]) == 1
    assert f"scenario {seed}: Shape(" in capsys.readouterr().out
