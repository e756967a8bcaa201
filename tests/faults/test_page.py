"""docs/faults.md shows the result file, and the result is what it must be."""

from __future__ import annotations

import json

from tests.faults.__main__ import PAGE, RESULT
from tests.faults.cells import matrix, real_cells
from tests.faults.table import with_table


def test_the_page_shows_the_result() -> None:
    page = PAGE.read_text()
    assert page == with_table(page, json.loads(RESULT.read_text()))


def test_the_result_is_of_the_whole_matrix() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    tried = {(row["cell"], row["engines"]) for row in rows}
    wanted = {(cell.name, "simulated") for cell in matrix()} | {(cell.name, "real") for cell in real_cells()}
    assert tried == wanted


def test_nothing_was_lost_doubled_wrong_or_late() -> None:
    """In the run that the page shows; and every fault met its phase."""
    for row in json.loads(RESULT.read_text())["rows"]:
        assert not any(row[name] for name in ("lost", "doubled", "wrong", "hung", "leaks")), row
        assert row["phase hit"] == row["runs"] and row["answered"] > 0, row
