"""`antiphon sweep`: the grid, what is run again and what is not, failures, real processes."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from antiphon.eval.simulation_plan import SimulationError
from antiphon.eval.sweep import read_done, run_cell, run_sweep
from antiphon.eval.sweep_spec import Cell, SweepSpec, cells_of, read_spec
from antiphon.scheduler.cli import app
from antiphon.traces.results import read_result, read_rounds, write_result
from tests.simulation_helpers import agent_sessions, cluster_file

SPEC = """
traces = ["trace.jsonl"]
clusters = ["cluster.toml"]
policies = ["local", "remote"]
session_rates = [2.0, 4.0]
seeds = [0, 1]
max_sessions = 5
"""


def grid(folder: Path, text: str = SPEC) -> Path:
    """A spec with its trace and cluster beside it."""
    cluster_file(folder)
    lines = msgspec.json.Encoder().encode_lines(agent_sessions(8, 1))
    (folder / "trace.jsonl").write_bytes(lines)
    spec = folder / "spec.toml"
    spec.write_text(text)
    return spec


def fails_on_remote(cell: Cell, spec: SweepSpec, out: Path) -> None:
    """For another process: half of the grid fails."""
    if cell.policy == "remote":
        raise ValueError("no luck with this one")
    run_cell(cell, spec, out)


def dies_on_one(cell: Cell, spec: SweepSpec, out: Path) -> None:
    """For another process: one cell of the grid kills it."""
    if cell.policy == "remote" and cell.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run_cell(cell, spec, out)


def test_a_sweep_runs_the_grid_once(tmp_path: Path) -> None:
    """Every combination has a result and its rounds; a second run runs nothing and changes nothing."""
    spec, out = grid(tmp_path), tmp_path / "out"
    done = CliRunner().invoke(app, ["sweep", str(spec), "--out", str(out), "--processes", "2"])
    assert done.exit_code == 0, done.output
    results = sorted(out.glob("*.json"))
    seen = {(r.policy, r.seed, r.load.value if r.load else None) for r in map(read_result, results)}
    assert seen == {(p, s, v) for p in ("local", "remote") for s in (0, 1) for v in (2.0, 4.0)}
    first = results[0]
    rounds = list(read_rounds(out / f"{first.stem}.rounds.jsonl.gz"))
    assert len(rounds) == read_result(first).rounds_total
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    console = Console(file=io.StringIO())
    assert run_sweep(spec, out, 1, console=console) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "8 cells, 8 there already" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_failed_cell_stops_no_other_and_is_run_again(tmp_path: Path) -> None:
    """Its fault is written and shown, the status is 1; the next sweep runs just what failed."""
    spec, out = grid(tmp_path), tmp_path / "out"
    console = Console(file=io.StringIO())
    assert run_sweep(spec, out, 2, runner=fails_on_remote, console=console) == 1
    assert len(list(out.glob("*.json"))) == 4
    failures = list(out.glob("*.failed.txt"))
    assert len(failures) == 4 and "no luck" in failures[0].read_text()
    assert "ValueError: no luck with this one" in console.file.getvalue()  # type: ignore[attr-defined]
    assert run_sweep(spec, out, 1, console=console) == 0
    assert len(list(out.glob("*.json"))) == 8 and not list(out.glob("*.failed.txt"))


def test_a_process_that_dies_takes_no_other_cell_with_it(tmp_path: Path) -> None:
    """Killed in the middle, as by a lack of memory: that cell failed and says so, all others have results."""
    spec, out = grid(tmp_path, SPEC.replace("[2.0, 4.0]", "[4.0]")), tmp_path / "out"
    assert run_sweep(spec, out, 2, runner=dies_on_one, console=Console(file=io.StringIO())) == 1
    assert len(list(out.glob("*.json"))) == 3
    (failure,) = out.glob("*.failed.txt")
    assert "remote-fcfs-rate4-s1" in failure.name and "BrokenProcessPool" in failure.read_text()


def test_results_of_another_commit_are_said(tmp_path: Path) -> None:
    """They count as done, since their inputs are the same, but the code may not be: one line says so."""
    path, out = grid(tmp_path), tmp_path / "out"
    spec = read_spec(path)
    cells = cells_of(spec, tmp_path)
    for cell in cells:
        run_cell(cell, spec, out)
    result = read_result(out / f"{cells[0].name}.json")
    older = msgspec.structs.replace(result.conditions, commit="0" * 40)
    write_result(msgspec.structs.replace(result, conditions=older), out / f"{cells[0].name}.json")
    console = Console(file=io.StringIO())
    assert run_sweep(path, out, 1, console=console) == 0
    assert "1 of them by another commit" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_changed_latency_profile_is_another_cell(tmp_path: Path) -> None:
    """The cluster file only names its profile; the coefficients are what the result depends on."""
    spec = grid(tmp_path)
    before = {cell.name for cell in cells_of(read_spec(spec), tmp_path)}
    profile = tmp_path / "profile.json"
    profile.write_text(profile.read_text().replace("0.01", "0.02"))
    assert not before & {cell.name for cell in cells_of(read_spec(spec), tmp_path)}


def test_a_half_written_result_does_not_count(tmp_path: Path) -> None:
    """A cell is done when its result can be read and its rounds are there, if they are wanted."""
    spec = read_spec(grid(tmp_path))
    cell = cells_of(spec, tmp_path)[0]
    rounds, result = tmp_path / f"{cell.name}.rounds.jsonl.gz", tmp_path / f"{cell.name}.json"
    assert read_done(cell, spec, tmp_path) is None
    run_cell(cell, spec, tmp_path)
    assert read_done(cell, spec, tmp_path) is not None
    rounds.rename(tmp_path / "elsewhere")
    assert read_done(cell, spec, tmp_path) is None, "the spec wants its rounds"
    assert read_done(cell, msgspec.structs.replace(spec, rounds=False), tmp_path) is not None
    rounds.touch()
    result.write_bytes(result.read_bytes()[:-20])
    assert read_done(cell, spec, tmp_path) is None
    result.write_text(json.dumps({"schema": "other/1"}))
    assert read_done(cell, spec, tmp_path) is None


def test_the_name_of_a_cell_says_what_it_is_and_changes_with_what_it_depends_on(tmp_path: Path) -> None:
    """Trace bytes, cluster bytes, common options: another hash; the same again: the same name."""
    spec = grid(tmp_path)

    def names() -> list[str]:
        return [cell.name for cell in cells_of(read_spec(spec), tmp_path)]

    first = names()
    assert first == names() and len(set(first)) == 8
    assert first[0].startswith("trace-cluster-local-fcfs-rate2-s0-")
    spec.write_text(SPEC.replace("max_sessions = 5", "max_sessions = 6"))
    assert not set(first) & set(names())
    spec.write_text(SPEC)
    with (tmp_path / "trace.jsonl").open("a") as trace:
        trace.write("\n")
    assert not set(first) & set(names())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SPEC + "polices = []", "polices"),
        (SPEC.replace("session_rates = [2.0, 4.0]", ""), "either loads or session_rates"),
        (SPEC + "loads = [0.5]", "either loads or session_rates"),
        (SPEC.replace("[2.0, 4.0]", "[0.0]"), "session_rates"),
        (SPEC.replace('["local", "remote"]', "[]"), "policies"),
        (SPEC.replace('"remote"', '"remoat"'), "remoat"),
        (SPEC + 'orderings = ["lifo"]', "lifo"),
        ("traces = [", "spec.toml"),
    ],
)
def test_a_bad_spec_is_said(text: str, said: str, tmp_path: Path) -> None:
    """File and key."""
    with pytest.raises(SimulationError, match=said):
        read_spec(grid(tmp_path, text))


def test_a_bundled_cluster_is_found_by_name(tmp_path: Path) -> None:
    """Beside the spec first, then among those that ship with the package."""
    spec = grid(tmp_path, SPEC.replace('"cluster.toml"', '"cluster.toml", "2p2d-qwen3-32b-h200"'))
    clusters = {Path(cell.cluster) for cell in cells_of(read_spec(spec), tmp_path)}
    assert tmp_path / "cluster.toml" in clusters and len(clusters) == 2
