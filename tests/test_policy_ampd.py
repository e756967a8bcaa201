"""AMPD's three tiers against tables worked by hand (latency model: policy_helpers.py)."""

from __future__ import annotations

from hashlib import sha256

import pytest

from antiphon.policies.ampd import Ampd, AmpdParameters
from antiphon.policies.base import Arm, EngineView
from tests.policy_helpers import SLOWER, a_round, cluster, engine, placed

AMPD = Ampd(AmpdParameters(alpha=0.8, beta=0.8))


def test_ampd_first_tier() -> None:
    """A prefill engine with a windowed TTFT under 0.8 x 0.5 = 0.4 s takes the round; 0.4 does not."""
    view = cluster(engine("d0"), engine("p0", window_ttft_s=0.4), engine("p1", window_ttft_s=0.399))
    answer = placed(AMPD.place(a_round(home="d0", history={"d0": 600}), view))
    assert (answer.arm, answer.home, answer.prefill_engine) == (Arm.REMOTE_PULL, "d0", "p1")
    assert answer.reason == "tier 1: p1 windowed TTFT 0.399 s < 0.8 x 0.500 s"
    # considered: p1 0 + 0.5 + 0.11 + 0.09 = 0.7 s; local 0.5 s. Tier 1 takes p1 all the same
    assert [(c.arm, c.prefill_engine) for c in answer.considered] == [
        (Arm.REMOTE_PULL, "p1"),
        (Arm.LOCAL, "d0"),
    ]
    assert [c.ttft_s for c in answer.considered] == pytest.approx([0.7, 0.5])


def test_a_first_round_prefilled_elsewhere_is_a_recompute() -> None:
    """No history anywhere: nothing to pull, so the arm is remote_recompute."""
    answer = placed(AMPD.place(a_round(), cluster(engine("d0"), engine("p0"))))
    assert (answer.arm, answer.predicted.pull_s) == (Arm.REMOTE_RECOMPUTE, 0.0)


@pytest.mark.parametrize(("queue_s", "tier"), [(0.0, "tier 1"), (0.399, "tier 1"), (0.4, "tier 2")])
def test_an_empty_ttft_window_is_read_from_the_queue(queue_s: float, tier: str) -> None:
    """No round ended in the window: the engine's queue is compared, so an idle engine has slack."""
    answer = placed(AMPD.place(a_round(), cluster(engine("d0"), engine("p0", queue_s=queue_s))))
    assert answer.reason.startswith(tier)


@pytest.mark.parametrize(
    ("home", "tier"),
    [
        (engine("d0", window_itl_s=0.0799), "tier 2"),
        (engine("d0", window_itl_s=0.0801), "tier 3"),
        # no ITL in the window: a batch of 69 has steps of 0.010 + 0.069 = 0.079 s < 0.8 x 0.1 s
        (engine("d0", batch=69), "tier 2"),
        # and one of 71 of 0.081 s
        (engine("d0", batch=71), "tier 3"),
    ],
)
def test_ampd_second_tier(home: EngineView, tier: str) -> None:
    """No slack in the prefill pool: local if the home's ITL is under 0.8 x 0.1 = 0.08 s."""
    answer = placed(AMPD.place(a_round(), cluster(home, engine("p0", window_ttft_s=9.0))))
    assert answer.reason.startswith(tier)
    if tier == "tier 2":
        assert (answer.arm, answer.prefill_engine) == (Arm.LOCAL, "d0")
        assert "no prefill engine under 0.8 x 0.500 s (best: p0 " in answer.reason


def test_the_second_tier_predicts_by_the_homes_own_model() -> None:
    """An empty window on a home of another kind: its own step counts, 0.020 s and not 0.081 s."""
    home = engine("d0", batch=71, latency=SLOWER)
    answer = placed(AMPD.place(a_round(), cluster(home, engine("p0", window_ttft_s=9.0))))
    assert answer.reason.startswith("tier 2") and "predicted step 0.0200 s" in answer.reason


@pytest.mark.parametrize(
    ("queues", "expected", "ttft_s"),
    [
        # history 600 on d0. local 0.3 + 0.5 = 0.8 s; p0 0.05 + 0.5 + 0.11 + 0.09 = 0.75 s; p1 0.06 more
        ({"d0": 0.3, "p0": 0.05, "p1": 0.06}, (Arm.REMOTE_PULL, "p0"), 0.75),
        # local 0.1 + 0.5 = 0.6 s < 0.7 s
        ({"d0": 0.1, "p0": 0.0, "p1": 0.0}, (Arm.LOCAL, "d0"), 0.6),
        # p0 and p1 equal at 0.7 s, local 0.75 s: the smaller id
        ({"d0": 0.25, "p0": 0.0, "p1": 0.0}, (Arm.REMOTE_PULL, "p0"), 0.7),
    ],
)  # fmt: skip
def test_ampd_third_tier(queues: dict[str, float], expected: tuple[Arm, str], ttft_s: float) -> None:
    """No slack anywhere: the least estimate of Eq. 2."""
    busy = [engine(e, queue_s=q, window_ttft_s=9.0, window_itl_s=9.0) for e, q in queues.items()]
    answer = placed(AMPD.place(a_round(home="d0", history={"d0": 600}), cluster(*busy)))
    assert (answer.arm, answer.prefill_engine) == expected
    assert answer.predicted.ttft_s == pytest.approx(ttft_s)
    assert answer.reason.startswith(f"tier 3: least predicted TTFT of 3 considered is {ttft_s:.3f} s")
    assert [c.prefill_engine for c in answer.considered] == ["d0", "p0", "p1"]


def test_a_tie_in_the_third_tier_moves_nothing() -> None:
    """Local and remote predicted equal (exact in binary): local."""
    # whole history on both: local 0.25 + prefill(1), remote prefill(1) with queue 0.25, no transfers
    busy = {"queue_s": 0.25, "window_ttft_s": 9.0, "window_itl_s": 9.0}
    view = cluster(engine("d0", **busy), engine("p0", **busy))
    answer = placed(AMPD.place(a_round(home="d0", history={"d0": 1000, "p0": 1000}), view))
    assert answer.considered[0].ttft_s == answer.considered[1].ttft_s
    assert answer.arm is Arm.LOCAL


def test_ampd_draws_by_the_seed() -> None:
    """Equal engines share rounds evenly by chance, and the same round always draws the same one."""
    view = cluster(engine("d0"), *(engine(f"p{i}") for i in range(4)))
    seeds = [int.from_bytes(sha256(str(number).encode()).digest()[:8], "little") for number in range(400)]
    first = [placed(AMPD.place(a_round(seed=seed), view)).prefill_engine for seed in seeds]
    again = [placed(AMPD.place(a_round(seed=seed), view)).prefill_engine for seed in seeds]
    assert first == again
    counts = {name: first.count(name) for name in ("p0", "p1", "p2", "p3")}
    # 400 draws over 4: mean 100, standard deviation 8.7; 5 of them either way
    assert all(56 < count < 144 for count in counts.values()), counts


def test_only_engines_with_slack_are_drawn() -> None:
    """Of four engines two have slack: each of them is drawn, the others never."""
    windows = {"p0": 9.0, "p1": 0.1, "p2": 0.4, "p3": 0.399}
    view = cluster(engine("d0"), *(engine(p, window_ttft_s=ttft) for p, ttft in windows.items()))
    drawn = {placed(AMPD.place(a_round(seed=seed), view)).prefill_engine for seed in range(50)}
    assert drawn == {"p1", "p3"}


def test_alpha_and_beta_move_the_thresholds() -> None:
    """alpha 0 closes tier 1, beta 0 closes tier 2."""
    view = cluster(engine("d0"), engine("p0"))
    assert placed(Ampd(AmpdParameters(alpha=0.0)).place(a_round(), view)).reason.startswith("tier 2")
    closed = Ampd(AmpdParameters(alpha=0.0, beta=0.0))
    assert placed(closed.place(a_round(), view)).reason.startswith("tier 3")
