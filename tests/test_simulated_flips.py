"""Pools that follow the load, in simulated time: flips carried out, sessions moved, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from antiphon.engines.cluster import load_cluster, resolve_engines
from antiphon.policies.leaving import Leaving
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.simulated_flips import RepoolingSimulation
from antiphon.scheduler.simulation import RoundEnd, Targets
from antiphon.traces.schema import RoundTrace, SessionTrace
from tests.simulation_helpers import cluster_file

QUICK = RepoolConfig(
    enabled=True, period_s=1.0, window_s=10.0, sustain=2, cool_down_s=10.0, drain_limit_s=20.0, margin=0.05
)


def day(prefill_s: float, decode_s: float, times: int = 1) -> list[tuple[float, SessionTrace]]:
    """Long prompts for so many seconds, then long answers for so many; so many times."""
    starts: list[tuple[float, SessionTrace]] = []
    at_s = 0.0
    for _ in range(times):
        until_s = at_s + prefill_s
        while at_s < until_s:
            rounds = RoundTrace(6000, 4), RoundTrace(7000, 4, 6004, 2.0)
            starts.append((at_s, SessionTrace(f"p{len(starts)}", rounds)))
            at_s += 0.5
        until_s = at_s + decode_s
        while at_s < until_s:
            rounds = RoundTrace(100, 300), RoundTrace(450, 300, 400, 1.0)
            starts.append((at_s, SessionTrace(f"d{len(starts)}", rounds)))
            at_s += 0.1
    return starts


def simulate(
    path: Path,
    starts: Sequence[tuple[float, SessionTrace]],
    config: RepoolConfig = QUICK,
    policy: str = "remote",
) -> tuple[RepoolingSimulation, list[RoundEnd]]:
    cluster = load_cluster(path)
    specs = resolve_engines(cluster, path.parent)
    core = Scheduler(Leaving(make_policy(policy)), make_ordering("fcfs"), specs[0].latency)
    ends: list[RoundEnd] = []
    targets = Targets(cluster.slo.ttft_s, cluster.slo.itl_s)
    simulation = RepoolingSimulation(core, cluster, specs, targets, ends.append, config=config)
    simulation.run(iter(starts))
    core.check_invariants()
    for engine in simulation.engines.values():
        engine.check_invariants()
    return simulation, ends


def test_pools_follow_the_load_both_ways(tmp_path: Path) -> None:
    simulation, ends = simulate(cluster_file(tmp_path, prefill=2, decode=2), day(60.0, 60.0))
    directions = [record.flip.direction for record in simulation.flips]
    assert directions[0] == "decode_to_prefill" and "prefill_to_decode" in directions
    assert {end.receipt.outcome for end in ends} == {Outcome.COMPLETED}
    assert {end.receipt.pools for end in ends} >= {"2p+2d", "3p+1d"}
    assert all("0" not in record.pools for record in simulation.flips), "a pool was emptied"
    began = [record.began_s for record in simulation.flips]
    ended = [record.ended_s for record in simulation.flips]
    gaps = [after - before for before, after in zip(ended, began[1:], strict=False)]
    assert all(gap >= QUICK.cool_down_s for gap in gaps)


def test_sessions_leave_with_their_kv_before_the_flip(tmp_path: Path) -> None:
    """What a round finds at its new home was moved: it is not computed again."""
    path = cluster_file(tmp_path, prefill=2, decode=2, link=2e10)
    path.write_text(path.read_text().replace("store_tokens = 160000", "store_tokens = 1600000"))
    simulation, ends = simulate(path, day(40.0, 0.0), policy="remote_pull_always")
    flip = next(r for r in simulation.flips if r.flip.direction == "decode_to_prefill")
    assert flip.result == "done" and flip.moved_sessions > 0 and flip.moved_bytes > 0
    assert flip.ended_s > flip.began_s
    second = [end for end in ends if end.number == 2]
    assert all(end.receipt.cached_tokens > 5000 for end in second)
    late = [e for e in ends if e.sent_s > flip.ended_s and e.receipt.home == flip.flip.engine_id]
    assert not late, "a round was decoded where nobody is at home any more"


def test_the_same_run_twice_and_nothing_with_a_margin_out_of_reach(tmp_path: Path) -> None:
    path, starts = cluster_file(tmp_path, prefill=2, decode=2), day(30.0, 30.0)
    one, two = simulate(path, starts), simulate(path, starts)
    assert one[0].flips == two[0].flips and one[1] == two[1]
    still = RepoolConfig(enabled=True, period_s=1.0, window_s=10.0, margin=100.0)
    assert not simulate(path, starts, still)[0].flips


@pytest.mark.parametrize("died", ["decode-0", "decode-1", "prefill-0"])
def test_deaths_during_flips_lose_nothing_and_a_mark_outlives_its_engine(tmp_path: Path, died: str) -> None:
    """Whatever dies, every 7 s for 2 s: flips are given up or done, the rest of the fleet goes on."""
    events = "".join(
        f'\n[[events]]\nat_s = {at}\nengine = "{died}"\nkind = "{kind}"\n'
        for down in range(5, 60, 7)
        for at, kind in ((down, "down"), (down + 2, "up"))
    )
    path = cluster_file(tmp_path, prefill=2, decode=2)
    path.write_text(path.read_text() + events)
    simulation, ends = simulate(path, day(40.0, 30.0))
    assert simulation.flips
    assert sum(end.receipt.outcome is Outcome.COMPLETED for end in ends) > 0.8 * len(ends)
    for engine_id, book in simulation.core.books.fleet.books.items():
        changed = [
            r.flip for r in simulation.flips if r.flip.engine_id == engine_id and r.result != "given_up"
        ]
        if changed:
            assert book.pool is changed[-1].to_pool
