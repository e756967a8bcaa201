"""What every registered policy must keep, whatever it decides: one contract over the registry.

Pure, deterministic, total; never a dead or excluded engine, never more than a KV pool holds, never a transfer
where there is no linker; arms, terms and `considered` fit together.
"""

from __future__ import annotations

from random import Random
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.policies import arms
from antiphon.policies.ampd import Ampd, AmpdParameters
from antiphon.policies.base import Arm, ClusterView, EngineView, Placement, Pool, Reject, RoundView
from antiphon.policies.home import can_be_home, choose_home
from antiphon.policies.latency import load_latency_model
from antiphon.policies.registry import ORDERINGS, POLICIES, make_ordering, make_policy

LATENCY = load_latency_model("tiny-cpu")
IDS = [f"{pool}{number}" for pool in "dp" for number in range(5)]

seconds = st.sampled_from([0.0, 0.001, 0.25, 0.5, 3.0, 100.0]) | st.floats(0, 10)
sizes = st.sampled_from([0, 500, 4096, 100_000, 100_000])


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
        tightest_itl_slo_s=st.none(),
        chunk_tokens=st.sampled_from([0, 64, 2048]),
        decode_interval=st.sampled_from([0, 4]),
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
        slo_ttft_s=draw(st.floats(0.01, 60)),
        slo_itl_s=draw(st.floats(0.001, 1)),
        home=draw(st.none() | st.sampled_from([*IDS, "gone"])),
        waited_s=draw(seconds),
        history_tokens=MappingProxyType(draw(held)),
        excluded=frozenset(draw(st.sets(st.sampled_from(IDS), max_size=4))),
    )


def check_placement(answer: Placement, round_view: RoundView, cluster: ClusterView) -> None:
    usable = {name: e for name, e in cluster.engines.items() if name not in round_view.excluded}
    need = round_view.prompt_tokens + round_view.max_output_tokens
    home, prefill = usable[answer.home], usable[answer.prefill_engine]
    assert home.pool_tokens >= need
    assert prefill.pool_tokens >= round_view.prompt_tokens
    assert (answer.arm is Arm.LOCAL) == (answer.home == answer.prefill_engine)
    if answer.arm is not Arm.LOCAL:
        assert home.can_transfer and prefill.can_transfer
    pulled = round_view.held(answer.home) - round_view.held(answer.prefill_engine)
    if answer.arm is Arm.REMOTE_PULL:
        assert pulled > 0
    assert answer.predicted in answer.considered
    assert (answer.predicted.arm, answer.predicted.prefill_engine) == (answer.arm, answer.prefill_engine)
    assert answer.reason
    for candidate in answer.considered:
        assert candidate.prefill_engine in usable
        assert min(candidate.queue_s, candidate.pull_s, candidate.push_s) >= 0
        assert candidate.prefill_s > 0
        assert (candidate.pull_s > 0) == (candidate.arm is Arm.REMOTE_PULL)
    kept = cluster.engines.get(round_view.home or "")
    if kept is not None and can_be_home(kept, round_view):
        assert answer.home == kept.engine_id


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=150, deadline=None)
def test_every_policy_keeps_the_contract(name: str, round_view: RoundView, cluster: ClusterView) -> None:
    """Twice the same answer, views unchanged, live engines that can hold it; a Reject only if none can."""
    before = repr((round_view, cluster))
    answer = make_policy(name).place(round_view, cluster)
    assert make_policy(name).place(round_view, cluster) == answer
    assert repr((round_view, cluster)) == before
    possible = [e for e in cluster.engines.values() if can_be_home(e, round_view)]
    if isinstance(answer, Reject):
        assert not possible
        assert answer.reason and answer.retry_after_s > 0
    else:
        assert possible
        check_placement(answer, round_view, cluster)


@pytest.mark.parametrize("name", sorted(ORDERINGS))
@given(queue=st.lists(rounds(), max_size=8, unique_by=lambda r: r.round_id), cluster=clusters())
@settings(max_examples=50, deadline=None)
def test_every_ordering_is_a_permutation(name: str, queue: list[RoundView], cluster: ClusterView) -> None:
    """Nothing is dropped or doubled, and the order does not depend on the order that it was given in."""
    ordered = make_ordering(name).order(queue, cluster)
    assert sorted(r.round_id for r in ordered) == sorted(r.round_id for r in queue)
    assert list(make_ordering(name).order(queue[::-1], cluster)) == list(ordered)


@given(round_view=rounds(), cluster=clusters())
@settings(max_examples=150, deadline=None)
def test_the_shortlist_finds_the_exhaustive_choice(round_view: RoundView, cluster: ClusterView) -> None:
    """Without decode steps between chunks and with at most 4 holders, 4 + 4 looked at equal all looked at."""
    quiet = {name: replace(engine, decode_interval=0) for name, engine in cluster.engines.items()}
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
