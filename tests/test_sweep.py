"""`antiphon sweep`: the grid, what is run again and what is not, failures, real processes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from antiphon.eval.simulation_plan import SimulationError
from antiphon.eval.sweep import is_done, run_cell, run_sweep
from antiphon.eval.sweep_spec import Cell, SweepSpec, cells_of, read_spec
from antiphon.scheduler.cli import app
from antiphon.traces.results import read_result, read_rounds
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


def test_a_half_written_result_does_not_count(tmp_path: Path) -> None:
    """A cell is done when its result can be read."""
    spec = grid(tmp_path)
    cell = cells_of(read_spec(spec), tmp_path)[0]
    assert not is_done(cell, tmp_path)
    (tmp_path / f"{cell.name}.json").write_text('{"schema": "antiphon.result/1", "tra')
    assert not is_done(cell, tmp_path)
    (tmp_path / f"{cell.name}.json").write_text(json.dumps({"schema": "other/1"}))
    assert not is_done(cell, tmp_path)


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
