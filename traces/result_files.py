"""The files of a run: the result object, and one line for each round beside it.

The result file never holds the rounds: they go to a file of their own where they are asked for (`--rounds`).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from antiphon.traces.output import whole_file
from antiphon.traces.result_types import RESULT_SCHEMA, RoundRecord, RunResult

LINES_AT_ONCE = 1000


class ResultError(Exception):
    """A result or rounds file cannot be used: which, where, what is wrong."""


def result_object(result: RunResult) -> dict[str, Any]:
    """What the result file holds: every field but the rounds."""
    whole: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(result, rounds=[]))
    del whole["rounds"]
    return whole


def write_result(result: RunResult, path: Path) -> None:
    """Whole or not at all. Raises `OSError`."""
    with whole_file(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(result_object(result)), indent=2) + b"\n")


def read_result(path: Path) -> RunResult:
    """The result in `path`, without its rounds; keys that are not known are ignored. Raises `ResultError`."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=RunResult)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: {error}") from error
    if result.schema != RESULT_SCHEMA:
        raise ResultError(f"{path}: schema is {result.schema!r}, not {RESULT_SCHEMA!r}")
    return result


def write_rounds(records: Iterable[RoundRecord], path: Path) -> None:
    """One JSON line for each round, gzipped if the name ends in .gz; equal rounds give equal bytes.

    Whole or not at all. Raises `OSError`.
    """
    encode = msgspec.json.Encoder().encode_lines
    left = iter(records)
    with whole_file(path) as file:
        while batch := list(islice(left, LINES_AT_ONCE)):
            file.write(encode(batch))


def read_rounds(path: Path) -> Iterator[RoundRecord]:
    """The rounds of a file of `write_rounds`, in order, one in memory; raises `ResultError`."""
    decode = msgspec.json.Decoder(RoundRecord).decode
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                yield decode(line)
                number += 1
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}, after line {number}: {error}") from error
