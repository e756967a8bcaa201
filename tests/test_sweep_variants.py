"""`antiphon sweep` with variants: a policy under other parameters is a series of its own, all the way."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from antiphon.eval.report_data import read_folder
from antiphon.eval.simulation_plan import SimulationError
from antiphon.eval.sweep import run_sweep
from antiphon.eval.sweep_spec import cells_of, read_spec
from antiphon.traces.results import read_result
from tests.simulation_helpers import agent_sessions, cluster_file

SPEC = """
traces = ["trace.jsonl"]
clusters = ["cluster.toml"]
policies = ["ampd", "local"]
orderings = ["fcfs", "ampd_reorder"]
one_ordering = ["local"]
session_rates = [3.0]

[variants.strict]
policy = "ampd"
parameters = {alpha = 0.1, beta = 0.1}

[variants.uncorrected]
policy = "ampd"
corrections = false
"""


def grid(folder: Path, text: str = SPEC) -> Path:
    cluster_file(folder)
    (folder / "trace.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(agent_sessions(8, 1)))
    spec = folder / "spec.toml"
    spec.write_text(text)
    return spec


def names(folder: Path, text: str) -> set[str]:
    return {cell.name for cell in cells_of(read_spec(grid(folder, text)), folder)}


def test_a_variant_is_a_series_of_its_own(tmp_path: Path) -> None:
    """In the files' names, in the results with its parameters, and beside its policy in a report."""
    spec = grid(tmp_path)
    assert run_sweep(spec, tmp_path / "out", 2, console=Console(file=io.StringIO())) == 0
    results = [read_result(path) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert {(r.variant, r.policy, r.ordering) for r in results} == {
        ("", "ampd", "fcfs"),
        ("", "ampd", "ampd_reorder"),
        ("", "local", "fcfs"),
        ("strict", "ampd", "fcfs"),
        ("uncorrected", "ampd", "fcfs"),
    }
    (strict,) = [result for result in results if result.variant == "strict"]
    assert strict.policy_parameters == {"alpha": 0.1, "beta": 0.1}
    (plain,) = [result for result in results if (result.policy, result.ordering) == ("ampd", "fcfs")
                and not result.variant]  # fmt: skip
    assert strict.arms != plain.arms, "its parameters are the policy's"
    (scenario,) = read_folder(tmp_path / "out").scenarios
    assert {"strict, fcfs", "ampd, fcfs", "uncorrected, fcfs"} <= set(scenario.series)


def test_a_cell_depends_on_what_its_variant_is(tmp_path: Path) -> None:
    """Other parameters, or corrections, make another cell of that variant and of nothing else."""
    before = names(tmp_path, SPEC)
    for old, new in (("alpha = 0.1", "alpha = 0.2"), ("corrections = false", "corrections = true")):
        changed = before ^ names(tmp_path, SPEC.replace(old, new))
        assert len(changed) == 2 and all("strict" in n or "uncorrected" in n for n in changed)
    plain = SPEC.partition("[variants")[0]
    assert names(tmp_path, plain) < before, "what is no variant keeps its name"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("alpha = 0.1", "gamma = 0.1", "no parameter 'gamma'"),
        ('policy = "ampd"\nparameters', 'policy = "nobody"\nparameters', "unknown policy 'nobody'"),
        ("[variants.strict]", '[variants."a/b"]', "variants"),
        ("corrections = false", "correction = false", "unknown field"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    """Before anything runs, with the file's name and what is wrong; a name must make a file's name."""
    with pytest.raises(SimulationError, match=r"spec\.toml") as refused:
        read_spec(grid(tmp_path, SPEC.replace(old, new)))
    assert said in str(refused.value)


def test_a_grid_without_a_policy_is_refused(tmp_path: Path) -> None:
    """Variants alone are enough."""
    read_spec(grid(tmp_path, SPEC.replace('policies = ["ampd", "local"]\n', "")))
    empty = SPEC.partition("[variants")[0].replace('policies = ["ampd", "local"]\n', "")
    with pytest.raises(SimulationError, match="give policies, or variants"):
        read_spec(grid(tmp_path, empty))
