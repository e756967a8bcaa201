"""The controller of the pools: when it chooses, what it waits for; the work it counts; its table."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.policies.base import Arm, Pool
from antiphon.policies.latency import load_latency_model
from antiphon.policies.pools import WindowRounds
from antiphon.scheduler.demand import Counts, Demand, Kind
from antiphon.scheduler.messages import ClientGone, FirstToken, RoundFinished
from antiphon.scheduler.pool_looks import DemandWindow, pool_engines, window_rounds
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.repooling import RESULTS, TRANSITIONS, IllegalStep, Place, Repooler, Step, after
from tests.core_helpers import Bench, arrived, claimed
from tests.test_pools import CALM, fleet

CONFIG = RepoolConfig(enabled=True, sustain=3, cool_down_s=100.0)
FULL, EVEN = fleet(2, 4, 1.6, 0.6), fleet(2, 4, 0.9, 1.8)


def test_a_flip_needs_so_many_looks_in_a_row() -> None:
    repooler = Repooler(CONFIG)
    assert repooler.look(FULL, CALM, 0.0) is None
    assert repooler.look(FULL, CALM, 10.0) is None
    assert repooler.look(EVEN, CALM, 20.0) is None  # it begins again
    assert repooler.look(FULL, CALM, 30.0) is None
    assert repooler.look(FULL, CALM, 40.0) is None
    assert repooler.look(FULL, CALM, 50.0) is not None


def test_after_a_flip_it_cools_down() -> None:
    repooler = Repooler(CONFIG)
    repooler.ended(0.0)
    looks = [repooler.look(FULL, CALM, float(now)) for now in range(10, 110, 10)]
    assert [flip is not None for flip in looks] == [False] * 9 + [True]


def test_the_most_work_of_a_while_is_remembered() -> None:
    """A pool that was busy a moment ago gives nothing away, until that is forgotten."""
    repooler = Repooler(RepoolConfig(enabled=True, sustain=1, memory_s=100.0))
    assert repooler.look(fleet(4, 4, 2.4, 2.4), CALM, 0.0) is None
    calm = fleet(4, 4, 0.4, 3.0)
    assert repooler.look(calm, CALM, 50.0) is None
    assert repooler.look(calm, CALM, 100.0) is None
    assert repooler.look(calm, CALM, 101.0) is not None


def test_one_flip_at_a_time_and_none_of_the_unknown() -> None:
    repooler = Repooler(RepoolConfig(enabled=True, sustain=1))
    assert repooler.look(FULL, CALM, 0.0, busy=True) is None
    assert repooler.look(FULL, CALM, 0.0, known=False) is None
    assert repooler.shares is None
    assert repooler.look(FULL, CALM, 0.0) is not None
    assert repooler.shares is not None and repooler.shares.prefill == 0.8


@given(st.lists(st.sampled_from([FULL, EVEN, fleet(4, 2, 0.3, 2.0)]), max_size=40), st.floats(0, 200))
def test_flips_are_never_nearer_than_the_cool_down(loads: list[list[object]], cool_down_s: float) -> None:
    repooler = Repooler(RepoolConfig(enabled=True, sustain=1, cool_down_s=cool_down_s))
    last_s = -math.inf
    for number, engines in enumerate(loads):
        now = 10.0 * number
        if repooler.look(engines, CALM, now) is not None:  # type: ignore[arg-type]
            assert now - last_s >= cool_down_s
            last_s = now
            repooler.ended(now)


def test_an_engine_between_pools_takes_the_steps_of_the_table_only() -> None:
    for place in Place:
        for step in Step:
            if (place, step) in TRANSITIONS:
                assert after(place, step) is TRANSITIONS[place, step]
                assert step in RESULTS
            else:
                with pytest.raises(IllegalStep):
                    after(place, step)


def test_the_table_is_that_of_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    section = text.partition("## Pools that follow the load")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (prefill|decode|leaving) \| (\w+) \| (\w+) \|", section, re.MULTILINE)
    assert set(rows) == {(place.value, step.value, to.value) for (place, step), to in TRANSITIONS.items()}


def test_a_bad_configuration_says_what_is_wrong() -> None:
    wrongs: list[dict[str, Any]] = [{"rule": "best"}, {"sustain": 0}, {"margin": -1.0}, {"period_s": 0.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RepoolConfig(**wrong)


def test_a_refusal_says_why() -> None:
    with pytest.raises(ValueError, match=r"^sustain must be at least 1, got 0: it is a number of looks$"):
        RepoolConfig(sustain=0)
    with pytest.raises(
        ValueError, match=r"^least_decode must be at least 1, got 0: a pool is never emptied$"
    ):
        RepoolConfig(least_decode=0)
    with pytest.raises(ValueError, match=r"^window_s \(9.0\) must be at least period_s \(10.0\)"):
        RepoolConfig(window_s=9.0)
    with pytest.raises(ValueError, match=r"^window_s \(120.0\) must be at least period_s \(121\)"):
        RepoolConfig(period_s=121)
    assert RepoolConfig(period_s=5.0, window_s=5.0).window_s == 5.0


# ---------------------------------------------------------------- demand


@given(st.integers(1, 40_000), st.integers(0, 40_000), st.sampled_from([0, 512, 2048, 8192]))
def test_a_prompt_in_chunks_costs_what_its_chunks_cost(new: int, cached: int, chunk: int) -> None:
    model = load_latency_model("tiny-cpu")
    expected, at, left = 0.0, cached, new
    while left:
        take = min(chunk or left, left)
        expected += model.prefill_s(take, at)
        at, left = at + take, left - take
    assert math.isclose(Kind(model, chunk, 32768).prefill_s(new, cached), expected, rel_tol=1e-9)


def work(demand: Demand, pool: Pool) -> tuple[float, float]:
    found = [w for key, w in demand.counts().work.items() if key.startswith(pool.value)]
    return sum(w[0] for w in found), sum(w[1] for w in found)


def test_work_is_counted_where_it_is_done() -> None:
    """A remote round: its prefill for one pool, its decode for the other, in the end by its true length."""
    bench = Bench()
    demand = bench.core.demand = Demand()
    demand.know(bench.core.books.fleet.books.values())
    kind = Kind(bench.core.books.fleet.books["d0"].latency, 0, 32768)
    bench.policy.next = [(Arm.REMOTE_RECOMPUTE, "d0", "p0")]
    bench.send(arrived("r1"))
    bench.send(claimed("r1"))
    assert math.isclose(work(demand, Pool.PREFILL)[0], kind.prefill_s(100, 0))
    assert work(demand, Pool.DECODE)[0] == 0.0
    expected = bench.core.rounds["r1"].arrived.max_output_tokens
    assert math.isclose(work(demand, Pool.DECODE)[1], expected * kind.token_s(100 + expected / 2, 0.1))


def test_a_round_that_ends_is_counted_by_its_true_length_and_a_cancelled_one_says_nothing() -> None:
    bench = Bench()
    demand = bench.core.demand = Demand()
    bench.send(arrived("r1"))
    bench.send(claimed("r1"))
    before = demand.counts()
    bench.send(FirstToken("r1"))
    bench.send(RoundFinished("r1", 4, 0, ()))
    more = demand.counts().plus(before, -1.0)
    assert (more.ended, more.output_tokens) == (1, 4 - 16)
    bench.send(arrived("r2", "s2"))
    bench.send(claimed("r2", "s2"))
    bench.send(ClientGone("r2"))
    assert demand.counts().ended == 1
    bench.core.check_invariants()


def test_a_window_says_nothing_before_half_of_it_was_seen() -> None:
    window = DemandWindow(100.0)
    window.add(0.0, {"a": Counts(rounds=5)})
    window.add(40.0, {"a": Counts(rounds=9)})
    assert window.total() == (Counts(), 0.0)
    window.add(60.0, {"a": Counts(rounds=11), "b": Counts(rounds=2)})
    total, seconds = window.total()
    assert (total.rounds, seconds) == (6, 60.0)
    window.add(90.0, {"b": Counts(rounds=3)})  # a is gone: what it told was done, more is not made up
    assert window.total()[0].rounds == 6 + 1


def test_a_replica_that_was_away_does_not_bring_the_work_of_its_life() -> None:
    """b, which has run for hours, is not in the window's first look: it was stopped, or has not told yet."""
    life = Counts({"prefill k": (36_000.0, 0.0, 0.0)}, rounds=36_000)
    more = Counts({"prefill k": (36_004.0, 0.0, 0.0)}, rounds=36_002)
    window = DemandWindow(100.0)
    window.add(0.0, {"a": Counts(rounds=5)})
    window.add(50.0, {"a": Counts(rounds=9), "b": life})
    assert window.total()[0].rounds == 4
    window.add(60.0, {"a": Counts(rounds=9), "b": more})
    total, _ = window.total()
    assert (total.rounds, total.work["prefill k"][0]) == (4 + 2, 4.0)
    window.add(70.0, {"a": Counts(rounds=9)})
    window.add(80.0, {"a": Counts(rounds=9), "b": Counts(more.work, rounds=36_050)})
    assert window.total()[0].rounds == 4 + 50, "what it did while it was away is of this window"


def test_a_replica_that_begins_anew_under_its_name_takes_no_work_back() -> None:
    window = DemandWindow(100.0)
    for now, rounds, prefill_s in (0.0, 900, 90.0), (50.0, 910, 95.0), (60.0, 3, 1.0), (90.0, 8, 2.5):
        window.add(now, {"a": Counts({"prefill k": (prefill_s, 0.0, 0.0)}, rounds=rounds)})
    total, seconds = window.total()
    assert (total.rounds, seconds) == (10 + 5, 90.0)
    assert math.isclose(total.work["prefill k"][0], 5.0 + 1.5)


REPLICA_LOOK = st.tuples(st.integers(0, 9), st.booleans(), st.booleans())
"""Rounds since the look before, whether it is seen now, whether it was started again since then."""


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=3).flatmap(
        lambda lives: st.tuples(
            st.just(lives),
            st.lists(st.tuples(*[REPLICA_LOOK] * len(lives), st.booleans()), min_size=1, max_size=30),
        )
    )
)
def test_a_window_tells_no_more_than_was_done_in_it(drawn: tuple[list[int], list[tuple[Any, ...]]]) -> None:
    """Whoever comes, goes and begins anew under its name, and whenever the window is cleared; and all that
    was done, where all were seen at every look."""
    counted, looks = drawn
    window, done = DemandWindow(50.0), list[tuple[int, bool]]()
    for number, (*replicas, cleared) in enumerate(looks):
        if cleared:
            window.clear()
            done.clear()
        seen: dict[str, Counts] = {}
        for index, (rounds, there, again) in enumerate(replicas):
            counted[index] = rounds if again else counted[index] + rounds
            if there:
                seen[str(index)] = Counts(rounds=counted[index])
        whole = all(there and not again for _, there, again in replicas)
        done.append((sum(rounds for rounds, _, _ in replicas), whole))
        window.add(10.0 * number, seen)
        total, seconds = window.total()
        if seconds:
            assert seconds <= 50.0
            within = done[-round(seconds / 10.0) :]
            assert 0 <= total.rounds <= sum(rounds for rounds, _ in within)
            if all(whole for _, whole in done[-len(within) - 1 :]):
                assert total.rounds == sum(rounds for rounds, _ in within)


def test_engines_are_shown_by_the_books() -> None:
    bench = Bench()
    total = Counts({"prefill tiny-cpu/0/32768": (5.0, 0.0, 10.0)}, rounds=2, ttft_slo_s=4.0, itl_slo_s=0.2)
    decode, prefill = pool_engines(bench.core, bench.now, total, 10.0)
    assert (decode.engine_id, prefill.engine_id) == ("d0", "p0")
    assert prefill.as_prefill_s == 0.5 and prefill.rest_s == 1.0
    assert window_rounds(total) == WindowRounds(2.0, 0.1)
    bench.core.standings.set_draining("d0", True)
    shown = pool_engines(bench.core, bench.now, total, 10.0)
    assert [engine.engine_id for engine in shown] == ["p0"], "one that drains is counted on"
