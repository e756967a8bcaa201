"""Azure's LLM inference traces: one request a row of a CSV file. No sessions, no prefixes: only arrivals.

Every row becomes a session of one round, called by its row number (0 for the first), that starts as long
after the first row as it was recorded. What was shared between requests is not in these files.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime

from antiphon.traces.formats import Format, Item, Line, ReadOptions, column_names
from antiphon.traces.schema import MAX_TOKENS, RoundTrace, SessionTrace

TIME, PROMPT, OUTPUT = COLUMNS = ("timestamp", "contexttokens", "generatedtokens")


def _matches(head: dict[str, object]) -> bool:
    return set(COLUMNS) <= {name.lower() for name in head}


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    """Lines after the header; the file need not have its columns in the usual order."""
    header = next(lines, Line(1, b""))
    names = [name.lower() for name in column_names(header.text)]
    if not set(COLUMNS) <= set(names):
        yield header, f"the header was not text, so what is in the {len(names)} columns is not known"
        return
    at = [names.index(name) for name in COLUMNS]
    first: datetime | None = None
    for count, line in enumerate(lines):
        cells = _cells(line)
        try:
            when, prompt, output = (cells[place].strip() for place in at)
            arrival = _time(when)
            first = first or arrival
            session = _session(count, prompt, output, (arrival - first).total_seconds())
        except IndexError:
            yield line, f"{len(cells)} columns, the header has {len(names)}"
        except (ValueError, OverflowError) as error:
            yield line, str(error)
        else:
            yield line, session


def _cells(line: Line) -> list[str]:
    """Raises nothing: a line that is no CSV is one cell."""
    text = line.text.decode("utf-8", "replace")
    try:
        return next(csv.reader([text]), [])
    except csv.Error:
        return [text]


def _time(text: str) -> datetime:
    """Times without a zone are taken as UTC, as in the 2023 files."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _session(number: int, prompt: str, output: str, start_s: float) -> SessionTrace:
    """Raises `ValueError` for tokens or a time that cannot be."""
    for column, text in zip(COLUMNS[1:], (prompt, output), strict=True):
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{column} {text!r} is no number of tokens")
    prompt_tokens, output_tokens = int(prompt), int(output)
    if not 1 <= prompt_tokens <= MAX_TOKENS or not 0 <= output_tokens <= MAX_TOKENS:
        raise ValueError(f"{prompt_tokens} context and {output_tokens} generated tokens make no request")
    if start_s < 0:
        raise ValueError("earlier than the first row: sort the file by time")
    return SessionTrace(str(number), (RoundTrace(prompt_tokens, max(1, output_tokens)),), start_s)


FORMAT = Format("azure llm inference", _matches, _read, "csv")
