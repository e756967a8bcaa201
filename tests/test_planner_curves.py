"""tau by load: one simulated replica in each role."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.curves import STEEP, CurveTask, _grid, make_curve, make_curves
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.tau import (
    POOLED,
    ROLES,
    Curve,
    Line,
    Role,
    busy_rate,
    idle_point,
    kv_tokens,
    line,
    rising,
)
from antiphon.eval.planner.workload import Workload
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost
from antiphon.traces.schema import RoundTrace, SessionTrace

LATENCY = LatencyModel(
    "by-hand", "by hand", PrefillCost(0.0, 0.001), DecodeCost(0.01, 0.001), TransferCost(0.0, 1e9, 1000)
)
ENGINE = EngineType("h100", 1, LATENCY, 64_000, 128_000, 1e9, 2.0)
SLO = Slo(1.0, 0.05)
WINDOW_TOKENS = 10_000


def turns(count: int) -> tuple[RoundTrace, ...]:
    """Rounds of 128 new tokens and 65 of output, each over all before it, 10 s apart."""
    made: list[RoundTrace] = []
    for _ in range(count):
        kept = made[-1].total_tokens - 1 if made else 0
        made.append(RoundTrace(prompt_tokens=kept + 128, output_tokens=65, kept_tokens=kept, gap_s=10.0))
    return tuple(made)


WORKLOAD = Workload.of([SessionTrace(f"s{n}", turns(4)) for n in range(5)], 4.0, LATENCY)


def task(role: Role, engine: EngineType = ENGINE, workload: Workload = WORKLOAD) -> CurveTask:
    return CurveTask(role, engine, workload, SLO, WINDOW_TOKENS, "local", 80, (0,))


@lru_cache
def curve(role: Role) -> Curve:
    return make_curve(task(role))


# ---------------------------------------------------------------- shapes


@given(st.lists(st.floats(0, 100), max_size=12))
def test_rising_is_the_nearest_that_never_falls(values: list[float]) -> None:
    risen = rising(values)
    assert list(risen) == sorted(risen)
    assert sum(risen) == pytest.approx(sum(values), abs=1e-9)
    assert rising(sorted(values)) == tuple(sorted(values))


def test_rising_by_hand() -> None:
    assert rising([1, 3, 2, 4]) == (1, 2.5, 2.5, 4)
    assert rising([3, 2, 1]) == (2, 2, 2)


points = st.lists(
    st.tuples(st.floats(0.01, 10), st.floats(0, 10)),
    min_size=1,
    max_size=6,
    unique_by=lambda p: p[0],
).map(sorted)


@settings(max_examples=40)
@given(points, points, st.floats(0, 3), st.floats(0.01, 30), st.data())
def test_tau_never_falls_with_the_load(
    alone: list[tuple[float, float]],
    pooled: list[tuple[float, float]],
    idle: float,
    kv_rate: float,
    data: st.DataObject,
) -> None:
    """Nor with fewer replicas."""
    zero = 0.0, idle
    drawn = Curve("prefill", ENGINE, line(zero, alone), line(zero, pooled), kv_rate)
    looked_at = sorted(data.draw(st.lists(st.floats(0.001, 40), min_size=2, max_size=8)))
    for replicas in (1, 2, 3, 4, 9):
        read = [drawn.tau(rate, replicas) for rate in looked_at]
        assert all(idle - 1e-9 <= a <= b + 1e-9 for a, b in pairwise(read))
        assert [tau == float("inf") for tau in read] == [rate > kv_rate for rate in looked_at]
    for rate in looked_at:
        by_size = [drawn.tau(rate, replicas) for replicas in (1, 2, 3, 4, 9)]
        assert all(b <= a + 1e-9 for a, b in pairwise(by_size))


def test_rates_that_are_looked_at_by_hand() -> None:
    """None beyond the last that is asked, and none that is hardly below it."""
    assert _grid([1.0, 2.0, 4.0], 9.0) == [1.0, 2.0, 4.0]
    assert _grid([1.0, 2.0, 4.0], 4.2) == [1.0, 2.0, 4.0]
    assert _grid([1.0, 2.0, 4.0], 3.0) == [1.0, 2.0, 3.0]
    assert _grid([1.0, 2.0, 4.0], 2.1) == [1.0, 2.1]
    assert _grid([1.0, 2.0, 4.0], 0.5) == [0.5]


def test_between_and_beyond_the_points() -> None:
    drawn = Line((0.0, 1.0, 2.0), (0.1, 0.5, 1.5))
    read = [drawn.tau(rate) for rate in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)]
    assert read == pytest.approx([0.1, 0.3, 0.5, 1.0, 1.5, 2.5])
    assert line((0.0, 1.0), [(2.0, 0.9)]) == Line((0.0, 2.0), (1.0, 1.0))
    assert line((0.0, 1.0), [(2.0, 0.9)]).tau(3.0) == 1.5  # flat, then as if through nothing


def test_between_one_and_a_pool() -> None:
    drawn = Curve("prefill", ENGINE, Line((0.0, 1.0), (1.0, 1.0)), Line((0.0, 1.0), (0.2, 0.2)), 9.0)
    assert [drawn.tau(1.0, replicas) for replicas in (1, 2, POOLED, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


# ---------------------------------------------------------------- one replica


def test_busy_rates_by_hand() -> None:
    """A session prefills 4 x 128 tokens of 1 ms and decodes 4 x 65 tokens. A step is 10 ms and 1 ms per
    request: 40 at once take the 50 ms of the target."""
    assert busy_rate(ENGINE, "prefill", WORKLOAD, SLO) == pytest.approx(1 / 0.512)
    decodes = 40 / 0.05 / 260
    assert busy_rate(ENGINE, "decode", WORKLOAD, SLO) == pytest.approx(decodes, rel=0.01)
    both = 1 / (0.512 + 1 / decodes)
    assert busy_rate(ENGINE, "colocated", WORKLOAD, SLO) == pytest.approx(both, rel=0.01)


def test_an_idle_engine_takes_what_its_profile_says() -> None:
    """0.128 s of prefill, of a target of 1 s; steps of 11 ms, of 50. A calm one takes little more."""
    slo = Slo(0.1, 0.05)
    assert idle_point(ENGINE, "prefill", WORKLOAD, SLO) == pytest.approx((0.0, 0.128))
    assert idle_point(ENGINE, "decode", WORKLOAD, SLO) == pytest.approx((0.0, 0.22))
    assert idle_point(ENGINE, "colocated", WORKLOAD, slo) == pytest.approx((0.0, 1.28))
    for role, idle in (("prefill", 0.128), ("decode", 0.22), ("colocated", 0.22)):
        made = curve(role).alone
        assert made.taus[0] == pytest.approx(idle)
        assert idle < made.taus[1] < 0.7


def test_load_makes_it_slower() -> None:
    for role in ROLES:
        for made in (curve(role).alone, curve(role).pooled):
            assert list(made.rates) == sorted(set(made.rates))
            assert list(made.taus) == sorted(made.taus)
            assert made.taus[-1] > 1  # no engine does well with no time left


def test_prefill_without_time_left_drowns() -> None:
    """At the busy rate nothing is simulated: a queue that grows for ever looks short in a short window."""
    roles: tuple[Role, ...] = ("prefill", "colocated")
    for role in roles:
        made, busy = curve(role), busy_rate(ENGINE, role, WORKLOAD, SLO)
        assert made.tau(busy) >= STEEP
        assert made.tau(1.3 * busy) > 1.2 * STEEP
        assert made.tau(0.9 * busy) < made.tau(busy)


def test_a_pool_of_prefill_engines_waits_less() -> None:
    made = curve("prefill")
    busy = busy_rate(ENGINE, "prefill", WORKLOAD, SLO)
    assert made.tau(0.7 * busy, POOLED) < 0.9 * made.tau(0.7 * busy)
    assert curve("decode").pooled == curve("decode").alone


def test_the_other_phase_is_ideal() -> None:
    """What decoding costs changes no first token, and links nothing. (A home prefills a page itself.)"""
    slow_decode = replace(LATENCY, decode=DecodeCost(10.0, 1.0))
    slow = replace(ENGINE, latency=slow_decode, link_bytes_per_s=1.0, device_tokens=2048, store_tokens=2048)
    prefill = curve("prefill")
    slowed = make_curve(task("prefill", replace(slow, device_tokens=64_000)))
    assert slowed.alone.taus == pytest.approx(prefill.alone.taus)
    assert slowed.pooled.taus == pytest.approx(prefill.pooled.taus)
    assert make_curve(task("decode", replace(ENGINE, link_bytes_per_s=1.0))) == replace(
        curve("decode"), type=replace(ENGINE, link_bytes_per_s=1.0)
    )


def test_kv_bounds_the_load_of_homes() -> None:
    """Device and store keep the same pages: the larger counts."""
    assert kv_tokens(ENGINE) == 128_000
    assert curve("prefill").kv_rate == float("inf")
    per_session = WORKLOAD.live_tokens / WORKLOAD.rate_per_s
    for role in ROLES[1:]:
        made = curve(role)
        assert made.kv_rate == pytest.approx(128_000 / per_session)
        assert made.tau(made.kv_rate * 1.01) == float("inf")
        assert made.tau(made.kv_rate * 1.01, kv_factor=1.1) < float("inf")


def test_no_pool_is_larger_than_the_budget() -> None:
    """Of three engines a pool of three is simulated, of one none."""

    def made(gpus: int) -> Curve:
        roles: tuple[Role, ...] = ("prefill",)
        budget = {ENGINE.gpu: gpus * ENGINE.tp}
        curves = make_curves(
            [ENGINE], WORKLOAD, SLO, WINDOW_TOKENS, rounds=80, seeds=(0,), roles=roles, budget=budget, jobs=1
        )
        return curves["prefill", ENGINE.name]

    single, three = made(1), made(3)
    assert single.pooled == single.alone == three.alone
    assert three.pooled_replicas == 3 and three == make_curve(replace(task("prefill"), pooled=3))
    busy = busy_rate(ENGINE, "prefill", WORKLOAD, SLO)
    assert three.tau(0.7 * busy, 3) == three.tau(0.7 * busy, 9) < three.tau(0.7 * busy, 2)
    assert made(9) == curve("prefill") and made(9).pooled_replicas == POOLED


def test_processes_change_nothing() -> None:
    roles: tuple[Role, ...] = ("prefill", "decode")
    known = [
        make_curves([ENGINE], WORKLOAD, SLO, WINDOW_TOKENS, rounds=60, seeds=(1,), roles=roles, jobs=jobs)
        for jobs in (1, 2)
    ]
    assert known[0] == known[1]
    assert list(known[0]) == [("prefill", "1xh100"), ("decode", "1xh100")]
