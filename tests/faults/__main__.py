"""`make faults`: the matrix, run by run; a table at the end, and status 1 if anything was not as it must be.

python -m tests.faults [--seed N] [--cells redis.*.decode,link.*] [--engines simulated|real|both]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from antiphon.engines.tiny_model import write_tiny_model
from tests.faults import real, table
from tests.faults.cells import Cell, chosen, matrix, real_cells
from tests.faults.conversation import load_tokenizer
from tests.faults.fleet import Fleet
from tests.faults.results import Scale, TrialResult
from tests.faults.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
RESULT = ROOT / "docs" / "results" / "faults.json"


def show(result: TrialResult) -> None:
    """One line, and a line for each finding."""
    verdict = result.verdict
    name = ".".join(part for part in (result.cell.name, result.variant) if part)
    drawn = f" ({result.note})" if result.note else ""
    print(
        f"{'ok ' if result.clean else 'BAD'} {result.engines:9} {name}{drawn}: seed {result.seed}, "
        f"{'in' if result.phase_hit else 'NOT in'} phase, {verdict.rounds} rounds, "
        f"{verdict.answered} answered, {verdict.retried} retried, {verdict.refused} refused, "
        f"{result.forks} forks, worst {verdict.worst_s:.1f} s, took {result.duration_s:.1f} s",
        flush=True,
    )
    for kind in ("lost", "doubled", "wrong", "hung"):
        for finding in getattr(verdict, kind):
            print(f"      {kind}: {finding}", flush=True)
    for leak in result.leaks:
        print(f"      leak: {leak}", flush=True)


async def run_cells(
    fleet: Fleet, cells: Sequence[Cell], seed: int, scale: Scale, runs: int = 1
) -> list[TrialResult]:
    """Each cell `runs` times on one fleet, which is repaired in between."""
    tokenizer = load_tokenizer(fleet.model)
    results = []
    async with fleet.running():
        for cell in cells:
            for variant in cell.variants:
                for number in range(runs):
                    await fleet.repair()
                    trial = Trial(fleet, cell, variant, seed + number, tokenizer, scale)
                    results.append(await trial.run())
                    show(results[-1])
    return results


async def run_all(options: argparse.Namespace, model: Path) -> list[TrialResult]:
    results: list[TrialResult] = []
    if options.engines in ("simulated", "both"):
        cells = chosen(matrix(), options.cells)
        fleet = Fleet(model.parent / "simulated", model)
        results += await run_cells(fleet, cells, options.seed, Scale(), options.runs)
    if options.engines in ("real", "both"):
        try:
            cells = chosen(real_cells(), options.cells)
        except ValueError:
            return results  # a part of the matrix that has no real engines
        fleet = real.fleet(model.parent / "real", model)
        results += await run_cells(fleet, cells, options.seed, real.SCALE)
        real.check_answers(model, results, options.directory)
    return results


def document(results: Sequence[TrialResult], seed: int, took_s: float) -> dict[str, Any]:
    """The result file of one call."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "schema": "antiphon.faults/1",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commits": [commit or "unknown"],
        "seed": seed,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "took_s": round(took_s),
        "rows": table.rows_of(results),
        "findings": table.findings_of(results),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cells", default="", help="names or patterns, commas between them")
    parser.add_argument("--engines", choices=("simulated", "real", "both"), default="both")
    parser.add_argument("--runs", type=int, default=1, help="of each cell on simulated engines, seed by seed")
    parser.add_argument("--directory", type=Path, default=Path("build/faults"), help="logs and result")
    parser.add_argument("--keep", action="store_true", help="rows of other cells stay in the result")
    parser.add_argument("--docs", action="store_true", help="write docs/faults.md and its result file too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    model = (options.directory / "model").resolve()
    if not (model / "config.json").exists():
        write_tiny_model(model)
    started = time.monotonic()
    print(f"seed {options.seed}, cells {options.cells or 'all'}", flush=True)
    results = asyncio.run(run_all(options, model))
    told = document(results, options.seed, time.monotonic() - started)
    written = options.directory / "result.json"
    if options.keep and written.exists():
        told = table.merged(json.loads(written.read_text()), told)
    table.write(told, written)
    print(f"\n{table.conditions(told)}\n\n{table.markdown(told)}\n\n{written}")
    if options.docs:
        table.write(told, RESULT)
        PAGE.write_text(table.with_table(PAGE.read_text(), told))
    missed = [result.cell.name for result in results if not result.phase_hit]
    if missed:
        print(f"the phase was not hit: {', '.join(missed)}")
    return 1 if missed or not all(result.clean for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
