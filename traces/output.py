"""Writing a file that is there whole or not at all, gzipped if its name says so, the same bytes each time."""

from __future__ import annotations

import errno
import gzip
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

GZIP_LEVEL = 6


def check_writable(path: Path) -> None:
    """Raise the OSError that writing `path` would end in: to know it before a long run. Folders are made."""
    partial = _partial(path)
    try:
        partial.touch(exist_ok=False)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write to it; it takes `path`'s place when the block ends, and nothing is left if the block raises.

    A name that ends in .gz is gzipped, without time or name inside. Folders are made. Raises OSError.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as zipped:
                    yield cast(BinaryIO, zipped)
            else:
                yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """What is written until it is whole; OSError if `path` is a folder or its folder cannot be made."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
