"""Copies between device pages (SGLang's K and V buffers) and slots of the page store.

A page is [layer][K, V][token][head][dim] in the store; on the device every layer has a K and a V buffer of
[token slot][head][dim]. `DirectCopy` serves buffers in host memory, `StreamedCopy` those of a GPU: side
streams, events, pinned host memory, chunks of bounded size. Both block until the bytes are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from antiphon.engines.device_pool import DevicePool, PagePart, page_ids_of
from antiphon.engines.page_memory import PageMemory

CHUNK_BYTES = 32 * 1024 * 1024
"""Staging memory per direction on a GPU, and as much pinned host memory for loads."""


def store_tensor(memory: PageMemory) -> torch.Tensor:
    """The store's memory as [slots, page bytes] of uint8, sharing it."""
    return torch.frombuffer(memory.buffer, dtype=torch.uint8).view(memory.n_pages, memory.page_bytes)


def pinned_memory(n_pages: int, page_bytes: int) -> PageMemory:
    """Page-locked memory for a store: a GPU copies to and from it without a detour."""
    pinned = torch.empty(n_pages * page_bytes, dtype=torch.uint8, pin_memory=True)
    return PageMemory(n_pages, page_bytes, memoryview(pinned.numpy()))


def adjacent_runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first slot, length) of every run of consecutive slots."""
    start = 0
    for position in range(1, len(slots) + 1):
        if position == len(slots) or slots[position] != slots[position - 1] + 1:
            yield start, slots[start], position - start
            start = position


class DeviceCopy(Protocol):
    """Both directions. `ready` are events after which the device pages may be touched."""

    asynchronous: bool
    """True: waits for the device; call it on a thread that may block."""

    def page_ids(self, indices: torch.Tensor, ready: Sequence[Any]) -> list[int]:
        """Device pages of token slots that come as whole pages; raises ValueError if they do not."""

    def to_store(self, device_pages: Sequence[int], slots: Sequence[int], ready: Sequence[Any]) -> None:
        """Copy pages out; returns when the bytes are in the store."""

    def to_device(
        self,
        slots: Sequence[int],
        device_pages: Sequence[int],
        ready: Sequence[Any],
        layer_done: Callable[[int], None],
    ) -> None:
        """Copy pages in, layer by layer; calls `layer_done(layer)` when that layer's bytes are there."""


class DirectCopy:
    """Device buffers in host memory: plain copies on the caller's thread."""

    asynchronous = False

    def __init__(self, pool: DevicePool, memory: PageMemory) -> None:
        self._pool = pool
        self._store = store_tensor(memory)

    def page_ids(self, indices: torch.Tensor, ready: Sequence[Any]) -> list[int]:
        return page_ids_of(indices, self._pool.page_size_tokens)

    def to_store(self, device_pages: Sequence[int], slots: Sequence[int], ready: Sequence[Any]) -> None:
        runs = list(_common_runs(device_pages, slots))
        for part in (part for layer in self._pool.layers for part in layer):
            stored = self._store[:, part.offset : part.offset + part.size]
            for page, slot, count in runs:
                stored[slot : slot + count].copy_(part.pages[page : page + count])

    def to_device(
        self,
        slots: Sequence[int],
        device_pages: Sequence[int],
        ready: Sequence[Any],
        layer_done: Callable[[int], None],
    ) -> None:
        runs = list(_common_runs(device_pages, slots))
        for number, layer in enumerate(self._pool.layers):
            for part in layer:
                stored = self._store[:, part.offset : part.offset + part.size]
                for page, slot, count in runs:
                    part.pages[page : page + count].copy_(stored[slot : slot + count])
            layer_done(number)


def _common_runs(pages: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first page, first slot, length) of every run that is consecutive on both sides."""
    for start, page, length in adjacent_runs(pages):
        for inner, slot, count in adjacent_runs(slots[start : start + length]):
            yield page + inner, slot, count


class StreamedCopy:
    """Device buffers on a GPU. `module` is torch.cuda (torch.cpu has the same names, which tests use).

    Out: pages are gathered on the device, then copied to the pinned store run by run. In: every layer's
    slices are gathered into pinned memory by the CPU while the layer before is on its way, so that the
    forward can begin with the first layer. One thread per direction.
    """

    asynchronous = True

    def __init__(
        self, pool: DevicePool, memory: PageMemory, module: Any = torch.cuda, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._pool = pool
        self._store = store_tensor(memory)
        self._module = module
        self._pin = pool.device.type == "cuda"
        self._chunk_bytes = chunk_bytes
        self._out = module.Stream()
        self._in = module.Stream()
        self._local = threading.local()
        self._pinned: list[torch.Tensor] = []

    def page_ids(self, indices: torch.Tensor, ready: Sequence[Any]) -> list[int]:
        self._enter_thread()
        for event in ready:
            event.synchronize()
        with self._module.stream(self._out):
            on_host = indices.to("cpu")
        return page_ids_of(on_host, self._pool.page_size_tokens)

    def to_store(self, device_pages: Sequence[int], slots: Sequence[int], ready: Sequence[Any]) -> None:
        self._enter_thread()
        step = max(1, self._chunk_bytes // self._pool.page_bytes)
        with self._module.stream(self._out):
            for event in ready:
                self._out.wait_event(event)
            for start in range(0, len(slots), step):
                pages = self._index(device_pages[start : start + step])
                staging = torch.empty(
                    (len(pages), self._pool.page_bytes), dtype=torch.uint8, device=self._pool.device
                )
                for part in (part for layer in self._pool.layers for part in layer):
                    staging[:, part.offset : part.offset + part.size] = part.pages.index_select(0, pages)
                for position, slot, count in adjacent_runs(slots[start : start + step]):
                    self._store[slot : slot + count].copy_(
                        staging[position : position + count], non_blocking=True
                    )
            self._mark(self._out).synchronize()

    def to_device(
        self,
        slots: Sequence[int],
        device_pages: Sequence[int],
        ready: Sequence[Any],
        layer_done: Callable[[int], None],
    ) -> None:
        self._enter_thread()
        largest = max(sum(part.size for part in layer) for layer in self._pool.layers)
        step = max(1, self._chunk_bytes // largest)
        buffers = self._pinned_buffers(min(step, len(slots)) * largest)
        in_use: list[Any] = [None, None]
        turn = 0
        landed: list[tuple[int, Any]] = []
        with self._module.stream(self._in):
            for event in ready:
                self._in.wait_event(event)
            pages_at = {
                start: self._index(device_pages[start : start + step]) for start in range(0, len(slots), step)
            }
            for number, layer in enumerate(self._pool.layers):
                for start, pages in pages_at.items():
                    if in_use[turn] is not None:
                        in_use[turn].synchronize()
                    self._load_chunk(layer, slots[start : start + step], pages, buffers[turn])
                    in_use[turn] = self._mark(self._in)
                    turn = 1 - turn
                landed.append((number, self._mark(self._in)))
                # One layer behind: its copy runs while the CPU gathers the next one.
                if len(landed) > 1:
                    self._report(landed.pop(0), layer_done)
            for entry in landed:
                self._report(entry, layer_done)

    def _load_chunk(
        self, layer: Sequence[PagePart], slots: Sequence[int], pages: torch.Tensor, pinned: torch.Tensor
    ) -> None:
        rows = torch.tensor(slots, dtype=torch.int64)
        begin, size = layer[0].offset, sum(part.size for part in layer)
        gathered = pinned[: len(slots) * size].view(len(slots), size)
        torch.index_select(self._store[:, begin : begin + size], 0, rows, out=gathered)
        arrived = gathered.to(self._pool.device, non_blocking=True)
        for part in layer:
            first = part.offset - begin
            part.pages.index_copy_(0, pages, arrived[:, first : first + part.size])

    def _report(self, landed: tuple[int, Any], layer_done: Callable[[int], None]) -> None:
        number, event = landed
        event.synchronize()
        layer_done(number)

    def _mark(self, stream: Any) -> Any:
        event = self._module.Event()
        event.record(stream)
        return event

    def _index(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.tensor(pages, dtype=torch.int64).to(self._pool.device)

    def _pinned_buffers(self, size: int) -> list[torch.Tensor]:
        """Two buffers of at least `size` bytes, kept for the next load; used by the load thread only."""
        if not self._pinned or self._pinned[0].numel() < size:
            self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pin) for _ in range(2)]
        return self._pinned

    def _enter_thread(self) -> None:
        """The current device is a property of the thread."""
        if self._pin and not getattr(self._local, "entered", False):
            self._module.set_device(self._pool.device)
            self._local.entered = True
