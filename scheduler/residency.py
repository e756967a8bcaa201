"""Which engine is believed to hold which prefix: checkpoints of page chains, one book per engine.

A chain (page hashes of a prompt) is remembered at checkpoints only: every `CHECKPOINT_TOKENS` tokens (the
stride) and at its end. An engine is believed to hold the first x tokens of a chain when a checkpoint at x and
every stride checkpoint before x is recorded for it; so a look-up walks up the strides and stops where nobody
holds more. A belief may be wrong (engines evict): that costs a recomputation, never a wrong token.

Written only by the core, on one thread. Engines are bits of an integer: a look-up is a walk of `&`.
Memory: at most `checkpoints_per_engine` per engine, least recently recorded first out. A chain is recorded
from its end to its root, so that what goes first is always the deepest and the rule above stays true.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from antiphon.scheduler.messages import Holding

CHECKPOINT_TOKENS = 512


def stride_pages(page_size: int) -> int:
    """Pages between two stride checkpoints: CHECKPOINT_TOKENS, rounded down to whole pages, at least one."""
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1 token, got {page_size}")
    return max(1, CHECKPOINT_TOKENS // page_size)


def chain_checkpoints(hashes: Sequence[bytes], page_size: int) -> list[tuple[int, bytes]]:
    """(tokens, hash of the page that ends there) of a chain's checkpoints, longest first."""
    stride = stride_pages(page_size)
    pages = list(range(stride, len(hashes) + 1, stride))
    if hashes and len(hashes) % stride:
        pages.append(len(hashes))
    return [(count * page_size, hashes[count - 1]) for count in reversed(pages)]


@dataclass(slots=True)
class _Book:
    incarnation: str
    bit: int
    entries: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Checkpoint hashes, least recently recorded first."""


class ResidencyIndex:
    """Beliefs on every admitted engine. Whatever is stamped with another incarnation is ignored."""

    def __init__(self, checkpoints_per_engine: int = 16384) -> None:
        if checkpoints_per_engine < 1:
            raise ValueError(f"checkpoints_per_engine must be at least 1, got {checkpoints_per_engine}")
        self._limit = checkpoints_per_engine
        self._books: dict[str, _Book] = {}
        self._by_bit: dict[int, str] = {}
        self._all = 0
        """Bits of every admitted engine."""
        self._masks: dict[bytes, int] = {}
        """Checkpoint hash -> bits of the engines that hold it; never 0."""

    def __len__(self) -> int:
        """Checkpoints over all engines."""
        return sum(len(book.entries) for book in self._books.values())

    # ---- engines

    def admit(self, engine_id: str, incarnation: str) -> None:
        """An engine said hello: from now on only this incarnation counts; another one's beliefs are void."""
        book = self._books.get(engine_id)
        if book is not None:
            if book.incarnation == incarnation:
                return
            self.void(engine_id, book.incarnation)
        bit = 1
        while bit in self._by_bit:
            bit <<= 1
        self._books[engine_id] = _Book(incarnation, bit)
        self._by_bit[bit] = engine_id
        self._all |= bit

    def void(self, engine_id: str, incarnation: str) -> None:
        """This incarnation is gone with all that it held; a newer one is not touched."""
        book = self._books.get(engine_id)
        if book is None or book.incarnation != incarnation:
            return
        for page_hash in book.entries:
            self._clear(page_hash, book.bit)
        del self._books[engine_id]
        del self._by_bit[book.bit]
        self._all &= ~book.bit

    # ---- what is believed

    def record(
        self, engine_id: str, incarnation: str, hashes: Sequence[bytes], page_size: int
    ) -> list[tuple[int, bytes]]:
        """The engine holds the whole chain. Returns its checkpoints (tokens, hash), longest first.

        Empty, with nothing recorded, when this incarnation is not the admitted one.
        """
        book = self._books.get(engine_id)
        if book is None or book.incarnation != incarnation:
            return []
        checkpoints = chain_checkpoints(hashes, page_size)
        for _, page_hash in checkpoints:
            book.entries[page_hash] = None
            book.entries.move_to_end(page_hash)
            self._masks[page_hash] = self._masks.get(page_hash, 0) | book.bit
        while len(book.entries) > self._limit:
            oldest, _ = book.entries.popitem(last=False)
            self._clear(oldest, book.bit)
        return checkpoints

    def merge(self, hashes: Sequence[bytes], page_size: int, holdings: Iterable[Holding]) -> None:
        """What the ledger knows of a prompt: each holding is a prefix of `hashes`."""
        for holding in holdings:
            prefix = hashes[: holding.tokens // page_size]
            self.record(holding.engine_id, holding.incarnation, prefix, page_size)

    def correct(self, engine_id: str, hashes: Sequence[bytes], actual_tokens: int, page_size: int) -> None:
        """The engine turned out to hold exactly the first `actual_tokens` of this chain."""
        book = self._books.get(engine_id)
        if book is None:
            return
        pages = actual_tokens // page_size
        for page_hash in hashes[pages:]:
            if page_hash in book.entries:
                del book.entries[page_hash]
                self._clear(page_hash, book.bit)
        self.record(engine_id, book.incarnation, hashes[:pages], page_size)

    def held(self, hashes: Sequence[bytes], page_size: int) -> dict[str, int]:
        """Engine id -> tokens of this chain that it is believed to hold; engines with none are absent.

        Cost: one look-up per stride of what anyone holds, and one per page of each stride in which some
        engine's belief ends.
        """
        found: dict[str, int] = {}
        for pages, mask in self._longest(hashes, stride_pages(page_size)):
            while mask:
                bit = mask & -mask
                mask ^= bit
                found[self._by_bit[bit]] = pages * page_size
        return found

    def checkpoints(self, hashes: Sequence[bytes], page_size: int) -> list[tuple[int, bytes]]:
        """(tokens, hash) to ask the ledger about, longest first.

        The chain's own checkpoints, and where the beliefs of this index end: the ends of earlier rounds.
        """
        asked = dict(chain_checkpoints(hashes, page_size))
        for pages, _ in self._longest(hashes, stride_pages(page_size)):
            asked[pages * page_size] = hashes[pages - 1]
        return sorted(asked.items(), reverse=True)

    def _longest(self, hashes: Sequence[bytes], stride: int) -> list[tuple[int, int]]:
        """(pages, bits of the engines whose longest belief ends there), every engine at most once."""
        longest: list[tuple[int, int]] = []
        holding = self._all
        base = 0
        while holding:
            above = base + stride
            here = holding & self._masks.get(hashes[above - 1], 0) if above <= len(hashes) else 0
            stopped = holding & ~here
            if stopped:
                longest += self._ends(hashes, base, min(above - 1, len(hashes)), stopped)
            holding, base = here, above
        return longest

    def _ends(self, hashes: Sequence[bytes], base: int, last: int, engines: int) -> list[tuple[int, int]]:
        """Where the beliefs of `engines`, which all hold `base` pages, end: in (base, last], or at base."""
        ends: list[tuple[int, int]] = []
        for pages in range(last, base, -1):
            here = engines & self._masks.get(hashes[pages - 1], 0)
            if here:
                ends.append((pages, here))
                engines ^= here
                if not engines:
                    return ends
        if base:
            ends.append((base, engines))
        return ends

    # ---- bookkeeping

    def _clear(self, page_hash: bytes, bit: int) -> None:
        mask = self._masks[page_hash] & ~bit
        if mask:
            self._masks[page_hash] = mask
        else:
            del self._masks[page_hash]

    def check_invariants(self) -> None:
        """Raise AssertionError unless books and masks say the same and no book is over its limit."""
        masks: dict[bytes, int] = {}
        for engine_id, book in self._books.items():
            assert self._by_bit[book.bit] == engine_id, f"{engine_id}: bit {book.bit} is another engine's"
            assert len(book.entries) <= self._limit, f"{engine_id}: {len(book.entries)} checkpoints"
            for page_hash in book.entries:
                masks[page_hash] = masks.get(page_hash, 0) | book.bit
        assert len(self._by_bit) == len(self._books), "an engine's bit outlived its book"
        assert sum(self._by_bit) == self._all, "the bits of all engines are out of date"
        assert masks == self._masks, "masks differ from the books"
