"""`make fidelity`: one trace live on real engines and in the simulator, and how far the two are apart.

1. the demo's stack starts: one prefill and one decode engine, SGLang with a tiny model on this CPU
2. the decode engine is measured as `calibrate` does, and the gateway starts with what was found
3. the trace is replayed against it in several ways, and measurements go on in between, for speed drifts
4. the same trace is simulated with all that was measured and the live settings, in cluster files made of them
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from antiphon.engines.cluster import Cluster, EngineGroup, Slo
from antiphon.engines.launch_options import LaunchError
from antiphon.eval.calibration import summary
from antiphon.eval.cluster_toml import PROFILE_FILE, write_cluster
from antiphon.eval.demo import DemoError, lock_directory
from antiphon.eval.fidelity_live import Case, FidelityError, FidelityOptions, Live, LiveRun, measure_live
from antiphon.eval.least_squares import FitFailed
from antiphon.eval.probe import ProbeError
from antiphon.eval.simulate import SimulateOptions, run_simulation
from antiphon.eval.stack import StackError
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost
from antiphon.traces.provenance import commit
from antiphon.traces.replay import ReplayError
from antiphon.traces.result_types import RoundRecord
from antiphon.traces.results import percentile
from antiphon.traces.schema import TraceError

FIDELITY_SCHEMA = "antiphon.fidelity/1"
GOAL = 0.10
METRICS = ("ttft_s", "itl_s")
QUANTILES = {"p50": 0.5, "p90": 0.9}


CostT = TypeVar("CostT", PrefillCost, DecodeCost, EngineGroup)


class Row(msgspec.Struct, frozen=True):
    """One quantile of one metric; `error` is simulated over live, less 1."""

    metric: str
    quantile: str
    live: float
    simulated: float
    error: float


class CaseResult(msgspec.Struct, frozen=True):
    """One case; `details` helps to understand its error."""

    case: str
    policy: str
    concurrency: int
    engines: int
    rows: list[Row]
    details: dict[str, Any]
    profile: LatencyModel
    """As measured between the replays of this case."""
    shared_rows: list[Row] = []
    """The same with every pass and request as slow as when the engines always crowd each other."""


class Fidelity(msgspec.Struct, frozen=True):
    """fidelity.json. `rows` are those of the first case."""

    conditions: dict[str, Any]
    rows: list[Row]
    cases: list[CaseResult]
    schema: str = FIDELITY_SCHEMA


async def run_fidelity(options: FidelityOptions, console: Console) -> Fidelity:
    """All five steps. Raises what `measure_live` does, `FidelityError` and `DemoError`."""
    with lock_directory(options.directory):
        shutil.rmtree(options.directory, ignore_errors=True)
        live = await measure_live(options, console)
    console.print(summary(live.runs[options.cases[0]].found), markup=False, highlight=False, soft_wrap=True)
    cases = [simulate_case(case, live.runs[case], options) for case in options.cases]
    result = Fidelity(conditions(live, cases, options), cases[0].rows, cases)
    written = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    (options.directory / "fidelity.json").write_bytes(written)
    console.print(fidelity_table(result))
    return result


# ---------------------------------------------------------------- simulated


def simulate_case(case: Case, live: LiveRun, options: FidelityOptions) -> CaseResult:
    """The case in the simulator, beside what it was live."""
    result = compare(case, live, _simulated(case, live, options, 1.0))
    if case.engines == 1 or not live.slowdown or live.slowdown <= 1:
        return result
    shared = compare(case, live, _simulated(case, live, options, live.slowdown))
    return msgspec.structs.replace(result, shared_rows=shared.rows)


def _simulated(case: Case, live: LiveRun, options: FidelityOptions, slowdown: float) -> list[RoundRecord]:
    """Its rounds, with everything that computes `slowdown` times as slow."""
    suffix = "" if slowdown == 1 else "-shared"
    folder = options.directory / f"simulated-{options.cases.index(case) + 1}{suffix}"
    cluster = live_cluster(live, case, options)
    groups = tuple(_slower(group, "request_fixed_s", slowdown=slowdown) for group in cluster.engines)
    cluster = msgspec.structs.replace(cluster, engines=groups, claim_s=cluster.claim_s * slowdown)
    profile = live.found.profile
    profile = msgspec.structs.replace(
        profile,
        prefill=_slower(profile.prefill, *profile.prefill.__struct_fields__, slowdown=slowdown),
        decode=_slower(profile.decode, "fixed_s", "per_request_s", "per_context_token_s", slowdown=slowdown),
    )
    simulated = run_simulation(
        SimulateOptions(
            trace=options.trace,
            cluster=write_cluster(folder, cluster, profile),
            policy=case.policy,
            concurrency=case.concurrency,
            max_gap_s=options.max_gap_s,
            slo_ttft_s=options.slo_ttft_s,
            slo_itl_s=options.slo_itl_s,
            json_path=folder / "result.json",
        )
    )
    return simulated.rounds


def _slower(cost: CostT, *names: str, slowdown: float) -> CostT:
    return msgspec.structs.replace(cost, **{name: getattr(cost, name) * slowdown for name in names})


def live_cluster(live: LiveRun, case: Case, options: FidelityOptions) -> Cluster:
    """The live stack as a cluster file: the engines as they are, all times as measured without load."""
    found, info = live.found, live.found.info

    def group(name: str, pool: Literal["prefill", "decode"]) -> EngineGroup:
        return EngineGroup(
            count=1,
            pool=pool,
            profile=PROFILE_FILE,
            device_tokens=info.device_tokens,
            store_tokens=found.store_tokens,
            link_bytes_per_s=found.profile.transfer.bytes_per_s,
            chunk_tokens=info.chunk_tokens,
            decode_interval=info.decode_interval,
            max_running_requests=info.max_running_requests,
            request_fixed_s=found.request_fixed_s,
            name=name,
        )

    return Cluster(
        name="fidelity",
        description="the live stack, as calibrated",
        slo=Slo(options.slo_ttft_s, options.slo_itl_s),
        engines=(group("p", "prefill"), group("d", "decode"))[-case.engines :],
        page_tokens=info.page_tokens,
        window_tokens=live.window_tokens or info.window_tokens,
        claim_s=live.cost.seconds,
    )


# ---------------------------------------------------------------- comparing


def compare(case: Case, live: LiveRun, simulated: Sequence[RoundRecord]) -> CaseResult:
    """Quantiles over all live rounds against those of the simulation. Raises `FidelityError`."""
    rows = []
    for metric in METRICS:
        ours, theirs = sorted(_values(live.rounds, metric)), sorted(_values(simulated, metric))
        if not ours or not theirs:
            raise FidelityError(f"{case.name}: no round has a {metric}")
        for name, share in QUANTILES.items():
            a, b = percentile(ours, share), percentile(theirs, share)
            rows.append(Row(metric, name, a, b, b / a - 1))
    details = {
        "rounds_live": len(live.rounds),
        "arms_live": _arms(live.rounds),
        "arms_simulated": _arms(simulated),
        "by_arm": _by_arm(live.rounds, simulated),
        "median_round_error": _round_errors(live.rounds, simulated),
    }
    return CaseResult(
        case.name, case.policy, case.concurrency, case.engines, rows, details, live.found.profile
    )


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


def conditions(live: Live, cases: Sequence[CaseResult], options: FidelityOptions) -> dict[str, Any]:
    """Flat, and in words where they say more: reports print it as it is."""
    first = options.cases[0]
    run = live.runs[first]
    return {
        "trace": options.trace.name,
        "engines": "1 prefill and 1 decode: SGLang, a tiny model, on the CPU",
        "policy": first.policy,
        "live_sessions": first.concurrency,
        "replays": options.repeats,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "why": why(run, cases),
        "request_fixed_s": round(run.found.request_fixed_s, 5),
        "gateway_http_s": round(run.cost.http_s, 5),
        "gateway_claim_s": round(run.cost.claim_s, 5),
        "shared_cores_slowdown": run.slowdown and round(run.slowdown, 2),
        "live_s": round(live.seconds),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }


def why(run: LiveRun, cases: Sequence[CaseResult]) -> str:
    """What the other cases and the measured slowdown say of the first case's error."""
    said = [f"engines, gateway and client share {os.cpu_count()} cores, and that is not simulated"]
    if run.slowdown is not None:
        said.append(f"a prefill takes {run.slowdown:.2f} times as long while the other engine works")
    if cases[0].shared_rows:
        said.append(f"were it always so: {_errors(cases[0].shared_rows)}")
    return "; ".join([*said, *(f"{case.case}: {_errors(case.rows)}" for case in cases[1:])])


def _errors(rows: Sequence[Row]) -> str:
    return ", ".join(f"{_label(row)} {row.error:+.0%}" for row in rows)


def _label(row: Row) -> str:
    return f"{row.metric.removesuffix('_s').upper()} {row.quantile}"


def fidelity_table(result: Fidelity) -> Table:
    """Every case, a row a quantile; what explains the errors stands below."""
    table = Table(title=f"simulated against live, goal {GOAL:.0%}", title_justify="left")
    for name in ("case", "metric", "live", "simulated", "error"):
        table.add_column(name, justify="left" if name in ("case", "metric") else "right")
    for case in result.cases:
        for index, row in enumerate(case.rows):
            shown = (f"{row.live * 1e3:.1f} ms", f"{row.simulated * 1e3:.1f} ms", f"{row.error:+.1%}")
            table.add_row("" if index else case.case, _label(row), *shown, end_section=row is case.rows[-1])
    table.caption = str(result.conditions["why"])
    return table


def main(arguments: list[str] | None = None) -> int:
    """0 = compared (whatever the error), 1 = something failed (said on stderr)."""
    defaults = FidelityOptions()
    parser = argparse.ArgumentParser(
        prog="python -m antiphon.eval.fidelity", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--directory", type=Path, default=defaults.directory)
    parser.add_argument("--trace", type=Path, default=defaults.trace)
    parser.add_argument("--repeats", type=int, default=defaults.repeats, help="replays of each case")
    given = parser.parse_args(arguments)
    options = FidelityOptions(directory=given.directory, trace=given.trace, repeats=given.repeats)
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
