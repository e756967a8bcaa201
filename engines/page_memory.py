"""The bytes of a page store: one region of host memory, cut into equal pages."""

from __future__ import annotations

import ctypes
import mmap
import zlib

_FLIP_HIGH_BIT = bytes(byte ^ 0x80 for byte in range(256))


def allocate_host_memory(size_bytes: int) -> memoryview:
    """Page-aligned anonymous memory; the system backs it only where it is touched."""
    return memoryview(mmap.mmap(-1, size_bytes))


class PageMemory:
    """`n_pages` slots of `page_bytes` in `buffer`, which must be writable and stay where it is."""

    def __init__(self, n_pages: int, page_bytes: int, buffer: memoryview | None = None) -> None:
        if n_pages < 1 or page_bytes < 1:
            raise ValueError(f"a store needs at least one page of one byte, got {n_pages} of {page_bytes}")
        size_bytes = n_pages * page_bytes
        if buffer is None:
            buffer = allocate_host_memory(size_bytes)
        if buffer.nbytes < size_bytes:
            raise ValueError(f"{buffer.nbytes} bytes cannot hold {n_pages} pages of {page_bytes} bytes")
        self.n_pages = n_pages
        self.page_bytes = page_bytes
        self.buffer = buffer.cast("B")[:size_bytes]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        """Where slot 0 begins in this process."""

    def view(self, slot: int) -> memoryview:
        return self.buffer[slot * self.page_bytes : (slot + 1) * self.page_bytes]

    def crc32(self, slot: int) -> int:
        return zlib.crc32(self.view(slot))

    def corrupt(self, slot: int) -> None:
        """Test hook: flip the high bit of every byte, which turns floats wrong but leaves them finite."""
        view = self.view(slot)
        view[:] = bytes(view).translate(_FLIP_HIGH_BIT)
