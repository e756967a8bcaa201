"""`antiphon sweep`: a grid of simulations over processes, resumable.

Each cell writes its own result file, whole or not at all; a cell whose file is there is not run again. A cell
that fails leaves `NAME.failed.txt` and stops nothing else.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from antiphon.eval.simulate import run_simulation
from antiphon.eval.sweep_spec import Cell, SweepSpec, cells_of, read_spec
from antiphon.traces.results import ResultError, read_result

Runner = Callable[[Cell, SweepSpec, Path], None]


def run_cell(cell: Cell, spec: SweepSpec, out: Path) -> None:
    """Simulate one cell; its files are in `out` when this returns."""
    run_simulation(cell.options(spec, out))


def run_sweep(
    spec_path: Path, out: Path, processes: int, runner: Runner = run_cell, console: Console | None = None
) -> int:
    """Run what is not there yet; 0, or 1 if a cell failed. Raises for a spec that cannot be used.

    `runner` must be importable from another process.
    """
    console = console or Console(stderr=True)
    spec = read_spec(spec_path)
    cells = cells_of(spec, spec_path.parent)
    out.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not is_done(cell, out)]
    console.print(f"{len(cells)} cells, {len(cells) - len(todo)} there already", highlight=False)
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=len(todo))
        for cell, fault in _run_all(todo, spec, out, processes, runner):
            progress.advance(bar)
            failure = out / f"{cell.name}.failed.txt"
            failure.unlink(missing_ok=True)
            if fault:
                failed += 1
                failure.write_text(fault)
                last = fault.rstrip().rpartition("\n")[2]
                progress.console.print(f"{cell.name}: {last}", markup=False, highlight=False)
    if failed:
        console.print(
            f"{failed} of {len(todo)} cells failed: see the .failed.txt files in {out}", style="red"
        )
    return 1 if failed else 0


def is_done(cell: Cell, out: Path) -> bool:
    """Its result file can be read."""
    try:
        read_result(out / f"{cell.name}.json")
    except ResultError:
        return False
    return True


def _run_all(
    cells: list[Cell], spec: SweepSpec, out: Path, processes: int, runner: Runner
) -> Iterator[tuple[Cell, str]]:
    """(cell, "" or its traceback) as cells end. An interrupt waits for those that run, starts no other."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=processes, mp_context=context) as pool:
        running: dict[Future[None], Cell] = {pool.submit(runner, cell, spec, out): cell for cell in cells}
        try:
            for future in as_completed(running):
                error = future.exception()
                yield running[future], "".join(traceback.format_exception(error)) if error else ""
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
