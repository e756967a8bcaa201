"""`make eval`: the standard evaluation, every policy on every trace, and docs/results.md with what it found.

1. traces are taken from a folder, or generated; each is sampled and written for each cluster
2. every cell of the grid is simulated, as `antiphon sweep` does
3. tables and figures are written; with --page-only, of what is there already
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from antiphon.engines.cluster import ClusterError
from antiphon.eval.report_style import require_matplotlib
from antiphon.eval.simulation_plan import SimulationError
from antiphon.eval.standard_data import Found, read_found
from antiphon.eval.standard_grid import SCALES, Scale, Scenario, scenarios_of
from antiphon.eval.standard_page import page
from antiphon.eval.standard_plots import attainment_figure
from antiphon.eval.standard_traces import sources_of
from antiphon.eval.sweep import run_sweep
from antiphon.eval.sweep_spec import cells_of
from antiphon.policies.registry import make_policy
from antiphon.traces.results import ResultError
from antiphon.traces.schema import TraceError

DEFAULT_OUT = Path("build/eval")
DEFAULT_PAGE = Path("docs/results.md")
COMMANDS = {
    "standard": "make eval",
    "full": "make eval-full",
    "quick": "python -m antiphon.eval.standard --quick",
}


@dataclass(frozen=True, slots=True)
class StandardOptions:
    """What the evaluation is told."""

    scale: Scale
    traces: Path | None = None
    """A folder; None = generate them."""
    out: Path = DEFAULT_OUT
    page: Path = DEFAULT_PAGE
    """Figures go into a folder of the same name beside it, notes come from NAME_notes.md."""
    processes: int = 2
    resume: bool = False
    page_only: bool = False


def run_standard(options: StandardOptions, console: Console) -> int:
    """0, or 1 if a cell has no result. Raises `TraceError`, `ClusterError`, `SimulationError`, `OSError`."""
    began_s = time.monotonic()
    scenarios = scenarios_of(options.scale, sources_of(options.traces, options.scale.profiles), options.out)
    if not options.page_only:
        _run(scenarios, options, console)
    found = read_found(scenarios)
    write_page(options, scenarios, found)
    spent_s = time.monotonic() - began_s
    console.print(f"{options.page}: {len(found.runs)} runs, {spent_s / 60:.1f} minutes", highlight=False)
    if found.missing:
        console.print(f"{len(found.missing)} cells have no result: {found.missing[0]}, ...", style="red")
    return 1 if found.missing else 0


def _run(scenarios: list[Scenario], options: StandardOptions, console: Console) -> None:
    """Scenario by scenario: one that is done is whole."""
    for number, scenario in enumerate(scenarios, 1):
        if not options.resume:
            _empty(scenario)
        sample = scenario.sample
        words = f"{sample.sent:,} sessions, {sample.rounds:,} rounds"
        console.print(f"{number}/{len(scenarios)} {scenario.name}: {words}", highlight=False)
        run_sweep(scenario.spec_path, scenario.results, options.processes, console=console)


def _empty(scenario: Scenario) -> None:
    """Results do not depend on the code's version in their name, so what another one found must go."""
    for cell in cells_of(scenario.spec, scenario.spec_path.parent):
        (scenario.results / f"{cell.name}.json").unlink(missing_ok=True)


def write_page(options: StandardOptions, scenarios: list[Scenario], found: Found) -> None:
    """The page and its figures, whole or not at all."""
    target = options.page
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for cluster in dict.fromkeys(cell.scenario.cluster for cell in found.cells):
        picture = folder / f"{cluster}.png"
        picture.write_bytes(attainment_figure(found, cluster))
        figures[cluster] = f"{folder.name}/{picture.name}"
    notes = target.with_name(f"{target.stem}_notes.md")
    text = page(
        options.scale,
        scenarios,
        found,
        figures,
        notes.read_text() if notes.is_file() else "",
        COMMANDS[options.scale.name],
    )
    part = target.with_name(f"{target.name}.part")
    part.write_text(text)
    part.replace(target)


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """0 = every cell has a result, 1 = one has not, 2 = it could not begin (said on stderr)."""
    console = Console(stderr=True)
    try:
        options = _options(arguments)
        require_matplotlib()
        return run_standard(options, console)
    except (TraceError, ClusterError, SimulationError, ResultError, OSError) as error:
        print(f"evaluation failed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _options(arguments: list[str] | None) -> StandardOptions:
    parser = argparse.ArgumentParser(
        prog="python -m antiphon.eval.standard", description=(__doc__ or "").partition("\n")[0]
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="three seeds, three clusters, more sessions")
    how.add_argument("--quick", action="store_true", help="seconds: a few sessions, two policies")
    parser.add_argument("--traces", type=Path, help="a folder of traces; without, they are generated")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="traces, specs and results")
    parser.add_argument("--page", type=Path, default=DEFAULT_PAGE, help="what is written")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--policies", help="only these, with commas")
    parser.add_argument("--clusters", help="these instead, with commas: files or bundled names")
    parser.add_argument("--loads", help="these rho instead, with commas")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is there")
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error("--processes must be at least 1")
    scale = SCALES["full" if given.full else "quick" if given.quick else "standard"]
    try:
        scale = replace(
            scale,
            policies=_listed(given.policies) or scale.policies,
            clusters=_listed(given.clusters) or scale.clusters,
            loads=tuple(sorted(map(float, _listed(given.loads)))) or scale.loads,
        )
        for name in scale.policies:
            make_policy(name)
    except ValueError as error:
        parser.error(str(error))
    return StandardOptions(
        scale, given.traces, given.out, given.page, given.processes, given.resume, given.page_only
    )


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(",")))


if __name__ == "__main__":
    sys.exit(main())
