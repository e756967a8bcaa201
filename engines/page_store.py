"""The page store: which slot of host memory holds which KV page. Bookkeeping only, no I/O, no copies.

A slot is FREE, INFLIGHT (somebody fills it, nobody sees it), USED (a published page) or QUARANTINED (a
transfer that was given up may still write into it). Pages are named by chained hashes and keep parent links.
Only leaves are evicted, least recently used first, so what is left of a chain is its head. Two things hold a
page: a pin, until it is given back or runs out (`unpin` then says so: what was read must not be trusted), and
a device page whose last known content it is. The engine offers a page only once, and does not tell when it
drops one from the device: with these holds a store larger than the device contains all that is there.

Thread-safe: one lock, held for dictionary work only. The clock is a parameter.
"""

from __future__ import annotations

import heapq
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from antiphon.engines.page_index import Page, PageIndex
from antiphon.engines.page_memory import PageMemory


class SlotState(Enum):
    FREE = "free"
    INFLIGHT = "inflight"
    USED = "used"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Pin:
    """A hold on the first `len(slots)` of the pages that were asked for."""

    pin_id: int
    slots: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(slots=True)
class _HeldPin:
    pages: list[Page]
    holder: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class StoreCounts:
    free: int
    used: int
    inflight: int
    quarantined: int
    pins: int
    pending_offloads: int
    evicted_total: int


@dataclass(slots=True)
class _State:
    """Everything that the lock protects."""

    slots: list[SlotState]
    free: list[int]
    index: PageIndex = field(default_factory=PageIndex)
    on_device: dict[int, Page] = field(default_factory=dict)
    """Device page -> the page that was last copied from it or to it."""
    pins: dict[int, _HeldPin] = field(default_factory=dict)
    expiries: list[tuple[float, int]] = field(default_factory=list)
    tick: int = 0
    quarantined: int = 0
    offloads_begun: int = 0
    offloads_ended: int = 0
    evicted_total: int = 0


class PageStore:
    """`n_pages` slots and the pages in them; `memory` holds their bytes (None = virtual: names only)."""

    def __init__(
        self,
        n_pages: int,
        memory: PageMemory | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        checksums: bool = False,
    ) -> None:
        """`checksums` keeps a crc32 of every page, taken when it is published."""
        if n_pages < 1:
            raise ValueError(f"a store needs at least one page, got {n_pages}")
        if memory is not None and memory.n_pages < n_pages:
            raise ValueError(f"memory for {memory.n_pages} pages cannot hold {n_pages}")
        if checksums and memory is None:
            raise ValueError("a virtual store has no bytes to checksum")
        self.n_pages = n_pages
        self.memory = memory
        self.checksums = checksums
        self._clock = clock
        self._changed = threading.Condition()
        self._state = _State(
            slots=[SlotState.FREE] * n_pages,
            # Handed out from the end: neighbours in order, so that their transfers merge.
            free=list(range(n_pages - 1, -1, -1)),
        )

    # ------------------------------------------------------------ questions

    def prefix_pages(self, hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, from the first on, are stored. Does not count as use."""
        with self._changed:
            return self._state.index.prefix(hashes)

    def missing(self, hashes: Sequence[bytes]) -> list[int]:
        """Positions in `hashes` of pages that are not stored."""
        with self._changed:
            return [i for i, page_hash in enumerate(hashes) if page_hash not in self._state.index.pages]

    def contains(self, page_hash: bytes) -> bool:
        with self._changed:
            return page_hash in self._state.index.pages

    def counts(self) -> StoreCounts:
        with self._changed:
            state = self._state
            self._expire()
            free, used = len(state.free), len(state.index.pages)
            return StoreCounts(
                free=free,
                used=used,
                inflight=self.n_pages - free - used - state.quarantined,
                quarantined=state.quarantined,
                pins=len(state.pins),
                pending_offloads=state.offloads_begun - state.offloads_ended,
                evicted_total=state.evicted_total,
            )

    def learn(self, hashes: Sequence[bytes]) -> None:
        """`hashes` is one piece of a chain: link pages whose parent was not known when they were stored."""
        with self._changed:
            self._state.index.learn(b"", hashes)

    def touch(self, tip: bytes) -> int:
        """Mark `tip` and all pages before it as just used; returns how many are stored, 0 if `tip` is not."""
        with self._changed:
            self._state.tick += 1
            pages = 0
            for page in self._state.index.chain(tip):
                page.last_use = self._state.tick
                pages += 1
            return pages

    def chain(self, tip: bytes) -> tuple[bytes, tuple[bytes, ...]]:
        """(digest before the first, hashes) of the pages up to `tip`, in order; none if `tip` is not here."""
        with self._changed:
            pages = list(self._state.index.chain(tip))
        return pages[-1].parent if pages else b"", tuple(page.page_hash for page in reversed(pages))

    # ------------------------------------------------------------ pins

    def pin(self, hashes: Sequence[bytes], *, ttl_s: float, holder: str) -> Pin:
        """Hold the longest stored prefix of `hashes` for `ttl_s` (inf = until `unpin`); counts as use."""
        with self._changed:
            state = self._state
            self._expire()
            state.tick += 1
            pages = [state.index.pages[page_hash] for page_hash in hashes[: self._state.index.prefix(hashes)]]
            for page in pages:
                state.index.hold(page)
                page.last_use = state.tick
            # Random, so that a pin of an earlier life of this engine cannot be mistaken for one of ours.
            pin_id = secrets.randbits(63)
            expires_at = self._clock() + ttl_s
            state.pins[pin_id] = _HeldPin(pages, holder, expires_at)
            if expires_at != float("inf"):
                heapq.heappush(state.expiries, (expires_at, pin_id))
            checksums = tuple(page.checksum for page in pages) if self.checksums else ()
            return Pin(pin_id, tuple(page.slot for page in pages), checksums)

    def unpin(self, pin_id: int) -> bool:
        """Give a pin back. True = it was held all the time, so what was read under it is what was stored."""
        with self._changed:
            self._expire()
            held = self._state.pins.pop(pin_id, None)
            if held is None:
                return False
            self._drop(held)
            return True

    def wait_for(self, hashes: Sequence[bytes], wait_s: float) -> None:
        """Block until all of `hashes` are stored, the offloads begun so far have ended (they end in order),
        or `wait_s` has passed."""
        with self._changed:
            state = self._state
            begun = state.offloads_begun
            self._changed.wait_for(
                lambda: state.offloads_ended >= begun or self._state.index.prefix(hashes) == len(hashes),
                wait_s,
            )

    def bind(self, device_pages: Sequence[int], hashes: Sequence[bytes]) -> None:
        """These device pages now have this content; each holds its page until it gets another."""
        with self._changed:
            state = self._state
            for device_page, page_hash in zip(device_pages, hashes, strict=True):
                before = state.on_device.pop(device_page, None)
                page = state.index.pages.get(page_hash)
                if page is not None:
                    state.index.hold(page)
                    state.on_device[device_page] = page
                if before is not None:
                    state.index.let_go(before)

    def unbind_all(self) -> None:
        """The device is empty."""
        with self._changed:
            bound, self._state.on_device = self._state.on_device, {}
            for page in bound.values():
                self._state.index.let_go(page)

    # ------------------------------------------------------------ filling

    def allocate(self, count: int) -> tuple[int, ...]:
        """Up to `count` slots, now INFLIGHT, evicting leaves as needed; fewer when the rest is held."""
        with self._changed:
            state = self._state
            self._expire()
            if count > len(state.free):
                for page in state.index.evict(count - len(state.free)):
                    self._free(page.slot)
                    state.evicted_total += 1
            taken = tuple(state.free.pop() for _ in range(min(count, len(state.free))))
            for slot in taken:
                state.slots[slot] = SlotState.INFLIGHT
            return taken

    def publish(self, parent: bytes, hashes: Sequence[bytes], slots: Sequence[int]) -> int:
        """Make filled slots visible as the chain `hashes` after `parent` (empty = root or not known); returns
        how many pages are new.

        A page that is stored already keeps its slot; the second copy is freed.
        """
        if len(hashes) != len(slots):
            raise ValueError(f"{len(hashes)} hashes for {len(slots)} slots")
        # Outside the lock: nobody else touches an INFLIGHT slot.
        crcs = [self._crc32(slot) for slot in slots]
        with self._changed:
            state = self._state
            self._require(slots, SlotState.INFLIGHT)
            state.tick += 1
            new = 0
            for page_hash, slot, crc in zip(hashes, slots, crcs, strict=True):
                if page_hash in state.index.pages:
                    self._free(slot)
                else:
                    state.slots[slot] = SlotState.USED
                    state.index.add(Page(page_hash, parent, slot, state.tick, crc))
                    new += 1
                parent = page_hash
            self._changed.notify_all()
            return new

    def discard(self, slots: Iterable[int]) -> None:
        """Give INFLIGHT slots back unseen."""
        self._move(slots, SlotState.INFLIGHT, SlotState.FREE)

    def quarantine(self, slots: Iterable[int]) -> None:
        """Set INFLIGHT slots aside: something may still write into them. Undone by `release`."""
        self._move(slots, SlotState.INFLIGHT, SlotState.QUARANTINED)

    def release(self, slots: Iterable[int]) -> None:
        """The writer of QUARANTINED slots has ended: they are free again."""
        self._move(slots, SlotState.QUARANTINED, SlotState.FREE)

    def forget(self, page_hash: bytes) -> bool:
        """Drop a page that is known to be bad; False when it is not stored or on hold."""
        with self._changed:
            self._expire()
            page = self._state.index.pages.get(page_hash)
            if page is None or page.holds:
                return False
            self._state.index.remove(page)
            self._free(page.slot)
            return True

    def begin_offload(self) -> None:
        """Pages are on their way into this store; `wait_for` waits for them until `end_offload`."""
        with self._changed:
            self._state.offloads_begun += 1

    def end_offload(self) -> None:
        with self._changed:
            if self._state.offloads_ended == self._state.offloads_begun:
                raise ValueError("end_offload without begin_offload")
            self._state.offloads_ended += 1
            self._changed.notify_all()

    # ------------------------------------------------------------ checks

    def bad_pages(self, pin: Pin) -> list[int]:
        """Positions in a pin whose bytes no longer match their checksum; [] without checksums."""
        pairs = zip(pin.slots, pin.checksums, strict=False)
        return [position for position, (slot, crc) in enumerate(pairs) if self._crc32(slot) != crc]

    def corrupt(self, page_hash: bytes) -> bool:
        """Test hook: spoil the bytes of a stored page; False if it is not stored."""
        with self._changed:
            page = self._state.index.pages.get(page_hash)
            if page is None or self.memory is None:
                return False
            self.memory.corrupt(page.slot)
            return True

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict themselves. For tests."""
        with self._changed:
            state = self._state
            state.index.check_invariants()
            pages = state.index.pages
            by_state = {kind: [s for s, now in enumerate(state.slots) if now is kind] for kind in SlotState}
            assert sorted(state.free) == by_state[SlotState.FREE], "free list and slot states differ"
            assert sorted(page.slot for page in pages.values()) == by_state[SlotState.USED], "pages and slots"
            assert state.quarantined == len(by_state[SlotState.QUARANTINED]), "quarantine count"
            holds = Counter(page for held in state.pins.values() for page in held.pages)
            holds.update(state.on_device.values())
            assert all(page.alive for page in holds), "a page on hold was evicted"
            assert holds == {page: page.holds for page in pages.values() if page.holds}, "hold counts"

    def _crc32(self, slot: int) -> int:
        return self.memory.crc32(slot) if self.checksums and self.memory is not None else 0

    # ------------------------------------------------------------ inside the lock

    def _expire(self) -> None:
        now, state = self._clock(), self._state
        while state.expiries and state.expiries[0][0] <= now:
            held = state.pins.pop(heapq.heappop(state.expiries)[1], None)
            if held is not None:
                self._drop(held)

    def _drop(self, held: _HeldPin) -> None:
        for page in held.pages:
            self._state.index.let_go(page)

    def _free(self, slot: int) -> None:
        self._state.slots[slot] = SlotState.FREE
        self._state.free.append(slot)

    def _move(self, slots: Iterable[int], before: SlotState, after: SlotState) -> None:
        slots = list(slots)
        with self._changed:
            self._require(slots, before)
            self._state.quarantined += len(slots) * (
                (after is SlotState.QUARANTINED) - (before is SlotState.QUARANTINED)
            )
            for slot in slots:
                if after is SlotState.FREE:
                    self._free(slot)
                else:
                    self._state.slots[slot] = after

    def _require(self, slots: Sequence[int], expected: SlotState) -> None:
        wrong = [slot for slot in slots if self._state.slots[slot] is not expected]
        if wrong or len(set(slots)) != len(slots):
            raise ValueError(f"slots {wrong or slots} are not all {expected.value}, or named twice")
