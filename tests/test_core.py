"""Scenarios of the core: event lists in, exact commands out."""

from __future__ import annotations

import pytest
from msgspec import structs

from antiphon.policies.base import Arm
from antiphon.policies.latency import TransferCost
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Claim,
    ClaimLost,
    ClientGone,
    Complete,
    EngineDown,
    EngineFailed,
    EngineUp,
    Event,
    FirstToken,
    Generate,
    HeldChain,
    LoadReported,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Refuse,
    Reserved,
    RoundFinished,
    Tick,
    Totals,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.states import ACCEPTS, SUCCESSORS, IllegalEvent, Phase
from tests.core_helpers import LATENCY, LOCAL, PULL, RECOMPUTE, Bench, arrived, claimed, engine_up


def test_a_local_round_is_claimed_generated_and_completed() -> None:
    """local: Claim, Generate at the home, Complete with a receipt; the session then has that home."""
    bench = Bench()
    commands = bench.send(arrived("r1"))
    assert commands[0] == Claim("r1")
    assert [t for t, _ in bench.core.checkpoints(arrived("r1").hashes, 16)] == [96]
    bench.policy.next.append(LOCAL)
    assert bench.send(claimed("r1")) == [Generate("r1", "d0", "r1-01g")]
    assert bench.send(FirstToken("r1")) == []
    hashes = arrived("r1", tokens=112).hashes
    (done,) = bench.send(RoundFinished("r1", 12, 0, hashes))
    assert isinstance(done, Complete) and done.outcome is Outcome.COMPLETED and done.home == "d0"
    assert done.receipt.arm is Arm.LOCAL and done.receipt.ttft_s == pytest.approx(0.2)
    assert done.holdings == (HeldChain("d0", "one", hashes),)
    assert bench.core.rounds == {}


def test_remote_pull_moves_history_there_and_the_rest_back() -> None:
    """remote_pull: the prefill engine pulls what the home holds, computes, and the home pulls the prompt."""
    bench = Bench()
    bench.place("r1", LOCAL, tokens=100)
    bench.send(FirstToken("r1"))
    bench.send(RoundFinished("r1", 12, 0, arrived("r1", tokens=112).hashes))
    (prefetch,) = bench.place("r2", PULL, tokens=200)
    assert isinstance(prefetch, Prefetch)
    assert (prefetch.engine_id, prefetch.source_id, prefetch.pages) == ("p0", "d0", 7)
    assert bench.send(PrefetchDone("r2", "p0", 7, 7, 7 * 32768, 0.01)) == [Prefill("r2", "p0", "r2-01p")]
    (push,) = bench.send(PrefillDone("r2", 112))
    assert isinstance(push, Prefetch)
    assert (push.engine_id, push.source_id, push.first_page, push.pages) == ("d0", "p0", 0, 12)
    assert bench.send(PrefetchDone("r2", "d0", 12, 5, 5 * 32768, 0.01)) == [Generate("r2", "d0", "r2-01g")]
    bench.send(FirstToken("r2"))
    (done,) = bench.send(RoundFinished("r2", 3, 192, arrived("r2", tokens=202).hashes))
    receipt = done.receipt  # type: ignore[union-attr]
    assert receipt.cached_tokens == 112, "the home's 192 cached tokens were computed by p0 for this round"
    assert (receipt.bytes_decode_to_prefill, receipt.bytes_prefill_to_decode) == (7 * 32768, 5 * 32768)
    assert receipt.pulled_tokens == 112


def test_what_was_pulled_is_believed_at_once() -> None:
    """The rounds that are placed meanwhile, and a second try, know of pages that a transfer brought."""
    bench = Bench()
    bench.place("r1", LOCAL, tokens=100)
    bench.send(FirstToken("r1"))
    bench.send(RoundFinished("r1", 12, 0, arrived("r1", tokens=112).hashes))
    bench.place("r2", PULL, tokens=200)
    held, hashes = bench.core.books.residency.held, arrived("r2", tokens=200).hashes
    assert held(hashes, 16) == {"d0": 112}
    bench.send(PrefetchDone("r2", "p0", 5, 5, 5 * 32768, 0.01, "deadline"))
    assert held(hashes, 16) == {"d0": 112, "p0": 80}
    bench.send(PrefillDone("r2", 80))
    bench.send(PrefetchDone("r2", "d0", 12, 5, 5 * 32768, 0.01))
    assert held(hashes, 16) == {"d0": 192, "p0": 192}


def test_a_late_page_only_costs_recomputing() -> None:
    """A prefetch that brings nothing goes on to the prefill, and the receipt says why."""
    bench = Bench()
    bench.place("r1", LOCAL)
    bench.send(FirstToken("r1"))
    bench.send(RoundFinished("r1", 12, 0, arrived("r1", tokens=112).hashes))
    bench.place("r2", PULL, tokens=200)
    assert bench.send(PrefetchDone("r2", "p0", 0, 0, 0, 0.5, "deadline")) == [Prefill("r2", "p0", "r2-01p")]
    assert "deadline" in bench.core.rounds["r2"].notes[0]


def test_two_rounds_prefill_at_once_and_the_third_waits() -> None:
    """At most two rounds are in flight at a prefill engine; the next starts when one has been prefilled."""
    bench = Bench()
    for n in (1, 2, 3):
        bench.send(arrived(f"r{n}", f"s{n}", first=1000 * n))
        bench.policy.next.append(RECOMPUTE)
        started = bench.send(claimed(f"r{n}", f"s{n}"))
        assert started == ([Prefill(f"r{n}", "p0", f"r{n}-01p")] if n < 3 else [])
    commands = bench.send(PrefillDone("r1", 0))
    assert Prefill("r3", "p0", "r3-01p") in commands


def test_a_failure_before_the_first_token_is_retried_elsewhere() -> None:
    """EngineFailed: same round, next arm, a new rid; at most three tries, then a clear refusal."""
    bench = Bench()
    bench.place("r1", RECOMPUTE)
    bench.policy.next.append(LOCAL)
    failed = bench.send(EngineFailed("r1", "p0", "unreachable", "gone"))
    assert failed == [Generate("r1", "d0", "r1-02g")]
    bench.policy.next.append(RECOMPUTE)
    assert bench.send(EngineFailed("r1", "d0", "refused", "503")) == [Prefill("r1", "p0", "r1-03p")]
    refuse, complete = bench.send(EngineFailed("r1", "p0", "refused", "503"))
    assert isinstance(refuse, Refuse) and refuse.code == "upstream_failed" and "p0" in refuse.message
    assert isinstance(complete, Complete) and complete.outcome is Outcome.FAILED


def test_a_bad_request_is_not_tried_again() -> None:
    """What one engine calls a bad request, no other will like better."""
    bench = Bench()
    bench.place("r1", LOCAL)
    refuse, complete = bench.send(EngineFailed("r1", "d0", "bad_request", "grammar"))
    assert isinstance(refuse, Refuse) and refuse.code == "bad_upstream_request"
    assert isinstance(complete, Complete) and complete.outcome is Outcome.REFUSED, "it leaves no trace"


def test_a_failure_after_the_first_token_ends_the_stream() -> None:
    """After a token was relayed nothing is retried: a clean error event and a failed receipt."""
    bench = Bench()
    bench.place("r1", LOCAL)
    bench.send(FirstToken("r1"))
    broke, complete = bench.send(EngineFailed("r1", "d0", "broken", "eof"))
    assert isinstance(broke, Broke)
    assert isinstance(complete, Complete) and complete.outcome is Outcome.FAILED


def test_a_dead_prefill_engine_sends_its_rounds_home() -> None:
    """EngineDown: rounds that prefilled or waited there are placed anew, its residency is void."""
    bench = Bench(prefill_in_flight=1)
    bench.place("r1", RECOMPUTE)
    bench.send(arrived("r2", "s2", first=500))
    bench.policy.next.append(RECOMPUTE)
    bench.send(claimed("r2", "s2"))
    commands = bench.send(EngineDown("p0", "one", "heartbeat"))
    assert commands == [
        Abort("r1", "p0", "r1-01p"),
        Generate("r1", "d0", "r1-02g"),
        Generate("r2", "d0", "r2-02g"),
    ]


def test_an_old_incarnation_going_down_touches_nothing() -> None:
    """EngineDown of an incarnation that was replaced already is ignored."""
    bench = Bench()
    bench.send(EngineUp("p0", "two", "prefill", True, 16, 32768))
    assert bench.send(EngineDown("p0", "one", "late")) == []
    assert "p0" in bench.core.books.fleet.books


def test_no_engine_alive_is_refused_at_once() -> None:
    """Without engines a round is refused with a retry hint and is gone."""
    bench = Bench()
    bench.send(EngineDown("p0", "one", "x"))
    bench.send(EngineDown("d0", "one", "x"))
    bench.send(arrived("r1"))
    refuse, complete = bench.send(claimed("r1"))
    assert isinstance(refuse, Refuse) and refuse.code == "no_engine_available" and refuse.retry_after_s > 0
    assert isinstance(complete, Complete) and complete.outcome is Outcome.REFUSED


@pytest.mark.parametrize("phase", list(Phase)[:-1])
def test_a_client_that_leaves_frees_everything(phase: Phase) -> None:
    """ClientGone in every phase: the call is aborted, nothing stays reserved."""
    bench = Bench(prefill_in_flight=1)
    bench.place("r0", LOCAL)
    bench.send(FirstToken("r0"))
    bench.send(RoundFinished("r0", 12, 0, arrived("r0", tokens=112).hashes))
    if phase is Phase.QUEUED:
        bench.send(arrived("busy", "other", first=9000))
        bench.policy.next.append(RECOMPUTE)
        bench.send(claimed("busy", "other"))
    bench.send(arrived("r1", tokens=200))
    if phase is not Phase.CLAIMING:
        bench.policy.next.append(PULL)
        bench.send(claimed("r1", number=2))
        steps: list[Event] = [
            PrefetchDone("r1", "p0", 7, 7, 1, 0.1),
            PrefillDone("r1", 112),
            PrefetchDone("r1", "d0", 12, 5, 1, 0.1),
            FirstToken("r1"),
        ]
        while bench.core.rounds["r1"].phase is not phase:
            bench.send(steps.pop(0))
    commands = bench.send(ClientGone("r1"))
    aborts = [c for c in commands if isinstance(c, Abort)]
    assert len(aborts) == (0 if phase is Phase.QUEUED else 1)
    assert isinstance(commands[-1], Complete) and commands[-1].outcome is Outcome.CANCELLED
    assert "r1" not in bench.core.rounds


def test_the_deadline_refuses_a_round_without_a_token() -> None:
    """next_deadline() names the moment; a Tick then aborts and refuses; a decoding round is left alone."""
    bench = Bench(first_token_deadline_s=5.0)
    bench.place("r1", LOCAL)
    deadline_s = bench.core.next_deadline()
    assert deadline_s is not None
    bench.now = deadline_s
    abort, refuse, _ = bench.send(Tick())
    assert abort == Abort("r1", "d0", "r1-01g") and isinstance(refuse, Refuse)
    bench.place("r2", LOCAL)
    bench.send(FirstToken("r2"))
    assert bench.core.next_deadline() is None


def test_an_engines_own_load_counts_where_it_is_above_ours() -> None:
    """LoadReported corrects drift: it is never added to the books, and an unknown engine is ignored."""
    bench = Bench()
    bench.place("r1", LOCAL)
    for reported, seen in ((40, 100), (5000, 5000), (99_999, 32768), (0, 100)):
        assert bench.send(LoadReported("d0", reported)) == []
        assert bench.core.books.fleet.views(bench.now)["d0"].used_tokens == seen
    assert bench.send(LoadReported("nobody", 1)) == []


def test_without_the_ledger_rounds_go_on() -> None:
    """ClaimLost: the core decides with what it knows and marks the receipt as degraded."""
    bench = Bench()
    bench.policy.next.append(LOCAL)
    bench.send(arrived("r1"))
    assert bench.send(ClaimLost("r1", "timeout")) == [Generate("r1", "d0", "r1-01g")]
    bench.send(FirstToken("r1"))
    (done,) = bench.send(RoundFinished("r1", 2, 0, ()))
    assert isinstance(done, Complete) and done.receipt.degraded


@pytest.mark.parametrize("phase", list(Phase)[:-1])
def test_an_illegal_event_raises_and_changes_nothing(phase: Phase) -> None:
    """Whatever a phase does not take is a driver's bug: it raises and the books stay as they were."""
    events: list[Event] = [
        claimed("r1"),
        ClaimLost("r1", "x"),
        PrefetchDone("r1", "p0", 0, 0, 0, 0.0),
        PrefillDone("r1", 0),
        FirstToken("r1"),
        RoundFinished("r1", 1, 0, ()),
        EngineFailed("r1", "d0", "refused", "x"),
    ]
    bench = Bench()
    bench.place("r1", LOCAL)
    round = bench.core.rounds["r1"]
    for event in events:
        if type(event) not in ACCEPTS[phase]:
            round.phase = phase
            before = repr(round)
            with pytest.raises(IllegalEvent, match="r1"):
                bench.core.receive(event, bench.now)
            assert repr(round) == before


def test_the_tables_are_whole() -> None:
    """Every phase is in both tables, every phase but the last can be left by a client that goes."""
    assert set(SUCCESSORS) == set(ACCEPTS) == set(Phase)
    assert all(ClientGone in ACCEPTS[p] and Phase.ENDED in SUCCESSORS[p] for p in list(Phase)[:-1])


def test_a_failed_try_is_not_charged_to_the_engine_that_answered() -> None:
    """The windowed TTFT counts from the try's own beginning; the receipt's from the round's arrival."""
    bench = Bench()
    bench.place("r1", RECOMPUTE)
    bench.now += 60.0
    bench.policy.next.append(LOCAL)
    bench.send(EngineFailed("r1", "p0", "unreachable", "gone"))
    bench.send(FirstToken("r1"))
    (done,) = bench.send(RoundFinished("r1", 2, 0, ()))
    assert isinstance(done, Complete) and done.receipt.ttft_s is not None and done.receipt.ttft_s > 60
    books = bench.core.books.fleet.books
    assert books["d0"].ttft.mean(bench.now) == pytest.approx(0.1) and not books["p0"].ttft.samples


def test_what_a_failed_try_computed_is_not_cached() -> None:
    """p0 computed the prompt for this round; that the next try finds it at the home does not make it free."""
    bench = Bench()
    bench.place("r1", RECOMPUTE, tokens=100)
    bench.send(PrefillDone("r1", 16))
    bench.send(PrefetchDone("r1", "d0", 6, 6, 6 * 32768, 0.01))
    bench.policy.next.append(LOCAL)
    bench.send(EngineFailed("r1", "d0", "refused", "full"))
    bench.send(FirstToken("r1"))
    (done,) = bench.send(RoundFinished("r1", 2, 96, ()))
    assert isinstance(done, Complete) and done.receipt.cached_tokens == 16
    assert done.receipt.bytes_prefill_to_decode == 6 * 32768, "what was moved, was moved"
    assert (done.receipt.prefill_s, done.receipt.push_s) == (0.0, 0.0), "times are the last try's"


def test_a_replaced_prefill_engine_holds_nothing() -> None:
    """p0 restarts while the home decodes: its new incarnation is not recorded as a holder of the prompt."""
    bench = Bench()
    bench.place("r1", RECOMPUTE)
    bench.send(PrefillDone("r1", 0))
    bench.send(PrefetchDone("r1", "d0", 6, 6, 6 * 32768, 0.01))
    bench.send(FirstToken("r1"))
    bench.send(engine_up("p0", "prefill", "two"))
    (done,) = bench.send(RoundFinished("r1", 12, 0, arrived("r1", tokens=112).hashes))
    assert isinstance(done, Complete) and {chain.engine_id for chain in done.holdings} == {"d0"}


def test_a_round_out_of_time_has_no_try_that_answered() -> None:
    """After the deadline the last try is a failed one, in the receipt too."""
    bench = Bench(first_token_deadline_s=5.0)
    bench.place("r1", LOCAL)
    bench.now += 5.0
    abort, refuse, done = bench.send(Tick())
    assert isinstance(abort, Abort) and isinstance(refuse, Refuse) and isinstance(done, Complete)
    assert done.receipt.outcome is Outcome.FAILED and "no token within 5 s" in done.receipt.tries[0].failure


def test_an_engine_has_the_profile_that_it_came_with() -> None:
    """EngineUp.latency goes into the engine's view; without one it is the core's default."""
    bench = Bench()
    slow = structs.replace(LATENCY, name="slow", transfer=TransferCost(1.0, 1e9, 1))
    views = bench.core.books.fleet.views
    assert {view.latency for view in views(bench.now).values()} == {LATENCY}
    bench.send(structs.replace(engine_up("p0", "prefill"), latency=slow))
    assert [view.latency.name for view in views(bench.now).values()] == [LATENCY.name, "slow"]
    bench.place("r1", RECOMPUTE)
    (push,) = bench.send(PrefillDone("r1", 0))
    assert isinstance(push, Prefetch) and push.deadline_s > 4.0, "four times the slower engine's transfer"


def test_a_view_ages_with_its_samples() -> None:
    """Without any event the means drop what is older than 10 s; until then the views are the same."""
    bench = Bench()
    for number, first_s in ((1, 0.25), (2, 0.75)):
        bench.send(arrived(f"r{number}"))
        began_s = bench.now
        bench.policy.next.append(LOCAL)
        bench.send(claimed(f"r{number}"))
        bench.now = began_s + first_s - 0.1
        bench.send(FirstToken(f"r{number}"))
        sampled_s = bench.now
    views = bench.core.books.fleet.views
    first_sample_s = bench.core.books.fleet.books["d0"].ttft.samples[0][0]
    before = views(bench.now)
    assert before["d0"].window_ttft_s == pytest.approx(0.5)
    first_placed_s = bench.core.books.fleet.books["d0"].placed.samples[0][0]
    assert before["d0"].arrivals_per_s == 0.2 and before["d0"].prefill_share == pytest.approx(0.02)
    assert views(first_placed_s + 9.99) is before
    aged = views(first_placed_s + 10.01)["d0"]
    assert aged.arrivals_per_s == 0.1 and aged.prefill_share == pytest.approx(0.01)
    assert views(first_sample_s + 9.99)["d0"] is aged
    assert views(first_sample_s + 10.01)["d0"].window_ttft_s == pytest.approx(0.75)
    assert views(sampled_s + 9.99)["d0"].window_ttft_s == pytest.approx(0.75)
    assert views(sampled_s + 10.01)["d0"].window_ttft_s is None
    assert before["d0"].window_ttft_s == pytest.approx(0.5), "a view that was given away never changes"


def test_a_reader_that_lags_gives_no_sample() -> None:
    """The ITL that a slow client saw says nothing of the engine."""
    bench = Bench()
    for n, lagged in enumerate((True, False)):
        bench.place(f"r{n}", LOCAL)
        bench.send(FirstToken(f"r{n}"))
        bench.send(RoundFinished(f"r{n}", 12, 0, (), lagged))
        assert len(bench.core.books.fleet.books["d0"].itl.samples) == n


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        (("unreachable", "unreachable", "unreachable"), "no_engine_available"),
        (("unreachable", "refused", "unreachable"), "upstream_failed"),
    ],
)
def test_engines_that_are_all_dead_are_no_engine(kinds: tuple[str, ...], code: str) -> None:
    """They die before anybody has noticed: the client is told to come again, not that its round failed."""
    bench = Bench()
    bench.place("r1", LOCAL)
    for kind, engine in zip(kinds, ("d0", "p0", "d0"), strict=True):
        bench.policy.next.append((Arm.LOCAL, engine, engine))
        round = bench.core.rounds["r1"]
        assert round.placement is not None
        refuse, *_ = bench.send(EngineFailed("r1", round.placement.home, kind, "x"))
    assert isinstance(refuse, Refuse) and refuse.code == code and refuse.retry_after_s > 0


def test_a_stream_that_stalls_is_aborted() -> None:
    """No token for too long after the first one: the client gets an error, and the engine is told to stop."""
    bench = Bench()
    bench.place("r1", LOCAL)
    bench.send(FirstToken("r1"))
    commands = bench.send(EngineFailed("r1", "d0", "deadline", "nothing came"))
    assert [type(command) for command in commands] == [Abort, Broke, Complete]


def test_reservations_on_a_dead_engine_are_taken_back() -> None:
    """What we published there would else burden the engine that comes back by the same name."""
    bench = Bench()
    bench.place("r1", RECOMPUTE)
    commands = bench.core.receive(EngineDown("p0", "one", "killed"), bench.now)
    assert Reserved("p0", Totals()) in commands
    commands = bench.core.receive(engine_up("p0", "prefill", "two"), bench.now)
    assert not commands
