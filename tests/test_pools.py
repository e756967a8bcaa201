"""The rules for the pools: values worked by hand, and what must hold for any fleet."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from antiphon.policies.base import Pool
from antiphon.policies.pools import (
    Peaks,
    PoolEngine,
    PoolRule,
    WindowRounds,
    arrow_flip,
    balanced_flip,
    pressure,
    shares,
)

RULE = PoolRule(margin=0.1, floor=0.4, horizon_s=900.0)
CALM = WindowRounds(2.0, 0.05)


def engine(
    name: str,
    pool: str,
    *,
    prefill_s: float = 0.0,
    decode_s: float = 0.0,
    may_flip: bool = True,
    kv: int = 0,
    rest_s: float = 0.0,
    drain_s: float = 0.0,
    queue_s: float = 0.0,
    itl_s: float | None = None,
) -> PoolEngine:
    return PoolEngine(
        name, Pool(pool), may_flip, prefill_s, decode_s, kv, 1000, rest_s, drain_s, queue_s, itl_s, 0.01
    )


def fleet(prefill: int, decode: int, prefill_s: float, decode_s: float) -> list[PoolEngine]:
    names = [f"p{n}" for n in range(prefill)] + [f"d{n}" for n in range(decode)]
    pools = {"p": "prefill", "d": "decode"}
    return [engine(name, pools[name[0]], prefill_s=prefill_s, decode_s=decode_s) for name in names]


def test_shares_divide_a_pools_work_among_its_engines() -> None:
    found = shares(fleet(2, 4, 1.0, 2.0))
    assert (found.prefill, found.decode) == (0.5, 0.5)


def test_a_slow_engine_takes_less_of_the_work() -> None:
    """One needs 1 s of it per second, the other 3: together 1 / (1 + 1/3)."""
    pair = [engine("p0", "prefill", prefill_s=1.0), engine("p1", "prefill", prefill_s=3.0)]
    assert math.isclose(shares(pair).prefill, 0.75)


def test_the_wait_is_that_of_sakasegawa() -> None:
    """One engine, half busy, 1 s left of what is at work: as M/G/1, r u / (1 - u) = 1 s."""
    alone = [engine("p0", "prefill", prefill_s=0.5, rest_s=1.0)]
    assert math.isclose(shares(alone).wait_s, 1.0)


def test_the_fuller_pool_gets_an_engine() -> None:
    """Prefill 1.6 / 2 = 0.8, decode 0.6 / 4 = 0.15; with one more, 0.53 and 0.2."""
    flip = balanced_flip(fleet(2, 4, 1.6, 0.6), RULE, CALM)
    assert flip is not None
    assert (flip.engine_id, flip.direction) == ("d0", "decode_to_prefill")
    assert math.isclose(flip.before.prefill, 0.8) and math.isclose(flip.after.prefill, 1.6 / 3)
    assert math.isclose(flip.after.decode, 0.2)
    assert "prefill 0.80 -> 0.53" in flip.reason


def test_nothing_changes_for_less_than_the_margin() -> None:
    """Decode 3.0 / 6 = 0.5 -> 0.43 is 0.07; with a margin of 0.05 it is enough."""
    engines = fleet(2, 6, 0.1, 3.0)
    assert balanced_flip(engines, RULE, CALM) is None
    looser = PoolRule(margin=0.05, floor=0.4, horizon_s=900.0)
    assert balanced_flip(engines, looser, CALM) is not None


def test_nothing_changes_while_no_pool_is_full() -> None:
    assert balanced_flip(fleet(2, 2, 0.7, 0.0), RULE, CALM) is None
    assert balanced_flip(fleet(2, 2, 1.4, 0.0), RULE, CALM) is not None


def test_misses_raise_the_pressure_of_the_pool_whose_fault_they_are() -> None:
    engines = fleet(2, 2, 0.6, 0.6)
    now = shares(engines)
    assert pressure(now, now, CALM) == 0.3
    late = WindowRounds(2.0, 0.05, prefill_missed=0.2)
    assert math.isclose(pressure(now, now, late), 0.5)


def test_the_kind_that_loses_least_changes() -> None:
    """d1 is as good for decode as d0, and prefills faster."""
    engines = [
        engine("p0", "prefill", prefill_s=1.0, decode_s=0.4),
        engine("d0", "decode", prefill_s=4.0, decode_s=0.4),
        engine("d1", "decode", prefill_s=1.0, decode_s=0.4),
    ]
    flip = balanced_flip(engines, RULE, CALM)
    assert flip is not None and flip.engine_id == "d1"


def test_less_kv_to_move_wins_between_equals_and_much_of_it_forbids() -> None:
    def with_drains(one_s: float, other_s: float) -> list[PoolEngine]:
        return [
            engine("p0", "prefill", prefill_s=1.0, decode_s=0.1),
            engine("d0", "decode", prefill_s=1.0, decode_s=0.1, drain_s=one_s),
            engine("d1", "decode", prefill_s=1.0, decode_s=0.1, drain_s=other_s),
        ]

    flip = balanced_flip(with_drains(20.0, 10.0), RULE, CALM)
    assert flip is not None and flip.engine_id == "d1" and flip.drain_s == 10.0
    assert balanced_flip(with_drains(900.0, 900.0), RULE, CALM) is None


def test_who_gives_an_engine_away_must_be_able_to_do_its_peak_without() -> None:
    """Prefill 0.4 / 4 = 0.1, and 0.13 with one less; it had five times as much, which is 0.67."""
    engines = fleet(4, 4, 0.4, 3.0)
    flip = balanced_flip(engines, RULE, CALM)
    assert flip is not None and math.isclose(flip.after.prefill, 0.4 / 3)
    assert balanced_flip(engines, RULE, CALM, Peaks(prefill=5.0)) is None
    flip = balanced_flip(engines, RULE, CALM, Peaks(prefill=2.0, decode=9.0))
    assert flip is not None and math.isclose(flip.after.prefill, 0.8 / 3)


def test_a_pool_that_a_crash_emptied_stays_empty() -> None:
    """Rounds go on where they are prefilled and all work is counted there: 2.7 / 3 = 0.9, and 1.35 with one
    less. The engine that died is waited for, as docs/operations.md says."""
    for lone in Pool:
        late = WindowRounds(2.0, 0.05, prefill_missed=0.3, decode_missed=0.3)
        left = [engine(f"e{n}", lone.value, prefill_s=2.7, decode_s=2.7, queue_s=9.0) for n in range(3)]
        assert balanced_flip(left, RULE, late) is None
    assert arrow_flip([engine(f"p{n}", "prefill", queue_s=9.0) for n in range(3)], RULE, CALM) is None


def test_arrows_rule_by_hand() -> None:
    """Floor 0.01 s, target 0.05 s: an ITL of 0.05 is a load of 1, one of 0.02 a quarter."""
    slow = [engine("p0", "prefill"), engine("p1", "prefill"), engine("d0", "decode", itl_s=0.05)]
    flip = arrow_flip(slow, RULE, CALM)
    assert flip is not None and flip.direction == "prefill_to_decode"
    queued = [
        engine("p0", "prefill", queue_s=2.5),
        engine("d0", "decode", itl_s=0.02),
        engine("d1", "decode", itl_s=0.02, kv=5),
    ]
    flip = arrow_flip(queued, RULE, CALM)
    assert flip is not None and (flip.engine_id, flip.direction) == ("d0", "decode_to_prefill")
    calm = [engine("p0", "prefill", queue_s=1.9), *queued[1:]]
    assert arrow_flip(calm, RULE, CALM) is None


ENGINES = st.lists(
    st.builds(
        PoolEngine,
        st.uuids().map(str),
        st.sampled_from(Pool),
        st.booleans(),
        st.floats(0, 20),
        st.floats(0, 20),
        st.integers(0, 5000),
        st.integers(1, 1000),
        st.floats(0, 10),
        st.floats(0, 100),
        st.floats(0, 50),
        st.none() | st.floats(0, 1),
        st.floats(0, 0.04),
    ),
    max_size=8,
    unique_by=lambda e: e.engine_id,
)
ROUNDS = st.builds(WindowRounds, st.floats(0, 5), st.floats(0, 0.2), st.floats(0, 1), st.floats(0, 1))
RULES = st.builds(
    PoolRule, st.floats(0, 0.5), st.floats(0, 1), st.floats(1, 1e4), st.integers(1, 3), st.integers(1, 3)
)


@given(ENGINES, RULES, ROUNDS)
def test_no_rule_empties_a_pool_or_takes_who_may_not(
    engines: list[PoolEngine], rule: PoolRule, rounds: WindowRounds
) -> None:
    """And what the balanced one chooses gains as much as it must."""
    least = {Pool.PREFILL: rule.least_prefill, Pool.DECODE: rule.least_decode}
    for flip in (balanced_flip(engines, rule, rounds), arrow_flip(engines, rule, rounds)):
        if flip is None:
            continue
        chosen = next(e for e in engines if e.engine_id == flip.engine_id)
        assert chosen.may_flip and chosen.pool is flip.from_pool is not flip.to_pool
        assert sum(e.pool is flip.from_pool for e in engines) > least[flip.from_pool]
    flip = balanced_flip(engines, rule, rounds)
    if flip is not None:
        now = shares(engines)
        gain = pressure(now, now, rounds) - pressure(flip.after, now, rounds) - flip.drain_s / rule.horizon_s
        assert gain >= rule.margin - 1e-9
        assert pressure(now, now, rounds) >= rule.floor
        assert flip == balanced_flip(list(engines), rule, rounds)
