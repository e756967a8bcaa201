"""Home rule, arms, `local` and `remote` against tables worked by hand; the registry.

The arithmetic stands beside each case; the latency model is in policy_helpers.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from antiphon.policies import arms
from antiphon.policies.ampd import Ampd, AmpdParameters
from antiphon.policies.base import Arm, ClusterView, EngineView, Reject, RoundView
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.home import RETRY_AFTER_S, choose_home
from antiphon.policies.local import Local
from antiphon.policies.registry import ORDERINGS, POLICIES, make_ordering, make_policy
from antiphon.policies.remote import Remote, RemoteParameters
from tests.policy_helpers import SLOWER, a_round, cluster, engine, placed, rejected, terms

# ---------------------------------------------------------------- home


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        # 9 / 5000 = 0.18 % against 10 / 100,000 = 0.01 %: the share counts, not the tokens
        ([engine("d0", used_tokens=9, pool_tokens=5000), engine("d1", used_tokens=10)], "d1"),
        # equal shares: fewer sessions
        ([engine("d0", used_tokens=10, sessions=3), engine("d1", used_tokens=10, sessions=2)], "d1"),
        # equal in all: the smaller id
        ([engine("d1"), engine("d0")], "d0"),
        # an empty prefill engine is no home while a decode engine is there, however full
        ([engine("p0"), engine("d0", used_tokens=99_999, sessions=9)], "d0"),
        # no decode engine: a prefill engine can do either
        ([engine("p0", sessions=1), engine("p1")], "p1"),
        # 1000 + 100 tokens do not fit 1099, and fit 1100
        ([engine("d0", pool_tokens=1099), engine("d1", pool_tokens=1100, used_tokens=900)], "d1"),
        # the decode engine is too small: the prefill engine takes it
        ([engine("d0", pool_tokens=1099), engine("p0")], "p0"),
    ],
)  # fmt: skip
def test_default_home(engines: list[EngineView], expected: str) -> None:
    """A new session goes to the least used share of KV, then fewest sessions, then id, decode pool first."""
    home = choose_home(a_round(), cluster(*engines))
    assert isinstance(home, EngineView)
    assert home.engine_id == expected


def test_a_home_is_kept_while_it_can_take_the_round() -> None:
    """The session's home stays, however full; excluded, dead or too small, it is chosen anew."""
    full, idle = engine("d0", used_tokens=99_000, sessions=50), engine("d1")
    view = cluster(full, idle)

    def home_of(round_view: RoundView, view: ClusterView = view) -> str:
        return placed(Local().place(round_view, view)).home

    assert home_of(a_round(home="d0")) == "d0"
    assert home_of(a_round(home="d0", excluded=frozenset({"d0"}))) == "d1"
    assert home_of(a_round(home="gone")) == "d1"
    assert home_of(a_round(home="d0"), cluster(engine("d0", pool_tokens=1000), idle)) == "d1"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_rejections_say_why(name: str) -> None:
    """No engine, none left, none large enough: a Reject with the reason in words and when to retry."""
    policy = make_policy(name)
    nothing = rejected(policy.place(a_round(), cluster()))
    assert nothing == Reject("no engine is alive", RETRY_AFTER_S)
    failed = a_round(excluded=frozenset({"d0", "p0"}))
    none_left = rejected(policy.place(failed, cluster(engine("d0"), engine("p0"))))
    assert none_left.reason == "all 2 engines alive failed this round already"
    small = rejected(
        policy.place(a_round(), cluster(engine("d0", pool_tokens=1099), engine("p0", pool_tokens=50)))
    )
    assert small.reason == "1100 tokens of prompt and output fit no KV pool: the largest of 2 holds 1099"


# ---------------------------------------------------------------- arms


@pytest.mark.parametrize(
    ("history", "arm", "expected"),
    [
        # nothing anywhere: p computes 1000 = 1.1 s, all 1000 go to d = 0.15 s
        ({}, Arm.REMOTE_RECOMPUTE, (0.2, 1.1, 0.0, 0.15)),
        # d holds 600, p nothing: pull 600 = 0.11 s, compute 400 = 0.5 s, push 400 = 0.09 s
        ({"d0": 600}, Arm.REMOTE_PULL, (0.2, 0.5, 0.11, 0.09)),
        # d holds 600, p 200: pull 400 = 0.09 s, the rest as before
        ({"d0": 600, "p0": 200}, Arm.REMOTE_PULL, (0.2, 0.5, 0.09, 0.09)),
        # both hold 600: nothing to pull; compute 400 = 0.5 s, push 400 = 0.09 s
        ({"d0": 600, "p0": 600}, Arm.REMOTE_RECOMPUTE, (0.2, 0.5, 0.0, 0.09)),
        # p holds more: computes 200 = 0.3 s, d fetches the 400 that it lacks = 0.09 s
        ({"d0": 600, "p0": 800}, Arm.REMOTE_RECOMPUTE, (0.2, 0.3, 0.0, 0.09)),
        # d holds everything: p pulls 1000 = 0.15 s and computes the last token = 0.101 s; nothing to push
        ({"d0": 1000}, Arm.REMOTE_PULL, (0.2, 0.101, 0.15, 0.0)),
    ],
)  # fmt: skip
def test_remote_estimates(history: dict[str, int], arm: Arm, expected: tuple[float, ...]) -> None:
    """Eq. 2, term by term; a pull needs history that the home holds beyond the prefill engine."""
    candidate = arms.remote_pull(a_round(history=history), engine("p0", queue_s=0.2), engine("d0"))
    assert candidate.arm is arm
    assert terms(candidate) == pytest.approx(expected)


def test_remote_recompute_computes_what_the_prefill_engine_lacks() -> None:
    """d holds 600, p 200: p computes 800 = 0.9 s and d fetches 400 = 0.09 s; nothing is pulled."""
    candidate = arms.remote_recompute(a_round(history={"d0": 600, "p0": 200}), engine("p0"), engine("d0"))
    assert candidate.arm is Arm.REMOTE_RECOMPUTE
    assert terms(candidate) == pytest.approx((0.0, 0.9, 0.0, 0.09))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # idle: 400 new = 0.5 s, whatever C and K
        ({"chunk_tokens": 100, "decode_interval": 2}, 0.5),
        # 4 chunks of 100 have 3 gaps of 2 steps; batch 10 = 0.020 s: 0.5 + 6 * 0.020 = 0.62 s
        ({"batch": 10, "chunk_tokens": 100, "decode_interval": 2}, 0.62),
        # 400 tokens in chunks of 399: 1 gap: 0.5 + 2 * 0.020 = 0.54 s; in one chunk of 400: none
        ({"batch": 10, "chunk_tokens": 399, "decode_interval": 2}, 0.54),
        ({"batch": 10, "chunk_tokens": 400, "decode_interval": 2}, 0.5),
        # prefill first (K = 0), or C unknown: the chunks run back to back
        ({"batch": 10, "chunk_tokens": 100, "decode_interval": 0}, 0.5),
        ({"batch": 10, "chunk_tokens": 0, "decode_interval": 2}, 0.5),
    ],
)  # fmt: skip
def test_decode_steps_between_chunks_lengthen_a_prefill(changes: dict[str, int], expected: float) -> None:
    """On a decoding engine, K steps of its batch run between two chunks of C."""
    candidate = arms.local(a_round(history={"d0": 600}), engine("d0", **changes))
    assert candidate.prefill_s == pytest.approx(expected)


def test_an_engine_computes_at_least_the_last_token() -> None:
    """A prompt that is all history still costs one token: 0.1 + 0.001 = 0.101 s."""
    candidate = arms.local(a_round(history={"d0": 1000}), engine("d0"))
    assert terms(candidate) == pytest.approx((0.0, 0.101, 0.0, 0.0))


def test_every_engine_is_priced_by_its_own_model() -> None:
    """Prefill and decode steps by the engine that runs them, a transfer by the slower of its two ends."""
    # SLOWER: prefill(n) = 0.1 + 0.002 n, a step 0.02 s, transfer(n) = 0.1 + n * 100 / 1e6
    history = {"d0": 600}
    slow_home = arms.remote_pull(a_round(history=history), engine("p0"), engine("d0", latency=SLOWER))
    # p0 computes 400 = 0.5 s; both transfers join p0 and the slow d0: 600 = 0.16 s, 400 = 0.14 s
    assert terms(slow_home) == pytest.approx((0.0, 0.5, 0.16, 0.14))
    slow_prefill = arms.remote_pull(a_round(history=history), engine("p0", latency=SLOWER), engine("d0"))
    assert terms(slow_prefill) == pytest.approx((0.0, 0.9, 0.16, 0.14))
    recompute = arms.remote_recompute(a_round(), engine("p0"), engine("d0", latency=SLOWER))
    assert terms(recompute) == pytest.approx((0.0, 1.1, 0.0, 0.2))
    busy = engine("d0", latency=SLOWER, batch=10, chunk_tokens=100, decode_interval=2)
    # 400 new = 0.9 s, and 3 gaps of 2 steps of 0.02 s
    assert arms.local(a_round(history=history), busy).prefill_s == pytest.approx(1.02)


def test_a_faster_engine_is_worth_a_queue() -> None:
    """remote: p0 computes 1000 in 0.4 + 1.1 s and beats p1 of the slower kind, with 2.1 s and no queue."""
    engines = engine("d0"), engine("p0", queue_s=0.4), engine("p1", latency=SLOWER)
    assert placed(Remote().place(a_round(), cluster(*engines))).prefill_engine == "p0"


def test_shortlist_keeps_short_queues_and_long_histories() -> None:
    """At most 2 * count engines: shortest queues (ties by id) and longest histories (ties by queue)."""
    engines = [engine(f"p{i}", queue_s=float(i)) for i in range(8)]
    history = {"p7": 500, "p6": 500, "p5": 900, "d0": 1000}
    chosen = arms.shortlist(a_round(history=history), engines, 2)
    # queues 0 and 1; histories 900 (p5), then of the two with 500 the one with queue 6 s
    assert [e.engine_id for e in chosen] == ["p0", "p1", "p5", "p6"]
    assert arms.shortlist(a_round(history=history), engines[:2], 2) == engines[:2]


# ---------------------------------------------------------------- local


def test_local_ignores_pools() -> None:
    """A new session goes to the least used engine of all, and is prefilled there."""
    answer = placed(Local().place(a_round(), cluster(engine("p0"), engine("d0", used_tokens=1, queue_s=3.0))))
    assert (answer.arm, answer.home, answer.prefill_engine) == (Arm.LOCAL, "p0", "p0")
    assert answer.reason == "local: new home p0, least KV in use (0.0%)"
    # a home of 600 tokens of history and 3 s of queue: 3.0 + 0.1 + 0.4 = 3.5 s
    kept = placed(
        Local().place(
            a_round(home="d0", history={"d0": 600}), cluster(engine("p0"), engine("d0", queue_s=3.0))
        )
    )
    assert (kept.home, kept.reason) == ("d0", "local: d0 is the session's home")
    assert kept.predicted.ttft_s == pytest.approx(3.5)
    assert kept.considered == (kept.predicted,)


# ---------------------------------------------------------------- remote


@pytest.mark.parametrize(
    ("engines", "history", "expected", "ttft_s"),
    [
        # p0 0.3 + 1.1 + 0.15 = 1.55 s; p1 1.25 s
        ([engine("p0", queue_s=0.3), engine("p1")], {}, "p1", 1.25),
        # p0 holds 400 more: 0.3 + 0.7 + 0.15 = 1.15 s < 1.25 s
        ([engine("p0", queue_s=0.3), engine("p1")], {"p0": 400}, "p0", 1.15),
        # equal estimates: the smaller id
        ([engine("p1"), engine("p0")], {}, "p0", 1.25),
        # the home's history is not pulled: p computes all 1000, d fetches the 400 that it lacks = 0.09 s
        ([engine("p0")], {"d0": 600}, "p0", 1.19),
        # no linker on p0: KV could not leave it
        ([engine("p0", can_transfer=False), engine("p1", queue_s=9.0)], {}, "p1", 10.25),
        # p0 cannot hold the prompt
        ([engine("p0", pool_tokens=999), engine("p1", queue_s=9.0)], {}, "p1", 10.25),
    ],
)  # fmt: skip
def test_remote_takes_the_least_estimate(
    engines: list[EngineView], history: dict[str, int], expected: str, ttft_s: float
) -> None:
    """The least of queue + prefill of what it lacks + push; ties by id; who cannot do it is not asked."""
    answer = placed(Remote().place(a_round(history=history), cluster(engine("d0"), *engines)))
    assert (answer.arm, answer.home, answer.prefill_engine) == (Arm.REMOTE_RECOMPUTE, "d0", expected)
    assert answer.predicted.ttft_s == pytest.approx(ttft_s)
    assert f"{expected} has the least predicted TTFT, {ttft_s:.3f} s" in answer.reason


@pytest.mark.parametrize("policy", [Remote(), Ampd()])
@pytest.mark.parametrize(
    ("engines", "home"),
    [
        ([engine("d0"), engine("d1")], "d0"),
        # only prefill engines: one is the home, and prefills itself
        ([engine("p0"), engine("p1")], "p0"),
        ([engine("p0")], "p0"),
        # the home has no linker: nothing can be moved into it
        ([engine("d0", can_transfer=False), engine("p0")], "d0"),
        ([engine("d0"), engine("p0", can_transfer=False)], "d0"),
    ],
)
def test_without_a_usable_prefill_engine_the_home_prefills(
    policy: Remote | Ampd, engines: list[EngineView], home: str
) -> None:
    """The fall-back is local on the home, and the reason says so."""
    answer = placed(policy.place(a_round(), cluster(*engines)))
    assert (answer.arm, answer.home, answer.prefill_engine) == (Arm.LOCAL, home, home)
    assert answer.reason == f"no prefill engine is usable for {home}: prefilled there"


def test_a_failed_prefill_engine_is_not_asked_again() -> None:
    """With p0 excluded the next one is taken, and with both excluded the home."""
    view = cluster(engine("d0"), engine("p0"), engine("p1", queue_s=5.0))
    for policy in (Remote(), Ampd()):
        one = placed(policy.place(a_round(excluded=frozenset({"p0"})), view))
        assert one.prefill_engine == "p1" or one.arm is Arm.LOCAL
        assert all(c.prefill_engine != "p0" for c in one.considered)
        both = placed(policy.place(a_round(excluded=frozenset({"p0", "p1"})), view))
        assert (both.arm, both.prefill_engine) == (Arm.LOCAL, "d0")


# ---------------------------------------------------------------- ordering, registry


def test_fcfs_serves_the_first_arrived_first() -> None:
    """By arrival, then by round id; the key alone decides."""
    queue = [a_round(round_id=name, arrived_s=at) for name, at in [("b", 8.0), ("c", 6.0), ("a", 8.0)]]
    assert [Fcfs().key(r) for r in queue] == [8.0, 6.0, 8.0] and Fcfs().window == 1
    assert [r.round_id for r in Fcfs().order(queue, cluster())] == ["c", "a", "b"]


def test_registry_builds_with_parameters() -> None:
    """What is given is set, the rest has its default; a whole number does for a real one."""
    assert make_policy("ampd", {"alpha": 1, "shortlist": 2}) == Ampd(AmpdParameters(1.0, 0.2, 2))
    assert make_policy("remote", {"shortlist": 9}) == Remote(RemoteParameters(9))
    assert make_policy("local") == Local()
    assert make_ordering("fcfs") == Fcfs()
    assert {"ampd", "local", "remote"} <= set(POLICIES) and "fcfs" in ORDERINGS


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("amdp", {}, f"unknown policy 'amdp': known are {', '.join(sorted(POLICIES))}"),
        ("ampd", {"alhpa": 1}, "policy 'ampd' has no parameter 'alhpa': it takes alpha, beta, shortlist"),
        ("local", {"x": 1}, "policy 'local' has no parameter 'x': it takes none"),
        ("ampd", {"alpha": "much"}, "policy 'ampd': Expected `float`, got `str`"),
        ("ampd", {"alpha": -0.1}, "policy 'ampd': alpha must be a number of at least 0, got -0.1"),
        ("ampd", {"beta": float("nan")}, "policy 'ampd': beta must be a number of at least 0, got nan"),
        ("ampd", {"shortlist": 0}, "policy 'ampd': shortlist must be at least 1, got 0"),
        ("remote", {"shortlist": 1.5}, "policy 'remote': Expected `int`, got `float`"),
    ],
)
def test_registry_refuses(name: str, parameters: dict[str, Any], message: str) -> None:
    """Unknown names and wrong values are errors that say what is known."""
    with pytest.raises(ValueError) as caught:
        make_policy(name, parameters)
    assert message in str(caught.value)
