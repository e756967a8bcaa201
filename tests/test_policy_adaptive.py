"""`adaptive` and its forecasts: values worked by hand. The latency model is the one of policy_helpers.py."""

from __future__ import annotations

import math

import pytest

from antiphon.policies.adaptive import Adaptive, AdaptiveParameters
from antiphon.policies.base import Arm, Candidate
from antiphon.policies.forecast import Forecast, backlog, chance, itl_at, transfer
from tests.policy_helpers import a_round, cluster, engine, placed, rejected, terms

HISTORY = {"d0": 900}
"""Of 1000 prompt tokens: 100 are new, 0.2 s of prefill on d0."""


def by_arm(considered: tuple[Candidate, ...]) -> dict[tuple[str, str, str], Candidate]:
    return {(c.arm.value, c.home, c.prefill_engine): c for c in considered}


# ---------------------------------------------------------------- forecasts


@pytest.mark.parametrize(
    ("predicted_s", "expected"),
    [
        (1.0, 0.5),
        (1.15, 1 / (1 + math.exp(-1))),
        (0.85, 1 / (1 + math.exp(1))),
        (0.4, 0.0),
        (1.6, 1.0),
        (float("inf"), 1.0),
    ],
)
def test_chance_of_a_miss(predicted_s: float, expected: float) -> None:
    """Half at the target; certain from four spreads on, on either side."""
    assert chance(predicted_s, 1.0, 0.15) == pytest.approx(expected)


def test_a_transfer_waits_behind_what_its_links_owe() -> None:
    """1000 tokens are 0.05 + 0.1 s; 50,000 bytes before them 0.05 s more, on the worse of both ends."""
    idle, busy = engine("d0"), engine("p0", incoming_bytes=50_000)
    slow = engine("d1", outgoing_bytes=100_000)
    assert transfer(idle, engine("p1"), 1000) == pytest.approx(0.15)
    assert transfer(idle, busy, 1000) == pytest.approx(0.2)
    assert transfer(slow, busy, 1000) == pytest.approx(0.25)
    assert transfer(slow, busy, 0) == 0.0


def test_itl_is_stretched_by_prefills_up_to_a_chunk() -> None:
    """A batch of 10 takes 0.020 s; a fifth of the time in prefills makes 0.025 s, K = 4 caps it."""
    home = engine("d0", batch=9, prefill_share=0.2)
    assert itl_at(a_round(), home) == pytest.approx(0.025)
    assert itl_at(a_round(), engine("d0", batch=9, prefill_share=1.5)) == pytest.approx(0.2)
    capped = engine("d0", batch=9, prefill_share=0.8, chunk_tokens=100, decode_interval=4)
    assert itl_at(a_round(), capped) == pytest.approx(0.020 + 0.2 / 4)


def test_others_are_counted() -> None:
    """Two of three decodes cannot take 0.4 s. Of 2 arrivals a second, with 0.5 s before them and a target of
    1 s, the queue makes late(0.5) = 0.125 SLOs late, with 0.4 s more late(0.9) = 0.405.
    """
    look = Forecast(a_round(slo_ttft_s=1.0), 0.15, 0.05)
    busy = engine("d0", itl_slacks_s=(0.1, 0.39, 0.4), in_time_per_s=2.0, queue_s=0.5)
    assert look.others(busy, 0.4) == pytest.approx(2 + 2.0 * (0.405 - 0.125))
    waiting = engine("d1", in_time_per_s=2.0, queue_s=1.0)
    assert look.others(waiting, 0.4) == pytest.approx(2.0 * 0.4)  # whoever comes is late anyway, 0.4 s longer
    half = engine("d2", in_time_per_s=2.0, queue_s=1.0, prefill_share=0.5)
    assert look.others(half, 0.4) == pytest.approx(4 * 2.0 * 0.4)
    blind = Forecast(a_round(), 0.15, 0.05, guard=False, decode_tax=0.5)
    assert blind.others(engine("d0", batch=3, itl_slacks_s=(0.1,)), 0.4) == pytest.approx(0.5 * 3 * 0.4)


def test_what_waits_shares_a_pass() -> None:
    """Three rounds of 0.3 s: the second and third pay the fixed 0.1 s of one pass together."""
    assert backlog(engine("d0", queue_s=0.9, queued_rounds=3)) == pytest.approx(0.7)
    assert backlog(engine("d0", queue_s=0.3, queued_rounds=1)) == pytest.approx(0.3)


def test_a_copy_pushes_others_out_of_a_full_store() -> None:
    """0.1 of 1000 tokens are new on d0: at a share of 0.5, 2 * 0.1 * 0.25 * (1 + 1.1 / 1); all on p0."""
    look = Forecast(a_round(history=HISTORY, slo_ttft_s=1.0), 0.15, 0.05, evict_weight=2.0)
    assert look.evicted(engine("d0", kv_share=0.5)) == pytest.approx(2 * 0.1 * 0.25 * 2.1)
    assert look.evicted(engine("p0", kv_share=3.0)) == pytest.approx(2 * 1.0 * 1.0 * 2.1)
    assert look.evicted(engine("p0")) == 0.0


# ---------------------------------------------------------------- decisions


def test_a_home_that_loses_nothing_is_not_questioned() -> None:
    """0.205 s of 1 s is over four spreads (0.16) under the target: local, nothing else is looked at."""
    answer = placed(
        Adaptive().place(
            a_round(home="d0", history=HISTORY, slo_ttft_s=1.0), cluster(engine("d0"), engine("p0"))
        )
    )
    assert (answer.arm, answer.home, len(answer.considered)) == (Arm.LOCAL, "d0", 1)
    assert answer.predicted.misses == 0.0 and terms(answer.predicted) == pytest.approx((0.005, 0.2, 0, 0))


def test_a_decode_about_to_miss_is_spared() -> None:
    """A decode on d0 can take 0.15 s, not 0.2 s: p0 prefills, and the home's last page (0.101 s) harms none.

    remote_pull: pull 900 = 0.14, prefill 0.2, push 100 = 0.06 + 0.101; every call 0.005, and at d0 half of a
    step of 0.012 s. Local loses 1 SLO for sure.
    """
    busy = engine("d0", itl_slacks_s=(0.15, 0.3), batch=2)
    round = a_round(home="d0", history=HISTORY, slo_ttft_s=1.0)
    answer = placed(Adaptive().place(round, cluster(busy, engine("p0"))))
    assert (answer.arm, answer.prefill_engine, answer.source) == (Arm.REMOTE_PULL, "p0", "d0")
    assert terms(answer.predicted) == pytest.approx((0.005, 0.2, 0.14, 0.172))
    assert answer.predicted.misses == pytest.approx(chance(0.517, 1.0, 0.16))
    assert by_arm(answer.considered)["local", "d0", "d0"].misses == 1.0
    assert "(local on d0: 1.00)" in answer.reason
    bare = Adaptive(AdaptiveParameters(guard=False))
    assert placed(bare.place(round, cluster(busy, engine("p0")))).arm is Arm.LOCAL


def test_a_busy_home_is_left() -> None:
    """5 s are queued on d0, where a remote round would have to end too: the session moves to d1.

    move: pull 900 = 0.14 s, prefill 0.2 s.
    """
    view = cluster(engine("d0", queue_s=5.0), engine("d1"), engine("p0", queue_s=0.1))
    round = a_round(home="d0", history=HISTORY, slo_ttft_s=1.0)
    answer = placed(Adaptive().place(round, view))
    assert (answer.arm, answer.home, answer.prefill_engine, answer.source) == (Arm.MOVE, "d1", "d1", "d0")
    assert terms(answer.predicted) == pytest.approx((0.005, 0.2, 0.14, 0))
    stays = placed(Adaptive(AdaptiveParameters(move=False)).place(round, view))
    assert stays.home == "d0" and stays.predicted.misses == 1.0


def test_a_lost_round_goes_where_it_delays_the_fewest() -> None:
    """5.1 s of prefill miss 1 s anywhere; on d0, where 2 rounds a second come, 3 * 2 * (5.1 - 0.5) more."""
    view = cluster(engine("d0", in_time_per_s=2.0), engine("d1"))
    answer = placed(Adaptive().place(a_round(prompt_tokens=5000, slo_ttft_s=1.0), view))
    assert (answer.arm, answer.home) == (Arm.LOCAL, "d1")
    assert by_arm(answer.considered)["local", "d0", "d0"].misses == pytest.approx(1 + 3 * 2.0 * 4.6)


def test_a_home_without_room_for_the_kv_is_as_good_as_late() -> None:
    """100,000 tokens in use by decodes: the round would wait for one to end."""
    full = engine("d0", batch=4, context_tokens=99_500)
    answer = placed(
        Adaptive().place(a_round(home="d0", history=HISTORY, slo_ttft_s=1.0), cluster(full, engine("d1")))
    )
    assert (answer.arm, answer.home) == (Arm.MOVE, "d1")


def test_a_shared_prefix_is_pulled_by_a_new_home() -> None:
    """A sub-agent's trunk lies on d0, where 5 s are queued: d1 fetches 900 tokens and computes 100."""
    view = cluster(engine("d0", queue_s=5.0), engine("d1"))
    answer = placed(Adaptive().place(a_round(history=HISTORY, slo_ttft_s=1.0), view))
    assert (answer.arm, answer.home, answer.source) == (Arm.MOVE, "d1", "d0")
    alone = placed(
        Adaptive().place(a_round(history=HISTORY, slo_ttft_s=1.0), cluster(engine("d0"), engine("d1")))
    )
    assert (alone.arm, alone.home) == (Arm.LOCAL, "d0")


def test_failed_engines_are_neither_used_nor_pulled_from() -> None:
    """The home failed this round: another takes it, and computes all of it."""
    view = cluster(engine("d0"), engine("d1"))
    round = a_round(home="d0", history=HISTORY, excluded=frozenset({"d0"}))
    answer = placed(Adaptive().place(round, view))
    assert (answer.arm, answer.home, answer.source) == (Arm.LOCAL, "d1", None)
    assert rejected(Adaptive().place(a_round(excluded=frozenset({"d0", "d1"})), view)).retry_after_s > 0


def test_engines_without_a_linker_only_prefill_for_themselves() -> None:
    """Nothing is pulled from or into them, however late the round will be."""
    view = cluster(engine("d0", queue_s=9.0, can_transfer=False), engine("d1"), engine("p0"))
    answer = placed(Adaptive().place(a_round(home="d0", history=HISTORY), view))
    assert (answer.arm, answer.home) == (Arm.LOCAL, "d0") and len(answer.considered) == 1


@pytest.mark.parametrize(
    "wrong", [{"spread": 0.0}, {"delay_weight": -1.0}, {"shortlist": 0}, {"stay": math.nan}]
)
def test_parameters_are_checked(wrong: dict[str, float]) -> None:
    """A value that means nothing is refused by its name."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdaptiveParameters(**wrong)  # type: ignore[arg-type]
