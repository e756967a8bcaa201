"""What a trace format is: how its content is told, and how it is read. The formats are in `format_*.py`.

A leaf beside `schema.py`: `readers.py` opens files, asks the formats in turn, and hands over the lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from antiphon.traces.schema import SessionTrace, TraceError

Form = Literal["auto", "cumulative", "delta"]
FORMS: tuple[Form, ...] = ("auto", "cumulative", "delta")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What content alone cannot tell."""

    share_system: bool = False
    """Weka: sessions of equal tool and system tokens share that prefix."""
    form: Form = "auto"
    """Mooncake with sessions: whether `input_length` counts the whole prompt or what is new."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise TraceError(f"--form {self.form!r}: known are {', '.join(FORMS)}")


class Line(NamedTuple):
    """A line that holds anything; of a document, the whole of it as line 1."""

    number: int
    text: bytes


def column_names(header: bytes) -> list[str]:
    """Of a table's first line. By it a format is told and read: what is told as a header is one."""
    return [name.strip(' "') for name in header.decode("utf-8", "replace").split(",")]


Item = tuple[Line, SessionTrace | str]
"""Where a session or a fault ended, and the session or what is wrong, in words."""


class Format(NamedTuple):
    """One way to write a trace down. `read` gets every line of the file, the first one included."""

    name: str
    matches: Callable[[dict[str, object]], bool]
    """Given the first line (or the document) as a JSON object; of CSV, its column names as keys."""
    read: Callable[[Iterator[Line], ReadOptions], Iterator[Item]]
    kind: Literal["lines", "document", "csv"] = "lines"
    """JSON lines; one JSON document a file (which may span lines); comma-separated with a header."""
