"""What a report is made of: the result files of a folder, grouped into scenarios, series and loads.

A scenario is what may be compared: one trace, shaped one way, on one cluster, under one SLO, with one kind of
load. In it a series is a policy (with its ordering, if there are several), a cell is one series at one load,
and the runs of a cell differ in their seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from antiphon.traces.result_types import RESULT_SCHEMA, RoundRecord, RunResult
from antiphon.traces.results import ResultError, read_result, read_rounds

FIDELITY_SCHEMA = "antiphon.fidelity/1"
ROUNDS_ENDINGS = (".rounds.jsonl.gz", ".rounds.jsonl", ".jsonl.gz", ".jsonl")
"""RESULT.json has its rounds beside it under one of these; the first that is there."""
FAILED_ENDING = ".failed.txt"
MAX_JSON_BYTES = 64 * 1024 * 1024

Figure = Callable[[RunResult], float | None]
"""One number of a result; None where it has none."""


class FidelityRow(msgspec.Struct, frozen=True):
    metric: str
    quantile: str
    live: float
    simulated: float
    error: float
    """simulated / live - 1"""


class Fidelity(msgspec.Struct, frozen=True):
    """How far simulated times are from live ones, as `make fidelity` measured it."""

    schema: str
    conditions: dict[str, Any]
    rows: list[FidelityRow]


class Head(msgspec.Struct, frozen=True):
    """What tells one JSON file from another."""

    schema: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One result file."""

    path: Path
    result: RunResult
    rounds_path: Path | None

    @property
    def load(self) -> float | None:
        return self.result.load.value if self.result.load is not None else None


@dataclass(frozen=True, slots=True)
class Span:
    """A figure over the seeds of a cell."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One series at one load; its runs in the order of their seeds."""

    series: str
    load: float | None
    runs: tuple[Run, ...]

    def span(self, figure: Figure) -> Span | None:
        """Mean, lowest and highest over the seeds that have the figure; None if none has."""
        values = [value for run in self.runs if (value := figure(run.result)) is not None]
        if not values:
            return None
        return Span(sum(values) / len(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Scenario:
    """Runs that may be compared. `series` and `loads` are in order; not every pair needs to have a cell."""

    runs: tuple[Run, ...]
    series: tuple[str, ...]
    loads: tuple[float | None, ...]
    cells: Mapping[tuple[str, float | None], Cell]

    @property
    def first(self) -> RunResult:
        return self.runs[0].result

    @property
    def title(self) -> str:
        cluster = self.first.cluster
        return f"{short_path(self.first.trace.path)} on {cluster.name if cluster else 'a live fleet'}"

    def at(self, load: float | None) -> list[Cell]:
        """The cells of one load, in the order of the series."""
        return [self.cells[name, load] for name in self.series if (name, load) in self.cells]

    def over_loads(self, series: str) -> list[Cell]:
        return [self.cells[series, load] for load in self.loads if (series, load) in self.cells]

    @property
    def focus(self) -> float | None:
        """The load at which the series' attainment differs most; the highest one where that says nothing."""
        return max(self.loads, key=lambda load: (len(self.at(load)), self._spread(load), load or 0.0))

    def _spread(self, load: float | None) -> float:
        found = [span.mean for cell in self.at(load) if (span := cell.span(rounds_attained)) is not None]
        return max(found) - min(found) if found else 0.0


@dataclass(slots=True)
class ReportInput:
    """Everything that a folder holds for a report."""

    scenarios: list[Scenario] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    fidelity: Fidelity | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(cell, the last line of its error) of a sweep."""
    unread: list[str] = field(default_factory=list)
    """Files that were left out, and why."""


# ---------------------------------------------------------------- figures


def rounds_attained(result: RunResult) -> float | None:
    return result.attainment["rounds"] if result.attainment else None


def sessions_attained(result: RunResult) -> float | None:
    return result.attainment["sessions"] if result.attainment else None


def quantile(metric: str, name: str) -> Figure:
    """Such as quantile("ttft_s", "p90")."""

    def figure(result: RunResult) -> float | None:
        times = getattr(result, metric)
        return None if times is None else float(getattr(times, name))

    return figure


def per_round(field_name: str) -> Figure:
    """A total of the result over its completed rounds."""

    def figure(result: RunResult) -> float | None:
        total = getattr(result, field_name)
        return None if total is None or not result.rounds_completed else total / result.rounds_completed

    return figure


def arm_shares(cell: Cell) -> dict[str, float]:
    """Arm -> share of the completed rounds of all seeds."""
    counts: dict[str, int] = {}
    for run in cell.runs:
        for arm, count in run.result.arms.items():
            counts[arm] = counts.get(arm, 0) + count
    total = sum(counts.values())
    return {arm: count / total for arm, count in counts.items()} if total else {}


# ---------------------------------------------------------------- reading


def read_folder(directory: Path) -> ReportInput:
    """Every result below `directory`; raises `ResultError` if there is none."""
    found = ReportInput()
    if not directory.is_dir():
        raise ResultError(f"{directory}: not a folder")
    for path in sorted(directory.rglob("*.json")):
        try:
            _read_json(path, found)
        except (OSError, ResultError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            found.unread.append(f"{path.relative_to(directory)}: {str(error).removeprefix(f'{path}: ')}")
    if not found.runs:
        why = f"; not read: {'; '.join(found.unread)}" if found.unread else ""
        raise ResultError(f"{directory}: no result file of schema {RESULT_SCHEMA}{why}")
    for path in sorted(directory.rglob(f"*{FAILED_ENDING}")):
        lines = path.read_text(errors="replace").strip().splitlines()
        found.failed.append((path.name.removesuffix(FAILED_ENDING), lines[-1] if lines else "no reason"))
    if found.fidelity is None:
        found.fidelity = bundled_fidelity()
    found.scenarios = scenarios_of(found.runs)
    return found


def _read_json(path: Path, found: ReportInput) -> None:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ResultError(f"more than {MAX_JSON_BYTES} bytes")
    content = path.read_bytes()
    try:
        schema = msgspec.json.decode(content, type=Head).schema
    except msgspec.ValidationError:
        return  # JSON, but nothing of ours
    if schema == FIDELITY_SCHEMA:
        found.fidelity = msgspec.json.decode(content, type=Fidelity)
    elif schema == RESULT_SCHEMA:
        found.runs.append(Run(path, read_result(path), rounds_beside(path)))


def rounds_beside(path: Path) -> Path | None:
    """The rounds file of a result file, if it was written."""
    stem = path.name.removesuffix(".json")
    names = (path.with_name(stem + ending) for ending in ROUNDS_ENDINGS)
    return next((name for name in names if name.is_file()), None)


def bundled_fidelity() -> Fidelity | None:
    """What came with the package, measured when it was made."""
    entry = resources.files("antiphon.eval") / "data" / "fidelity.json"
    return msgspec.json.decode(entry.read_bytes(), type=Fidelity) if entry.is_file() else None


def rounds_of(run: Run, unread: list[str]) -> list[RoundRecord]:
    """Its rounds; none, and a line in `unread`, if the file cannot be read to its end."""
    if run.rounds_path is None:
        return []
    try:
        return list(read_rounds(run.rounds_path))
    except ResultError as error:
        if (line := str(error).replace(str(run.rounds_path), run.rounds_path.name)) not in unread:
            unread.append(line)
        return []


# ---------------------------------------------------------------- grouping


def scenarios_of(runs: Sequence[Run]) -> list[Scenario]:
    """In the order in which they are first seen."""
    groups: dict[bytes, list[Run]] = {}
    for run in runs:
        groups.setdefault(_scenario_key(run.result), []).append(run)
    return [_scenario(group) for group in groups.values()]


def _scenario_key(result: RunResult) -> bytes:
    """What all runs of a comparison have in common."""
    trace, how = result.trace, result.conditions
    cluster = (result.cluster.name, result.cluster.engines) if result.cluster else None
    load = result.load.kind if result.load else None
    shape = (trace.sha256, trace.sessions, trace.rounds, how.max_gap_s, how.divide, how.window_tokens)
    return msgspec.json.encode([result.kind, shape, cluster, how.model, sorted(result.slo.items()), load])


def _scenario(runs: Sequence[Run]) -> Scenario:
    several = len({run.result.ordering for run in runs}) > 1
    cells: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        name = run.result.variant or run.result.policy or "unknown"
        if several:
            name = f"{name}, {run.result.ordering or 'unknown'}"
        cells.setdefault((name, run.load), []).append(run)
    return Scenario(
        runs=tuple(runs),
        series=tuple(sorted({name for name, _ in cells})),
        loads=tuple(sorted({load for _, load in cells}, key=lambda load: load or 0.0)),
        cells={
            (name, load): Cell(name, load, tuple(sorted(found, key=lambda run: run.result.seed)))
            for (name, load), found in cells.items()
        },
    )


# ---------------------------------------------------------------- words


def short_path(path: str) -> str:
    """The last two parts: which file it is, not where somebody keeps it."""
    return "/".join(Path(path).parts[-2:])


def distinct(values: Iterable[Any]) -> Iterator[Any]:
    """Each once, in the order of first sight."""
    seen: list[Any] = []
    for value in values:
        if value not in seen:
            seen.append(value)
            yield value
