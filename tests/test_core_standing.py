"""Engines that cannot be counted on: nothing new is placed there, unless nothing else is left."""

from __future__ import annotations

import pytest

from antiphon.policies.base import Placement
from antiphon.scheduler.messages import (
    Abort,
    Claimed,
    ClientGone,
    EngineDown,
    EngineDraining,
    EngineFailed,
    EngineSuspect,
    FirstToken,
    Generate,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Refuse,
    Tick,
)
from tests.core_helpers import LOCAL, PULL, RECOMPUTE, Bench, arrived, engine_up


def test_a_draining_engine_gets_nothing_new_and_is_read_from() -> None:
    """It is excluded, what it holds is still seen; when it is taken back, it is used again."""
    bench = Bench()
    bench.run("r0", LOCAL)
    bench.send(EngineDraining("d0", True))
    (generate,) = bench.place("r1", session="t", tokens=120)
    assert isinstance(generate, Generate) and generate.engine_id == "p0"
    assert bench.policy.seen[-1].excluded == {"d0"} and bench.policy.seen[-1].held("d0") == 112
    bench.send(EngineDraining("d0", False))
    bench.place("r2", tokens=120)
    assert bench.policy.seen[-1].excluded == frozenset()


def test_a_suspect_is_not_read_from() -> None:
    """What it holds is not shown to the policy; the next good probe brings it back."""
    bench = Bench()
    bench.run("r0", LOCAL)
    bench.send(EngineSuspect("d0", "one", True))
    bench.place("r1", tokens=120)
    assert bench.policy.seen[-1].excluded == {"d0"} and bench.policy.seen[-1].held("d0") == 0
    bench.send(EngineSuspect("d0", "one", False))
    bench.place("r2", tokens=120)
    assert bench.policy.seen[-1].excluded == frozenset() and bench.policy.seen[-1].held("d0") == 112


def test_late_news_of_an_old_incarnation_suspects_nobody() -> None:
    """Nor is a restarted engine suspected of what the one before it did."""
    bench = Bench()
    bench.send(EngineSuspect("d0", "zero", True))
    assert not bench.core.standings.suspect
    bench.send(EngineSuspect("d0", "one", True))
    bench.send(EngineDown("d0", "one", "killed"))
    bench.send(engine_up("d0", "decode", "two"))
    assert not bench.core.standings.suspect and not bench.core.standings.unusable


def test_better_an_unusable_engine_than_none() -> None:
    """First a draining one, then a suspect, and one that failed this round last."""
    bench = Bench()
    bench.send(EngineDraining("d0", True))
    bench.send(EngineSuspect("p0", "one", True))
    (generate,) = bench.place("r0")
    assert isinstance(generate, Generate) and generate.engine_id == "d0"
    bench.send(EngineDown("d0", "one", "killed"))
    (generate,) = bench.place("r1", session="t")
    assert isinstance(generate, Generate) and generate.engine_id == "p0"


def test_of_two_that_failed_the_round_the_one_that_still_speaks_has_the_last_try() -> None:
    """The one that is suspect hangs, and would take all that is left of the round's time."""
    bench = Bench()
    (first,) = bench.place("r0")
    assert isinstance(first, Generate) and first.engine_id == "d0"
    (second,) = [
        c for c in bench.send(EngineFailed("r0", "d0", "deadline", "late")) if isinstance(c, Generate)
    ]
    assert second.engine_id == "p0"
    bench.send(EngineSuspect("d0", "one", True))
    bench.now += 1.0
    bench.place("r1", session="t")
    bench.send(FirstToken("r1"))  # p0 lives: it is only slow
    (third,) = [
        c for c in bench.send(EngineFailed("r0", "p0", "deadline", "late")) if isinstance(c, Generate)
    ]
    assert third.engine_id == "p0"


def test_explained_as_decided_whoever_drains() -> None:
    """`explain` sees the same engines as the decision."""
    bench = Bench()
    bench.run("r0", LOCAL)
    bench.send(EngineDraining("d0", True))
    told = Claimed("r1", 1, "s", 2, None, "d0")
    foretold = bench.core.explain(arrived("r1", tokens=120), told, bench.now)
    assert isinstance(foretold, Placement) and foretold.home == "p0"
    bench.place("r1", tokens=120)
    assert bench.core.rounds["r1"].tries[0].placement.home == "p0"


def test_rounds_under_way_are_left_alone() -> None:
    """A drain or a missed probe stops nothing that runs, and a queue goes on."""
    bench = Bench(prefill_in_flight=1)
    bench.place("r0", RECOMPUTE)
    bench.place("r1", RECOMPUTE, session="t", first=1000)
    assert bench.send(EngineSuspect("p0", "one", True)) == []
    assert bench.send(EngineDraining("p0", True)) == []
    assert [r.phase.value for r in bench.core.rounds.values()] == ["prefilling", "queued"]


def test_history_of_a_suspect_is_recomputed() -> None:
    """A pull that was planned before its source was suspected is not begun."""
    bench = Bench(prefill_in_flight=1)
    bench.run("r0", LOCAL)
    bench.place("r1", RECOMPUTE, session="t", first=5000)
    bench.place("r2", PULL, tokens=120)
    bench.send(EngineSuspect("d0", "one", True))
    commands = bench.send(ClientGone("r1"))
    (prefill,) = [c for c in commands if isinstance(c, Prefill)]
    assert prefill.round_id == "r2"
    assert any("suspect" in note for note in bench.core.rounds["r2"].notes)


# ---------------------------------------------------------------- breakers


def fail(bench: Bench, round_id: str, kind: str = "refused") -> None:
    """The round's first try fails on d0, and its client leaves."""
    bench.place(round_id, LOCAL, session=round_id)
    bench.send(EngineFailed(round_id, "d0", kind, "x"))
    bench.send(ClientGone(round_id))


def excluded(bench: Bench, round_id: str) -> frozenset[str]:
    """What the next round's policy is told not to use."""
    bench.place(round_id, session=round_id)
    seen = next(view for view in reversed(bench.policy.seen) if view.round_id == round_id)
    return seen.excluded


def test_three_failures_in_a_row_shun_an_engine_until_one_round_has_tried_it() -> None:
    bench = Bench(breaker_open_s=2.0)
    fail(bench, "r1")
    fail(bench, "r2")
    assert excluded(bench, "r3") == frozenset()
    bench.send(EngineFailed("r3", "d0", "refused", "503"))
    assert excluded(bench, "r4") == {"d0"}
    bench.now += 2.0
    assert excluded(bench, "r5") == frozenset(), "the probe"
    assert bench.core.rounds["r5"].placement is not None and bench.core.rounds["r5"].placement.home == "d0"
    assert excluded(bench, "r6") == {"d0"}, "one at a time"
    bench.send(FirstToken("r5"))
    assert excluded(bench, "r7") == frozenset()


def test_a_probe_that_fails_doubles_the_pause_and_one_that_leaves_passes_it_on() -> None:
    bench = Bench(breaker_failures=1, breaker_open_s=2.0)
    fail(bench, "r1")
    bench.now += 2.0
    assert excluded(bench, "r2") == frozenset()
    bench.send(ClientGone("r2"))
    assert excluded(bench, "r3") == frozenset(), "the next probe"
    bench.send(EngineFailed("r3", "d0", "broken", "x"))
    bench.now += 2.0
    assert excluded(bench, "r4") == {"d0"}
    bench.now += 2.0
    assert excluded(bench, "r5") == frozenset()


def test_the_callers_fault_blames_nobody() -> None:
    bench = Bench(breaker_failures=1)
    bench.place("r1", LOCAL)
    bench.send(EngineFailed("r1", "d0", "bad_request", "400"))
    assert excluded(bench, "r2") == frozenset()


def test_an_engine_that_brings_nothing_to_anybody_is_shunned_at_the_first_miss() -> None:
    """One that brought others something meanwhile is only slow: that counts as any failure."""
    bench = Bench()
    bench.place("r1", LOCAL)
    bench.place("r2", LOCAL, session="t")
    bench.send(FirstToken("r2"))
    bench.send(EngineFailed("r1", "d0", "deadline", "nothing came"))
    assert not bench.core.standings.engines.not_closed
    bench.place("r3", LOCAL, session="u")
    bench.send(EngineFailed("r3", "d0", "deadline", "nothing came"))
    assert excluded(bench, "r4") == {"d0"}


def test_a_restarted_engine_is_not_shunned_for_what_the_one_before_did() -> None:
    bench = Bench(breaker_failures=1)
    fail(bench, "r1")
    bench.send(engine_up("d0", "decode", "two"))
    assert excluded(bench, "r2") == frozenset()


# ---------------------------------------------------------------- links


def cut_link(bench: Bench) -> None:
    """d0 gets nothing from p0, over and over."""
    for number in range(3):
        name = f"cut{number}"
        bench.place(name, RECOMPUTE, session=name, first=1000 * (number + 1))
        bench.send(PrefillDone(name, 0))
        bench.send(PrefetchDone(name, "d0", 0, 0, 0, 0.5, "the deadline passed", True))
        bench.send(ClientGone(name))


def test_nothing_is_fetched_over_a_link_that_keeps_failing() -> None:
    """The policy is asked again without the engine behind it; if it has nothing else, the home recomputes."""
    bench = Bench(breaker_open_s=5.0)
    cut_link(bench)
    (generate,) = bench.place("r1", RECOMPUTE, LOCAL)
    assert isinstance(generate, Generate) and bench.policy.seen[-1].excluded == {"p0"}
    bench.place("r2", RECOMPUTE, RECOMPUTE, RECOMPUTE, RECOMPUTE, RECOMPUTE, session="t", first=9000)
    (generate,) = bench.send(PrefillDone("r2", 0))
    assert isinstance(generate, Generate), "no prefetch"
    assert any("the link between them" in note for note in bench.core.rounds["r2"].notes)
    bench.policy.next.clear()


def test_one_round_probes_the_link() -> None:
    """And the pages that it brings close the breaker."""
    bench = Bench(breaker_open_s=2.0)
    cut_link(bench)
    bench.now += 2.0
    bench.place("r1", RECOMPUTE, first=9000)
    (probe,) = bench.send(PrefillDone("r1", 0))
    assert isinstance(probe, Prefetch)
    bench.place("r2", *[RECOMPUTE] * 5, session="t", first=12_000)
    (generate,) = bench.send(PrefillDone("r2", 0))
    assert isinstance(generate, Generate)
    bench.send(PrefetchDone("r1", "d0", 6, 6, 6 * 32768, 0.1))
    bench.place("r3", RECOMPUTE, session="u", first=15_000)
    (fetch,) = bench.send(PrefillDone("r3", 0))
    assert isinstance(fetch, Prefetch)


def test_what_a_source_lacks_says_nothing_of_the_link() -> None:
    bench = Bench(breaker_failures=1)
    bench.place("r1", RECOMPUTE)
    bench.send(PrefillDone("r1", 0))
    bench.send(PrefetchDone("r1", "d0", 0, 0, 0, 0.1, "the source has only 0 of 6 pages"))
    assert not bench.core.standings.links.not_closed


# ---------------------------------------------------------------- deadlines


def test_each_try_that_is_left_has_its_share_of_the_time() -> None:
    bench = Bench(first_token_deadline_s=15.0)
    bench.place("r1", LOCAL)
    assert 4.9 < bench.deadlines_s["r1-01g"] < 5.0
    bench.now += 4.8
    bench.send(EngineFailed("r1", "d0", "deadline", "x"))
    assert 4.9 < bench.deadlines_s["r1-02g"] < 5.1
    bench.now += 4.9
    bench.send(EngineFailed("r1", "p0", "deadline", "x"))
    assert 4.9 < bench.deadlines_s["r1-03g"] < 5.1, "the last has all that is left"
    (abort, refuse, _) = bench.send(EngineFailed("r1", "d0", "deadline", "x"))
    assert isinstance(abort, Abort) and isinstance(refuse, Refuse)
    assert refuse.message.startswith("3 tries failed: local on d0: deadline: x (") and "p0" in refuse.message


def test_a_call_is_given_time_by_its_target_and_the_work_that_is_booked() -> None:
    """Never less than the floor; four times the target or the booked prefills, if that is longer."""
    bench = Bench()
    bench.place("r1", LOCAL)
    assert bench.deadlines_s["r1-01g"] == 10.0
    bench.policy.predicted_s = (0.0, 6.0, 0.0, 0.0)
    bench.place("r2", LOCAL, session="t")
    assert bench.deadlines_s["r2-01g"] == pytest.approx(4 * 6.1)
    bench.place("r3", LOCAL, session="u")
    assert 39.0 < bench.deadlines_s["r3-01g"] < 40.0, "a third of 120 s"


def test_a_stream_may_be_silent_while_others_prefill_at_its_home() -> None:
    bench = Bench()
    bench.place("r1", LOCAL)
    bench.send(FirstToken("r1"))
    assert bench.core.silence_s("r1") == 10.0
    bench.policy.predicted_s = (0.0, 6.0, 0.0, 0.0)
    bench.place("r2", LOCAL, session="t")
    assert bench.core.silence_s("r1") == pytest.approx(24.0)


def test_a_device_that_is_full_hurries_nobody() -> None:
    """Rounds wait for the end of others there, which no prediction covers."""
    bench = Bench()
    for number in range(6):
        bench.place(f"r{number}", LOCAL, session=f"s{number}", tokens=6000)
    assert bench.deadlines_s["r4-01g"] == 10.0 and 39.0 < bench.deadlines_s["r5-01g"] < 40.0


def test_the_rounds_own_deadline_blames_the_engine_too() -> None:
    bench = Bench(first_token_deadline_s=5.0, max_tries=1)
    bench.place("r1", LOCAL)
    bench.now += 5.0
    bench.send(Tick())
    assert excluded(bench, "r2") == {"d0"}
