"""The heap driver: cases worked by hand, conservation, deaths of engines, trends over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from antiphon.engines.cluster import load_cluster, resolve_engines
from antiphon.policies.base import Arm
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.simulated_sessions import PageNames, split_children
from antiphon.scheduler.simulation import RoundEnd, Simulation, Targets
from antiphon.traces.arrivals import Arrivals, Start, schedule
from antiphon.traces.schema import RoundTrace, SessionTrace
from tests.simulation_helpers import agent_sessions, cluster_file

CLAIM_S, REQUEST_S = 0.0004, 0.001


class Run:
    """One simulation and what it found."""

    def __init__(
        self,
        path: Path,
        starts: Sequence[tuple[float, SessionTrace]],
        policy: str = "local",
        parameters: dict[str, object] | None = None,
        children: dict[str, list[SessionTrace]] | None = None,
        config: CoreConfig | None = None,
        max_live: int | None = None,
    ) -> None:
        cluster = load_cluster(path)
        specs = resolve_engines(cluster, path.parent)
        core = Scheduler(make_policy(policy, parameters), make_ordering("fcfs"), specs[0].latency, config)
        self.ends: list[RoundEnd] = []
        targets = Targets(cluster.slo.ttft_s, cluster.slo.itl_s)
        self.simulation = Simulation(core, cluster, specs, targets, self.ends.append, max_live)
        self.simulation.run(iter(starts), children)
        core.check_invariants()
        for engine in self.simulation.engines.values():
            engine.check_invariants()

    def of(self, session_id: str) -> list[RoundEnd]:
        return [end for end in self.ends if end.session.session_id == session_id]

    def attained(self) -> float:
        targets = self.simulation.targets
        good = 0
        for end in self.ends:
            r = end.receipt
            good += (
                r.outcome is Outcome.COMPLETED
                and r.ttft_s is not None
                and r.ttft_s <= targets.ttft_s
                and (r.itl_s or 0.0) <= targets.itl_s
            )
        return good / len(self.ends)


def prefill_s(new: int, cached: int) -> float:
    return 0.01 + new * 1e-4 + new * cached * 1e-9 + new * new * 1e-9


def step_s(batch: int, context: int) -> float:
    return 0.008 + batch * 0.0005 + context * 1e-7


def test_one_round_on_one_engine_by_hand(tmp_path: Path) -> None:
    """Claim, request, one prefill pass; then each step one token longer than the one before."""
    session = SessionTrace("s", (RoundTrace(400, 5),))
    run = Run(cluster_file(tmp_path, prefill=0, decode=1), [(2.0, session)])
    (end,) = run.ends
    ttft_s = CLAIM_S + REQUEST_S + prefill_s(400, 0)
    assert end.receipt.ttft_s == pytest.approx(ttft_s, abs=1e-9)
    decode_s = sum(step_s(1, 401 + k) for k in range(4))
    assert end.ended_s == pytest.approx(2.0 + ttft_s + decode_s, abs=1e-9)
    assert end.receipt.itl_s == pytest.approx(decode_s / 4, abs=1e-9)
    assert (end.receipt.arm, end.receipt.cached_tokens, end.sent_s) == (Arm.LOCAL, 0, 2.0)


def test_the_second_round_finds_whole_pages_and_computes_the_rest(tmp_path: Path) -> None:
    """After 400 + 5 tokens KV of 404 is there: 25 pages of 16. The second prompt of 500 computes 100."""
    session = SessionTrace("s", (RoundTrace(400, 5), RoundTrace(500, 1, kept_tokens=405, gap_s=1.5)))
    run = Run(cluster_file(tmp_path, prefill=0, decode=1), [(0.0, session)])
    first, second = run.ends
    assert second.sent_s == pytest.approx(first.ended_s + 1.5, abs=1e-12)
    assert second.receipt.cached_tokens == 400
    expected = CLAIM_S + REQUEST_S + prefill_s(100, 400)
    assert second.receipt.ttft_s == pytest.approx(expected, abs=1e-9)
    assert second.receipt.itl_s is None, "one token has no gap"


def test_a_remote_round_by_hand(tmp_path: Path) -> None:
    """Prefill on p, a pull of whole pages, the rest of a page computed again at home: two engine requests."""
    session = SessionTrace("s", (RoundTrace(500, 2),))
    run = Run(cluster_file(tmp_path, prefill=1, decode=1), [(0.0, session)], "remote")
    (end,) = run.ends
    pages_bytes = 31 * 16 * 50_000
    expected = (
        CLAIM_S
        + (REQUEST_S + prefill_s(500, 0))
        + (0.002 + pages_bytes / 1e9)
        + (REQUEST_S + prefill_s(4, 496) + 0.001 + pages_bytes / 4e9)
    )
    assert end.receipt.ttft_s == pytest.approx(expected, abs=1e-9)
    assert end.receipt.bytes_prefill_to_decode == pages_bytes
    assert end.receipt.arm is Arm.REMOTE_RECOMPUTE
    assert end.receipt.cached_tokens == 0, "one of the two engines computed every token"


def test_without_an_interval_a_prefill_stalls_the_decode_beside_it(tmp_path: Path) -> None:
    """K = 0: all chunks of a long prompt run back to back, and the other round's token waits for them."""
    short = SessionTrace("short", (RoundTrace(100, 60),))
    long = SessionTrace("long", (RoundTrace(4096, 1),))
    starts = [(0.0, short), (0.2, long)]

    def longest_gap(interval: int) -> float:
        run = Run(cluster_file(tmp_path, prefill=0, decode=1, interval=interval), starts)
        (engine,) = run.simulation.engines.values()
        return engine.gaps.quantile(1.0)

    chunks_s = sum(prefill_s(512, 512 * k) for k in range(8))
    assert longest_gap(0) == pytest.approx(chunks_s + step_s(1, 130), rel=0.02)
    assert longest_gap(1) < 0.2 * longest_gap(0)


def test_sessions_share_what_their_prefix_names(tmp_path: Path) -> None:
    """The second session of a prefix finds it; one of another prefix, or of none, does not."""
    rounds = (RoundTrace(400, 2),)
    starts = [
        (0.0, SessionTrace("a", rounds, shared_prefix="x", shared_tokens=320)),
        (1.0, SessionTrace("b", rounds, shared_prefix="x", shared_tokens=320)),
        (2.0, SessionTrace("c", rounds, shared_prefix="y", shared_tokens=320)),
        (3.0, SessionTrace("d", rounds)),
    ]
    run = Run(cluster_file(tmp_path, prefill=0, decode=1), starts)
    assert [end.receipt.cached_tokens for end in run.ends] == [0, 320, 0, 0]


def test_a_compaction_keeps_what_was_kept_and_no_more(tmp_path: Path) -> None:
    """The third round keeps 320 of 800 tokens; the fourth goes on from the third."""
    rounds = (
        RoundTrace(640, 1),
        RoundTrace(800, 1, kept_tokens=641),
        RoundTrace(400, 1, kept_tokens=330),
        RoundTrace(480, 1, kept_tokens=401),
    )
    run = Run(cluster_file(tmp_path, prefill=0, decode=1), [(0.0, SessionTrace("s", rounds))])
    assert [end.receipt.cached_tokens for end in run.ends] == [0, 640, 320, 400]


def test_sub_agents_start_when_their_parents_round_has_ended(tmp_path: Path) -> None:
    """One at the parent's start, one after its first round; the parent's next round does not wait."""
    parent = SessionTrace("p", (RoundTrace(400, 9), RoundTrace(500, 1, kept_tokens=409, gap_s=0.25)))
    early = SessionTrace("early", (RoundTrace(200, 1),), parent="p")
    late = SessionTrace("late", (RoundTrace(200, 1),), parent="p", after_round=1)
    orphan = SessionTrace("orphan", (RoundTrace(200, 1),), parent="nobody")
    tops, children = split_children([parent, early, late, orphan])
    assert tops == [parent, orphan]
    run = Run(cluster_file(tmp_path, prefill=0, decode=1), [(1.0, parent), (9.0, orphan)], children=children)
    first = run.of("p")[0]
    assert run.of("early")[0].sent_s == 1.0
    assert run.of("late")[0].sent_s == first.ended_s
    assert run.of("p")[1].sent_s == pytest.approx(first.ended_s + 0.25)
    assert len(run.ends) == 5


def test_at_most_so_many_sessions_live(tmp_path: Path) -> None:
    """With max_live 1 every session waits for the end of the one before, in order of arrival."""
    sessions = [SessionTrace(f"s{n}", (RoundTrace(300, 3), RoundTrace(400, 2, 303, 0.5))) for n in range(3)]
    run = Run(cluster_file(tmp_path, decode=1), [(0.0, s) for s in sessions], max_live=1)
    names = [end.session.session_id for end in run.ends]
    assert names == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert run.of("s1")[0].sent_s == run.of("s0")[1].ended_s


@pytest.mark.parametrize("policy", ["ampd", "local", "remote"])
def test_tokens_in_are_tokens_out(policy: str, tmp_path: Path) -> None:
    """Every round completes once with its own output; what was computed and reused adds up to the prompts."""
    sessions = agent_sessions(40, 3)
    starts = schedule(sessions, Arrivals(Start.POISSON, 8.0, 3))
    run = Run(cluster_file(tmp_path, device=12_000), starts, policy)
    expected = {f"{s.session_id}/{n}": turn for s in sessions for n, turn in enumerate(s.rounds, 1)}
    assert {end.receipt.round_id: end.receipt.completion_tokens for end in run.ends} == {
        name: turn.output_tokens for name, turn in expected.items()
    }
    engines = run.simulation.engines.values()
    assert sum(e.totals.output_tokens for e in engines) == sum(t.output_tokens for t in expected.values())
    computed = sum(e.totals.prefill_tokens_computed for e in engines)
    needed = sum(end.receipt.prompt_tokens - end.receipt.cached_tokens for end in run.ends)
    retracted = sum(e.totals.retractions for e in engines)
    if policy == "local" and not retracted:
        assert computed == needed
    else:
        assert computed >= needed, "a part of a page, or a page that did not come, is computed twice"


def test_two_runs_are_equal(tmp_path: Path) -> None:
    """Equal inputs, equal receipts and times, to the last bit."""
    starts = schedule(agent_sessions(30, 5), Arrivals(Start.POISSON, 8.0, 5))
    path = cluster_file(tmp_path)
    assert Run(path, starts, "ampd").ends == Run(path, starts, "ampd").ends


@pytest.mark.parametrize("engine", ["prefill-0", "decode-0", "decode-1"])
def test_an_engine_dies_and_comes_back_empty(engine: str, tmp_path: Path) -> None:
    """Rounds without a token yet are tried elsewhere; streams that broke end their sessions."""
    more = f"""
[[events]]
at_s = 1.5
engine = "{engine}"
kind = "down"
[[events]]
at_s = 3.0
engine = "{engine}"
kind = "up"
"""
    starts = schedule(agent_sessions(60, 7), Arrivals(Start.POISSON, 20.0, 7))
    policy = "remote" if engine.startswith("prefill") else "ampd"
    run = Run(cluster_file(tmp_path, more=more), starts, policy)
    outcomes = [end.receipt.outcome for end in run.ends]
    broken = outcomes.count(Outcome.FAILED)
    assert outcomes.count(Outcome.COMPLETED) + broken == len(outcomes)
    assert len(run.simulation.dead) == 1 and len(run.simulation.engines) == 4
    dead = run.simulation.dead[0]
    assert dead.totals.prefill_tokens_computed > 0, "it had done nothing when it died: the test shows nothing"
    if engine.startswith("decode"):
        assert broken, "no round was decoding there when it died"
    else:
        assert not broken, "a prefill engine's death must not be seen by a client"
        assert any(len(end.receipt.tries) > 1 for end in run.ends)
    assert any(engine in (e.receipt.home, e.receipt.prefill_engine) for e in run.ends if e.sent_s > 3.0)


def test_a_fleet_without_homes_refuses_at_once(tmp_path: Path) -> None:
    """All decode and prefill engines dead: no_engine_available, and the session is over."""
    down = "".join(
        f'\n[[events]]\nat_s = 0.5\nengine = "{name}-0"\nkind = "down"\n' for name in ("prefill", "decode")
    )
    session = SessionTrace("s", (RoundTrace(300, 1), RoundTrace(400, 1, 301, 5.0), RoundTrace(500, 1, 401)))
    run = Run(cluster_file(tmp_path, prefill=1, decode=1, more=down), [(0.0, session)], "ampd")
    assert [end.receipt.outcome for end in run.ends] == [Outcome.COMPLETED, Outcome.REFUSED]


def test_a_round_without_a_token_by_its_deadline_is_refused(tmp_path: Path) -> None:
    """The core's Tick comes in simulated time too."""
    session = SessionTrace("s", (RoundTrace(20_000, 1),))
    config = CoreConfig(first_token_deadline_s=0.5)
    run = Run(cluster_file(tmp_path, prefill=0, decode=1), [(0.0, session)], config=config)
    (end,) = run.ends
    assert end.receipt.outcome is Outcome.FAILED and end.ended_s == 0.5


# ---------------------------------------------------------------- trends, over the mean of seeds

SEEDS = range(4)
PULL_ALWAYS: dict[str, object] = {"alpha": 1e9}
"""AMPD whose first tier always has slack: every round with a history is pulled."""


def mean_attained(path: Path, rate: float, policy: str, parameters: dict[str, object] | None = None) -> float:
    runs = (
        Run(path, schedule(agent_sessions(50, seed), Arrivals(Start.POISSON, rate, seed)), policy, parameters)
        for seed in SEEDS
    )
    return statistics.fmean(run.attained() for run in runs)


def test_more_bandwidth_helps_who_always_pulls(tmp_path: Path) -> None:
    slow, fast = (
        mean_attained(cluster_file(tmp_path, link=link), 6.0, "ampd", PULL_ALWAYS) for link in (1e8, 4e9)
    )
    assert fast > slow + 0.1


@pytest.mark.parametrize("policy", ["ampd", "local", "remote"])
def test_more_load_lowers_attainment(policy: str, tmp_path: Path) -> None:
    path = cluster_file(tmp_path)
    attained = [mean_attained(path, rate, policy) for rate in (1.0, 8.0, 40.0)]
    assert attained == sorted(attained, reverse=True) and attained[0] > attained[-1] + 0.1


def test_page_names_are_shared_exactly_where_content_is() -> None:
    """Names of kept pages are equal, all others differ; chains say the same by branches."""
    names = PageNames(16)
    rounds = (RoundTrace(160, 17), RoundTrace(240, 16, 177), RoundTrace(200, 1, 100))
    first, second, third = names.plan(SessionTrace("s", rounds))
    assert first.end_hashes == second.hashes[:11] and len(first.end_hashes) == 11
    assert third.hashes[:6] == second.hashes[:6]
    assert not set(third.hashes[6:]) & set(second.end_hashes)
    assert second.chain.branch is first.chain.branch
    assert third.chain.branch.parent is first.chain.branch and third.chain.branch.fork_pages == 6
