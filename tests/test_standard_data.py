"""What the standard evaluation makes of results: better orderings, verdicts, gains, ablation, tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from antiphon.eval.standard_data import (
    Cell,
    Found,
    Interval,
    Shown,
    ablation,
    gains,
    read_found,
    verdict_of,
)
from antiphon.eval.standard_grid import ABLATION, OURS, Scale, Scenario, scenarios_of
from antiphon.eval.standard_plots import attainment_figure
from antiphon.eval.standard_tables import (
    ablation_table,
    attainment_table,
    gain_table,
    local_table,
    lost_table,
    times_table,
    verdict_table,
)
from antiphon.eval.standard_traces import Amount, Source
from antiphon.eval.sweep_spec import cells_of
from antiphon.traces.result_types import RunResult
from antiphon.traces.results import write_result
from antiphon.traces.writers import WRITERS
from tests.simulation_helpers import agent_sessions, cluster_file
from tests.test_report import PNG, result


def run(policy: str, good: int, load: float = 0.5, seed: int = 0, of: int = 100) -> RunResult:
    """A run in which so many of a hundred rounds attain."""
    return result(policy, load, seed, [0.5] * good + [2.0] * (of - good))


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    """One trace on one cluster at two loads, with three seeds, and nothing run."""
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        WRITERS["antiphon"](agent_sessions(3, 1), file)
    scale = Scale(
        "small", (str(cluster_file(tmp_path)),), (0, 1, 2), Amount(3, 0.0, 0, 50), (0.5, 1.1),
        policies=(OURS, "ampd", "local"),
    )  # fmt: skip
    (made,) = scenarios_of(scale, [Source("t", path)], tmp_path / "out")
    return made


def cell(scenario: Scenario, load: float = 0.5, **good: int) -> Cell:
    """Policies by how many of a hundred rounds attain."""
    shown = {name: Shown(name, "fcfs", {0: run(name, count, load)}) for name, count in good.items()}
    return Cell(scenario, load, shown, {})


def found_of(*cells: Cell) -> Found:
    return Found(cells, (), ())


# ---------------------------------------------------------------- reading


def test_each_policy_is_shown_under_its_better_ordering(scenario: Scenario) -> None:
    """By the mean over seeds, load by load; variants are parts of ours and no policies of their own."""
    scenario.results.mkdir(parents=True)
    good = {
        ("ampd", "fcfs"): 40,
        ("ampd", "ampd_reorder"): 60,
        (OURS, "fcfs"): 70,
        (OURS, "ampd_reorder"): 70,
    }
    cells = cells_of(scenario.spec, scenario.spec_path.parent)
    assert len(cells) == (2 + 2 + 1 + len(ABLATION)) * 2 * 3
    for one in cells:
        count = good.get((one.policy, one.ordering), 50) - (10 if one.variant else 0)
        made = run(one.policy, count - (60 if one.load == 1.1 and one.ordering == "ampd_reorder" else 0))
        write_result(made, scenario.results / f"{one.name}.json")
    found = read_found([scenario])
    assert not found.missing and len(found.runs) == len(cells)
    below, above = found.cells
    assert {name: shown.ordering for name, shown in below.policies.items()} == {
        OURS: "fcfs", "ampd": "ampd_reorder", "local": "fcfs",
    }  # fmt: skip
    assert above.policies["ampd"].ordering == "fcfs" and not above.counts
    assert set(below.parts) == {*ABLATION, "whole", "without-ordering"}
    assert below.parts["whole"].ordering == "ampd_reorder"
    assert [round(lost.mean, 6) for _, lost in ablation(found.counted, "without-pull")] == [0.1]
    assert all(len(shown.runs) == 3 for shown in below.policies.values())


def test_a_cell_without_a_result_is_missing_by_name(scenario: Scenario) -> None:
    """The others are shown; a policy with fewer seeds keeps those it has."""
    scenario.results.mkdir(parents=True)
    cells = [one for one in cells_of(scenario.spec, scenario.spec_path.parent) if one.policy == "local"]
    for one in cells[1:]:
        write_result(run("local", 50), scenario.results / f"{one.name}.json")
    found = read_found([scenario])
    assert cells[0].name in found.missing
    assert [len(one.policies["local"].runs) for one in found.cells] == [2, 3]


# ---------------------------------------------------------------- figures


def test_an_interval_is_students(scenario: Scenario) -> None:
    """0.5, 0.6, 0.7: mean 0.6, deviation 0.1, 4.303 x 0.1 / sqrt(3) to each side; one value has none."""
    found = Interval.of([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6) and found.half == pytest.approx(0.24843, abs=1e-4)
    assert Interval.of([0.5]) == Interval(0.5, None)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (0.02, None, "won"),
        (0.01, None, "tied"),
        (-0.01, None, "tied"),
        (-0.011, None, "lost"),
        (0.05, 0.06, "tied"),
        (0.05, 0.04, "won"),
        (-0.05, 0.04, "lost"),
    ],
)
def test_a_cell_is_tied_within_a_point_or_the_interval(mean: float, half: float | None, verdict: str) -> None:
    """Else the sign of the difference decides."""
    assert verdict_of(Interval(mean, half)) == verdict


def test_differences_are_taken_seed_by_seed(scenario: Scenario) -> None:
    """Seeds differ by 40 points, ours is 3 better under each: won, though the seeds' ranges overlap."""
    ours = Shown(OURS, "fcfs", {seed: run(OURS, 33 + 20 * seed) for seed in range(3)})
    other = Shown("local", "fcfs", {seed: run("local", 30 + 20 * seed) for seed in range(3)})
    made = Cell(scenario, 0.5, {OURS: ours, "local": other}, {})
    assert made.difference is not None and made.difference.mean == pytest.approx(0.03)
    assert made.verdict == "won"


def test_the_best_other_is_of_that_cell(scenario: Scenario) -> None:
    """And ours alone has no verdict."""
    made = cell(scenario, adaptive=50, local=40, ampd=70)
    assert made.best_other is not None and made.best_other.policy == "ampd" and made.verdict == "lost"
    assert cell(scenario, adaptive=50).verdict is None


def test_gains_are_relative_and_need_something_to_compare_with(scenario: Scenario) -> None:
    """60 over 40 is +50 %, over 80 -25 %; over nothing there is no gain."""
    cells = [cell(scenario, adaptive=60, remote=40), cell(scenario, adaptive=60, remote=80, isl_bounding=0)]
    assert gains(cells, ("remote", "isl_bounding")) == [pytest.approx(0.5), pytest.approx(-0.25)]
    text = gain_table(found_of(*cells))
    assert "| - remote | 2 | +12 % | +12 % | +50 % |" in text and "+67 %" in text
    assert "co-located" not in text, "nothing of it was run"


# ---------------------------------------------------------------- tables


def test_cells_at_saturation_are_shown_and_not_counted(scenario: Scenario) -> None:
    """One won and one lost below, one lost above: the summary has the first two."""
    found = found_of(
        cell(scenario, 0.5, adaptive=60, local=50),
        cell(scenario, 0.9, adaptive=40, local=50),
        cell(scenario, 1.1, adaptive=10, local=50),
    )
    assert "| all | 2 | 1 | 0 | 1 | 50 % |" in verdict_table(found)
    lost = lost_table(found)
    assert lost.count("\n") == 3 and "| t | cluster | 0.9 | 40.0 | local 50.0 | -10.0 |" in lost
    assert lost_table(found_of(cell(scenario, adaptive=60, local=50))) == "None.\n"


def test_the_table_of_attainment_marks_the_best(scenario: Scenario) -> None:
    """Ours first, the best bold, also when equal; another ordering is marked; the last row says who won."""
    first = cell(scenario, 0.5, adaptive=60, local=60, ampd=9)
    shown = {
        OURS: Shown(OURS, "ampd_reorder", {0: run(OURS, 30)}),
        "local": Shown("local", "fcfs", {0: run("local", 50)}),
    }
    lines = attainment_table([first, Cell(scenario, 0.9, shown, {})]).splitlines()
    assert lines[0] == "| policy | rho 0.5 | rho 0.9 |"
    assert lines[2:] == [
        "| adaptive | **60.0** | 30.0 r |",
        "| ampd | 9.0 | \N{EN DASH} |",
        "| local | **60.0** | **50.0** |",
        "| *adaptive less the best other* | +0.0 tied | -20.0 lost (local) |",
    ]


def test_times_and_arms_are_the_best_first(scenario: Scenario) -> None:
    """Median and 90th percentile, and each arm's share of the rounds."""
    lines = times_table(cell(scenario, adaptive=60, local=90)).splitlines()
    assert lines[2].startswith("| local | fcfs | 90.0 | 500 ms / ") and lines[3].startswith("| adaptive ")
    assert lines[0].endswith("| local, % | remote_pull, % | remote_recompute, % |")
    assert lines[2].endswith("| 34 | 33 | 33 |")
    assert "| adaptive | 34 % | 34 % | 34 % | 34 % |" in local_table(found_of(cell(scenario, adaptive=60)))


def test_the_ablation_counts_cells_that_it_changes(scenario: Scenario) -> None:
    """Without the part 20 points worse in one cell, 2 better in another; in the mean 9 worse."""
    cells = []
    for whole, without in ((60, 40), (60, 62)):
        parts = {"whole": whole, "without-move": without}
        shown = {name: Shown(OURS, "x", {0: run(OURS, count)}) for name, count in parts.items()}
        cells.append(Cell(scenario, 0.5, {}, shown))
    text = ablation_table(found_of(*cells))
    assert "| without move | -9.00 | 1 | 1 | -20.0 (t, cluster, rho 0.5) |" in text
    assert ablation_table(found_of(cell(scenario, adaptive=60))) == ""


def test_a_figure_is_a_picture_and_always_the_same(scenario: Scenario) -> None:
    """With a policy that one load lacks, and intervals."""
    three = {seed: run(OURS, 50 + seed, 0.9) for seed in range(3)}
    cells = (
        cell(scenario, 0.5, adaptive=60, local=50, ppd=3),
        Cell(scenario, 0.9, {OURS: Shown(OURS, "fcfs", three)}, {}),
    )
    picture = attainment_figure(found_of(*cells), "cluster")
    assert picture.startswith(PNG) and picture == attainment_figure(found_of(*cells), "cluster")
