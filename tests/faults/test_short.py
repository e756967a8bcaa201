"""The short form of `make faults`: a cell of each component, on simulated engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.faults.__main__ import run_cells
from tests.faults.cells import chosen, matrix
from tests.faults.fleet import Fleet
from tests.faults.results import Scale

CELLS = ",".join(
    [
        "redis.restart.decode",
        "gateway.kill.decode",
        "prefill.kill.transfer",
        "decode.cut.prefill",
        "link.corrupt.transfer",
    ]
)
SEED = 1


def test_nothing_is_lost_doubled_or_wrong(tmp_path: Path, tiny_model_dir: Path) -> None:
    """And the faults did hit rounds in their phases."""
    fleet = Fleet(tmp_path / "fleet", tiny_model_dir)
    results = asyncio.run(run_cells(fleet, chosen(matrix(), CELLS), SEED, Scale()))
    assert all(result.clean for result in results), [
        (result.cell.name, result.verdict, result.leaks) for result in results if not result.clean
    ]
    assert all(result.phase_hit for result in results)
    assert all(result.verdict.answered for result in results)
