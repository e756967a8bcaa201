"""What clients say of their sessions, in the core: lengths of answers, targets, and sessions that end."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from antiphon.policies.base import Arm
from antiphon.scheduler.messages import (
    Claimed,
    ClientGone,
    FirstToken,
    RoundArrived,
    RoundFinished,
    SessionEnded,
)
from tests.core_helpers import Bench, arrived, claimed, engine_up

KEY = ("t", "s")


def run_round(bench: Bench, arrival: RoundArrived, number: int = 1, output: int = 7, **told: int) -> None:
    """From arrival to end, on d0."""
    bench.send(arrival)
    bench.send(replace(claimed(arrival.round_id, arrival.session_id, number), **told))
    bench.send(FirstToken(arrival.round_id))
    bench.send(RoundFinished(arrival.round_id, output, 0, arrival.hashes))


def expected_outputs(bench: Bench) -> list[int]:
    return [view.expected_output_tokens for view in bench.policy.seen]


def test_what_the_client_expects_wins_over_what_was_seen() -> None:
    """Of this round as said now, else as said by the round before, else the mean; never over the limit."""
    bench = Bench()
    run_round(bench, replace(arrived("r1"), expected_output_tokens=5))
    run_round(bench, replace(arrived("r2"), next_output_tokens=11), 2)
    run_round(bench, arrived("r3"), 3)
    run_round(bench, arrived("r4"), 4)
    run_round(bench, replace(arrived("r5"), expected_output_tokens=4000), 5)
    assert expected_outputs(bench) == [5, 7, 11, 7, 16]


@pytest.mark.parametrize("how", ["last round", "rounds expected", "ended between", "ended meanwhile"])
def test_a_session_that_ends_leaves_no_room_behind(how: str) -> None:
    """Its KV is not counted as expected back, nor as idle context at its home."""
    bench = Bench()
    run_round(bench, arrived("r1", tokens=320))
    book = bench.core.books.fleet.books["d0"]
    assert book.store.live_tokens(bench.now) == book.idle_tokens == 327
    arrival = replace(arrived("r2", tokens=640), remaining_rounds=0 if how == "last round" else None)
    if how == "ended between":
        bench.send(SessionEnded(*KEY))
    else:
        bench.send(arrival)
        bench.send(replace(claimed("r2", number=2), expected_rounds=2 if how == "rounds expected" else 0))
        if how == "ended meanwhile":
            bench.send(SessionEnded(*KEY))
        bench.send(FirstToken("r2"))
        assert book.store.live_tokens(bench.now) > 0, "a session at work is in use"
        bench.send(RoundFinished("r2", 7, 0, arrival.hashes))
    assert book.store.live_tokens(bench.now) == book.idle_tokens == 0
    assert bench.core.books.sessions.get(KEY) is None


@pytest.mark.parametrize("remaining", [1, None])
def test_a_session_that_goes_on_is_kept(remaining: int | None) -> None:
    """Rounds that are to come, or nothing said; more than were expected are no end either."""
    bench = Bench()
    run_round(bench, replace(arrived("r1", tokens=320), remaining_rounds=remaining), expected_rounds=1)
    kept = bench.core.books.sessions.get(KEY) is not None
    assert kept is (remaining == 1), "the client's newest word counts"
    run_round(bench, replace(arrived("r2", tokens=320), remaining_rounds=remaining), 2)
    assert bench.core.books.sessions.get(KEY) is not None


def test_a_last_round_that_fails_ends_nothing() -> None:
    """It will be sent again."""
    bench = Bench()
    run_round(bench, arrived("r1", tokens=320))
    bench.send(replace(arrived("r2", tokens=640), remaining_rounds=0))
    bench.send(claimed("r2", number=2))
    bench.send(ClientGone("r2"))
    assert bench.core.books.sessions.get(KEY) is not None
    assert bench.core.books.fleet.books["d0"].store.live_tokens(bench.now) == 640


def test_an_unknown_session_may_end() -> None:
    """Another replica's, say."""
    bench = Bench()
    assert bench.send(SessionEnded("t", "nobody")) == []


def test_a_session_s_own_targets_count() -> None:
    """Those that the claim tells replace the default ones: in the view and in the receipt."""
    bench = Bench()
    run_round(bench, arrived("r1"))
    bench.send(arrived("r2"))
    bench.send(replace(claimed("r2", number=2), slo_ttft_s=0.25))
    seen = [(view.slo_ttft_s, view.slo_itl_s) for view in bench.policy.seen]
    assert seen == [(1.0, 0.1), (0.25, 0.1)]


def child_home(bench: Bench, first: int) -> str | None:
    """Of a child whose parent ran on d0: where the policy is told that it is at home."""
    bench.send(arrived("c1", "child", 400, first))
    explained = bench.core.explain(arrived("c2", "child 2", 400, first), child("c2", "child 2"), bench.now)
    bench.send(child("c1", "child"))
    told = bench.policy.seen[-1].home
    assert bench.policy.seen[-2].home == told, explained
    return told


def child(round_id: str, session_id: str) -> Claimed:
    return replace(claimed(round_id, session_id, home="d0"), parent_id="s")


def test_a_child_is_at_home_where_its_parents_kv_is() -> None:
    """If it shares its parent's prompt; a sub-agent with a prompt of its own may start anywhere."""
    bench = Bench()
    run_round(bench, arrived("r1", tokens=320))
    assert child_home(bench, first=0) == "d0"
    bench = Bench()
    run_round(bench, arrived("r1", tokens=320))
    assert child_home(bench, first=10_000) is None


def test_what_every_engine_holds_ties_nobody() -> None:
    """A system prompt that is on both decode engines is no reason to crowd the parent's."""
    bench = Bench()
    bench.send(engine_up("d1", "decode"))
    run_round(bench, arrived("r1", tokens=320))
    bench.policy.next.append((Arm.LOCAL, "d1", "d1"))
    run_round(bench, arrived("o1", "other", 320))
    assert child_home(bench, first=0) is None


def test_a_childs_home_without_a_linker_is_its_parents() -> None:
    """Nothing is known of who holds what: then where the parent was is the best guess."""
    bench = Bench()
    bench.send(replace(arrived("c1", "child", 8), hashes=()))
    bench.send(child("c1", "child"))
    assert bench.policy.seen[-1].home == "d0"
