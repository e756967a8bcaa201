"""Policies that follow a fixed rule, against tables worked by hand (latency model: policy_helpers.py).

`remote_pull_always`, `first_remote`, `threshold`, `threshold_queue`, `isl_bounding`. Unless a case says
otherwise the round has L = 1000 tokens: a prefill of n takes 0.1 + 0.001 n s, a transfer 0.05 + 0.0001 n s.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from antiphon.policies.base import Arm, EngineView, Placement, Policy
from antiphon.policies.first_remote import FirstRemote
from antiphon.policies.isl_bounding import IslBounding, IslBoundingParameters
from antiphon.policies.latency import TransferCost
from antiphon.policies.registry import make_policy
from antiphon.policies.remote_pull_always import RemotePullAlways, RemotePullAlwaysParameters
from antiphon.policies.threshold import Threshold, ThresholdParameters, points
from antiphon.policies.threshold_queue import ThresholdQueue, ThresholdQueueParameters
from tests.policy_helpers import LATENCY, a_round, cluster, engine, placed, terms

NEVER_LOCAL = [
    RemotePullAlways(),
    FirstRemote(),
    Threshold(ThresholdParameters(prompt_tokens=0)),
    ThresholdQueue(ThresholdQueueParameters(max_local_prefill_length=0)),
    IslBounding(IslBoundingParameters(eff_isl_threshold=0)),
]
"""Each so that a new session goes remote whenever a prefill engine is usable."""


def ids(policy: Policy) -> str:
    return type(policy).__name__


def decide(policy: Policy, *engines: EngineView, **changes: Any) -> Placement:
    return placed(policy.place(a_round(**changes), cluster(*engines)))


def summary(answer: Placement) -> tuple[Arm, str, str]:
    return answer.arm, answer.home, answer.prefill_engine


# ---------------------------------------------------------------- what all of them share


@pytest.mark.parametrize("policy", NEVER_LOCAL, ids=ids)
@pytest.mark.parametrize(
    ("engines", "home"),
    [
        ([engine("d0"), engine("d1")], "d0"),
        # only prefill engines: one is the home, and prefills itself
        ([engine("p0"), engine("p1")], "p0"),
        # the home has no linker: nothing can be moved into it
        ([engine("d0", can_transfer=False), engine("p0")], "d0"),
        # the only prefill engine has no linker, or cannot hold the prompt
        ([engine("d0"), engine("p0", can_transfer=False)], "d0"),
        ([engine("d0"), engine("p0", pool_tokens=999)], "d0"),
    ],
)  # fmt: skip
def test_without_a_usable_prefill_engine_the_home_prefills(
    policy: Policy, engines: list[EngineView], home: str
) -> None:
    """The way out is local on the home, and the reason says so."""
    answer = decide(policy, *engines)
    assert summary(answer) == (Arm.LOCAL, home, home)
    assert answer.reason == f"no prefill engine is usable for {home}: prefilled there"


@pytest.mark.parametrize("policy", NEVER_LOCAL, ids=ids)
def test_a_failed_prefill_engine_is_not_asked_again(policy: Policy) -> None:
    """With p0 excluded p1 is taken, however long its queue; with both excluded the home."""
    view = engine("d0"), engine("p0"), engine("p1", queue_s=5.0)
    assert summary(decide(policy, *view)) == (Arm.REMOTE_RECOMPUTE, "d0", "p0")
    one = decide(policy, *view, excluded=frozenset({"p0"}))
    assert summary(one) == (Arm.REMOTE_RECOMPUTE, "d0", "p1")
    both = decide(policy, *view, excluded=frozenset({"p0", "p1"}))
    assert summary(both) == (Arm.LOCAL, "d0", "d0")


@pytest.mark.parametrize("policy", NEVER_LOCAL, ids=ids)
def test_a_lost_home_is_chosen_anew(policy: Policy) -> None:
    """A home that is gone, failed the round or cannot hold it: the session starts at another one."""
    for changes in ({"home": "gone"}, {"home": "d0", "excluded": frozenset({"d0"})}):
        answer = decide(policy, engine("d0"), engine("d1"), engine("p0"), history={"p0": 1000}, **changes)
        assert (answer.home, answer.arm) == (
            "d0" if changes["home"] == "gone" else "d1",
            Arm.REMOTE_RECOMPUTE,
        )
    small = decide(policy, engine("d0", pool_tokens=1099), engine("d1"), engine("p0"), home="d0")
    assert (small.home, small.arm) == ("d1", Arm.REMOTE_RECOMPUTE)


@pytest.mark.parametrize("policy", NEVER_LOCAL, ids=ids)
def test_a_usable_home_is_kept(policy: Policy) -> None:
    """The session stays on a full, busy home that holds nothing, beside an empty engine that holds all."""
    home = engine("d0", used_tokens=99_000, sessions=9, batch=9, context_tokens=90_000, queued_rounds=9)
    answer = decide(policy, home, engine("d1"), engine("p0"), home="d0", history={"d1": 1000})
    assert answer.home == "d0"


# ---------------------------------------------------------------- remote_pull_always


@pytest.mark.parametrize(
    ("history", "arm", "p", "expected"),
    [
        # a first round: nothing to pull. p0 queues 0.2 s, p1 is idle: 1.1 + 0.15 = 1.25 s
        ({}, Arm.REMOTE_RECOMPUTE, "p1", (0.0, 1.1, 0.0, 0.15)),
        # d0 holds 600. p1: prefill 400 = 0.5, pull 600 = 0.11, push 400 = 0.09: 0.7 s; p0 0.9 s
        ({"d0": 600}, Arm.REMOTE_PULL, "p1", (0.0, 0.5, 0.11, 0.09)),
        # p0 holds 600 as well: 0.2 + 0.5 + 0.09 = 0.79 s, still more than 0.7 s
        ({"d0": 600, "p0": 600}, Arm.REMOTE_PULL, "p1", (0.0, 0.5, 0.11, 0.09)),
        # p0 holds 800: 0.2 + prefill 200 = 0.3 + push 400 = 0.09: 0.59 s
        ({"d0": 600, "p0": 800}, Arm.REMOTE_RECOMPUTE, "p0", (0.2, 0.3, 0.0, 0.09)),
    ],
)  # fmt: skip
def test_remote_pull_always_takes_the_least_estimate(
    history: dict[str, int], arm: Arm, p: str, expected: tuple[float, ...]
) -> None:
    """Always remote; what the home holds beyond p is pulled, not computed."""
    view = engine("d0"), engine("p0", queue_s=0.2), engine("p1")
    answer = decide(RemotePullAlways(), *view, home="d0", history=history)
    assert summary(answer) == (arm, "d0", p)
    assert terms(answer.predicted) == pytest.approx(expected)
    assert f"remote: {p} has the least predicted TTFT, {sum(expected):.3f} s with" in answer.reason
    assert len(answer.considered) == 2


def test_remote_pull_always_stays_remote_where_local_is_faster() -> None:
    """All 1000 held by an idle home: local 0.101 s, remote 0.15 more; remote all the same, ties by id."""
    answer = decide(
        RemotePullAlways(), engine("d0"), engine("p1"), engine("p0"), home="d0", history={"d0": 1000}
    )
    assert summary(answer) == (Arm.REMOTE_PULL, "d0", "p0")
    assert answer.predicted.ttft_s == pytest.approx(0.251)


def test_remote_pull_always_looks_at_its_shortlist() -> None:
    """With a shortlist of 1: the shortest queue (p0) and the most history (p2), not p1."""
    view = engine("d0"), engine("p0"), engine("p1", queue_s=0.1), engine("p2", queue_s=9.0)
    policy = RemotePullAlways(RemotePullAlwaysParameters(shortlist=1))
    answer = decide(policy, *view, home="d0", history={"p2": 500})
    assert [c.prefill_engine for c in answer.considered] == ["p0", "p2"]


# ---------------------------------------------------------------- first_remote


def test_first_remote_sends_the_first_round_to_the_prefill_pool() -> None:
    """No home yet: the decode engine with least KV in use, and the prefill engine with least TTFT."""
    view = engine("d0", used_tokens=10), engine("d1"), engine("p0", queue_s=0.3), engine("p1")
    answer = decide(FirstRemote(), *view)
    # p1 1.1 + 0.15 = 1.25 s; p0 1.55 s
    assert summary(answer) == (Arm.REMOTE_RECOMPUTE, "d1", "p1")
    assert answer.reason == (
        "first round: p1 has the least predicted TTFT, 1.250 s, of 2 considered of 2 prefill engines"
    )
    # p0 holds a shared prefix of 400: 0.3 + 0.7 + 0.15 = 1.15 s
    shared = decide(FirstRemote(), *view, history={"p0": 400})
    assert shared.prefill_engine == "p0"
    assert shared.predicted.ttft_s == pytest.approx(1.15)
    # one of 400 on the new home is not pulled: 1.1 + push 600 = 0.11 s
    at_home = decide(FirstRemote(), *view, history={"d1": 400})
    assert summary(at_home) == (Arm.REMOTE_RECOMPUTE, "d1", "p1")
    assert at_home.predicted.ttft_s == pytest.approx(1.21)


@pytest.mark.parametrize("history", [{}, {"d0": 600}, {"d0": 600, "p0": 1000}])
def test_first_remote_keeps_every_later_round_on_the_home(history: dict[str, int]) -> None:
    """With a home it is local for ever: 3 s of queue and nothing left of the history change nothing."""
    answer = decide(FirstRemote(), engine("d0", queue_s=3.0), engine("p0"), home="d0", history=history)
    assert summary(answer) == (Arm.LOCAL, "d0", "d0")
    assert answer.reason == "later round: local on the session's home d0"
    # 3.0 + 0.1 + 0.001 * (1000 - H(d0))
    assert answer.predicted.ttft_s == pytest.approx(4.1 - 0.001 * history.get("d0", 0))


# ---------------------------------------------------------------- threshold


@pytest.mark.parametrize(
    ("prompt", "held", "arm"),
    [
        # the home lacks 512: at least 512; 511: fewer
        (2000, 1488, Arm.REMOTE_RECOMPUTE),
        (2000, 1489, Arm.LOCAL),
        # a prompt of 1024 may go remote, one of 1023 not
        (1024, 0, Arm.REMOTE_RECOMPUTE),
        (1023, 0, Arm.LOCAL),
    ],
)  # fmt: skip
def test_threshold_counts_what_the_home_lacks(prompt: int, held: int, arm: Arm) -> None:
    """Remote iff L >= 1024 and L - H(home) >= 512."""
    history = {"d0": held, "p0": 0}
    answer = decide(Threshold(), engine("d0"), engine("p0"), home="d0", prompt_tokens=prompt, history=history)
    assert (answer.arm, answer.home) == (arm, "d0")


@pytest.mark.parametrize(
    ("parameters", "prompt", "reason"),
    [
        (ThresholdParameters(0, 1024), 5000, "local: non_cached_tokens is 0, which turns remote prefill off"),
        (ThresholdParameters(512, 0), 511, "local: d0 lacks 511 tokens, fewer than 512"),
        (ThresholdParameters(512, 0), 512, "remote: d0 lacks 512 tokens, at least 512; p0 has most points,"),
        (ThresholdParameters(512, 1024), 600, "local: a prompt of 600 tokens, fewer than 1024"),
    ],
)  # fmt: skip
def test_threshold_parameters(parameters: ThresholdParameters, prompt: int, reason: str) -> None:
    """non_cached_tokens 0 turns it off, prompt_tokens 0 is no bound; the reason has the numbers."""
    answer = decide(Threshold(parameters), engine("d0"), engine("p0"), home="d0", prompt_tokens=prompt)
    assert answer.reason.startswith(reason)
    assert (answer.arm is Arm.LOCAL) == reason.startswith("local")


@pytest.mark.parametrize(
    ("queues", "history", "expected", "p"),
    [
        # equal queues: 1 point each; H = 500 of 2000 gives 2 * 0.25 more
        ({"p0": 3, "p1": 3}, {"p1": 500}, [1.0, 1.5], "p1"),
        # queues 0, 1, 4: 1, 0.75, 0; p1's 500 tokens make it 1.25, p2's 1000 tokens 1.0
        ({"p0": 0, "p1": 1, "p2": 4}, {"p1": 500, "p2": 1000}, [1.0, 1.25, 1.0], "p1"),
        # a whole prompt is worth more than the whole span of queues
        ({"p0": 0, "p1": 9}, {"p1": 1001}, [1.0, 1.001], "p1"),
        ({"p0": 0, "p1": 9}, {"p1": 999}, [1.0, 0.999], "p0"),
    ],
)  # fmt: skip
def test_threshold_scores_the_prefill_engines(
    queues: dict[str, int], history: dict[str, int], expected: list[float], p: str
) -> None:
    """2 points for the share of the prompt held, 1 for the shortest queue; nothing is pulled."""
    engines = [engine(name, queued_rounds=count) for name, count in queues.items()]
    round_view = a_round(prompt_tokens=2000, history=history)
    assert points(round_view, engines) == pytest.approx(expected)
    answer = decide(
        Threshold(), engine("d0"), *engines, home="d0", prompt_tokens=2000, history=history | {"d0": 1000}
    )
    assert summary(answer) == (Arm.REMOTE_RECOMPUTE, "d0", p)
    # prefill 0.1 + 0.001 * (2000 - H(p)), nothing pulled; the home fetches 1000 = 0.15 s
    assert terms(answer.predicted)[1:] == pytest.approx((2.1 - 0.001 * history.get(p, 0), 0.0, 0.15))
    assert [c.prefill_engine for c in answer.considered] == [p, "d0"]


def test_threshold_breaks_ties_by_queued_seconds_then_id() -> None:
    """Equal points: the shorter queue in seconds; equal too: the smaller id."""
    view = engine("d0"), engine("p0", queue_s=0.2), engine("p2", queue_s=0.1), engine("p1", queue_s=0.1)
    assert decide(Threshold(), *view, prompt_tokens=2000).prefill_engine == "p1"


@pytest.mark.parametrize(
    ("engines", "history", "home"),
    [
        # d0 2 * 0.25 + 0 points, d1 0 + 1
        ([engine("d0", queued_rounds=1), engine("d1")], {"d0": 500}, "d1"),
        # d0 2 * 0.75 + 0 points, d1 0 + 1
        ([engine("d0", queued_rounds=1, used_tokens=9), engine("d1")], {"d0": 1500}, "d0"),
        # equal points: the default rule, least KV in use
        ([engine("d0", used_tokens=9), engine("d1")], {}, "d1"),
        # d0 is too small for 2100 tokens, whatever it holds
        ([engine("d0", pool_tokens=2099), engine("d1")], {"d0": 2000}, "d1"),
        # none of the decode pool: the default rule takes a prefill engine
        ([engine("d0", pool_tokens=2099), engine("p0", sessions=1), engine("p1")], {"p0": 2000}, "p1"),
    ],
)  # fmt: skip
def test_threshold_scores_new_homes(engines: list[EngineView], history: dict[str, int], home: str) -> None:
    """A session without a home gets the decode engine of most points."""
    assert decide(Threshold(), *engines, prompt_tokens=2000, history=history).home == home


# ---------------------------------------------------------------- threshold_queue


@pytest.mark.parametrize(
    ("prompt", "held", "queues", "arm"),
    [
        # the home lacks 1001 > 1000, and 1000
        (3000, 1999, [0, 0], Arm.REMOTE_PULL),
        (3000, 2000, [0, 0], Arm.LOCAL),
        # two engines work on one each: 3 reserved means 1 waits, 4 that 2 wait
        (3000, 0, [2, 1], Arm.REMOTE_RECOMPUTE),
        (3000, 0, [2, 2], Arm.LOCAL),
        (3000, 0, [4, 0], Arm.LOCAL),
        # nothing reserved: 0 wait, not -2
        (3000, 0, [0, 0], Arm.REMOTE_RECOMPUTE),
    ],
)  # fmt: skip
def test_threshold_queue_rule(prompt: int, held: int, queues: list[int], arm: Arm) -> None:
    """Remote iff the home lacks more than 1000 tokens and fewer than 2 rounds wait for prefill."""
    pool = [engine(f"p{i}", queued_rounds=count) for i, count in enumerate(queues)]
    answer = decide(
        ThresholdQueue(), engine("d0"), *pool, home="d0", prompt_tokens=prompt, history={"d0": held}
    )
    assert (answer.arm, answer.home) == (arm, "d0")


def test_threshold_queue_reads_the_prefix_from_the_home() -> None:
    """The engine free first pulls what the home holds: p1 with 0.1 s, though p0 holds all of it."""
    view = (
        engine("d0"),
        engine("p0", queue_s=0.2, queued_rounds=1),
        engine("p1", queue_s=0.1, queued_rounds=2),
    )
    history = {"d0": 1000, "p0": 2999}
    answer = decide(ThresholdQueue(), *view, home="d0", prompt_tokens=3000, history=history)
    assert summary(answer) == (Arm.REMOTE_PULL, "d0", "p1")
    # prefill 2000 = 2.1 s, pull 1000 = 0.15 s, push 2000 = 0.25 s
    assert terms(answer.predicted) == pytest.approx((0.1, 2.1, 0.15, 0.25))
    assert answer.reason == (
        "remote: d0 lacks 2000 tokens, more than 1000; waiting are 1, fewer than 2;"
        " p1 is free first, in 0.100 s"
    )
    assert [c.prefill_engine for c in answer.considered] == ["p1", "d0"]


def test_threshold_queue_says_why_it_stays_local() -> None:
    """The length is asked before the queue; both arms are in the receipt."""
    view = engine("d0"), engine("p0", queued_rounds=3)
    short = decide(ThresholdQueue(), *view)
    assert short.reason == "local: d0 lacks 1000 tokens, not more than 1000"
    full = decide(ThresholdQueue(), *view, prompt_tokens=1001)
    assert full.reason == "local: waiting for prefill are 2 rounds, not fewer than 2"
    assert [c.arm for c in full.considered] == [Arm.LOCAL, Arm.REMOTE_RECOMPUTE]


def test_threshold_queue_parameters_and_ties() -> None:
    """A queue limit of 0 is always local; engines free at once: the smaller id."""
    view = engine("d0"), engine("p1"), engine("p0")
    off = ThresholdQueue(ThresholdQueueParameters(max_prefill_queue_size=0))
    assert decide(off, *view, prompt_tokens=3000).arm is Arm.LOCAL
    assert decide(ThresholdQueue(), *view, prompt_tokens=3000).prefill_engine == "p0"


# ---------------------------------------------------------------- isl_bounding


@pytest.mark.parametrize(
    ("prompt", "held", "arm"),
    [
        # lacks 2047 of 10,000 = 0.205; 2048: not below 2048
        (10_000, 7953, Arm.LOCAL),
        (10_000, 7952, Arm.REMOTE_RECOMPUTE),
        # lacks 699 of 1000 = 0.699; 700: not below 0.7
        (1000, 301, Arm.LOCAL),
        (1000, 300, Arm.REMOTE_RECOMPUTE),
        # a short prompt of which nothing is held: ratio 1
        (10, 0, Arm.REMOTE_RECOMPUTE),
        # all of it is held: 0 and 0
        (10_000, 10_000, Arm.LOCAL),
    ],
)  # fmt: skip
def test_isl_bounding_rule(prompt: int, held: int, arm: Arm) -> None:
    """Local iff the home lacks fewer than 2048 tokens and less than 0.7 of the prompt."""
    answer = decide(
        IslBounding(), engine("d0"), engine("p0"), home="d0", prompt_tokens=prompt, history={"d0": held}
    )
    assert (answer.arm, answer.home) == (arm, "d0")


def test_isl_bounding_says_why() -> None:
    """Both numbers and both bounds."""
    view = engine("d0"), engine("p0")
    local = decide(IslBounding(), *view, home="d0", history={"d0": 600})
    assert local.reason == "local: d0 lacks 400 tokens, 0.400 of the prompt: under 2048 and 0.7"
    remote = decide(IslBounding(), *view, home="d0", history={"d0": 200})
    assert remote.reason.startswith(
        "remote: d0 lacks 800 tokens, 0.800 of the prompt: not under 2048 and 0.7; p0 has the least queue"
    )


@pytest.mark.parametrize(
    ("queues", "history", "p", "cost_s"),
    [
        # p0 0.3 + 1.1 = 1.4 s; p1 1.1 s
        ([0.3, 0.0], {}, "p1", 1.1),
        # p0 holds 400: 0.3 + 0.7 = 1.0 s; what the home holds counts for p neither way
        ([0.3, 0.0], {"d0": 300, "p0": 400}, "p0", 1.0),
        # what the home holds is not pulled: p computes all
        ([0.0, 0.0], {"d0": 300}, "p0", 1.1),
    ],
)  # fmt: skip
def test_isl_bounding_chooses_by_queue_and_prefill(
    queues: list[float], history: dict[str, int], p: str, cost_s: float
) -> None:
    """The router's cost of a prefill worker: work queued there and what it lacks; ties by id."""
    pool = [engine(f"p{i}", queue_s=queue) for i, queue in enumerate(queues)]
    answer = decide(IslBounding(), engine("d0"), *pool, home="d0", history=history)
    assert summary(answer) == (Arm.REMOTE_RECOMPUTE, "d0", p)
    assert answer.predicted.queue_s + answer.predicted.prefill_s == pytest.approx(cost_s)
    assert f"{p} has the least queue and prefill, {cost_s:.3f} s, of 2 considered of 2" in answer.reason
    assert [c.arm for c in answer.considered] == [Arm.REMOTE_RECOMPUTE] * 2 + [Arm.LOCAL]


def test_isl_bounding_leaves_the_push_out_of_its_cost() -> None:
    """p0 is slower in transfers only: the router does not see them, and takes the smaller id."""
    transfer = TransferCost(fixed_s=9.0, bytes_per_s=1e6, kv_bytes_per_token=100)
    latency = replace(LATENCY, transfer=transfer)
    answer = decide(IslBounding(), engine("d0"), engine("p0", latency=latency), engine("p1"))
    # p0 1.1 s + 9.1 s of push, p1 1.1 s + 0.15 s
    assert answer.prefill_engine == "p0"


@pytest.mark.parametrize(
    ("engines", "history", "home"),
    [
        # context 500 + 1000 against 600 + 1000
        ([engine("d0", context_tokens=600), engine("d1", context_tokens=500)], {}, "d1"),
        # d0 holds 200 of the prompt: 1400 against 1500
        ([engine("d0", context_tokens=600), engine("d1", context_tokens=500)], {"d0": 200}, "d0"),
        # equal: the default rule, least KV in use
        ([engine("d0", used_tokens=9), engine("d1")], {}, "d1"),
        # none of the decode pool can hold 1100 tokens: the default rule
        ([engine("d0", pool_tokens=1099), engine("p0", sessions=1), engine("p1")], {"p0": 900}, "p1"),
    ],
)  # fmt: skip
def test_isl_bounding_chooses_new_homes_by_decodes_and_overlap(
    engines: list[EngineView], history: dict[str, int], home: str
) -> None:
    """A session without a home gets the decode engine of least context, less what it holds of the prompt."""
    assert decide(IslBounding(), *engines, history=history).home == home


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("remote_pull_always", {"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ("first_remote", {"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ("threshold", {"non_cached_tokens": -1}, "non_cached_tokens must be at least 0, got -1"),
        ("threshold", {"prompt_tokens": -1}, "prompt_tokens must be at least 0, got -1"),
        ("threshold_queue", {"max_local_prefill_length": -1}, "max_local_prefill_length must be at least 0"),
        ("threshold_queue", {"max_prefill_queue_size": -1}, "max_prefill_queue_size must be at least 0"),
        ("isl_bounding", {"eff_isl_threshold": -1}, "eff_isl_threshold must be at least 0, got -1"),
        ("isl_bounding", {"eff_isl_ratio_threshold": 1.1}, "must be between 0 and 1, got 1.1"),
        ("isl_bounding", {"eff_isl_ratio_threshold": float("nan")}, "must be between 0 and 1, got nan"),
        ("isl_bounding", {"shortlist": 0}, "shortlist must be at least 1, got 0"),
    ],
)
def test_parameters_are_checked(name: str, parameters: dict[str, Any], message: str) -> None:
    """A value that means nothing is refused by name."""
    with pytest.raises(ValueError, match=f"policy '{name}': ") as caught:
        make_policy(name, parameters)
    assert message in str(caught.value)
