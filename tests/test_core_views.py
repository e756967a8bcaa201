"""What policies see of transfers, of the stalls that decodes can take, of arrivals and of coming output."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from antiphon.policies.base import SLACKS, Arm, Corrections
from antiphon.scheduler.messages import (
    ClientGone,
    EngineFailed,
    FirstToken,
    Prefetch,
    PrefetchDone,
    PrefillDone,
    RoundFinished,
)
from antiphon.scheduler.tallies import Owed, Slacks
from tests.core_helpers import LATENCY, LOCAL, PULL, RECOMPUTE, Bench, arrived, claimed, engine_up

PAGE_BYTES = 16 * 2048


def owed(bench: Bench) -> dict[str, tuple[float, float]]:
    """(incoming, outgoing) bytes by engine."""
    views = bench.core.books.fleet.views(bench.now)
    return {e: (view.incoming_bytes, view.outgoing_bytes) for e, view in views.items()}


# ---------------------------------------------------------------- transfers


def test_transfers_are_owed_from_the_decision_until_they_are_over() -> None:
    """A pull and a push are reserved together; each is dropped by its own PrefetchDone."""
    bench = Bench()
    bench.run("r1", LOCAL)
    bench.place("r2", PULL, tokens=200)
    # d0 holds 7 pages of 12: p0 pulls those, and d0 fetches the other five
    assert owed(bench) == {"d0": (5 * PAGE_BYTES, 7 * PAGE_BYTES), "p0": (7 * PAGE_BYTES, 5 * PAGE_BYTES)}
    bench.send(PrefetchDone("r2", "p0", 3, 3, 3 * PAGE_BYTES, 0.1, "deadline"))
    assert owed(bench) == {"d0": (5 * PAGE_BYTES, 0), "p0": (0, 5 * PAGE_BYTES)}
    bench.send(PrefillDone("r2", 48))
    assert owed(bench) == {"d0": (5 * PAGE_BYTES, 0), "p0": (0, 5 * PAGE_BYTES)}
    bench.send(PrefetchDone("r2", "d0", 12, 5, 5 * PAGE_BYTES, 0.1))
    assert owed(bench) == {"d0": (0, 0), "p0": (0, 0)}


def test_rounds_owe_together_and_give_back_alone() -> None:
    """Sums over rounds; one that ends takes only its own with it."""
    bench = Bench()
    bench.place("r1", RECOMPUTE, tokens=100)
    bench.place("r2", RECOMPUTE, tokens=200, session="other", first=1000)
    assert owed(bench) == {"d0": (18 * PAGE_BYTES, 0), "p0": (0, 18 * PAGE_BYTES)}
    bench.send(ClientGone("r1"))
    assert owed(bench) == {"d0": (12 * PAGE_BYTES, 0), "p0": (0, 12 * PAGE_BYTES)}
    bench.policy.next.append(LOCAL)
    bench.send(EngineFailed("r2", "p0", "refused", "full"))
    assert owed(bench) == {"d0": (0, 0), "p0": (0, 0)}, "the new try moves nothing"


def test_bytes_are_the_engines_own_or_the_profiles() -> None:
    """EngineUp.kv_bytes_per_token; where an engine has not told, what its latency profile says."""
    bench = Bench()
    bench.send(engine_up("d0", "decode", "two", kv_bytes_per_token=100))
    bench.place("r1", RECOMPUTE)
    assert owed(bench) == {"d0": (9600, 0), "p0": (0, 9600)}
    bench.send(ClientGone("r1"))
    bench.send(engine_up("d0", "decode", "three", kv_bytes_per_token=0))
    bench.place("r2", RECOMPUTE)
    assert owed(bench)["d0"] == (96 * LATENCY.transfer.kv_bytes_per_token, 0)


def test_a_transfers_deadline_is_corrected() -> None:
    """Four times the prediction, by the slower of the two ends as it has shown itself to be."""
    slow = structs.replace(LATENCY, transfer=structs.replace(LATENCY.transfer, bytes_per_s=1e5))
    deadlines = []
    for factor in (1.0, 2.0):
        bench = Bench()
        bench.send(structs.replace(engine_up("p0", "prefill"), latency=slow))
        bench.core.books.fleet.books["p0"].corrections = Corrections(transfer=factor)
        bench.place("r1", RECOMPUTE)
        (push,) = bench.send(PrefillDone("r1", 0))
        assert isinstance(push, Prefetch)
        deadlines.append(push.deadline_s)
    assert deadlines == pytest.approx([4 * slow.transfer_s(96), 8 * slow.transfer_s(96)])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=30))
def test_what_is_owed_is_the_sum_of_its_parts(steps: list[tuple[int, int]]) -> None:
    """Add and drop in any order."""
    kept, naive = Owed(), dict[str, int]()
    for number, count in steps:
        if count % 3:
            kept.add(str(number), count)
            naive[str(number)] = count
        else:
            kept.drop(str(number))
            naive.pop(str(number), None)
        assert kept.total == sum(naive.values()) and kept.parts == naive


# ---------------------------------------------------------------- slacks

STEP_S = LATENCY.decode_step_s(1, 116)
BUDGET_S = 15 * (0.1 - STEP_S)
"""Of a round of 16 tokens under an ITL target of 0.1 s, alone at its home."""


def test_a_prefill_eats_the_slack_of_those_who_decode_there() -> None:
    """Budget = (tokens - 1) x (target - step of the batch with it); later prefills there take from it."""
    bench = Bench()
    bench.place("r1", LOCAL)
    bench.send(FirstToken("r1"))
    assert bench.view("d0").itl_slacks_s == pytest.approx((BUDGET_S,)), "its own prefill costs it nothing"
    bench.place("r2", LOCAL, session="b", first=1000)
    second_s = 15 * (0.1 - LATENCY.decode_step_s(2, 232))
    assert bench.view("d0").itl_slacks_s == pytest.approx((BUDGET_S - 0.1, second_s))
    bench.place("r3", RECOMPUTE, session="c", first=2000)
    third_s = 15 * (0.1 - LATENCY.decode_step_s(3, 348))
    assert bench.view("d0").itl_slacks_s == pytest.approx((BUDGET_S - 0.1, third_s, second_s))
    bench.send(ClientGone("r1"))
    assert bench.view("d0").itl_slacks_s == pytest.approx((third_s, second_s))


def test_what_was_prefilled_before_the_first_token_stalled_nobody() -> None:
    """From its first token on a round is stalled by what is still reserved there, and by what comes."""
    bench = Bench()
    bench.place("r1", RECOMPUTE)
    for number in range(3):
        bench.place(f"local{number}", LOCAL, session=f"b{number}", first=1000 * (1 + number))
    bench.send(FirstToken("local0"))
    bench.send(FirstToken("local1"))
    bench.send(ClientGone("local0"))
    bench.send(ClientGone("local1"))
    bench.send(PrefillDone("r1", 0))
    bench.send(PrefetchDone("r1", "d0", 6, 6, 6 * PAGE_BYTES, 0.1))
    assert bench.view("d0").itl_slacks_s[0] == pytest.approx(BUDGET_S - 0.3)
    bench.send(FirstToken("r1"))
    assert bench.view("d0").itl_slacks_s[0] == pytest.approx(BUDGET_S - 0.1), "only local2 is still to come"


def test_a_missed_target_is_nobodys_slack() -> None:
    """Budgets below 0 are left out, and at most SLACKS of the others are shown, the least first."""
    bench = Bench()
    for number in range(SLACKS + 3):
        bench.place(f"r{number}", LOCAL, session=f"s{number}", first=1000 * number)
    slacks = bench.view("d0").itl_slacks_s
    # of the first rounds 0.1 s for each later one is gone
    assert 0 < len(slacks) < SLACKS + 3 and min(slacks) >= 0
    assert list(slacks) == sorted(slacks)
    assert len(bench.core.books.fleet.books["d0"].slacks) == SLACKS + 3


def test_a_round_of_one_token_has_no_itl_to_lose() -> None:
    """What is expected to be a single token is in no list of slacks."""
    bench = Bench()
    bench.send(structs.replace(arrived("r1"), max_output_tokens=1))
    bench.policy.next.append(LOCAL)
    bench.send(claimed("r1"))
    assert bench.view("d0").itl_slacks_s == () and bench.view("d0").batch == 1


def test_decode_steps_between_chunks_stall_nobody() -> None:
    """Of a chunked prefill only the chunks count: a prediction has the K steps between them in it."""
    bench = Bench()
    bench.send(engine_up("d0", "decode", "two", chunk_tokens=64, decode_interval=2))
    bench.place("r1", LOCAL)
    before_s = bench.core.books.fleet.books["d0"].slacks.stalled_s
    assert before_s == pytest.approx(0.1), "nobody decodes: no steps are run"
    bench.place("r2", LOCAL, tokens=200, session="b", first=1000)  # three more chunks than one
    stalled_s = bench.core.books.fleet.books["d0"].slacks.stalled_s - before_s
    assert stalled_s == pytest.approx(0.1 - 3 * 2 * STEP_S)
    assert bench.view("d0").prefill_share == pytest.approx((before_s + stalled_s) / 10)


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "drop", "stall", "begin"]), st.integers(0, 5), st.floats(-2, 2)),
        max_size=40,
    )
)
def test_slacks_are_what_subtracting_says(steps: list[tuple[str, int, float]]) -> None:
    """Against a model that takes every stall from every budget."""
    slacks, naive, budgets = Slacks(), dict[str, float](), dict[str, float]()
    for step, number, seconds in steps:
        name = str(number)
        match step:
            case "add":
                slacks.add(name, seconds)
                naive[name] = budgets[name] = seconds
            case "drop":
                slacks.drop(name)
                naive.pop(name, None)
            case "stall":
                slacks.stall(abs(seconds))
                naive = {other: slack_s - abs(seconds) for other, slack_s in naive.items()}
            case "begin" if name in naive:
                slacks.begin(name, abs(seconds))
                naive[name] = budgets[name] - abs(seconds)
            case _:
                slacks.begin("nobody", 1.0)
        assert sorted(slacks) == sorted(naive) and len(slacks) == len(naive)
        if all(abs(slack_s) > 1e-9 for slack_s in naive.values()):  # at 0 rounding decides
            expected = sorted(slack_s for slack_s in naive.values() if slack_s >= 0)
            assert slacks.least(3) == pytest.approx(tuple(expected[:3]))


# ---------------------------------------------------------------- arrivals and output


def test_prefills_placed_there_count_for_ten_seconds() -> None:
    """Rounds and seconds of prefill per second of the window, wherever the round decodes."""
    bench = Bench()
    for number in range(4):
        bench.place(f"r{number}", RECOMPUTE, session=f"s{number}", first=1000 * number)
    assert bench.view("p0").arrivals_per_s == 0.4 and bench.view("p0").prefill_share == pytest.approx(0.04)
    assert bench.view("d0").arrivals_per_s == 0.0
    bench.now += 9.5
    assert 0.0 < bench.view("p0").arrivals_per_s < 0.4
    bench.now += 1.0
    assert (bench.view("p0").arrivals_per_s, bench.view("p0").prefill_share) == (0.0, 0.0)


def test_expected_output_is_the_sessions_own_then_the_fleets() -> None:
    """0 before any round ended; an EWMA of weight 0.1 of completed rounds; never above what may come."""
    bench = Bench()
    bench.run("r1", LOCAL, output=10)
    assert bench.policy.seen[-1].expected_output_tokens == 0
    bench.run("r2", LOCAL, tokens=120, output=15)
    assert bench.policy.seen[-1].expected_output_tokens == 10
    bench.place("r3", LOCAL, tokens=140)
    assert bench.policy.seen[-1].expected_output_tokens == round(0.9 * 10 + 0.1 * 15)
    bench.send(FirstToken("r3"))
    bench.send(EngineFailed("r3", "d0", "broken", "eof"))
    bench.place("x", LOCAL, session="new", first=5000)
    assert bench.policy.seen[-1].expected_output_tokens == 10, "a failed round teaches nothing"
    bench.send(FirstToken("x"))
    bench.send(RoundFinished("x", 4000, 0, arrived("x", "new", 200, 5000).hashes))
    bench.place("y", LOCAL, session="new", first=5000)
    assert bench.policy.seen[-1].expected_output_tokens == 16, "max_output_tokens"
    bench.place("r4", LOCAL, tokens=140)
    assert bench.policy.seen[-1].expected_output_tokens == 10, "what others answer counts no more"


def test_what_a_prefill_engine_does_for_a_pull_is_work_too() -> None:
    """remote_pull: the round has its place there while it pulls; only its prefill stalls the decodes."""
    bench = Bench()
    bench.run("r1", LOCAL)
    bench.policy.predicted_s = (0.0, 0.1, 0.4, 0.2)
    bench.place("r2", PULL, tokens=200)
    assert bench.view("p0").queue_s == pytest.approx(0.5)
    assert bench.view("p0").prefill_share == pytest.approx(0.01)


def test_pulled_tokens_are_in_no_chunk() -> None:
    """Of 200 tokens 112 are pulled: two chunks of 64, so K steps once."""
    bench = Bench()
    bench.send(engine_up("p0", "prefill", "two", chunk_tokens=64, decode_interval=2))
    bench.run("r1", LOCAL)
    bench.place("b", (Arm.LOCAL, "p0", "p0"), session="b", first=1000)
    book = bench.core.books.fleet.books["p0"]
    before_s = book.slacks.stalled_s
    bench.place("r2", PULL, tokens=200)
    assert book.slacks.stalled_s - before_s == pytest.approx(0.1 - 1 * 2 * STEP_S)


def test_a_waiting_round_tells_its_ordering_what_it_was_placed_for() -> None:
    """work_s is pull and prefill at the prefill engine, push_s the way home, as the policy predicted."""
    bench = Bench()
    bench.place("r1", RECOMPUTE)
    round = bench.core.rounds["r1"]
    placement = round.placement
    assert placement is not None
    predicted = structs.replace(placement.predicted, pull_s=0.25, push_s=0.5)
    round.placement = structs.replace(placement, predicted=predicted)
    view = bench.core.books.view(round, bench.now)
    assert (view.work_s, view.push_s, view.postponed) == (0.35, 0.5, 0)
    assert bench.policy.seen[-1].work_s == 0.0, "not placed yet"
    assert view.home == "d0" and placement.arm is Arm.REMOTE_RECOMPUTE
