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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write to it; it takes `path`'s place when the block ends, and nothing is left if the block raises.

    A name that ends in .gz is gzipped, without time or name inside. Folders are made. Raises OSError.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
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
