"""`antiphon sweep`: a grid of simulations over processes, resumable.

Each cell writes its own result file, whole or not at all; a cell whose file is there is not run again. A cell
that fails, or whose process dies, leaves `NAME.failed.txt` and stops nothing else.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from antiphon.eval.simulate import run_simulation
from antiphon.eval.sweep_spec import Cell, SweepSpec, cells_of, read_spec
from antiphon.traces.provenance import commit
from antiphon.traces.results import ResultError, RunResult, read_result

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
    done = {cell.name: result for cell in cells if (result := read_done(cell, spec, out)) is not None}
    todo = [cell for cell in cells if cell.name not in done]
    console.print(f"{len(cells)} cells, {len(done)} there already", highlight=False)
    ours = commit()
    if others := sum(result.conditions.commit != ours for result in done.values()):
        console.print(f"{others} of them by another commit: another --out runs them again", highlight=False)
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


def read_done(cell: Cell, spec: SweepSpec, out: Path) -> RunResult | None:
    """Its result, if the file can be read and has its rounds beside it where the spec wants them."""
    rounds_path = cell.options(spec, out).rounds_path
    if rounds_path is not None and not rounds_path.is_file():
        return None
    try:
        return read_result(out / f"{cell.name}.json")
    except ResultError:
        return None


def _run_all(
    cells: list[Cell], spec: SweepSpec, out: Path, processes: int, runner: Runner
) -> Iterator[tuple[Cell, str]]:
    """(cell, "" or its traceback) as cells end. An interrupt waits for those that run, starts no other.

    A process that dies takes its pool with it, and nobody can say which cell it was: whatever that cut off
    runs again, each cell in a process of its own.
    """
    cut_off: list[Cell] = []
    with _pool(processes) as pool:
        for cell, error in _ended({pool.submit(runner, cell, spec, out): cell for cell in cells}, pool):
            if isinstance(error, BrokenProcessPool):
                cut_off.append(cell)
            else:
                yield cell, _words(error)
    with ThreadPoolExecutor(processes) as threads:
        alone = {threads.submit(_run_alone, cell, spec, out, runner): cell for cell in cut_off}
        for cell, error in _ended(alone, threads):
            yield cell, _words(error)


def _run_alone(cell: Cell, spec: SweepSpec, out: Path, runner: Runner) -> None:
    with _pool(1) as pool:
        pool.submit(runner, cell, spec, out).result()


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _ended(
    running: Mapping[Future[None], Cell], executor: Executor
) -> Iterator[tuple[Cell, BaseException | None]]:
    try:
        for future in as_completed(running):
            yield running[future], future.exception()
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise


def _words(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)) if error else ""
