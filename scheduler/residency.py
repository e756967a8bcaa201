"""Which engine is believed to hold which prefix: checkpoints of page chains, one tree per engine.

A chain (page hashes of a prompt) is remembered at checkpoints only: every `CHECKPOINT_TOKENS` tokens (the
stride) and at its end. The checkpoint below a checkpoint is the stride before it. An engine that holds a
checkpoint holds all below it, so that a look-up bisects over the strides. A belief may be wrong (engines
evict): that costs a recomputation, never a wrong token.

Memory: per engine at most the checkpoints that its page store can hold. Only a checkpoint with none above it
is ever dropped, the least recently recorded first. What it stood on then goes next, so that a chain that
nobody uses is dropped from its end on; but if it was recorded as an end itself while others stood on it, it
counts as recorded now.

Written only by the core, on one thread. Engines are bits of an integer. Costs: recording, what is new;
a look-up, the logarithm of the length for every length at which beliefs end, and less than a stride of pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from antiphon.scheduler.messages import Holding

CHECKPOINT_TOKENS = 512

DEVICES_IN_A_STORE = 4
"""How much more than its device an engine's page store is taken to hold, where it has not told."""

LEAST_LIMIT = 1024
"""Checkpoints of an engine, however small."""

NAMES_LIMIT = 4096
"""Combinations of engines whose names are remembered."""


@lru_cache(maxsize=64)
def stride_pages(page_size: int) -> int:
    """Pages between two stride checkpoints: CHECKPOINT_TOKENS, rounded down to whole pages, at least one."""
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1 token, got {page_size}")
    return CHECKPOINT_TOKENS // page_size or 1


def checkpoint_limit(store_tokens: int, pool_tokens: int) -> int:
    """How many checkpoints of an engine are worth keeping: twice the strides that its store can hold.

    Twice, as a chain's end is one too. What is believed beyond that has been evicted there. `store_tokens` 0:
    the engine has not told, and its device's `pool_tokens` stand in.
    """
    tokens = store_tokens or DEVICES_IN_A_STORE * pool_tokens
    return max(LEAST_LIMIT, 2 * -(-tokens // CHECKPOINT_TOKENS))


def chain_checkpoints(hashes: Sequence[bytes], page_size: int) -> list[tuple[int, bytes]]:
    """(tokens, hash of the page that ends there) of a chain's checkpoints, longest first."""
    stride = stride_pages(page_size)
    pages = list(range(stride, len(hashes) + 1, stride))
    if hashes and len(hashes) % stride:
        pages.append(len(hashes))
    return [(count * page_size, hashes[count - 1]) for count in reversed(pages)]


def latest_checkpoints(hashes: Sequence[bytes], page_size: int, since: int) -> list[tuple[int, bytes]]:
    """As `chain_checkpoints`, but of the first `since` pages only some: fewer, the further back they are."""
    stride = stride_pages(page_size)
    whole, old = len(hashes) // stride, min(since // stride, len(hashes) // stride)
    strides = [*range(whole, old, -1), *(old - back for back in _growing(old))]
    found = [(count * stride * page_size, hashes[count * stride - 1]) for count in strides]
    if len(hashes) % stride:
        found.insert(0, (len(hashes) * page_size, hashes[-1]))
    return found


def _growing(limit: int) -> Iterator[int]:
    """0, 1, 4, 16, ... below the limit."""
    back = 0
    while back < limit:
        yield back
        back = 4 * back or 1


@dataclass(slots=True)
class _Tree:
    """What one engine holds. Every checkpoint is either in `leaves` or in `above`."""

    incarnation: str
    bit: int
    limit: int
    leaves: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Checkpoints with none above them, least recently recorded first."""
    above: dict[bytes, int] = field(default_factory=dict)
    """Of every other checkpoint: how many stand directly on it; never 0."""
    renewed: set[bytes] = field(default_factory=set)
    """Those of `above` that were recorded as the end of a chain while others stood on them."""

    def __len__(self) -> int:
        return len(self.leaves) + len(self.above)


class ResidencyIndex:
    """Beliefs on every admitted engine. Whatever is stamped with another incarnation is ignored."""

    def __init__(self) -> None:
        self._trees: dict[str, _Tree] = {}
        self._by_bit: dict[int, str] = {}
        self._all = 0
        """Bits of every admitted engine."""
        self._masks: dict[bytes, int] = {}
        """Checkpoint hash -> bits of the engines that hold it; never 0."""
        self._names: dict[int, tuple[str, ...]] = {}
        """Bits -> ids of the engines: remembered, as few combinations come up."""
        self._below: dict[bytes, bytes | None] = {}
        """Checkpoint hash -> the checkpoint that it stands on, in whoever's tree; None for a first one."""

    def __len__(self) -> int:
        """Checkpoints over all engines."""
        return sum(map(len, self._trees.values()))

    # ---- engines

    def admit(self, engine_id: str, incarnation: str, limit: int = 16384) -> None:
        """An engine said hello: from now on only this incarnation counts; another one's beliefs are void.

        `limit`: most checkpoints to keep of it (`checkpoint_limit`).
        """
        if limit < 1:
            raise ValueError(f"the limit of {engine_id} must be at least 1 checkpoint, got {limit}")
        tree = self._trees.get(engine_id)
        if tree is not None:
            if tree.incarnation == incarnation:
                return
            self.void(engine_id, tree.incarnation)
        bit = 1
        while bit in self._by_bit:
            bit <<= 1
        self._trees[engine_id] = _Tree(incarnation, bit, limit)
        self._by_bit[bit] = engine_id
        self._all |= bit
        self._names.clear()

    def void(self, engine_id: str, incarnation: str) -> None:
        """This incarnation is gone with all that it held; a newer one is not touched."""
        tree = self._trees.get(engine_id)
        if tree is None or tree.incarnation != incarnation:
            return
        for checkpoints in (tree.leaves, tree.above):
            for page_hash in checkpoints:
                self._clear(page_hash, tree.bit)
        del self._trees[engine_id]
        del self._by_bit[tree.bit]
        self._all &= ~tree.bit

    # ---- what is believed

    def record(
        self,
        engine_id: str,
        incarnation: str,
        hashes: Sequence[bytes],
        page_size: int,
        pages: int | None = None,
    ) -> bool:
        """The engine holds the first `pages` pages of the chain (None: all of them).

        False, with nothing recorded, when this incarnation is not the admitted one.
        """
        tree = self._trees.get(engine_id)
        if tree is None or tree.incarnation != incarnation:
            return False
        end = len(hashes) if pages is None or pages > len(hashes) else pages
        if end <= 0:
            return True
        tip, bit, leaves = hashes[end - 1], tree.bit, tree.leaves
        mask = self._masks.get(tip, 0)
        if not mask & bit:
            self._masks[tip] = mask | bit
            leaves[tip] = None
            stride = stride_pages(page_size)
            self._stand(tree, hashes, end, (end - 1) // stride * stride, stride)
            if len(leaves) + len(tree.above) > tree.limit:
                self._trim(tree)
        elif tip in leaves:
            leaves.move_to_end(tip)
        else:
            tree.renewed.add(tip)
        return True

    def _stand(self, tree: _Tree, hashes: Sequence[bytes], at: int, below: int, stride: int) -> None:
        """The checkpoint at `at` pages is new: have all below it, down to the first one that was held."""
        masks, bit, above = self._masks, tree.bit, tree.above
        node, below_of, known = hashes[at - 1], self._below, masks.get
        for end in range(below - 1, -1, -stride):
            base = hashes[end]
            below_of[node] = base
            mask = known(base, 0)
            if mask & bit:
                above[base] = above.get(base, 0) + 1
                tree.leaves.pop(base, None)
                return
            masks[base] = mask | bit
            above[base] = 1
            node = base
        below_of[node] = None

    def merge(self, hashes: Sequence[bytes], page_size: int, holdings: Iterable[Holding]) -> None:
        """What the ledger knows of a prompt: each holding is a prefix of `hashes`."""
        for holding in holdings:
            pages = holding.tokens // page_size
            self.record(holding.engine_id, holding.incarnation, hashes, page_size, pages)

    def held(self, hashes: Sequence[bytes], page_size: int) -> dict[str, int]:
        """Engine id -> tokens of this chain that it is believed to hold; engines with none are absent."""
        found: dict[str, int] = {}
        for pages, mask in self._ends(hashes, stride_pages(page_size)):
            for engine_id in self._names.get(mask) or self._name(mask):
                found[engine_id] = pages * page_size
        return found

    def holds(self, engine_id: str, hashes: Sequence[bytes]) -> bool:
        """The engine is believed to hold the whole chain, which was recorded as one."""
        tree = self._trees.get(engine_id)
        return tree is not None and (not hashes or bool(self._masks.get(hashes[-1], 0) & tree.bit))

    def held_by(self, engine_id: str, hashes: Sequence[bytes], page_size: int) -> int:
        """Tokens of this chain that one engine is believed to hold."""
        tree = self._trees.get(engine_id)
        if tree is None:
            return 0
        get, bit, stride = self._masks.get, tree.bit, stride_pages(page_size)
        # It holds `low` strides and not `high`. Most often it lacks only what the last round added: from the
        # end in growing steps, then by halves.
        low = len(hashes) // stride
        high, step = low + 1, 1
        while low > 0 and not get(hashes[low * stride - 1], 0) & bit:
            low, high, step = max(0, low - step), low, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            if get(hashes[middle * stride - 1], 0) & bit:
                low = middle
            else:
                high = middle
        base = low * stride
        for pages in range(min(base + stride - 1, len(hashes)), base, -1):
            if get(hashes[pages - 1], 0) & bit:
                return pages * page_size
        return base * page_size

    def checkpoints(self, hashes: Sequence[bytes], page_size: int, since: int = 0) -> list[tuple[int, bytes]]:
        """(tokens, hash) to tell the ledger of or to ask it about, longest first. Walks the whole chain.

        The chain's own checkpoints, and where the beliefs of this index end: the ends of earlier rounds. Of
        the first `since` pages only a few, for a chain whose beginning the ledger knows.
        """
        asked = dict(
            latest_checkpoints(hashes, page_size, since) if since else chain_checkpoints(hashes, page_size)
        )
        for pages, _ in self._ends(hashes, stride_pages(page_size)):
            asked[pages * page_size] = hashes[pages - 1]
        return sorted(asked.items(), reverse=True)

    def _ends(self, hashes: Sequence[bytes], stride: int) -> list[tuple[int, int]]:
        """(pages, bits of the engines whose belief ends there), every engine at most once, 0 pages left out.

        Who holds a stride only gets fewer from one to the next: intervals with equal ends are skipped. An
        engine mostly has nothing, or lacks only what the last rounds added: so the first stride is looked at,
        and each interval from its end in growing steps, then by halves.
        """
        get = self._masks.get
        ends: list[tuple[int, int]] = []
        holders, high = self._all, len(hashes) // stride
        left = get(hashes[high * stride - 1], 0) if high else holders
        if left:
            self._stopped(hashes, high * stride, len(hashes), left, ends)
        first = get(hashes[stride - 1], 0) if high > 1 else left
        intervals = [(0, holders, 1, first), (1, first, high, left)]
        while intervals:
            low, holders, high, left = intervals.pop()
            step = 1
            while holders != left:
                if high - low == 1:
                    self._stopped(hashes, low * stride, high * stride - 1, holders & ~left, ends)
                    break
                middle = high - step if high - step > low else (low + high) // 2
                there = get(hashes[middle * stride - 1], 0)
                if there == left:
                    high, step = middle, 2 * step
                else:
                    if there != holders:
                        intervals.append((low, holders, middle, there))
                    low, holders = middle, there
        return ends

    def _stopped(
        self, hashes: Sequence[bytes], base: int, last: int, engines: int, ends: list[tuple[int, int]]
    ) -> None:
        """`engines` hold `base` pages and no further stride: where in (base, last] each ends, or at base."""
        get = self._masks.get
        for pages in range(last, base, -1):
            here = engines & get(hashes[pages - 1], 0)
            if here:
                ends.append((pages, here))
                engines ^= here
                if not engines:
                    return
        if base:
            ends.append((base, engines))

    # ---- bookkeeping

    def _name(self, mask: int) -> tuple[str, ...]:
        if len(self._names) >= NAMES_LIMIT:
            self._names.clear()
        names = tuple(engine_id for bit, engine_id in self._by_bit.items() if mask & bit)
        self._names[mask] = names
        return names

    def _trim(self, tree: _Tree) -> None:
        """Drop checkpoints from the least recent end on until the limit is kept."""
        leaves, above, bit = tree.leaves, tree.above, tree.bit
        masks, below_of = self._masks, self._below
        node: bytes | None = None
        for _ in range(len(leaves) + len(above) - tree.limit):
            if node is None:
                node, _ = leaves.popitem(last=False)
            base = below_of[node]
            mask = masks[node] ^ bit
            if mask:
                masks[node] = mask
            else:
                del masks[node]
                del below_of[node]
            node = None
            if base is None:
                continue
            standing = above[base] - 1
            if standing:
                above[base] = standing
                continue
            del above[base]
            if base in tree.renewed:
                tree.renewed.discard(base)
                leaves[base] = None
            else:
                node = base  # the next to go
        if node is not None:
            leaves[node] = None
            leaves.move_to_end(node, last=False)

    def _clear(self, page_hash: bytes, bit: int) -> None:
        mask = self._masks[page_hash] & ~bit
        if mask:
            self._masks[page_hash] = mask
        else:
            del self._masks[page_hash]
            del self._below[page_hash]

    def check_invariants(self) -> None:
        """Raise AssertionError unless trees and masks say the same and no tree is over its limit."""
        masks: dict[bytes, int] = {}
        for engine_id, tree in self._trees.items():
            assert self._by_bit[tree.bit] == engine_id, f"{engine_id}: bit {tree.bit} is another engine's"
            assert len(tree) <= tree.limit, f"{engine_id}: {len(tree)} checkpoints"
            assert not tree.leaves.keys() & tree.above.keys(), f"{engine_id}: a leaf has some above it"
            assert tree.renewed <= tree.above.keys(), f"{engine_id}: a leaf is to be renewed"
            above: dict[bytes, int] = {}
            for page_hash in (*tree.leaves, *tree.above):
                masks[page_hash] = masks.get(page_hash, 0) | tree.bit
                base = self._below[page_hash]
                if base is not None:
                    above[base] = above.get(base, 0) + 1
            assert above == tree.above, f"{engine_id}: what stands on its checkpoints is miscounted"
        assert len(self._by_bit) == len(self._trees), "an engine's bit outlived its tree"
        assert sum(self._by_bit) == self._all, "the bits of all engines are out of date"
        assert masks == self._masks, "masks differ from the trees"
        assert self._below.keys() == masks.keys(), "a checkpoint without a place, or a place without one"
