"""`antiphon counterfactual DIR --policy X`: what another policy would have done with what was recorded.

The recorded sessions run in the simulator twice, under the policy that they were recorded under and under X,
at their recorded starts. What differs between the two is the answer. How far the first is from what was
measured is shown beside it: no difference that is smaller than that means anything.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from antiphon.engines.cluster import ClusterError
from antiphon.eval.cluster_toml import write_cluster
from antiphon.eval.recorded_fleet import (
    RecordingError,
    load_facts,
    measured_records,
    recorded_cluster,
    recorded_policy,
)
from antiphon.eval.simulate import SimulateOptions, SimulationError, run_simulation
from antiphon.scheduler.recorded_facts import ReplicaFacts
from antiphon.traces.recording import read_recording, recorded_rounds
from antiphon.traces.result_types import RoundRecord
from antiphon.traces.results import attainment, distribution
from antiphon.traces.schema import SessionTrace, TraceError

COUNTERFACTUAL_SCHEMA = "antiphon.counterfactual/1"
SHOWN_ROUNDS = 5
NO_CAP_S = 1e9
NOTE = (
    "A simulation: the differences are between two simulated runs of the recorded sessions. "
    "Differences smaller than the gap between simulated and measured say nothing."
)


@dataclass(frozen=True, slots=True)
class CounterfactualOptions:
    """What `antiphon counterfactual` can be told."""

    directory: Path
    """A recording."""
    policy: str
    ordering: str | None = None
    """None = the recorded one."""
    cluster: str | Path | None = None
    """A bundled name or a TOML file; None = the recorded fleet."""
    seed: int = 0
    json_path: Path | None = None
    policy_parameters: Mapping[str, object] = field(default_factory=dict)


class Column(msgspec.Struct, frozen=True):
    """One run, over the rounds that were recorded as completed. Times in seconds; None = no such round."""

    policy: str
    rounds: int
    attainment_rounds: float
    attainment_sessions: float
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p50_s: float | None
    itl_p90_s: float | None
    arms: dict[str, int]
    bytes_moved: int


class ChangedRound(msgspec.Struct, frozen=True):
    """A round whose simulated TTFT differs most between the policies."""

    session: str
    round: int
    prompt_tokens: int
    recorded_arm: str
    """As simulated under the recorded policy."""
    other_arm: str
    recorded_ttft_s: float
    other_ttft_s: float


class Counterfactual(msgspec.Struct, frozen=True):
    """The answer, as `--json` writes it."""

    recording: str
    cluster: str
    measured: Column
    simulated: Column
    """Under the recorded policy."""
    other: Column
    model_gap: dict[str, float]
    """Simulated over measured under the recorded policy, less 1."""
    rounds_compared: int
    other_arm: int
    """Rounds that would have had another arm."""
    wins: list[ChangedRound]
    losses: list[ChangedRound]
    schema: str = COUNTERFACTUAL_SCHEMA
    note: str = NOTE


def counterfactual(options: CounterfactualOptions) -> Counterfactual:
    """Simulate both. Raises `RecordingError`, `TraceError`, `ClusterError`, `SimulationError`, `OSError`."""
    sessions = read_recording(options.directory)
    facts = load_facts(options.directory)
    policy = recorded_policy(facts)
    measured = measured_records(options.directory)
    with tempfile.TemporaryDirectory(prefix="antiphon-counterfactual-") as folder:
        trace = _write_trace(Path(folder) / "trace.jsonl", sessions)
        cluster: str | Path
        if options.cluster is None:
            began_s = recorded_rounds(options.directory)[0].arrived_s
            found = recorded_cluster(facts, measured, began_s)
            cluster = write_cluster(Path(folder), found, policy.profile)
        else:
            cluster = options.cluster
        runs = [
            run_simulation(
                SimulateOptions(
                    trace=trace,
                    cluster=cluster,
                    policy=name,
                    ordering=ordering,
                    as_recorded=True,
                    max_gap_s=NO_CAP_S,
                    seed=options.seed,
                    policy_parameters=parameters,
                )
            )
            for name, ordering, parameters in (
                (policy.policy, policy.ordering, policy.policy_parameters),
                (options.policy, options.ordering or policy.ordering, _parameters(options, policy)),
            )
        ]
    counts = {session.session_id: len(session.rounds) for session in sessions}
    columns = [
        column(name, records, counts)
        for name, records in (
            (f"{policy.policy}, measured", measured),
            (f"{policy.policy}, simulated", runs[0].rounds),
            (f"{options.policy}, simulated", runs[1].rounds),
        )
    ]
    return _compared(options, columns, runs[0].rounds, runs[1].rounds)


def run_counterfactual(options: CounterfactualOptions, console: Console | None = None) -> int:
    """The command: 0 = answered, 2 = it could not be."""
    console = console or Console()
    try:
        found = counterfactual(options)
        if options.json_path is not None:
            options.json_path.parent.mkdir(parents=True, exist_ok=True)
            options.json_path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    except (RecordingError, TraceError, ClusterError, SimulationError, OSError) as error:
        console.print(f"antiphon counterfactual: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(table(found))
    for line in closing_lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _parameters(options: CounterfactualOptions, recorded: ReplicaFacts) -> Mapping[str, object]:
    """Of the other policy: what was given; the recorded ones if it is the same policy."""
    if options.policy_parameters or options.policy != recorded.policy:
        return options.policy_parameters
    return recorded.policy_parameters


def _write_trace(path: Path, sessions: Sequence[SessionTrace]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(session) + b"\n" for session in sessions))
    return path


# ---------------------------------------------------------------- comparing


def column(policy: str, records: Sequence[RoundRecord], counts: Mapping[str, int]) -> Column:
    """One run's figures; `counts` has every session's rounds, as recorded."""
    done = [record for record in records if record.completed]
    shares = attainment(records, counts)
    ttft = distribution(record.ttft_s for record in done)
    itl = distribution(record.itl_s for record in done)
    return Column(
        policy=policy,
        rounds=len(done),
        attainment_rounds=shares["rounds"],
        attainment_sessions=shares["sessions"],
        ttft_p50_s=ttft.p50 if ttft else None,
        ttft_p90_s=ttft.p90 if ttft else None,
        itl_p50_s=itl.p50 if itl else None,
        itl_p90_s=itl.p90 if itl else None,
        arms=dict(sorted(Counter(record.arm for record in done).items())),
        bytes_moved=sum(
            r.bytes_decode_to_prefill + r.bytes_prefill_to_decode + r.bytes_home_to_home for r in done
        ),
    )


def _compared(
    options: CounterfactualOptions,
    columns: Sequence[Column],
    recorded: Sequence[RoundRecord],
    other: Sequence[RoundRecord],
) -> Counterfactual:
    measured, simulated, elsewhere = columns
    theirs = {(record.session, record.round): record for record in other if record.completed}
    changed = []
    for record in recorded:
        match = theirs.get((record.session, record.round))
        if match is not None and record.ttft_s is not None and match.ttft_s is not None:
            changed.append(
                ChangedRound(
                    session=record.session,
                    round=record.round,
                    prompt_tokens=record.prompt_tokens,
                    recorded_arm=record.arm,
                    other_arm=match.arm,
                    recorded_ttft_s=record.ttft_s,
                    other_ttft_s=match.ttft_s,
                )
            )
    by_gain = sorted(
        changed, key=lambda item: (item.other_ttft_s - item.recorded_ttft_s, item.session, item.round)
    )
    return Counterfactual(
        recording=str(options.directory),
        cluster=str(options.cluster) if options.cluster is not None else "as recorded",
        measured=measured,
        simulated=simulated,
        other=elsewhere,
        model_gap={
            name: there / here - 1
            for name in ("ttft_p50_s", "ttft_p90_s", "itl_p50_s", "itl_p90_s")
            if (here := getattr(measured, name)) and (there := getattr(simulated, name)) is not None
        },
        rounds_compared=len(changed),
        other_arm=sum(item.recorded_arm != item.other_arm for item in changed),
        wins=[item for item in by_gain[:SHOWN_ROUNDS] if item.other_ttft_s < item.recorded_ttft_s],
        losses=[
            item for item in by_gain[: -SHOWN_ROUNDS - 1 : -1] if item.other_ttft_s > item.recorded_ttft_s
        ],
    )


# ---------------------------------------------------------------- showing


def table(found: Counterfactual) -> Table:
    """A row for each figure, a column for each run, and how far the simulation is off."""
    shown = Table(title=f"{found.recording}, fleet {found.cluster}", title_justify="left")
    shown.add_column("")
    for item in (found.measured, found.simulated, found.other):
        shown.add_column(item.policy, justify="right")
    shown.add_column("simulated to measured", justify="right")
    columns = (found.measured, found.simulated, found.other)
    shown.add_row("rounds completed", *(str(item.rounds) for item in columns), "")
    shown.add_row(
        "rounds that attain", *(f"{item.attainment_rounds:.1%}" for item in columns), _points(found, "rounds")
    )
    shown.add_row(
        "sessions that attain",
        *(f"{item.attainment_sessions:.1%}" for item in columns),
        _points(found, "sessions"),
    )
    for label, name in (
        ("TTFT p50", "ttft_p50_s"), ("TTFT p90", "ttft_p90_s"),
        ("ITL p50", "itl_p50_s"), ("ITL p90", "itl_p90_s"),
    ):  # fmt: skip
        gap = found.model_gap.get(name)
        cells = (_milliseconds(getattr(item, name)) for item in columns)
        shown.add_row(label, *cells, f"{gap:+.1%}" if gap is not None else "")
    for arm in sorted({arm for item in columns for arm in item.arms}):
        shown.add_row(f"arm {arm}", *(str(item.arms.get(arm, 0)) for item in columns), "")
    shown.add_row("KV moved, MB", *(f"{item.bytes_moved / 1e6:.1f}" for item in columns), "")
    return shown


def _points(found: Counterfactual, what: str) -> str:
    name = f"attainment_{what}"
    return f"{100 * (getattr(found.simulated, name) - getattr(found.measured, name)):+.1f} points"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def closing_lines(found: Counterfactual) -> list[str]:
    """What is not in the table: changed rounds, the largest differences, and what this is."""

    def told(item: ChangedRound) -> str:
        change = (item.other_ttft_s - item.recorded_ttft_s) * 1e3
        arms = f"{item.recorded_arm} -> {item.other_arm}"
        return f"  {item.session} round {item.round}, {item.prompt_tokens} tokens: {change:+.1f} ms, {arms}"

    lines = [f"{found.other_arm} of {found.rounds_compared} rounds would have had another arm."]
    for title, items in (("largest wins (TTFT):", found.wins), ("largest losses (TTFT):", found.losses)):
        if items:
            lines += [title, *map(told, items)]
    return [*lines, found.note]
