"""The simulator's speed: rounds per wall second of one core, beside Dynamo's offline replay in the same run.

Both replay the same sessions with the same starts on the same cluster; repeats of the two take turns, and
each counts with its best. What the two simulate differs (`dynamo_replay.py` says how), so the ratio says what
a sweep costs with either, not that one does the other's work. Without a Python that has ai-dynamo only ours
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from antiphon.eval.dynamo_replay import DynamoRun, replay_with_dynamo
from antiphon.eval.simulate import Prepared, SimulateOptions, prepare, run_simulation
from antiphon.scheduler.simulated_sessions import split_children
from antiphon.traces.arrivals import schedule
from antiphon.traces.generate import generate, take
from antiphon.traces.profiles import load_profile
from antiphon.traces.result_types import RunResult
from antiphon.traces.writers import WRITERS

TARGET_ROUNDS_PER_S = 10_000
DEFAULT_SESSIONS = 173
"""As many as the WEKA subset has."""


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """What is simulated, and how often."""

    trace: Path
    cluster: str = "2p2d-qwen3-32b-h200"
    policy: str = "ampd"
    load: float = 0.5
    seed: int = 0
    repeats: int = 5
    max_sessions: int | None = DEFAULT_SESSIONS
    dynamo: Path | None = None
    """A Python with ai-dynamo."""


def measure_speed(options: SpeedOptions) -> dict[str, Any]:
    """Ours and Dynamo's best of `repeats`, as a section of the bench's result. Raises as both do."""
    simulate = SimulateOptions(
        trace=options.trace,
        cluster=options.cluster,
        policy=options.policy,
        load=options.load,
        seed=options.seed,
        max_sessions=options.max_sessions,
    )
    prepared = prepare(simulate)
    ours: list[RunResult] = []
    theirs: list[DynamoRun] = []
    for _ in range(options.repeats):
        ours.append(run_simulation(simulate, prepared))
        if options.dynamo is not None:
            theirs.append(_dynamo(options.dynamo, prepared))
    best = min(ours, key=lambda result: result.wall_s)
    section: dict[str, Any] = {
        "trace": str(options.trace),
        "cluster": options.cluster,
        "policy": options.policy,
        "load": options.load,
        "rounds": best.rounds_completed,
        "simulated_s": best.simulated_s,
        "wall_s": [result.wall_s for result in ours],
        "rounds_per_s": best.rounds_completed / best.wall_s,
        "target_rounds_per_s": TARGET_ROUNDS_PER_S,
        "dynamo": None,
    }
    if theirs:
        peer = min(theirs, key=lambda run: run.wall_s)
        section["dynamo"] = {
            "version": peer.version,
            "requests": peer.requests,
            "wall_s": [run.wall_s for run in theirs],
            "requests_per_s": peer.requests_per_s,
            "ratio": section["rounds_per_s"] / peer.requests_per_s,
        }
    return section


def generated_trace(path: Path) -> Path:
    """Sessions of the claude-code profile, the same each time: for who has no recorded trace."""
    sessions = generate("claude-code", load_profile("claude-code"))
    with path.open("wb") as out:
        WRITERS["antiphon"](take(sessions, sessions=DEFAULT_SESSIONS), out)
    return path


def _dynamo(python: Path, prepared: Prepared) -> DynamoRun:
    tops, children = split_children(prepared.sessions)
    starts = schedule(tops, prepared.arrivals)
    for start_s, parent in list(starts):
        starts += [(start_s, child) for child in children.get(parent.session_id, ())]
    starts.sort(key=lambda start: start[0])
    return replay_with_dynamo(python, starts, prepared.cluster, prepared.specs)


def print_speed(section: dict[str, Any], console: Console) -> None:
    """The section as a table and a verdict."""
    table = Table(title=f"simulators, {section['rounds']} rounds, {section['cluster']}, best of repeats")
    for heading in ("simulator", "wall s", "rounds/s"):
        table.add_column(heading, justify="left" if heading == "simulator" else "right")
    rate = section["rounds_per_s"]
    table.add_row(f"antiphon simulate, {section['policy']}", f"{min(section['wall_s']):.2f}", f"{rate:,.0f}")
    peer = section["dynamo"]
    if peer is not None:
        name = f"Dynamo {peer['version']} offline replay, KV router"
        table.add_row(name, f"{min(peer['wall_s']):.2f}", f"{peer['requests_per_s']:,.0f}")
    console.print(table)
    said = "met" if rate >= section["target_rounds_per_s"] else "MISSED"
    console.print(f"simulator: {rate:,.0f} rounds/s; target {section['target_rounds_per_s']:,}: {said}")
    if peer is None:
        console.print("Dynamo was not measured: give --dynamo a Python that has ai-dynamo 1.6.1")
    else:
        console.print(f"simulator: {peer['ratio']:.1f} x Dynamo's replay of the same sessions")
