"""Which page lies in which slot, who follows whom, what to evict next: the store's books, without a lock."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAX_EXPECTED = 65536
"""Pages that are not here whose parent is remembered: those of offloads under way."""


@dataclass(slots=True, eq=False)
class Page:
    page_hash: bytes
    parent: bytes
    slot: int
    last_use: int
    checksum: int
    holds: int = 0
    """Pins and device pages that keep it from being evicted."""
    queued: bool = False
    """It has an entry in the eviction heap."""
    alive: bool = True


@dataclass(slots=True)
class PageIndex:
    """Pages by hash. Eviction takes leaves only, least recently used first, never a page on hold.

    An empty parent stands for "root or not known": `learn` may still name it.
    """

    pages: dict[bytes, Page] = field(default_factory=dict)
    children: dict[bytes, int] = field(default_factory=dict)
    """Parent hash -> number of pages that follow it, whether or not the parent itself is here."""
    leaves: list[tuple[int, int, Page]] = field(default_factory=list)
    """Heap of (last use when queued, slot, page); entries are checked when popped."""
    expected: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    """Page that was not here when its parent was told -> that parent."""

    def prefix(self, hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, from the first on, are here."""
        for position, page_hash in enumerate(hashes):
            if page_hash not in self.pages:
                return position
        return len(hashes)

    def chain(self, tip: bytes) -> Iterator[Page]:
        """`tip` and the pages before it, tip first, up to the first that is not here."""
        page = self.pages.get(tip)
        left = len(self.pages)  # peers tell parents: a wrong one must not lead in a circle for ever
        while page is not None and left:
            left -= 1
            yield page
            page = self.pages.get(page.parent)

    def add(self, page: Page) -> None:
        parent = self.expected.pop(page.page_hash, b"")
        page.parent = page.parent or parent
        self.pages[page.page_hash] = page
        self._link(page)
        self._queue_if_evictable(page)

    def remove(self, page: Page) -> None:
        del self.pages[page.page_hash]
        page.alive = False
        self._unlink(page)

    def learn(self, parent: bytes, hashes: Sequence[bytes]) -> None:
        """Take note that `hashes` is a chain after `parent`: fills in parents that were not known.

        Of pages that are not here it is kept for when they come: they may be on their way from the device.
        """
        for page_hash in hashes:
            page = self.pages.get(page_hash)
            if page is not None and parent and not page.parent:
                self._unlink(page)
                page.parent = parent
                self._link(page)
            elif page is None and parent:
                self.expected[page_hash] = parent
                if len(self.expected) > MAX_EXPECTED:
                    self.expected.popitem(last=False)
            parent = page_hash

    def hold(self, page: Page) -> None:
        page.holds += 1

    def let_go(self, page: Page) -> None:
        page.holds -= 1
        self._queue_if_evictable(page)

    def evict(self, count: int) -> list[Page]:
        """Remove up to `count` pages and return them; fewer when all others are on hold."""
        evicted: list[Page] = []
        while len(evicted) < count and self.leaves:
            # An entry may be out of date: its page gone, grown, held or used since it was queued.
            queued_use, _, page = heapq.heappop(self.leaves)
            page.queued = False
            if not page.alive or page.holds or page.page_hash in self.children:
                continue
            if queued_use < page.last_use:
                self._queue_if_evictable(page)
            else:
                self.remove(page)
                evicted.append(page)
        return evicted

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict themselves. For tests."""
        children: dict[bytes, int] = {}
        for page in self.pages.values():
            children[page.parent] = children.get(page.parent, 0) + 1
        assert children == self.children, "child counts"
        queued = [id(page) for _, _, page in self.leaves if page.alive]
        assert len(queued) == len(set(queued)), "a page is queued twice"
        for page_hash, page in self.pages.items():
            assert page.page_hash == page_hash and page.alive
            assert page.queued == (id(page) in queued), "queue marks"
            assert page.queued or page.holds or page_hash in children, "a leaf that cannot be evicted"

    def _link(self, page: Page) -> None:
        self.children[page.parent] = self.children.get(page.parent, 0) + 1

    def _unlink(self, page: Page) -> None:
        left = self.children[page.parent] - 1
        if left:
            self.children[page.parent] = left
            return
        del self.children[page.parent]
        parent = self.pages.get(page.parent)
        if parent is not None:
            # A chain was used when its tail was: without this, its head would be next in line.
            parent.last_use = max(parent.last_use, page.last_use)
            self._queue_if_evictable(parent)

    def _queue_if_evictable(self, page: Page) -> None:
        if page.alive and not (page.queued or page.holds or page.page_hash in self.children):
            page.queued = True
            heapq.heappush(self.leaves, (page.last_use, page.slot, page))
