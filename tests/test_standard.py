"""The standard evaluation's command: the whole path with generated traces, and what is run again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from antiphon.eval.standard import main
from antiphon.eval.standard_grid import OURS, SCALES
from antiphon.eval.sweep import run_sweep
from antiphon.policies.registry import POLICIES

PNG = b"\x89PNG\r\n\x1a\n"


def quick(folder: Path, *more: str) -> int:
    """The quick form into `folder`; the exit status."""
    page = folder / "docs" / "results.md"
    page.parent.mkdir(exist_ok=True)
    return main(["--quick", "--out", str(folder / "out"), "--page", str(page), *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quick form has run, with notes beside its page."""
    folder = tmp_path_factory.mktemp("standard")
    (folder / "docs").mkdir()
    (folder / "docs" / "results_notes.md").write_text("## Why\n\nBecause of <this> & *that*.\n")
    assert quick(folder) == 0
    return folder


def test_the_page_shows_every_cell_and_its_conditions(done: Path) -> None:
    """Each trace, policy and load of the grid, the notes as they are, figures, nobody's folders."""
    text = (done / "docs" / "results.md").read_text()
    scale = SCALES["quick"]
    for trace in scale.profiles:
        assert f"### {trace} on {scale.clusters[0]}\n" in text
        assert f"generated: profile {trace}, seed 0" in text
    for policy in scale.policies:
        assert len(re.findall(rf"^\| {policy} \|(?: \**\d+\.\d\**(?: r)? \|){{2}}$", text, re.MULTILINE)) == 2
    assert "## Why\n\nBecause of <this> & *that*.\n" in text
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) == len(scale.clusters)
    assert all((done / "docs" / link).read_bytes().startswith(PNG) for link in links)
    assert "| all | 4 | " in text, "two traces at two loads below saturation"
    assert str(done) not in text


def test_a_policy_without_a_queue_runs_once(done: Path) -> None:
    """`local` under one ordering, ours under two: three cells for each trace and load."""
    names = [path.name for path in (done / "out" / "results").rglob("*.json")]
    scale = SCALES["quick"]
    assert len(names) == 3 * len(scale.profiles) * len(scale.loads)
    assert not [name for name in names if "local-ampd_reorder" in name]


def test_what_is_there_is_kept_only_if_asked(done: Path) -> None:
    """--resume and --page-only run nothing; without them everything that is asked for runs again."""

    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (done / "out" / "results").rglob("*.json")}

    before, page = times(), (done / "docs" / "results.md").read_text()
    assert quick(done, "--resume") == 0 and times() == before
    assert quick(done, "--page-only") == 0 and times() == before
    assert (done / "docs" / "results.md").read_text() == page
    assert quick(done, "--loads", "0.5", "--policies", "local") == 0
    changed = [name for name, time in times().items() if before[name] != time]
    assert len(changed) == 2 and all("local-fcfs-rho0.5" in name for name in changed)


def test_the_specs_that_are_left_run_by_themselves(done: Path) -> None:
    """`antiphon sweep` takes them and finds every cell there."""
    assert quick(done, "--resume") == 0
    specs = sorted((done / "out" / "specs").glob("*.toml"))
    assert len(specs) == 2
    for spec in specs:
        results = done / "out" / "results" / spec.stem
        before = sorted(results.iterdir())
        assert run_sweep(spec, results, 1) == 0
        assert sorted(results.iterdir()) == before


def test_a_grid_with_holes_makes_a_page_that_says_so(done: Path) -> None:
    """A cell that has no result is missed in the status and on the page, and stops neither."""
    victim = next((done / "out" / "results").rglob(f"*{OURS}-fcfs-rho0.9*.json"))
    content = victim.read_bytes()
    victim.unlink()
    assert quick(done, "--page-only") == 1
    text = (done / "docs" / "results.md").read_text()
    assert "**1 cells of the grid have no result**" in text and victim.stem in text
    victim.write_bytes(content)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policies", "nobody"], "unknown policy 'nobody'"),
        (["--loads", "half"], "could not convert"),
        (["--processes", "0"], "at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs or is written."""
    with pytest.raises(SystemExit) as refused:
        quick(tmp_path, *arguments)
    assert refused.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_traces_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and a sentence, not an empty page."""
    (tmp_path / "traces").mkdir()
    assert quick(tmp_path, "--traces", str(tmp_path / "traces")) == 2
    assert "has a file .jsonl" in capsys.readouterr().err
    assert not (tmp_path / "docs" / "results.md").exists()


def test_the_big_grids_run_every_policy() -> None:
    """Whatever is registered; and the loads, seeds and clusters that were promised."""
    standard, full = SCALES["standard"], SCALES["full"]
    assert set(standard.policies) == set(full.policies) == set(POLICIES)
    assert standard.loads == full.loads == (0.3, 0.5, 0.7, 0.9, 1.1)
    assert (len(standard.seeds), len(full.seeds), len(standard.clusters)) == (1, 3, 2)
    assert min(standard.amount.sessions, full.amount.sessions) >= 40
