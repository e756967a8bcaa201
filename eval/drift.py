"""`make drift`: a day with a shifting mix on eight engines: static splits against pools that follow the load.

Everything runs by the production core on simulated engines. An hour of the day takes `hour_s` seconds: drift
is 3600 / hour_s times as fast as in life, and the controller's times are set for that (`FAST`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from antiphon.engines.cluster import Cluster, load_cluster, resolve_engines
from antiphon.eval.cluster_files import find_cluster
from antiphon.eval.drift_day import HOURS, day
from antiphon.eval.drift_page import figure, table
from antiphon.eval.drift_types import Days, FlipTold, Run
from antiphon.policies.leaving import Leaving
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.simulated_flips import FlipRecord, RepoolingSimulation
from antiphon.scheduler.simulation import RoundEnd, Simulation, Targets
from antiphon.traces.arrivals import Arrivals, Start, schedule
from antiphon.traces.schema import SessionTrace

CLUSTER = "4p4d-qwen3-32b-h200"
ENGINES = 8
PEAKS = {"review": 2.6, "reasoning": 2.2, "agents": 0.3}
"""Sessions per second at load 1, when each kind at its height asks for about all of the fleet's time."""

FAST = RepoolConfig(
    enabled=True, period_s=5, window_s=60, sustain=2, cool_down_s=20, drain_limit_s=30, memory_s=60
)
ONLINE = {
    "online": FAST,
    "held": replace(FAST, margin=1e9),
    "long memory": replace(FAST, memory_s=300),
    "no margin": replace(FAST, margin=0.0),
    "no cool-down": replace(FAST, cool_down_s=0.0, sustain=1, window_s=20),
    "neither": replace(FAST, margin=0.0, cool_down_s=0.0, sustain=1, window_s=20),
    "arrow": replace(FAST, rule="arrow", period_s=1, sustain=3, cool_down_s=10),
}
"""The last as in its reference: three ticks, ten seconds."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One run."""

    policy: str
    prefill: int
    seed: int
    days: Days
    online: str = ""
    """Name of the controller; "" = the split stays. `prefill` 0 = all co-located."""


def cluster_of(prefill: int) -> Cluster:
    """The bundled cluster's engines, split so: each with the chunk size of the pool that it starts in."""
    cluster = load_cluster(find_cluster(CLUSTER))
    counts = {"prefill": prefill, "decode": ENGINES - prefill}
    groups = [msgspec.structs.replace(g, count=counts[g.pool]) for g in cluster.engines if counts[g.pool]]
    return msgspec.structs.replace(cluster, engines=tuple(groups))


def run(setting: Setting) -> Run:
    cluster = cluster_of(setting.prefill)
    sessions = day(
        {kind: rate * setting.days.load for kind, rate in PEAKS.items()},
        setting.seed,
        setting.days.hour_s,
        cluster.window_tokens,
    )
    specs = resolve_engines(cluster)
    policy = make_policy(setting.policy, {})
    config = ONLINE.get(setting.online)
    core = Scheduler(
        Leaving(policy) if config else policy,
        make_ordering("fcfs"),
        specs[0].latency,
        CoreConfig(publish=False),
    )
    ends: list[RoundEnd] = []
    told = core, cluster, specs, Targets(cluster.slo.ttft_s, cluster.slo.itl_s), ends.append
    simulation = Simulation(*told) if config is None else RepoolingSimulation(*told, config=config)
    began_s = time.perf_counter()
    simulation.run(iter(schedule(sessions, Arrivals(Start.RECORDED))))
    flips = simulation.flips if isinstance(simulation, RepoolingSimulation) else []
    return _result(setting, sessions, ends, flips, time.perf_counter() - began_s)


def _result(
    setting: Setting,
    sessions: Sequence[SessionTrace],
    ends: Iterable[RoundEnd],
    flips: Sequence[FlipRecord],
    wall_s: float,
) -> Run:
    """A round that never came, as an earlier one of its session failed, attained nothing."""
    hour_s = setting.days.hour_s
    good, sent = [0] * HOURS, [0] * HOURS
    ttft = itl = done = 0
    for end in ends:
        receipt, hour = end.receipt, min(HOURS - 1, int(end.sent_s / hour_s))
        sent[hour] += 1
        completed = receipt.outcome is Outcome.COMPLETED
        in_time = completed and (receipt.ttft_s or 0.0) <= receipt.slo_ttft_s
        smooth = completed and (receipt.itl_s or 0.0) <= receipt.slo_itl_s
        done, ttft, itl = done + completed, ttft + in_time, itl + smooth
        good[hour] += in_time and smooth
    rounds = sum(len(session.rounds) for session in sessions)
    return Run(
        policy=setting.policy,
        prefill=setting.prefill,
        seed=setting.seed,
        online=setting.online,
        rounds=rounds,
        attainment=sum(good) / rounds,
        ttft=ttft / rounds,
        itl=itl / rounds,
        failed=rounds - done,
        by_hour=[g / s if s else 1.0 for g, s in zip(good, sent, strict=True)],
        flips=[
            FlipTold(
                hour=f.began_s / hour_s,
                seconds=f.ended_s - f.began_s,
                engine=f.flip.engine_id,
                direction=f.flip.direction,
                result=f.result,
                moved_sessions=f.moved_sessions,
                moved_bytes=f.moved_bytes,
                pools=f.pools,
                reason=f.flip.reason,
            )
            for f in flips
        ],
        wall_s=wall_s,
    )


def settings(policies: Sequence[str], seeds: Sequence[int], days: Days) -> list[Setting]:
    """Every static split, and all co-located."""
    splits = [Setting(p, n, s, days) for s in seeds for p in policies for n in range(1, ENGINES)]
    return splits + [Setting("local", 0, seed, days) for seed in seeds]


def online_settings(found: Sequence[Run], policies: Sequence[str], days: Days) -> list[Setting]:
    """From the worst static split and from the best, by the mean over seeds; ablations from the best."""
    seeds = list(dict.fromkeys(run.seed for run in found))
    more: list[Setting] = []
    for policy in policies:
        means = {n: 0.0 for n in range(1, ENGINES)}
        for one in found:
            if one.policy == policy:
                means[one.prefill] += one.attainment
        worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        for seed in seeds:
            more += [Setting(policy, n, seed, days, "online") for n in dict.fromkeys((worst, 4, best))]
            more += [Setting(policy, best, seed, days, name) for name in ONLINE if name != "online"]
    return more


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m antiphon.eval.drift", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--policies", nargs="+", default=["adaptive", "ampd", "mooncake", "remote"])
    parser.add_argument("--hour-s", type=float, default=100.0)
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/drift"))
    told = parser.parse_args(arguments)
    days = Days(hour_s=told.hour_s, load=told.load)
    with ProcessPoolExecutor(told.jobs) as pool:
        found: list[Run] = []
        for batch in (settings, online_settings):
            todo = (
                settings(told.policies, told.seeds, days)
                if batch is settings
                else online_settings(found, told.policies, days)
            )
            for one in pool.map(run, todo):
                found.append(one)
                print(one.line(), flush=True)
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "runs.json").write_bytes(
        msgspec.json.format(msgspec.json.encode({"days": days, "runs": found}))
    )
    (told.out / "drift.md").write_text(table(found, days))
    (told.out / "drift.png").write_bytes(figure(found, days))
    print(table(found, days))


if __name__ == "__main__":
    main()
