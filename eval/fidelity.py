"""`make fidelity`: one trace live on real engines and in the simulator, and how far the two are apart.

1. the demo's stack starts: one prefill and one decode engine, SGLang with a tiny model on this CPU
2. `calibrate` measures one of them, and what a request costs on its way through the gateway
3. the gateway starts with that profile; the trace is replayed against it, several times
4. the same trace is simulated with that profile and the live settings, in a cluster file written for it
5. TTFT and ITL, p50 and p90, live against simulated: printed, and written as fidelity.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from antiphon.engines.cluster import Cluster, EngineGroup, Slo
from antiphon.engines.launch_options import LaunchError
from antiphon.engines.tiny_model import write_tiny_model
from antiphon.eval.calibrate import CalibrateOptions, Sampler, sampling
from antiphon.eval.calibration import Calibration, summary
from antiphon.eval.cluster_toml import write_cluster
from antiphon.eval.demo import BUNDLED_TRACE, DemoError, free_ports, lock_directory
from antiphon.eval.gateway_cost import GatewayCost, measure_gateway
from antiphon.eval.least_squares import FitFailed
from antiphon.eval.probe import ProbeError
from antiphon.eval.simulate import SimulateOptions, run_simulation
from antiphon.eval.stack import EngineSpec, Stack, StackError
from antiphon.traces.provenance import commit, machine
from antiphon.traces.replay import ReplayError, ReplayOptions, replay
from antiphon.traces.result_types import RoundRecord, RunResult
from antiphon.traces.results import percentile
from antiphon.traces.schema import TraceError

FIDELITY_SCHEMA = "antiphon.fidelity/1"
GOAL = 0.10
METRICS = ("ttft_s", "itl_s")
QUANTILES = {"p50": 0.5, "p90": 0.9}
PREFILL_ENGINE, DECODE_ENGINE = "p0", "d0"


class FidelityError(Exception):
    """The comparison cannot be made: what failed."""


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """What `make fidelity` can be told."""

    directory: Path = Path("build/fidelity")
    trace: Path = BUNDLED_TRACE
    policy: str = "ampd"
    concurrency: int = 2
    """Live sessions: a closed loop, live and simulated."""
    max_gap_s: float = 60.0
    repeats: int = 5
    """Replays, each with tokens of its own, and measurements after each; all their rounds count."""
    slo_ttft_s: float = 1.0
    slo_itl_s: float = 0.1
    most_tokens: int = 2100
    """Longest prompt of the calibration: about the longest of the trace."""


class Row(msgspec.Struct, frozen=True):
    """One quantile of one metric; `error` is simulated over live, less 1."""

    metric: str
    quantile: str
    live: float
    simulated: float
    error: float


class Fidelity(msgspec.Struct, frozen=True):
    """fidelity.json. `rows` is the comparison, `details` what helps to understand it."""

    conditions: dict[str, Any]
    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)
    schema: str = FIDELITY_SCHEMA


class LiveRun(NamedTuple):
    rounds: list[RoundRecord]
    window_tokens: int
    wall_s: float

    def joined(self, other: LiveRun) -> LiveRun:
        return LiveRun(self.rounds + other.rounds, other.window_tokens, self.wall_s + other.wall_s)


async def run_fidelity(options: FidelityOptions, console: Console) -> Fidelity:
    """All five steps. Raises `FidelityError`, `StackError`, `DemoError`, `ProbeError`, `FitFailed`."""
    with lock_directory(options.directory):
        shutil.rmtree(options.directory, ignore_errors=True)
        model = options.directory / "model"
        write_tiny_model(model)
        async with Stack(options.directory) as stack:
            console.print("starting one prefill and one decode engine (about a minute) ...")
            ports = free_ports(2)
            specs = [
                EngineSpec(PREFILL_ENGINE, "prefill", ports[0]),
                EngineSpec(DECODE_ENGINE, "decode", ports[1]),
            ]
            await stack.start_engines(model, specs)
            async with sampling(_calibration_options(stack, options)) as sampler:
                found, cost, live = await _measure(stack, sampler, options, console)
    cluster = _cluster(found, cost, live, options)
    path = write_cluster(options.directory / "simulation", cluster, found.profile)
    simulated = run_simulation(_simulate_options(options, path))
    result = compare(live.rounds, simulated, _conditions(found, cost, live, options))
    (options.directory / "fidelity.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    )
    console.print(fidelity_table(result))
    return result


# ---------------------------------------------------------------- live


def _calibration_options(stack: Stack, options: FidelityOptions) -> CalibrateOptions:
    return CalibrateOptions(
        url=stack.engines[DECODE_ENGINE].url,
        ledger=stack.ledger_url,
        fleet=stack.fleet,
        peer=PREFILL_ENGINE,
        state_dir=str(stack.state_dir),
        name="fidelity",
        most_tokens=options.most_tokens,
    )


async def _measure(
    stack: Stack, sampler: Sampler, options: FidelityOptions, console: Console
) -> tuple[Calibration, GatewayCost, LiveRun]:
    """Measurements and replays by turns: a machine's speed drifts, and both must see the same of it."""
    console.print("calibrating ...")
    await sampler.round()
    profile = options.directory / "first-profile.json"
    profile.write_bytes(msgspec.json.encode(sampler.fit().profile))
    (port,) = free_ports(1)
    await stack.start_gateway(
        *("--policy", options.policy, "--profile", str(profile)),
        *("--slo-ttft", f"{options.slo_ttft_s}", "--slo-itl", f"{options.slo_itl_s}"),
        *("--record", str(options.directory / "recording")),
        port=port,
        engines=2,
    )
    costs, live = [], LiveRun([], 0, 0.0)
    for repeat in range(options.repeats):
        costs.append(await measure_gateway(stack.gateway_url, "model"))
        live = live.joined(await _replay(stack, options, repeat, console))
        await sampler.round()
    found = sampler.fit()
    console.print(summary(found), markup=False, highlight=False, soft_wrap=True)
    cost = GatewayCost(*(statistics.median(values) for values in zip(*costs, strict=True)))
    console.print(f"gateway: {cost.seconds * 1e3:.1f} ms on the way of a request without load")
    return found, cost, live


async def _replay(stack: Stack, options: FidelityOptions, repeat: int, console: Console) -> LiveRun:
    result = await replay(
        ReplayOptions(
            options.trace,
            stack.gateway_url,
            concurrency=options.concurrency,
            max_gap_s=options.max_gap_s,
            seed=repeat,  # other tokens each time: nothing of an earlier replay is cached
            slo_ttft_s=options.slo_ttft_s,
            slo_itl_s=options.slo_itl_s,
        ),
        lambda record: None,
    )
    if result.rounds_completed != result.rounds_total:
        raise FidelityError(f"only {result.rounds_completed} of {result.rounds_total} rounds completed live")
    console.print(f"replay {repeat + 1} of {options.repeats}: {result.wall_s:.0f} s, arms {result.arms}")
    return LiveRun(result.rounds, result.conditions.window_tokens or 0, result.wall_s)


# ---------------------------------------------------------------- simulated


def _cluster(found: Calibration, cost: GatewayCost, live: LiveRun, options: FidelityOptions) -> Cluster:
    """The live stack as a cluster file."""
    info = found.info

    def group(name: str, pool: str) -> EngineGroup:
        return msgspec.convert(
            {
                "count": 1,
                "pool": pool,
                "profile": "profile.json",
                "device_tokens": info.device_tokens,
                "store_tokens": found.store_tokens,
                "link_bytes_per_s": found.profile.transfer.bytes_per_s,
                "chunk_tokens": info.chunk_tokens,
                "decode_interval": info.decode_interval,
                "max_running_requests": info.max_running_requests,
                "request_fixed_s": found.request_fixed_s,
                "name": name,
            },
            EngineGroup,
        )

    return Cluster(
        name="fidelity",
        description="the live stack, as calibrated",
        slo=Slo(options.slo_ttft_s, options.slo_itl_s),
        engines=(group("p", "prefill"), group("d", "decode")),
        page_tokens=info.page_tokens,
        window_tokens=live.window_tokens or info.window_tokens,
        claim_s=cost.seconds,
    )


def _simulate_options(options: FidelityOptions, cluster: Path) -> SimulateOptions:
    return SimulateOptions(
        trace=options.trace,
        cluster=cluster,
        policy=options.policy,
        concurrency=options.concurrency,
        max_gap_s=options.max_gap_s,
        slo_ttft_s=options.slo_ttft_s,
        slo_itl_s=options.slo_itl_s,
        json_path=cluster.parent / "result.json",
    )


# ---------------------------------------------------------------- comparing


def compare(live: Sequence[RoundRecord], simulated: RunResult, conditions: dict[str, Any]) -> Fidelity:
    """Quantiles over all live rounds against those of the simulation."""
    rows = []
    for metric in METRICS:
        ours = sorted(_values(live, metric))
        theirs = sorted(_values(simulated.rounds, metric))
        if not ours or not theirs:
            raise FidelityError(f"no round has a {metric}")
        for name, share in QUANTILES.items():
            a, b = percentile(ours, share), percentile(theirs, share)
            rows.append(Row(metric, name, a, b, b / a - 1))
    details = {
        "arms_live": _arms(live),
        "arms_simulated": _arms(simulated.rounds),
        "by_arm": _by_arm(live, simulated.rounds),
        "median_round_error": _round_errors(live, simulated.rounds),
    }
    return Fidelity(conditions, rows, details)


def _by_arm(live: Sequence[RoundRecord], simulated: Sequence[RoundRecord]) -> dict[str, Any]:
    """Mean TTFT and its parts, in seconds, by arm."""
    found: dict[str, Any] = {}
    for side, rounds in (("live", live), ("simulated", simulated)):
        for arm in sorted({record.arm for record in rounds if record.completed}):
            mine = [record for record in rounds if record.completed and record.arm == arm]
            parts = ("ttft_s", "gateway_ttft_s", "queue_s", "pull_s", "prefill_s", "push_s", "itl_s")
            means = {part: statistics.fmean(values) for part in parts if (values := _values(mine, part))}
            found.setdefault(arm, {})[side] = {"rounds": len(mine), **means}
    return found


def _round_errors(live: Sequence[RoundRecord], simulated: Sequence[RoundRecord]) -> dict[str, float]:
    """Median over rounds of |simulated / live - 1|, round by round."""
    by_round = {(record.session, record.round): record for record in simulated}
    found: dict[str, float] = {}
    for metric in METRICS:
        errors = []
        for record in live:
            other = by_round.get((record.session, record.round))
            a, b = getattr(record, metric), getattr(other, metric, None)
            if a and b:
                errors.append(abs(b / a - 1))
        if errors:
            found[metric] = statistics.median(errors)
    return found


def _values(rounds: Sequence[RoundRecord], metric: str) -> list[float]:
    return [value for record in rounds if record.completed and (value := getattr(record, metric)) is not None]


def _arms(rounds: Sequence[RoundRecord]) -> dict[str, float]:
    """Share of the completed rounds."""
    arms = [record.arm for record in rounds if record.completed]
    return {arm: arms.count(arm) / len(arms) for arm in sorted(set(arms))}


def _conditions(
    found: Calibration, cost: GatewayCost, live: LiveRun, options: FidelityOptions
) -> dict[str, Any]:
    return {
        "trace": str(options.trace.name),
        "policy": options.policy,
        "concurrency": options.concurrency,
        "repeats": options.repeats,
        "rounds_live": len(live.rounds),
        "engines": "1 prefill, 1 decode: SGLang with a tiny model on the CPU",
        "profile": msgspec.to_builtins(found.profile),
        "request_fixed_s": found.request_fixed_s,
        "gateway_http_s": cost.http_s,
        "gateway_claim_s": cost.claim_s,
        "replay_s": live.wall_s,
        "machine": machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "commit": commit(),
    }


def fidelity_table(result: Fidelity) -> Table:
    """The comparison, a row a quantile."""
    table = Table(title=f"simulated against live, goal {GOAL:.0%}", title_justify="left")
    for name in ("metric", "quantile", "live", "simulated", "error"):
        table.add_column(name, justify="left" if name in ("metric", "quantile") else "right")
    for row in result.rows:
        shown = (f"{row.live * 1e3:.1f} ms", f"{row.simulated * 1e3:.1f} ms", f"{row.error:+.1%}")
        table.add_row(row.metric.removesuffix("_s").upper(), row.quantile, *shown)
    return table


def main(arguments: list[str] | None = None) -> int:
    """0 = compared (whatever the error), 1 = something failed (said on stderr)."""
    defaults = FidelityOptions()
    parser = argparse.ArgumentParser(
        prog="python -m antiphon.eval.fidelity", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--directory", type=Path, default=defaults.directory)
    parser.add_argument("--trace", type=Path, default=defaults.trace)
    parser.add_argument("--policy", default=defaults.policy)
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency)
    parser.add_argument("--repeats", type=int, default=defaults.repeats)
    given = parser.parse_args(arguments)
    options = FidelityOptions(
        directory=given.directory,
        trace=given.trace,
        policy=given.policy,
        concurrency=given.concurrency,
        repeats=given.repeats,
    )
    console = Console()
    try:
        asyncio.run(run_fidelity(options, console))
    except (
        FidelityError, DemoError, StackError, LaunchError, ProbeError, FitFailed, ReplayError, TraceError
    ) as error:  # fmt: skip
        print(f"fidelity failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(f"result: {options.directory / 'fidelity.json'}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
