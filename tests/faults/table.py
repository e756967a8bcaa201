"""The result as JSON and as a table: one row for each cell and kind of engine. Pure but for the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.cells import matrix
from tests.faults.results import TrialResult

COLUMNS = ("cell", "engines", "runs", "phase hit", "rounds", "answered", "retried", "refused", "lost",
           "doubled", "wrong", "hung", "forks", "leaks", "worst s")  # fmt: skip
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def row_of(results: Sequence[TrialResult]) -> dict[str, Any]:
    """Of the runs of one cell on one kind of engine."""
    verdicts = [result.verdict for result in results]
    return {
        "cell": results[0].cell.name,
        "engines": results[0].engines,
        "runs": len(results),
        "phase hit": sum(result.phase_hit for result in results),
        "rounds": sum(verdict.rounds for verdict in verdicts),
        "answered": sum(verdict.answered for verdict in verdicts),
        "retried": sum(verdict.retried for verdict in verdicts),
        "refused": sum(verdict.refused for verdict in verdicts),
        "lost": sum(len(verdict.lost) for verdict in verdicts),
        "doubled": sum(len(verdict.doubled) for verdict in verdicts),
        "wrong": sum(len(verdict.wrong) for verdict in verdicts),
        "hung": sum(len(verdict.hung) for verdict in verdicts),
        "forks": sum(result.forks for result in results),
        "leaks": sum(len(result.leaks) for result in results),
        "worst s": round(max(verdict.worst_s for verdict in verdicts), 1),
    }


def rows_of(results: Iterable[TrialResult]) -> list[dict[str, Any]]:
    grouped: dict[tuple[str, str], list[TrialResult]] = {}
    for result in results:
        grouped.setdefault((result.cell.name, result.engines), []).append(result)
    return [row_of(group) for group in grouped.values()]


def findings_of(results: Iterable[TrialResult]) -> list[dict[str, Any]]:
    """What was not as it must be, with what repeats it."""
    return [
        {
            "cell": result.cell.name,
            "variant": result.variant,
            "engines": result.engines,
            "seed": result.seed,
            "drawn": result.note,
            "lost": result.verdict.lost,
            "doubled": result.verdict.doubled,
            "wrong": result.verdict.wrong,
            "hung": result.verdict.hung,
            "leaks": result.leaks,
        }
        for result in results
        if not result.clean
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """The table of a result file, with a line of sums."""
    rows = document["rows"]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(str(row[name]) for name in COLUMNS)} |" for row in rows]
    sums = {name: sum(row[name] for row in rows) for name in COLUMNS[2:-1]}
    worst = max((row["worst s"] for row in rows), default=0.0)
    total = {"cell": "all", "engines": "", **sums, "worst s": worst}
    return "\n".join([*lines, f"| {' | '.join(str(total[name]) for name in COLUMNS)} |"])


def conditions(document: Mapping[str, Any]) -> str:
    """When, where and how long."""
    commits = ", ".join(f"`{commit}`" for commit in document["commits"])
    runs = sum(row["runs"] for row in document["rows"])
    return (
        f"{document['date']}, commit {commits}, seed {document['seed']}: {runs} runs in "
        f"{document['took_s'] / 60:.0f} minutes on {document['machine']}."
    )


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A later result, with the rows of cells that it did not run; the matrix' order."""
    again = {(row["cell"], row["engines"]) for row in now["rows"]}

    def kept(part: str) -> list[dict[str, Any]]:
        return [each for each in before[part] if (each["cell"], each["engines"]) not in again]

    order = [cell.name for cell in matrix()]
    rows = [*kept("rows"), *now["rows"]]
    return {
        **now,
        "commits": list(dict.fromkeys([*before["commits"], *now["commits"]])),
        "took_s": before["took_s"] + now["took_s"],
        "rows": sorted(rows, key=lambda row: (row["engines"] == "real", order.index(row["cell"]))),
        "findings": [*kept("findings"), *now["findings"]],
    }


def with_table(page: str, document: Mapping[str, Any]) -> str:
    """The page, with its table replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{conditions(document)}\n\n{markdown(document)}\n{END}{tail}"


def write(document: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
