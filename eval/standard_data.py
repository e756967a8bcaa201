"""What the standard evaluation found: a cell for each trace, cluster and load.

In a cell every policy is shown under its better ordering. It is won or lost where the policy that is ours
attains more or less than the best other one, and tied within `TIE` of each other, or where the 95 % interval
of the difference, over the seeds, holds 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from antiphon.eval.standard_grid import ABLATION, ABLATION_ORDERING, OURS, WITHOUT_ORDERING, Scenario
from antiphon.eval.sweep import read_done
from antiphon.eval.sweep_spec import cells_of
from antiphon.traces.result_types import RunResult

TIE = 0.01
SATURATION = 1.0
"""Cells at this load and above are shown and not counted."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided quantiles of Student's t for 1 to 10 degrees of freedom; more are taken as 10."""

Verdict = Literal["won", "tied", "lost"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, and how far its 95 % interval reaches to each side; None with a single seed."""

    mean: float
    half: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        count = len(values)
        mean = sum(values) / count
        if count < 2:
            return cls(mean)
        deviation = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
        return cls(mean, T_95[min(count - 1, len(T_95)) - 1] * deviation / count**0.5)


@dataclass(frozen=True, slots=True)
class Shown:
    """A policy at one load, under one ordering."""

    policy: str
    ordering: str
    runs: Mapping[int, RunResult]
    """By seed."""

    @property
    def attained(self) -> Interval:
        return Interval.of([attained(run) for run in self.runs.values()])

    def mean(self, figure: Callable[[RunResult], float | None]) -> float | None:
        """Over the seeds that have the figure."""
        values = [value for run in self.runs.values() if (value := figure(run)) is not None]
        return sum(values) / len(values) if values else None

    def arms(self) -> dict[str, float]:
        """Arm -> share of the completed rounds of all seeds."""
        total = sum(run.rounds_completed for run in self.runs.values())
        names = sorted({arm for run in self.runs.values() for arm in run.arms})
        return {a: sum(r.arms.get(a, 0) for r in self.runs.values()) / total for a in names} if total else {}


def attained(run: RunResult) -> float:
    """Share of rounds."""
    return run.attainment["rounds"] if run.attainment else 0.0


def less(first: Shown, second: Shown) -> Interval | None:
    """The difference in attainment, seed by seed: arrivals are the same. None without a common seed."""
    both = first.runs.keys() & second.runs.keys()
    if not both:
        return None
    return Interval.of([attained(first.runs[s]) - attained(second.runs[s]) for s in sorted(both)])


@dataclass(frozen=True)
class Cell:
    """One trace on one cluster at one load."""

    scenario: Scenario
    load: float
    policies: Mapping[str, Shown]
    """Each under its better ordering."""
    parts: Mapping[str, Shown]
    """`OURS` under the ordering of the ablation ("whole"), and without one part each."""

    @property
    def counts(self) -> bool:
        """Whether the fleet is not lost by its load alone."""
        return self.load < SATURATION

    @cached_property
    def ours(self) -> Shown | None:
        return self.policies.get(OURS)

    @cached_property
    def best_other(self) -> Shown | None:
        others = [shown for name, shown in self.policies.items() if name != OURS]
        return max(others, key=lambda shown: shown.attained.mean, default=None)

    @cached_property
    def difference(self) -> Interval | None:
        """Ours less the best other."""
        if self.ours is None or self.best_other is None:
            return None
        return less(self.ours, self.best_other)

    @property
    def verdict(self) -> Verdict | None:
        return verdict_of(self.difference) if self.difference is not None else None


def verdict_of(difference: Interval) -> Verdict:
    half = difference.half or 0.0
    if abs(difference.mean) <= TIE + 1e-12 or abs(difference.mean) <= half:
        return "tied"
    return "won" if difference.mean > 0 else "lost"


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that the page shows."""

    cells: tuple[Cell, ...]
    missing: tuple[str, ...]
    """Cells without a result, by name."""
    runs: tuple[RunResult, ...]

    def of(self, scenario: Scenario) -> list[Cell]:
        return [cell for cell in self.cells if cell.scenario is scenario]

    @property
    def counted(self) -> list[Cell]:
        """Below saturation."""
        return [cell for cell in self.cells if cell.counts]


# ---------------------------------------------------------------- reading


def read_found(scenarios: Iterable[Scenario]) -> Found:
    """The results of every cell of the grid that are there."""
    cells: list[Cell] = []
    missing: list[str] = []
    runs: list[RunResult] = []
    for scenario in scenarios:
        found: dict[float, dict[tuple[str, str], dict[int, RunResult]]] = {}
        for cell in cells_of(scenario.spec, scenario.spec_path.parent):
            result = read_done(cell, scenario.spec, scenario.results)
            if result is None:
                missing.append(cell.name)
                continue
            runs.append(result)
            series = cell.variant or cell.policy, cell.ordering
            found.setdefault(cell.load or 0.0, {}).setdefault(series, {})[cell.seed] = result
        cells += [_cell(scenario, load, series) for load, series in sorted(found.items())]
    return Found(tuple(cells), tuple(missing), tuple(runs))


def _cell(scenario: Scenario, load: float, series: Mapping[tuple[str, str], Mapping[int, RunResult]]) -> Cell:
    shown = [Shown(name, ordering, runs) for (name, ordering), runs in series.items()]
    policies: dict[str, Shown] = {}
    for one in shown:
        best = policies.get(one.policy)
        if one.policy not in ABLATION and (best is None or one.attained.mean > best.attained.mean):
            policies[one.policy] = one
    parts = {one.policy: one for one in shown if one.policy in ABLATION}
    if parts:
        whole = {one.ordering: one for one in shown if one.policy == OURS}
        parts |= {"whole": whole[ABLATION_ORDERING]} if ABLATION_ORDERING in whole else {}
        parts |= {"without-ordering": whole[WITHOUT_ORDERING]} if WITHOUT_ORDERING in whole else {}
    return Cell(scenario, load, policies, parts)


# ---------------------------------------------------------------- figures over cells


def gains(cells: Iterable[Cell], others: Sequence[str]) -> list[float]:
    """Ours over each of the others, less 1, per cell; where another attains nothing there is none."""
    found = []
    for cell in cells:
        for name in others:
            other = cell.policies.get(name)
            if cell.ours is not None and other is not None and other.attained.mean > 0:
                found.append(cell.ours.attained.mean / other.attained.mean - 1)
    return found


def ablation(cells: Iterable[Cell], part: str) -> list[tuple[Cell, Interval]]:
    """What the whole attains more than without that part, per cell."""
    found = []
    for cell in cells:
        whole, without = cell.parts.get("whole"), cell.parts.get(part)
        if whole is not None and without is not None and (difference := less(whole, without)) is not None:
            found.append((cell, difference))
    return found
