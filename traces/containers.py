"""What a trace lies in: a file, a folder or a tar archive, plain, gzipped or xz: told by content.

Archives are looked into one level deep: in a folder they are, in another archive they are not. Nothing of an
archive is ever written under its own name; a compressed one is unpacked into an unnamed file to be sorted.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, NamedTuple, cast

from antiphon.traces.formats import Line
from antiphon.traces.schema import TraceError

MAX_LINE_BYTES = 64 * 1024 * 1024
SPOOL_BYTES = 32 * 1024 * 1024
"""An unpacked archive larger than this goes to disk."""
GZIP, XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNREADABLE = (
    OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError, OverflowError, MemoryError,
)  # fmt: skip
"""How files that are absent, cut off or damaged show themselves."""


class Part(NamedTuple):
    """One file's content, unpacked; it can be read until the next part is asked for."""

    name: str
    """For people: the path, of an archive `path:member`."""
    source: Path
    """The file on disk that it lies in."""
    file: BufferedReader
    alone: bool
    """The user named this very file: it has to be a trace."""


def parts(path: Path, ignored: list[str]) -> Iterator[Part]:
    """Regular files below a folder or in an archive, sorted by name; of a file just that.

    Archives in archives are noted in `ignored`. Raises `TraceError` for what cannot be read.
    """
    with _readable(str(path)):
        folder = path.is_dir()
        files = sorted(each for each in path.rglob("*") if each.is_file()) if folder else [path]
    for each in files:
        yield from _parts_of_file(each, not folder, ignored)


def lines(part: Part) -> Iterator[Line]:
    """Lines that hold anything, numbered from 1. Every way a file can fail to be read is a `TraceError`."""
    number = 0
    try:
        while raw := part.file.readline(MAX_LINE_BYTES):
            number += 1
            if len(raw) == MAX_LINE_BYTES:
                raise TraceError(f"{part.name}, line {number}: longer than {MAX_LINE_BYTES} bytes")
            if text := (raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw).strip():
                yield Line(number, text)
    except UNREADABLE as error:
        raise TraceError(f"{part.name}: cannot be read after line {number}: {error}") from error


def trace_sha256(path: Path) -> str:
    """Of a file: of its bytes as they are. Of a folder: of its files' names and bytes, sorted by name.

    Raises `TraceError` for what cannot be read.
    """
    with _readable(str(path)):
        if not path.is_dir():
            return _file_digest(path).hex()
        whole = hashlib.sha256()
        for each in sorted(file for file in path.rglob("*") if file.is_file()):
            whole.update(os.fsencode(each.relative_to(path).as_posix()) + b"\0" + _file_digest(each))
        return whole.hexdigest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise TraceError(f"{name}: cannot be read: {error}") from error


def _parts_of_file(path: Path, alone: bool, ignored: list[str]) -> Iterator[Part]:
    with _readable(str(path)):
        raw = path.open("rb")
    with raw:
        with _readable(str(path)):
            file = _unpacked(raw)
            archive = _is_tar(file)
        if archive:
            yield from _members(path, file, file is not raw, ignored)
        else:
            yield Part(str(path), path, file, alone)


def _members(path: Path, file: BufferedReader, compressed: bool, ignored: list[str]) -> Iterator[Part]:
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        with _readable(str(path)):
            if compressed:
                shutil.copyfileobj(file, spool)
                spool.seek(0)
                archive = cast(IO[bytes], spool)
            else:
                archive = file
            tar = tarfile.TarFile(fileobj=archive)
            members = sorted((each for each in tar.getmembers() if each.isreg()), key=lambda each: each.name)
            _check_end(tar, archive)
        for member in members:
            name = f"{path}:{member.name}"
            with _readable(name):
                content = tar.extractfile(member)
                if content is None:
                    continue
                inner = _unpacked(cast(BufferedReader, content))
                nested = _is_tar(inner)
            if nested:
                ignored.append(f"{name}: an archive in an archive")
            else:
                yield Part(name, path, inner, False)


def _check_end(tar: tarfile.TarFile, archive: IO[bytes]) -> None:
    """`tarfile` takes a damaged header for the end of the archive; an end is nothing or zeros."""
    archive.seek(tar.offset)
    if archive.read(tarfile.BLOCKSIZE).strip(b"\0"):
        last = tar.getnames()[-1:]
        raise tarfile.ReadError(f"the archive is damaged after member {last[0] if last else 'none'}")


def _unpacked(file: BufferedReader) -> BufferedReader:
    """What a gzipped or xz file holds; of any other, the file itself."""
    start = file.peek(len(XZ))
    if start.startswith(GZIP):
        return BufferedReader(gzip.GzipFile(fileobj=file))
    if start.startswith(XZ):
        return BufferedReader(lzma.LZMAFile(file))
    return file


def _is_tar(file: BufferedReader) -> bool:
    """Whether the first block is a header with a right checksum."""
    try:
        tarfile.TarInfo.frombuf(file.peek(tarfile.BLOCKSIZE)[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
