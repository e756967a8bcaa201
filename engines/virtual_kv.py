"""Virtual KV of a simulated engine: a device pool with a tree of pages, in front of a real page store.

Nothing is computed or copied, but every page is accounted for as SGLang with our linker would: matches are
whole pages and never hold the last token of a prompt, pages of requests in flight are locked, unreferenced
ones are evicted leaf by leaf, and every page that newly joins the tree is offloaded to the store (once: one
that the store evicts while the device still has it is not offered again).

A virtual page is a few bytes in the store. Flipping them (`wire.Corrupt`) makes the page wrong: whoever
computes on top of it generates other tokens, so that checks of outputs can fail here too.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from antiphon.engines.page_hash import page_hashes
from antiphon.engines.page_memory import PageMemory
from antiphon.engines.page_store import PageStore

RIGHT_CONTENT = b"page"
"""What a right page holds; its checksum shows whether it was flipped."""

WRONG_CONTENT = bytes(byte ^ 0x80 for byte in RIGHT_CONTENT)


class VirtualStore(PageStore):
    """A page store whose pages are a few bytes long, with checksums."""

    def __init__(self, n_pages: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.content = PageMemory(n_pages, len(RIGHT_CONTENT))
        super().__init__(n_pages, self.content, clock=clock, checksums=True)


@dataclass(slots=True)
class _Node:
    parent: bytes
    locks: int
    wrong: bool


class DevicePool:
    """Pages of the device: a tree of named pages, locked or idle, and unnamed ones that requests work in.

    Locks always cover a chain from its first page on, and pages become idle tip first: so the oldest idle
    page is always a leaf. For one thread.
    """

    def __init__(self, n_pages: int) -> None:
        if n_pages < 1:
            raise ValueError(f"a device pool needs at least one page, got {n_pages}")
        self.n_pages = n_pages
        self.evicted_total = 0
        self._nodes: dict[bytes, _Node] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._private = 0

    @property
    def used_pages(self) -> int:
        """Pages that requests in flight hold: not evictable."""
        return self._private + len(self._nodes) - len(self._idle)

    @property
    def available_pages(self) -> int:
        """Free or evictable."""
        return self.n_pages - self.used_pages

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, from the first on, are in the tree."""
        for position, page_hash in enumerate(hashes):
            if page_hash not in self._nodes:
                return position
        return len(hashes)

    def lock(self, hashes: Sequence[bytes]) -> bool:
        """Protect pages that are in the tree; True when one of them is wrong."""
        wrong = False
        for page_hash in hashes:
            node = self._nodes[page_hash]
            node.locks += 1
            wrong = wrong or node.wrong
            self._idle.pop(page_hash, None)
        return wrong

    def unlock(self, hashes: Sequence[bytes]) -> None:
        for page_hash in reversed(hashes):
            node = self._nodes[page_hash]
            node.locks -= 1
            if node.locks == 0:
                self._idle[page_hash] = None

    def take(self, pages: int) -> bool:
        """Get unnamed pages, evicting idle ones as needed; False, changing nothing, if there are too few."""
        if pages > self.available_pages:
            return False
        while self.n_pages - self._private - len(self._nodes) < pages:
            page_hash, _ = self._idle.popitem(last=False)
            del self._nodes[page_hash]
            self.evicted_total += 1
        self._private += pages
        return True

    def give_back(self, pages: int) -> None:
        if pages > self._private:
            raise ValueError(f"{pages} pages given back, {self._private} are out")
        self._private -= pages

    def adopt(self, parent: bytes, hashes: Sequence[bytes], *, wrong: bool) -> tuple[bytes, ...]:
        """Unnamed pages join the tree as the chain `hashes` after `parent`, locked; returns the new ones.

        A page that another request put there meanwhile stays, and the second copy is freed.
        """
        new = []
        for page_hash in hashes:
            node = self._nodes.get(page_hash)
            if node is None:
                self._nodes[page_hash] = _Node(parent, 1, wrong)
                new.append(page_hash)
            else:
                node.locks += 1
                self._idle.pop(page_hash, None)
            self.give_back(1)
            parent = page_hash
        return tuple(new)

    def flush(self) -> None:
        """Forget all idle pages."""
        for page_hash in self._idle:
            del self._nodes[page_hash]
        self._idle.clear()

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict themselves. For tests."""
        assert self._private >= 0 and self._private + len(self._nodes) <= self.n_pages
        order = {page_hash: position for position, page_hash in enumerate(self._idle)}
        for page_hash, node in self._nodes.items():
            assert (node.locks == 0) == (page_hash in order)
            parent = self._nodes.get(node.parent)
            if parent is not None:
                assert parent.locks >= node.locks, "a page is locked without its parent"
                assert parent.locks or order[node.parent] > order[page_hash], "a parent would go first"
        assert set(order) <= set(self._nodes)


@dataclass(slots=True)
class Allocation:
    """KV of one request: `tree_pages` of `hashes` locked in the tree, `private_pages` behind them."""

    seed: bytes
    """Digest before the first page: the namespace of a salt, or nothing."""
    hashes: list[bytes] = field(default_factory=list)
    """Of every whole page of the request's tokens so far."""
    tree_pages: int = 0
    private_pages: int = 0
    device_tokens: int = 0
    """Of the prompt, found on the device at admission."""
    host_tokens: int = 0
    """Of the prompt, found in the store at admission."""
    wrong: bool = False
    """It builds on a wrong page."""

    @property
    def pages(self) -> int:
        return self.tree_pages + self.private_pages


class VirtualKv:
    """The two tiers together, as the batch loop uses them. For one thread; only the store is shared."""

    def __init__(self, device_pages: int, store: VirtualStore, page_size_tokens: int) -> None:
        self.device = DevicePool(device_pages)
        self.store = store
        self.page_size_tokens = page_size_tokens

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size_tokens)

    def admit(self, prompt: Sequence[int], seed: bytes, reserve_tokens: int) -> Allocation | None:
        """Match and lock what is there already; None when prompt and `reserve_tokens` more would not fit."""
        hashes = page_hashes(prompt, self.page_size_tokens, seed)
        # The last token is always computed: its output is what the request is for.
        usable = hashes[: (len(prompt) - 1) // self.page_size_tokens]
        on_device = usable[: self.device.match(usable)]
        allocation = Allocation(seed, list(hashes), tree_pages=len(on_device))
        allocation.wrong = self.device.lock(on_device)
        missing = self.pages_for(len(prompt) + reserve_tokens) - len(on_device)
        if missing > self.device.available_pages:
            self.device.unlock(on_device)
            return None
        self._load(allocation, usable[len(on_device) :])
        allocation.device_tokens = len(on_device) * self.page_size_tokens
        return allocation

    def _load(self, allocation: Allocation, hashes: Sequence[bytes]) -> None:
        """Copy the stored head of `hashes` to the device; it joins the tree when the request's KV does."""
        pin = self.store.pin(hashes, ttl_s=float("inf"), holder="load")
        if any(self.store.content.view(slot) != RIGHT_CONTENT for slot in pin.slots):
            allocation.wrong = True
        self.store.unpin(pin.pin_id)
        if pin.slots and self.device.take(len(pin.slots)):
            allocation.private_pages = len(pin.slots)
            allocation.host_tokens = len(pin.slots) * self.page_size_tokens

    def grow(self, allocation: Allocation, tokens: int) -> bool:
        """Have pages for `tokens` tokens in all; False (and nothing changes) when the pool is in use."""
        missing = self.pages_for(tokens) - allocation.pages
        if missing <= 0:
            return True
        if not self.device.take(missing):
            return False
        allocation.private_pages += missing
        return True

    def commit(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        """The KV of all of `tokens` is computed: its whole pages join the tree and are offloaded."""
        whole = len(tokens) // self.page_size_tokens
        known = len(allocation.hashes)
        if whole > known:
            tail = tokens[known * self.page_size_tokens : whole * self.page_size_tokens]
            prior = allocation.hashes[-1] if known else allocation.seed
            allocation.hashes.extend(page_hashes(tail, self.page_size_tokens, prior))
        joining = allocation.hashes[allocation.tree_pages : whole]
        if not joining:
            return
        parent = allocation.hashes[allocation.tree_pages - 1] if allocation.tree_pages else allocation.seed
        new = self.device.adopt(parent, joining, wrong=allocation.wrong)
        allocation.tree_pages = whole
        allocation.private_pages -= len(joining)
        if new:
            # What is new is the end of the chain: a page is in the tree only if its parent is.
            first = len(joining) - len(new)
            self._offload(joining[first - 1] if first else parent, new, wrong=allocation.wrong)

    def _offload(self, parent: bytes, hashes: Sequence[bytes], *, wrong: bool) -> None:
        stored = self.store.prefix_pages(hashes)
        if stored:
            parent, hashes = hashes[stored - 1], hashes[stored:]
        slots = self.store.allocate(len(hashes))
        if len(slots) < len(hashes):
            # The store is full of pinned pages: the device has them, others cannot pull them.
            self.store.discard(slots)
            return
        for slot in slots:
            self.store.content.view(slot)[:] = WRONG_CONTENT if wrong else RIGHT_CONTENT
        self.store.publish(parent, hashes, slots)

    def release(self, allocation: Allocation) -> None:
        """The request is over: its pages in the tree become idle, the others are free."""
        self.device.unlock(allocation.hashes[: allocation.tree_pages])
        self.device.give_back(allocation.private_pages)
        allocation.tree_pages = allocation.private_pages = 0
