"""What every registered policy must keep, whatever it decides: one contract over the registry.

Pure, deterministic, total; never a dead or excluded engine, never more than a KV pool holds, never a transfer
where there is no linker; a home changes only by `move`; arms, source, terms and `considered` fit together.
An ordering has a key that ages, permutes what it is given, and lets no round starve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from random import Random
from types import MappingProxyType

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.policies import arms
from antiphon.policies.ampd import Ampd, AmpdParameters
from antiphon.policies.base import (
    NEUTRAL,
    SLACKS,
    Arm,
    Candidate,
    ClusterView,
    Corrections,
    EngineView,
    Ordering,
    Placement,
    Pool,
    Reject,
    RoundView,
)
from antiphon.policies.home import can_be_home, choose_home, session_home
from antiphon.policies.latency import load_latency_model
from antiphon.policies.registry import ORDERINGS, POLICIES, make_ordering, make_policy

LATENCY = load_latency_model("tiny-cpu")
NOBODY = ClusterView(MappingProxyType({}))
IDS = [f"{pool}{number}" for pool in "dp" for number in range(5)]

seconds = st.sampled_from([0.0, 0.001, 0.25, 0.5, 3.0, 100.0]) | st.floats(0, 10)
sizes = st.sampled_from([0, 500, 4096, 100_000, 100_000])
corrections = [NEUTRAL, NEUTRAL, Corrections(0.5, 2.0, 2.0), Corrections(2.0, 0.5, 0.7)]
transferred = st.sampled_from([0.0, 0.0, 1e6, 1e12])
slacks = st.sampled_from([(), (0.0,), (0.001, 0.5), tuple(0.05 * n for n in range(SLACKS))])


def engines(engine_id: str) -> st.SearchStrategy[EngineView]:
    return st.builds(
        EngineView,
        engine_id=st.just(engine_id),
        pool=st.just(Pool.PREFILL if engine_id.startswith("p") else Pool.DECODE),
        can_transfer=st.sampled_from([True, True, True, False]),
        batch=st.sampled_from([0, 1, 64]),
        context_tokens=st.sampled_from([0, 50_000]),
        queue_s=seconds,
        queued_rounds=st.just(0),
        pool_tokens=sizes,
        used_tokens=st.sampled_from([0, 1, 70_000, 200_000]),
        sessions=st.integers(0, 2),
        latency=st.just(LATENCY),
        window_ttft_s=st.none() | seconds,
        window_itl_s=st.none() | st.sampled_from([0.001, 0.1]),
        tightest_itl_slo_s=st.none() | st.sampled_from([0.001, 0.1, 10.0]),
        chunk_tokens=st.sampled_from([0, 64, 2048]),
        decode_interval=st.sampled_from([0, 4]),
        corrections=st.sampled_from(corrections),
        incoming_bytes=transferred,
        outgoing_bytes=transferred,
        itl_slacks_s=slacks,
        arrivals_per_s=st.sampled_from([0.0, 0.1, 5.0, 1000.0]),
        prefill_share=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    )


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    alive = sorted(draw(st.sets(st.sampled_from(IDS))))
    return ClusterView(MappingProxyType({name: draw(engines(name)) for name in alive}))


@st.composite
def rounds(draw: st.DrawFn) -> RoundView:
    prompt_tokens = draw(st.integers(1, 8192))
    held = st.dictionaries(st.sampled_from([*IDS, "gone"]), st.integers(0, prompt_tokens))
    return RoundView(
        round_id=draw(st.text("abc", min_size=1, max_size=3)),
        session_id="s",
        seed=draw(st.integers(0, 2**64 - 1)),
        prompt_tokens=prompt_tokens,
        max_output_tokens=draw(st.integers(1, 4096)),
        slo_ttft_s=draw(st.sampled_from([0.5, 2.0]) | st.floats(0.01, 60)),
        slo_itl_s=draw(st.floats(0.001, 1)),
        home=draw(st.none() | st.sampled_from([*IDS, "gone"])),
        waited_s=draw(seconds),
        history_tokens=MappingProxyType(draw(held)),
        excluded=frozenset(draw(st.sets(st.sampled_from(IDS), max_size=4))),
        arrived_s=draw(seconds),
        expected_output_tokens=draw(st.sampled_from([0, 1, 300, 100_000])),
        work_s=draw(seconds),
        push_s=draw(seconds),
        postponed=draw(st.integers(0, 5)),
    )


def check_placement(answer: Placement, round_view: RoundView, cluster: ClusterView) -> None:
    usable = {name: e for name, e in cluster.engines.items() if name not in round_view.excluded}
    need = round_view.prompt_tokens + round_view.max_output_tokens
    home, prefill = usable[answer.home], usable[answer.prefill_engine]
    assert home.pool_tokens >= need
    assert prefill.pool_tokens >= round_view.prompt_tokens
    assert (answer.arm in (Arm.LOCAL, Arm.MOVE)) == (answer.home == answer.prefill_engine)
    if home is not prefill:
        assert home.can_transfer and prefill.can_transfer
    check_source(answer, round_view, cluster)
    kept = session_home(round_view, cluster)
    if kept is not None and answer.arm is not Arm.MOVE:
        assert answer.home == kept.engine_id, "a home that can take the round changes only by `move`"
    chosen = answer.predicted
    assert chosen in answer.considered
    assert (chosen.arm, chosen.prefill_engine) == (answer.arm, answer.prefill_engine)
    assert chosen.home in ("", answer.home)
    assert answer.reason
    for candidate in answer.considered:
        check_candidate(candidate, usable)


def check_source(answer: Placement, round_view: RoundView, cluster: ClusterView) -> None:
    """Where history comes from: an engine that lives, has our linker, and holds more than who pulls."""
    if answer.arm not in (Arm.REMOTE_PULL, Arm.MOVE):
        assert answer.source is None
        return
    source = cluster.engines[answer.source or answer.home]
    pulled = round_view.held(source.engine_id) - round_view.held(answer.prefill_engine)
    assert source.engine_id != answer.prefill_engine
    if answer.arm is Arm.REMOTE_PULL:
        assert pulled > 0
    if pulled > 0:
        assert source.can_transfer and cluster.engines[answer.prefill_engine].can_transfer
    assert (answer.predicted.pull_s > 0) == (pulled > 0)


def check_candidate(candidate: Candidate, usable: dict[str, EngineView]) -> None:
    assert candidate.prefill_engine in usable
    assert candidate.home in ("", *usable)
    assert min(candidate.queue_s, candidate.pull_s, candidate.push_s) >= 0
    assert candidate.prefill_s > 0
    assert math.isfinite(candidate.ttft_s)
    if candidate.arm is not Arm.MOVE:
        assert (candidate.pull_s > 0) == (candidate.arm is Arm.REMOTE_PULL)
    if candidate.arm in (Arm.LOCAL, Arm.MOVE):
        assert candidate.home in ("", candidate.prefill_engine)
        assert candidate.push_s == 0
    assert candidate.itl_s is None or candidate.itl_s >= 0
    assert candidate.misses is None or candidate.misses >= 0


def check(name: str, round_view: RoundView, cluster: ClusterView) -> None:
    """Twice the same answer, views unchanged, live engines that can hold it; a Reject only if none can."""
    before = repr((round_view, cluster))
    answer = make_policy(name).place(round_view, cluster)
    assert make_policy(name, asdict(POLICIES[name].parameters())).place(round_view, cluster) == answer
    assert repr((round_view, cluster)) == before
    possible = [e for e in cluster.engines.values() if can_be_home(e, round_view)]
    if isinstance(answer, Reject):
        assert not possible
        assert answer.reason and answer.retry_after_s > 0
    else:
        assert possible
        check_placement(answer, round_view, cluster)


@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=75, deadline=None)
def test_every_policy_keeps_the_contract(round_view: RoundView, cluster: ClusterView) -> None:
    """`check`, whatever the views hold."""
    for name in POLICIES:  # drawing a case costs more than placing it
        note(name)
        check(name, round_view, cluster)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_keeps_the_contract_in_a_busy_fleet(name: str) -> None:
    """`check` in 300 seeded draws of fleets where most engines can do the round and many hold some of it."""
    random = Random(name)
    for _ in range(300):
        check(name, *busy_fleet(random))


def busy_fleet(random: Random) -> tuple[RoundView, ClusterView]:
    pick = random.choice
    engines = {
        name: EngineView(
            name, Pool.PREFILL if name.startswith("p") else Pool.DECODE, can_transfer=random.random() < 0.8,
            batch=pick([0, 4, 64]), context_tokens=50_000, queue_s=pick([0.0, 0.0, random.expovariate(1.0)]),
            queued_rounds=1, pool_tokens=pick([2000, 100_000, 100_000]), used_tokens=random.randrange(90_000),
            sessions=random.randrange(9), latency=LATENCY, window_ttft_s=pick([None, 9.0]),
            window_itl_s=pick([None, 9.0]), tightest_itl_slo_s=pick([None, 0.1, 9.0]),
            chunk_tokens=512, decode_interval=pick([0, 4]), corrections=pick(corrections),
            itl_slacks_s=pick([(), (0.01, 1.0)]), arrivals_per_s=random.random(),
            prefill_share=random.random(),
        )
        for name in sorted(random.sample(IDS, 6))
    }  # fmt: skip
    prompt_tokens = random.randrange(1, 8192)
    history = {name: random.randrange(prompt_tokens) for name in random.sample(IDS, 6)}
    round_view = RoundView(
        "r", "s", random.getrandbits(64), prompt_tokens, 256, random.expovariate(0.2), pick([0.1, 1.0, 9.0]),
        pick([None, *IDS]), 0.0, MappingProxyType(history),
        excluded=frozenset(random.sample(IDS, random.randrange(3))), expected_output_tokens=pick([0, 200]),
    )  # fmt: skip
    return round_view, ClusterView(MappingProxyType(engines))


@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=50, deadline=None)
def test_no_policy_depends_on_chance(round_view: RoundView, cluster: ClusterView) -> None:
    """What was placed before, the order of the history and the clock's origin do not change the answer."""
    turned = MappingProxyType(dict(reversed(list(round_view.history_tokens.items()))))
    later = replace(round_view, history_tokens=turned, arrived_s=round_view.arrived_s + 1e6)
    for name in POLICIES:
        note(name)
        policy = make_policy(name)
        answer = policy.place(round_view, cluster)
        policy.place(replace(round_view, seed=1, home=None), cluster)
        assert policy.place(later, cluster) == answer


@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=50, deadline=None)
def test_early_rejection_refuses_and_changes_nothing_else(
    round_view: RoundView, cluster: ClusterView
) -> None:
    """The one parameter that lets a policy refuse a possible round; the rest is as without it."""
    answer = make_policy("mooncake", {"early_rejection": True}).place(round_view, cluster)
    if isinstance(answer, Placement):
        assert answer == make_policy("mooncake").place(round_view, cluster)
    else:
        assert answer.reason and answer.retry_after_s > 0


@given(queue=st.lists(rounds(), max_size=8, unique_by=lambda r: r.round_id))
@settings(max_examples=100, deadline=None)
def test_every_ordering_is_a_permutation(queue: list[RoundView]) -> None:
    """Nothing is dropped or doubled, the order it was given in does not matter, a key is a finite number."""
    before = repr(queue)
    for name in ORDERINGS:
        note(name)
        ordering = make_ordering(name)
        ordered = list(ordering.order(queue, NOBODY))
        assert sorted(r.round_id for r in ordered) == sorted(r.round_id for r in queue)
        assert list(make_ordering(name).order(queue[::-1], NOBODY)) == ordered
        assert repr(queue) == before
        keys = [ordering.key(r) for r in queue]
        assert all(math.isfinite(key) for key in keys)
        assert keys == [make_ordering(name).key(r) for r in queue]
        assert ordering.window >= 1
        if ordering.window == 1:
            assert ordered == sorted(queue, key=lambda r: (ordering.key(r), r.round_id))


@given(round_view=rounds(), later_s=st.floats(0.001, 1000))
@settings(max_examples=50, deadline=None)
def test_every_key_ages(round_view: RoundView, later_s: float) -> None:
    """The same round, arrived later, comes later by as much: so those that can pass a round are few."""
    later = replace(round_view, arrived_s=round_view.arrived_s + later_s)
    for name in ORDERINGS:
        note(name)
        key = make_ordering(name).key
        assert key(later) - key(round_view) == pytest.approx(later_s, abs=1e-6)


PASSED = 8
"""Starts after which a round is started, for each round with a lesser key. `ampd_reorder` needs 4."""


@pytest.mark.parametrize("name", sorted(ORDERINGS))
@given(
    waiting=st.lists(
        st.tuples(st.integers(0, 10), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.1, 2.0, 10.0])),
        min_size=1, max_size=8,
    ),
    every_s=st.sampled_from([0.1, 1.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_no_ordering_starves_a_round(
    name: str, waiting: list[tuple[int, float, float]], every_s: float
) -> None:
    """With a short, urgent round more at every start, one that waits is started soon after lesser keys."""
    ordering = make_ordering(name)
    rounds = [
        RoundView(f"r{n}", "s", 0, 9, 9, slo_s, 0.1, None, 0.0, arrived_s=at, work_s=work_s)
        for n, (at, work_s, slo_s) in enumerate(waiting)
    ]
    now = max(r.arrived_s for r in rounds)
    passing = max(0.0, max(map(ordering.key, rounds)) - now) / every_s
    starts = list(serve(ordering, rounds, now, every_s, math.ceil(PASSED * (len(rounds) + passing + 1))))
    assert {r.round_id for r in rounds} <= set(starts)


def serve(
    ordering: Ordering, waiting: list[RoundView], now: float, every_s: float, most: int
) -> Iterator[str]:
    """Ids in the order of their starts until all of `waiting` are, at most `most`; queued as in the core."""
    queue, left = list(waiting), {r.round_id for r in waiting}
    for number in range(most):
        if not left:
            return
        now += every_s
        urgent = replace(waiting[0], round_id=f"u{number:06}", arrived_s=now, work_s=0.01, slo_ttft_s=0.02)
        queue.append(urgent)
        queue.sort(key=lambda r: (ordering.key(r), r.round_id))
        asked = [replace(r, waited_s=now - r.arrived_s) for r in queue[: ordering.window]]
        first = ordering.order(asked, NOBODY)[0].round_id
        at = next(i for i, r in enumerate(queue) if r.round_id == first)
        queue = [replace(r, postponed=r.postponed + 1) for r in queue[:at]] + queue[at + 1 :]
        left.discard(first)
        yield first


@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=75, deadline=None)
def test_the_shortlist_finds_the_exhaustive_choice(round_view: RoundView, cluster: ClusterView) -> None:
    """No steps between chunks, equal engines, at most 4 holders: 4 + 4 looked at equal all looked at."""
    quiet = {n: replace(e, decode_interval=0, corrections=NEUTRAL) for n, e in cluster.engines.items()}
    holders = [name for name in sorted(round_view.history_tokens) if name.startswith("p")][:4]
    kept = {name: round_view.held(name) for name in (*holders, round_view.home or "d0")}
    round_view = replace(round_view, history_tokens=MappingProxyType(kept))
    cluster = ClusterView(MappingProxyType(quiet))
    closed = {"alpha": 0.0, "beta": 0.0}
    short = Ampd(AmpdParameters(**closed, shortlist=4)).place(round_view, cluster)
    whole = Ampd(AmpdParameters(**closed, shortlist=99)).place(round_view, cluster)
    if isinstance(whole, Placement):
        assert isinstance(short, Placement)
        assert short.predicted == whole.predicted


def test_the_shortlist_loses_little_with_decode_steps_between_chunks() -> None:
    """On 300 seeded draws of 24 busy prefill engines, 4 + 4 looked at cost under 2 % over all looked at."""
    draw = Random(20)
    short_s = whole_s = 0.0
    for _ in range(300):
        pool = [
            EngineView(
                f"p{i:02}", Pool.PREFILL, True, batch=draw.randrange(8), context_tokens=0,
                queue_s=draw.expovariate(2.0), queued_rounds=0, pool_tokens=100_000, used_tokens=0,
                sessions=0, latency=LATENCY, chunk_tokens=512, decode_interval=1,
            )
            for i in range(24)
        ]  # fmt: skip
        home = replace(pool[0], engine_id="d0", pool=Pool.DECODE)
        prompt = draw.randrange(500, 8000)
        history = {e.engine_id: draw.randrange(prompt) for e in pool if draw.random() < 0.3}
        round_view = RoundView("r", "s", 0, prompt, 100, 1.0, 0.1, "d0", 0.0, MappingProxyType(history))
        estimates = {e.engine_id: arms.remote_recompute(round_view, e, home).ttft_s for e in pool}
        whole_s += min(estimates.values())
        short_s += min(estimates[e.engine_id] for e in arms.shortlist(round_view, pool, 4))
    assert whole_s <= short_s < 1.02 * whole_s


@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=50, deadline=None)
def test_a_prefill_engine_is_a_home_only_without_a_decode_engine(
    round_view: RoundView, cluster: ClusterView
) -> None:
    """The default rule for new sessions looks at the decode pool first."""
    fresh = replace(round_view, home=None)
    home = choose_home(fresh, cluster)
    if isinstance(home, EngineView) and home.pool is Pool.PREFILL:
        decode = [e for e in cluster.engines.values() if e.pool is Pool.DECODE]
        assert not any(can_be_home(e, fresh) for e in decode)
