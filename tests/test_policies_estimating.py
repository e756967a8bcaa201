"""`ppd`, `mooncake`, `deflect` against tables worked by hand; the latency model is in policy_helpers.py."""

from __future__ import annotations

from typing import Any

import pytest

from antiphon.policies import arms
from antiphon.policies.base import Arm, Corrections, EngineView
from antiphon.policies.deflect import Deflect, DeflectParameters, itl_during
from antiphon.policies.mooncake import Mooncake, MooncakeParameters
from antiphon.policies.ppd import Ppd, PpdParameters, cell_of, score
from antiphon.policies.registry import make_policy
from tests.policy_helpers import SLOWER, a_round, cluster, engine, placed, rejected, terms

# ---------------------------------------------------------------- remote_pull from any holder


def test_remote_pull_from_another_holder_than_the_home() -> None:
    """L 1000, p0 has 100, p1 900, home 600: pull 800 from p1, prefill 100, and the home still lacks 400."""
    round_view = a_round(home="d0", history={"d0": 600, "p0": 100, "p1": 900})
    p0, p1, d0 = engine("p0"), engine("p1"), engine("d0")
    candidate = arms.remote_pull(round_view, p0, d0, p1)
    assert candidate.arm is Arm.REMOTE_PULL
    assert terms(candidate) == pytest.approx((0.0, 0.2, 0.13, 0.09))
    # the slower of the two that it joins: 0.1 + 0.08 s
    assert arms.remote_pull(round_view, p0, d0, engine("p1", latency=SLOWER)).pull_s == pytest.approx(0.18)
    # from whom holds no more than p1 there is nothing to fetch
    assert arms.remote_pull(round_view, p1, d0, p0).arm is Arm.REMOTE_RECOMPUTE


# ---------------------------------------------------------------- ppd

LATER: dict[str, Any] = {"home": "d0", "max_output_tokens": 100}


def fleet(count: int, rate: float, **home: Any) -> list[EngineView]:
    """`count` engines in each pool; the whole fleet gets `rate` rounds per second."""
    ids = [f"{pool}{number}" for pool in "dp" for number in range(count)]
    return [engine(i, arrivals_per_s=rate * (i == "p0"), **(home if i == "d0" else {})) for i in ids]


@pytest.mark.parametrize(
    ("held", "arm", "said"),
    [
        # 511 new tokens
        (489, Arm.LOCAL, "ppd: 511 new tokens < 512, local"),
        # 512, and the table: 1/s over one and one fills d0 to 0.868: S < 0
        (488, Arm.REMOTE_RECOMPUTE, "ppd: S = "),
    ],
)
def test_ppd_bypasses_the_table_for_short_increments(held: int, arm: Arm, said: str) -> None:
    """Under 512 new tokens a later round is local; from 512 on the table decides."""
    answer = placed(Ppd().place(a_round(history={"d0": held}, **LATER), cluster(*fleet(1, 1.0))))
    assert answer.arm is arm
    assert answer.reason.startswith(said)


def test_ppd_sends_the_first_turn_away() -> None:
    """No home yet, or none that lives: remote, however short, to the least predicted TTFT."""
    view = cluster(engine("d0"), engine("p0", queue_s=0.2), engine("p1"))
    answer = placed(Ppd().place(a_round(prompt_tokens=100), view))
    assert (answer.arm, answer.prefill_engine) == (Arm.REMOTE_RECOMPUTE, "p1")
    assert answer.reason == "ppd: turn 1, remote"
    assert placed(Ppd().place(a_round(home="gone", history={"d0": 900}), view)).prefill_engine == "p1"
    assert placed(Ppd().place(a_round(), cluster(engine("d0")))).arm is Arm.LOCAL


@pytest.mark.parametrize(
    ("count", "rate", "ttft", "tpot_loss", "arm"),
    [
        # context large = 2048, input short = 768, output short = 64, 0.5 rounds/s over one and one:
        # PD: 832 new tokens, 0.932 s, busy 0.466, wait 0.466 x 0.932 / 1.068 = 0.4067, transfer 0.1268:
        # 1.4655 s. PPD: 0.868 s, busy 0.434, wait 0.3328: 1.2008 s, gain 0.1806.
        # A batch of 1: 0.011 s, and 0.011 / (1 - 0.434): 76.7 % more
        (1, 0.5, 0.1806, 0.7668, Arm.REMOTE_RECOMPUTE),
        # over four and four: busy 0.1165 and 0.1085: 1.1202 and 0.9208 s; 1 / 0.8915 = 12.2 % more: S = 0.056
        (4, 0.5, 0.1780, 0.1217, Arm.LOCAL),
        # 0.4 and 0.7 are nearest to 0.5
        (4, 0.4, 0.1780, 0.1217, Arm.LOCAL),
        (4, 0.7, 0.1780, 0.1217, Arm.LOCAL),
    ],
)  # fmt: skip
def test_ppd_table(count: int, rate: float, ttft: float, tpot_loss: float, arm: Arm) -> None:
    """S = relative gain in TTFT less relative loss in TPOT, local if positive."""
    view = cluster(*fleet(count, rate))
    round_view = a_round(prompt_tokens=2000, history={"d0": 1000}, **LATER)
    gain = score(cell_of(round_view, view.engines["d0"], view.engines["p0"], view))
    assert gain == pytest.approx((ttft, tpot_loss, ""), abs=1e-4)
    assert placed(Ppd().place(round_view, view)).arm is arm
    # the weights: TTFT alone says local, TPOT alone remote
    assert placed(Ppd(PpdParameters(w_tpot=0.0)).place(round_view, view)).arm is Arm.LOCAL
    assert placed(Ppd(PpdParameters(w_ttft=0.0)).place(round_view, view)).arm is Arm.REMOTE_RECOMPUTE


def test_ppd_counts_the_steps_between_chunks() -> None:
    """C 256, K 4: 767 // 256 x 4 = 8 steps of 0.011 s, PPD 1.0088 s: gain (1.1202 - 1.0088) / 1.1202."""
    view = cluster(*fleet(4, 0.5, chunk_tokens=256, decode_interval=4))
    round_view = a_round(prompt_tokens=2000, history={"d0": 1000}, **LATER)
    gain = score(cell_of(round_view, view.engines["d0"], view.engines["p0"], view))
    assert gain == pytest.approx((0.0995, 0.1217, ""), abs=1e-4)
    assert placed(Ppd().place(round_view, view)).reason == (
        "ppd: S = -0.022 at large context, short input, short output, 0.5/s, remote"
    )


def test_ppd_where_a_run_cannot_keep_up() -> None:
    """2/s x 0.932 s fill one prefill engine: local, as theirs. Two keep up and one home does not: remote."""
    round_view = a_round(prompt_tokens=2000, history={"d0": 1000}, **LATER)
    answer = placed(Ppd().place(round_view, cluster(*fleet(1, 2.0))))
    assert answer.arm is Arm.LOCAL
    assert answer.reason.startswith("ppd: PD cannot keep up at large context")
    view = cluster(*fleet(1, 2.0), engine("p1"))
    answer = placed(Ppd().place(round_view, view))
    assert answer.arm is Arm.REMOTE_RECOMPUTE
    assert answer.reason.startswith("ppd: PPD cannot keep up at large context")


def test_ppd_table_is_static() -> None:
    """No queue, batch, window or correction moves it; the output class is of what the core expects."""
    round_view = a_round(prompt_tokens=2000, history={"d0": 1000}, **LATER)
    loaded = {"queue_s": 9.0, "batch": 99, "window_ttft_s": 9.0, "corrections": Corrections(2.0, 2.0, 2.0)}
    view = cluster(*fleet(4, 0.5, **loaded))
    assert placed(Ppd().place(round_view, view)).reason.startswith("ppd: S = 0.056 at large context")
    longer = a_round(prompt_tokens=2000, history={"d0": 1000}, expected_output_tokens=600, **LATER)
    assert cell_of(longer, view.engines["d0"], view.engines["p0"], view).output.name == "long"


# ---------------------------------------------------------------- mooncake


@pytest.mark.parametrize(
    ("queues", "held", "arm", "prefill_engine", "ttft_s"),
    [
        # L 1000, home d0 has 600. p0 has none: pulls 600, 0.11 + 0.5 + 0.09 = 0.7. p1 has 450 and
        # 600 / 450 < 1.5: computes 550, 0.65 + 0.09 = 0.74; the home 0.3 + 0.5 = 0.8
        ({"d0": 0.3, "p0": 0.0, "p1": 0.0}, 450, Arm.REMOTE_PULL, "p0", 0.7),
        ({"d0": 0.3, "p0": 0.05, "p1": 0.0}, 450, Arm.REMOTE_RECOMPUTE, "p1", 0.74),
        # the home has nothing to move: 0.1 + 0.5
        ({"d0": 0.1, "p0": 0.0, "p1": 0.0}, 450, Arm.LOCAL, "d0", 0.6),
        # 600 / 400 is not above 1.5: computes 600, 0.7 + 0.09
        ({"d0": 9.0, "p0": 9.0, "p1": 0.0}, 400, Arm.REMOTE_RECOMPUTE, "p1", 0.79),
        # 600 / 399 is: pulls 201, 0.0701 + 0.5 + 0.09
        ({"d0": 9.0, "p0": 9.0, "p1": 0.0}, 399, Arm.REMOTE_PULL, "p1", 0.6601),
    ],
)  # fmt: skip
def test_mooncake(queues: dict[str, float], held: int, arm: Arm, prefill_engine: str, ttft_s: float) -> None:
    """Least queue + pull + prefill + push; pulled only where the best prefix is over 1.5 times the own."""
    view = cluster(*(engine(name, queue_s=queue_s) for name, queue_s in queues.items()))
    at_1_5 = Mooncake(MooncakeParameters(balancing_threshold=1.5))
    answer = placed(at_1_5.place(a_round(home="d0", history={"d0": 600, "p1": held}), view))
    assert (answer.arm, answer.prefill_engine, answer.home) == (arm, prefill_engine, "d0")
    assert answer.predicted.ttft_s == pytest.approx(ttft_s)
    assert answer.source is None  # the home is the best holder
    assert [c.prefill_engine for c in answer.considered] == ["d0", "p0", "p1"]


def test_mooncake_pulls_from_the_best_holder() -> None:
    """p1 is busy and has 900: p0 pulls them from it, 0.14 + 0.2 + 0.09 = 0.43 s; so does a first round."""
    view = cluster(engine("d0"), engine("p0"), engine("p1", queue_s=1.0))
    answer = placed(Mooncake().place(a_round(home="d0", history={"d0": 600, "p1": 900}), view))
    assert (answer.arm, answer.prefill_engine, answer.source) == (Arm.REMOTE_PULL, "p0", "p1")
    assert answer.predicted.ttft_s == pytest.approx(0.43)
    assert answer.reason == (
        "mooncake: least predicted TTFT of 3 considered is 0.430 s, remote_pull on p0 from p1,"
        " which holds 900 tokens"
    )
    # a shared prefix: the new home holds nothing, so all is pushed: 0.14 + 0.2 + 0.15
    first = placed(Mooncake().place(a_round(history={"p1": 900}), view))
    assert (first.arm, first.prefill_engine, first.source) == (Arm.REMOTE_PULL, "p0", "p1")
    assert first.predicted.ttft_s == pytest.approx(0.49)
    assert [c.arm for c in first.considered] == [Arm.REMOTE_PULL, Arm.REMOTE_RECOMPUTE]


@pytest.mark.parametrize(
    "holder", [engine("p1", can_transfer=False), engine("p1", pool_tokens=500), None], ids=repr
)
def test_mooncake_pulls_only_from_who_can_give(holder: EngineView | None) -> None:
    """Not from an engine without linker, that is gone, or that failed this round; a small one can give."""
    rest = [] if holder is None else [holder]
    view = cluster(engine("d0"), engine("p0"), *rest)
    answer = placed(Mooncake(MooncakeParameters(home_prefills=False)).place(
        a_round(home="d0", history={"d0": 600, "p1": 900}), view)
    )  # fmt: skip
    small = holder is not None and holder.can_transfer
    assert answer.source == ("p1" if small else None)
    assert answer.predicted.ttft_s == pytest.approx(0.43 if small else 0.7)
    failed = a_round(home="d0", history={"d0": 600, "p1": 900}, excluded=frozenset({"p1"}))
    assert placed(Mooncake().place(failed, view)).source is None


def test_mooncake_without_the_home_as_candidate() -> None:
    """home_prefills off: prefill engines only, though local would take 0.5 s; none usable: local."""
    theirs = Mooncake(MooncakeParameters(home_prefills=False))
    round_view = a_round(home="d0", history={"d0": 600})
    assert placed(theirs.place(round_view, cluster(engine("d0"), engine("p0")))).arm is Arm.REMOTE_PULL
    alone = placed(theirs.place(round_view, cluster(engine("d0"))))
    assert alone.arm is Arm.LOCAL
    assert alone.reason == "no prefill engine is usable for d0: prefilled there"


def test_mooncake_early_rejection() -> None:
    """On, a predicted miss is refused, of TTFT with what it waited, or of ITL; off, it is placed."""
    strict, view = Mooncake(MooncakeParameters(early_rejection=True)), cluster(engine("d0"), engine("p0"))
    assert rejected(strict.place(a_round(), view)).reason == "predicted TTFT 1.250 s is over 0.500 s"
    placed(strict.place(a_round(slo_ttft_s=1.3), view))
    waited = a_round(slo_ttft_s=1.3, waited_s=0.1)
    assert rejected(strict.place(waited, view)).reason == "predicted TTFT 1.350 s is over 1.300 s"
    busy = cluster(engine("d0", batch=100), engine("p0"))
    late = rejected(strict.place(a_round(slo_ttft_s=2.0), busy))
    assert late.reason == "predicted ITL 0.1110 s is over 0.1000 s"
    placed(Mooncake().place(a_round(), busy))


# ---------------------------------------------------------------- deflect


@pytest.mark.parametrize(
    ("changes", "itl_s"),
    [
        # 400 new tokens in 4 chunks of 100, 4 steps after each: 0.5 s / 16 + a step of 10 rounds, 0.02 s
        ({}, 0.05125),
        # the last chunk counts in full: 5 chunks of 90
        ({"chunk_tokens": 90}, 0.045),
        # K 0, stock SGLang: all of it between two tokens
        ({"decode_interval": 0}, 0.52),
        # C unknown: one chunk, 4 steps
        ({"chunk_tokens": 0}, 0.145),
        # nobody decodes there
        ({"batch": 0}, 0.0),
        # corrections: 0.5 x 2 / 16 + 0.02 x 1.5
        ({"corrections": Corrections(prefill=2.0, decode=1.5)}, 0.0925),
    ],
)
def test_itl_during_a_local_prefill(changes: dict[str, Any], itl_s: float) -> None:
    """Mean gap of the others: the prefill shared out over the steps that its chunks leave room for."""
    values: dict[str, Any] = {"batch": 10, "chunk_tokens": 100, "decode_interval": 4}
    assert itl_during(engine("d0", **(values | changes)), 1000, 600) == pytest.approx(itl_s)


HOME: dict[str, Any] = {"batch": 10, "chunk_tokens": 100, "decode_interval": 4}


@pytest.mark.parametrize(
    ("home", "queue_s", "alpha", "arm", "said"),
    [
        # local 0.5 + 3 x 4 x 0.02 = 0.74 s; remote 0.11 + 0.5 + 0.09 = 0.7 s
        ({}, 0.0, 1.0, Arm.REMOTE_PULL,
         "not deflected, d0: local TTFT 0.740 s > 1 x 0.700 s remote on p0"),
        ({}, 0.1, 1.0, Arm.LOCAL,
         "deflected to d0: ITL 0.0513 s <= 0.1000 s; local TTFT 0.740 s <= 1 x 0.800 s remote on p0"),
        ({}, 0.0, 1.1, Arm.LOCAL,
         "deflected to d0: ITL 0.0513 s <= 0.1000 s; local TTFT 0.740 s <= 1.1 x 0.700 s remote on p0"),
        # a round there with a tighter target: not, however long the queue
        ({"tightest_itl_slo_s": 0.05}, 9.0, 1.0, Arm.REMOTE_PULL,
         "not deflected, safe on no decode engine, d0: ITL 0.0513 s > 0.0500 s"),
        # one with a looser target: this round's own 0.1 s counts; a batch of 90 has steps of 0.1 s
        ({"tightest_itl_slo_s": 9.0, "batch": 90}, 9.0, 1.0, Arm.REMOTE_PULL,
         "not deflected, safe on no decode engine, d0: ITL 0.1312 s > 0.1000 s"),
        # prefill-first: one stall of 0.5 s
        ({"decode_interval": 0}, 9.0, 1.0, Arm.REMOTE_PULL,
         "not deflected, safe on no decode engine, d0: ITL 0.5200 s > 0.1000 s"),
    ],
)  # fmt: skip
def test_deflect(home: dict[str, Any], queue_s: float, alpha: float, arm: Arm, said: str) -> None:
    """Local iff its chunks keep the ITL targets there and its TTFT is at most alpha times remote's."""
    view = cluster(engine("d0", **(HOME | home)), engine("p0", queue_s=queue_s))
    policy = Deflect(DeflectParameters(alpha=alpha))
    answer = placed(policy.place(a_round(home="d0", history={"d0": 600}), view))
    assert (answer.arm, answer.home) == (arm, "d0")
    assert answer.reason == said
    assert [(c.arm, c.prefill_engine) for c in answer.considered] == [
        (Arm.LOCAL, "d0"),
        (Arm.REMOTE_PULL, "p0"),
    ]


def test_deflect_counts_the_round_that_joins() -> None:
    """On an idle engine nobody is stalled, but its own step of 0.011 s must be within its target."""
    view = cluster(engine("d0"), engine("p0"))
    known = {"home": "d0", "history": {"d0": 600}}
    assert placed(Deflect().place(a_round(slo_itl_s=0.0111, **known), view)).arm is Arm.LOCAL
    assert placed(Deflect().place(a_round(slo_itl_s=0.0109, **known), view)).arm is Arm.REMOTE_PULL


def test_deflect_takes_a_new_session_where_it_is_safe() -> None:
    """d0 has the least KV in use but stalls; d1 is safe, 1.1 s <= 1.25 s, so it becomes the home."""
    d0 = engine("d0", batch=10)  # K 0: 1.1 + 0.02 s
    d1 = engine("d1", used_tokens=50_000)
    answer = placed(Deflect().place(a_round(), cluster(d0, d1, engine("p0"))))
    assert (answer.arm, answer.home, answer.prefill_engine) == (Arm.LOCAL, "d1", "d1")
    assert [c.home for c in answer.considered] == ["d0", "d1", ""]
    # safe on none: the default home, prefilled remotely
    full = placed(Deflect().place(a_round(slo_itl_s=0.001), cluster(d0, d1, engine("p0"))))
    assert (full.arm, full.home, full.prefill_engine) == (Arm.REMOTE_RECOMPUTE, "d0", "p0")
    # as fast on two: the one with less KV in use
    idle = cluster(engine("d0", used_tokens=9), engine("d1"), engine("p0"))
    assert placed(Deflect().place(a_round(), idle)).home == "d1"
    # a session stays with its home, even where another would be safe
    kept = placed(Deflect().place(a_round(home="d0", history={"d0": 600}), cluster(d0, d1, engine("p0"))))
    assert (kept.arm, kept.home) == (Arm.REMOTE_PULL, "d0")


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("ppd", {"bypass_tokens": -1}, "bypass_tokens must be at least 0, got -1"),
        ("ppd", {"w_tpot": -1.0}, "w_tpot must be a number of at least 0, got -1.0"),
        ("ppd", {"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ("mooncake", {"balancing_threshold": 0.9}, "balancing_threshold must be at least 1, got 0.9"),
        ("mooncake", {"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ("deflect", {"alpha": 0.9}, "alpha must be a number of at least 1, got 0.9"),
        ("deflect", {"shortlist": 0}, "shortlist must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters: dict[str, float], said: str) -> None:
    """The error names the parameter and the value."""
    with pytest.raises(ValueError, match=said):
        make_policy(name, parameters)
