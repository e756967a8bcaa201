"""Engines that cannot be counted on: nothing new is placed there, unless nothing else is left."""

from __future__ import annotations

from antiphon.policies.base import Placement
from antiphon.scheduler.messages import (
    Claimed,
    ClientGone,
    EngineDown,
    EngineDraining,
    EngineSuspect,
    Generate,
    Prefill,
)
from tests.core_helpers import LOCAL, PULL, RECOMPUTE, Bench, arrived, engine_up


def test_a_draining_engine_gets_nothing_new_and_is_read_from() -> None:
    """It is excluded, what it holds is still seen; when it is taken back, it is used again."""
    bench = Bench()
    bench.run("r0", LOCAL)
    bench.send(EngineDraining("d0", True))
    (generate,) = bench.place("r1", tokens=120)
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
