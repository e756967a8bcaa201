"""The arm `move` and pulls from other engines than the home: event lists in, exact commands out."""

from __future__ import annotations

import pytest

from antiphon.policies.base import Arm
from antiphon.scheduler.messages import (
    Abort,
    ClientGone,
    Complete,
    EngineDown,
    EngineFailed,
    FirstToken,
    Generate,
    HeldChain,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Rehome,
    RoundFinished,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.states import Phase
from tests.core_helpers import LOCAL, Bench, arrived, engine_up

MOVE = (Arm.MOVE, "d1", "d1", "d0")
PAGE_BYTES = 16 * 2048


def bench_with_history() -> Bench:
    """Session s has its home and 112 tokens at d0; d1 is empty."""
    bench = Bench()
    bench.send(engine_up("d1", "decode"))
    bench.run("r1", LOCAL)
    return bench


def session_home(bench: Bench) -> str | None:
    return bench.core.books.sessions.live_home(("t", "s"))


def test_a_session_moves_with_its_kv() -> None:
    """move: the new home fetches what the old one holds, then has the session, and answers."""
    bench = bench_with_history()
    (prefetch,) = bench.place("r2", MOVE, tokens=200)
    assert isinstance(prefetch, Prefetch) and prefetch.source_incarnation == "one"
    assert (prefetch.engine_id, prefetch.source_id, prefetch.first_page, prefetch.pages) == ("d1", "d0", 0, 7)
    assert session_home(bench) == "d0", "not before the KV has come"
    came = bench.send(PrefetchDone("r2", "d1", 7, 7, 7 * PAGE_BYTES, 0.01))
    assert came == [Rehome("r2", "d0", "d1"), Generate("r2", "d1", "r2-01g")]
    assert session_home(bench) == "d1" and bench.view("d0").sessions == 0 and bench.view("d1").sessions == 1
    bench.send(FirstToken("r2"))
    hashes = arrived("r2", tokens=202).hashes
    (done,) = bench.send(RoundFinished("r2", 3, 112, hashes))
    assert isinstance(done, Complete) and done.home == "d1"
    assert done.holdings == (HeldChain("d1", "one", hashes),)
    receipt = done.receipt
    assert (receipt.arm, receipt.home, receipt.prefill_engine) == (Arm.MOVE, "d1", "d1")
    assert (receipt.bytes_decode_to_prefill, receipt.bytes_prefill_to_decode) == (0, 0)
    assert (receipt.bytes_home_to_home, receipt.pulled_tokens) == (7 * PAGE_BYTES, 112)
    assert receipt.pull_s == pytest.approx(0.1) and receipt.push_s == 0.0
    assert (receipt.cached_tokens, receipt.history_tokens) == (112, 0), "pulled KV is computed by nobody"
    held = bench.core.books.residency.held(arrived("r3", tokens=300).hashes, 16)
    assert held == {"d0": 112, "d1": 192}, "the old home's KV stays where it is"


def test_a_move_that_brings_less_goes_on() -> None:
    """Pages that did not come are recomputed: the session moves all the same, and the receipt says why."""
    bench = bench_with_history()
    bench.place("r2", MOVE, tokens=200)
    came = bench.send(PrefetchDone("r2", "d1", 2, 2, 2 * PAGE_BYTES, 0.5, "deadline"))
    assert came == [Rehome("r2", "d0", "d1"), Generate("r2", "d1", "r2-01g")]
    assert bench.core.rounds["r2"].notes == ["pushing on d1: deadline"]
    held = bench.core.books.residency.held(arrived("r3", tokens=200).hashes, 16)
    assert held == {"d0": 112, "d1": 32}


def test_the_old_home_may_die_meanwhile() -> None:
    """A dead source is a transfer that brings little; there is no other home to give up, so no Rehome."""
    bench = bench_with_history()
    bench.place("r2", MOVE, tokens=200)
    assert bench.send(EngineDown("d0", "one", "killed")) == []
    assert session_home(bench) is None
    came = bench.send(PrefetchDone("r2", "d1", 0, 0, 0, 0.0, "the source is gone"))
    assert came == [Generate("r2", "d1", "r2-01g")]
    assert session_home(bench) == "d1"


@pytest.mark.parametrize("how", ["failed", "dead"])
def test_a_move_that_fails_leaves_the_session_where_it_was(how: str) -> None:
    """Before the KV has come nothing was changed: the next try finds the old home."""
    bench = bench_with_history()
    bench.place("r2", MOVE, tokens=200)
    bench.policy.next.append(LOCAL)
    if how == "failed":
        commands = bench.send(EngineFailed("r2", "d1", "unreachable", "gone"))
    else:
        abort, *commands = bench.send(EngineDown("d1", "one", "killed"))
        assert abort == Abort("r2", "d1", "")
    assert commands == [Generate("r2", "d0", "r2-02g")]
    assert bench.policy.seen[-1].home == "d0" and session_home(bench) == "d0"
    bench.send(FirstToken("r2"))
    (done,) = bench.send(RoundFinished("r2", 3, 112, arrived("r2", tokens=202).hashes))
    assert isinstance(done, Complete) and done.home == "d0" and done.receipt.arm is Arm.LOCAL


def test_a_client_that_leaves_during_a_move_leaves_the_session_there() -> None:
    """ClientGone: the transfer is aborted, nothing stays reserved at either end, the home is the old one."""
    bench = bench_with_history()
    bench.place("r2", MOVE, tokens=200)
    assert bench.view("d0").outgoing_bytes == bench.view("d1").incoming_bytes == 7 * PAGE_BYTES
    abort, done = bench.send(ClientGone("r2"))
    assert abort == Abort("r2", "d1", "")
    assert isinstance(done, Complete) and done.outcome is Outcome.CANCELLED
    assert session_home(bench) == "d0"
    for engine_id in ("d0", "d1"):
        view = bench.view(engine_id)
        assert (view.batch, view.queue_s, view.incoming_bytes, view.outgoing_bytes) == (0, 0.0, 0, 0)


@pytest.mark.parametrize(
    ("source", "alive"), [("d0", False), ("gone", True), ("p0", True), ("d1", True)], ids=str
)
def test_a_move_with_nothing_to_fetch_begins_at_once(source: str, alive: bool) -> None:
    """Source gone, empty, or the new home itself: the round generates there now, the session is there now."""
    bench = bench_with_history()
    if not alive:
        bench.send(EngineDown("d0", "one", "killed"))
    commands = bench.place("r2", (Arm.MOVE, "d1", "d1", source), tokens=200)
    generate = Generate("r2", "d1", "r2-01g")
    assert commands == ([Rehome("r2", "d0", "d1"), generate] if alive else [generate])
    assert session_home(bench) == "d1"


def test_a_move_to_where_the_session_is_moves_nothing() -> None:
    """The new home is the old one: the round just begins, and nobody is told of a move."""
    bench = bench_with_history()
    assert bench.place("r2", (Arm.MOVE, "d0", "d0"), tokens=200) == [Generate("r2", "d0", "r2-01g")]
    assert session_home(bench) == "d0"


def test_a_move_without_a_source_pulls_from_the_home() -> None:
    """`Placement.source` None: the session's present home; a first round has none, and just begins."""
    bench = bench_with_history()
    (prefetch,) = bench.place("r2", (Arm.MOVE, "d1", "d1"), tokens=200)
    assert isinstance(prefetch, Prefetch) and prefetch.source_id == "d0"
    fresh = bench.place("r3", (Arm.MOVE, "d1", "d1"), session="fresh", first=5000)
    assert fresh == [Generate("r3", "d1", "r3-01g")]


def test_a_move_reserves_its_work_at_the_new_home() -> None:
    """Prefill until the first token and a place in the batch at d1; at d0 only what is fetched from it."""
    bench = bench_with_history()
    bench.policy.predicted_s = (0.0, 0.1, 0.4, 0.0)  # the pull keeps d1 from nothing
    bench.place("r2", MOVE, tokens=200)
    view = bench.view("d1")
    assert (view.batch, view.context_tokens, view.queued_rounds) == (1, 216, 1)
    assert view.queue_s == pytest.approx(0.1) and view.arrivals_per_s == 0.1
    bench.send(PrefetchDone("r2", "d1", 7, 7, 7 * PAGE_BYTES, 0.01))
    assert bench.view("d1").queue_s == pytest.approx(0.1) and bench.view("d1").incoming_bytes == 0
    bench.send(FirstToken("r2"))
    assert bench.view("d1").queue_s == 0.0 and bench.view("d1").batch == 1
    assert bench.view("d1").window_ttft_s == pytest.approx(0.3)


def test_a_try_after_the_move_finds_the_session_moved() -> None:
    """The KV came, then the new home refused: the session is there now, whoever answers this round."""
    bench = bench_with_history()
    bench.place("r2", MOVE, tokens=200)
    bench.send(PrefetchDone("r2", "d1", 7, 7, 7 * PAGE_BYTES, 0.01))
    bench.policy.next.append((Arm.MOVE, "d0", "d0", "d1"))
    again = bench.send(EngineFailed("r2", "d1", "refused", "full"))
    assert bench.policy.seen[-1].home == "d1"
    assert again == [Rehome("r2", "d1", "d0"), Generate("r2", "d0", "r2-02g")], "d0 has those pages itself"
    assert bench.core.rounds["r2"].bytes_home_to_home == 7 * PAGE_BYTES, "what was moved, was moved"


def test_a_pull_comes_from_the_source_that_the_placement_names() -> None:
    """remote_pull from a third engine: p0 pulls from d0, and d1, the home, fetches from p0."""
    bench = bench_with_history()
    (pull,) = bench.place("r2", (Arm.REMOTE_PULL, "d1", "p0", "d0"), tokens=200)
    assert isinstance(pull, Prefetch)
    assert (pull.engine_id, pull.source_id, pull.pages) == ("p0", "d0", 7)
    owed = {e: (bench.view(e).incoming_bytes, bench.view(e).outgoing_bytes) for e in ("d0", "d1", "p0")}
    assert owed == {
        "d0": (0, 7 * PAGE_BYTES),
        "d1": (12 * PAGE_BYTES, 0),
        "p0": (7 * PAGE_BYTES, 12 * PAGE_BYTES),
    }
    assert bench.send(PrefetchDone("r2", "p0", 7, 7, 7 * PAGE_BYTES, 0.1)) == [Prefill("r2", "p0", "r2-01p")]
    (push,) = bench.send(PrefillDone("r2", 112))
    assert isinstance(push, Prefetch)
    assert (push.engine_id, push.source_id, push.pages) == ("d1", "p0", 12)
    bench.send(PrefetchDone("r2", "d1", 12, 12, 12 * PAGE_BYTES, 0.1))
    round = bench.core.rounds["r2"]
    assert round.phase is Phase.GENERATING
    moved = (round.bytes_decode_to_prefill, round.bytes_prefill_to_decode, round.bytes_home_to_home)
    assert moved == (7 * PAGE_BYTES, 12 * PAGE_BYTES, 0)


def test_a_pull_whose_source_died_in_the_queue_is_not_tried() -> None:
    """The round waited, its source went: it prefills without, and nothing is owed any more."""
    bench = bench_with_history()
    for n in (1, 2):
        bench.place(f"busy{n}", (Arm.REMOTE_RECOMPUTE, "d1", "p0"), session=f"b{n}", first=1000 * n)
    bench.place("r2", (Arm.REMOTE_PULL, "d1", "p0", "d0"), tokens=200)
    assert bench.core.rounds["r2"].phase is Phase.QUEUED
    bench.send(EngineDown("d0", "one", "killed"))
    push, prefill = bench.send(PrefillDone("busy1", 0))
    assert isinstance(push, Prefetch) and prefill == Prefill("r2", "p0", "r2-01p")
    owed_tokens = 96 + 96 + 192  # what d1 fetches of the two busy rounds and of r2
    assert bench.view("p0").incoming_bytes == 0 and bench.view("p0").outgoing_bytes == owed_tokens * 2048
