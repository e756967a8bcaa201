"""The residency index against a model that does the same by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from antiphon.engines.page_hash import page_hashes
from antiphon.scheduler.messages import Holding
from antiphon.scheduler.residency import (
    CHECKPOINT_TOKENS,
    ResidencyIndex,
    chain_checkpoints,
    checkpoint_limit,
    stride_pages,
)

PAGE = 64
"""8 pages to a stride."""


def chain(tokens: int, variant: int = 0, shared: int = 0, page_size: int = PAGE) -> tuple[bytes, ...]:
    """Hashes of a prompt of `tokens`; prompts of different variants share their first `shared` tokens."""
    ids = [position if position < shared else position * 7 + variant for position in range(tokens)]
    return page_hashes(ids, page_size)


def index_of(*engine_ids: str, limit: int = 16384) -> ResidencyIndex:
    index = ResidencyIndex()
    for engine_id in engine_ids:
        index.admit(engine_id, "i1", limit)
    return index


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("pages", "page_size", "expected"),
    [
        # 64 tokens to a page, 8 pages to a stride: ends at 8 and 16 pages, and at the last
        (19, 64, [19 * 64, 1024, 512]),
        (16, 64, [1024, 512]),
        (5, 64, [320]),
        (0, 64, []),
        # a page larger than the stride: every page
        (3, 1024, [3072, 2048, 1024]),
        # 48 does not divide 512: 10 pages to a stride
        (21, 48, [21 * 48, 960, 480]),
    ],
)
def test_checkpoints_are_strides_and_the_end(pages: int, page_size: int, expected: list[int]) -> None:
    """Every 512 tokens in whole pages, and the end of the chain, longest first, each with its hash."""
    hashes = chain(pages * page_size, page_size=page_size)
    found = chain_checkpoints(hashes, page_size)
    assert [tokens for tokens, _ in found] == expected
    assert all(hashes[tokens // page_size - 1] == page_hash for tokens, page_hash in found)


def test_a_page_size_below_one_is_refused() -> None:
    """A page has at least one token."""
    with pytest.raises(ValueError, match="page_size must be at least 1"):
        stride_pages(0)
    with pytest.raises(ValueError, match="at least 1 checkpoint"):
        ResidencyIndex().admit("d0", "i1", 0)


def test_an_engine_has_as_many_checkpoints_as_its_store_has_room_for() -> None:
    """Two to each stride of the page store; of a store that is not told, four times the device."""
    assert checkpoint_limit(500_000, 1) == 2 * 977
    assert checkpoint_limit(0, 500_000) == checkpoint_limit(2_000_000, 0) == 2 * 3907
    assert checkpoint_limit(0, 0) == checkpoint_limit(4096, 4096) == 1024


# ---------------------------------------------------------------- scenarios


def test_a_longer_prompt_finds_the_end_of_the_round_before() -> None:
    """A session's next prompt finds all that its home held, to the page, not only to the stride."""
    index = index_of("d0", "p0")
    before, after = chain(19 * PAGE), chain(40 * PAGE)
    index.record("d0", "i1", before, PAGE)
    index.record("p0", "i1", before[:9], PAGE)
    assert index.held(after, PAGE) == {"d0": 19 * PAGE, "p0": 9 * PAGE}
    # what the ledger is asked: strides, the last page (here a stride), and both ends that are believed
    asked = [tokens // PAGE for tokens, _ in index.checkpoints(after, PAGE)]
    assert asked == [40, 32, 24, 19, 16, 9, 8]
    assert all(after[tokens // PAGE - 1] == page for tokens, page in index.checkpoints(after, PAGE))


def test_prompts_that_share_a_trunk_find_it() -> None:
    """Another session with the same system prompt is believed to hold the shared part, in whole strides."""
    index = index_of("d0")
    index.record("d0", "i1", chain(30 * PAGE, variant=1, shared=20 * PAGE), PAGE)
    assert index.held(chain(30 * PAGE, variant=2, shared=20 * PAGE), PAGE) == {"d0": 1024}
    assert index.held(chain(30 * PAGE, variant=2), PAGE) == {}


def test_a_shorter_prompt_finds_no_more_than_itself() -> None:
    """A prompt cut back (a compaction, a retry) finds at most its own length."""
    index = index_of("d0")
    whole = chain(30 * PAGE)
    index.record("d0", "i1", whole, PAGE)
    assert index.held(whole[:20], PAGE) == {"d0": 16 * PAGE}
    assert index.held(whole[:16], PAGE) == {"d0": 16 * PAGE}
    assert index.held((), PAGE) == {}
    assert index.checkpoints((), PAGE) == []


def test_another_incarnation_is_void() -> None:
    """A new hello drops what the old process held; what is stamped with the old one is ignored."""
    index = index_of("d0")
    hashes = chain(16 * PAGE)
    index.record("d0", "i1", hashes, PAGE)
    index.admit("d0", "i1")
    assert index.held(hashes, PAGE) == {"d0": 1024}
    index.admit("d0", "i2")
    assert index.held(hashes, PAGE) == {}
    assert index.record("d0", "i1", hashes, PAGE) is False
    index.merge(hashes, PAGE, [Holding("d0", "i1", 1024), Holding("stranger", "i1", 1024)])
    assert index.held(hashes, PAGE) == {}
    index.merge(hashes, PAGE, [Holding("d0", "i2", 1024)])
    index.void("d0", "i1")
    assert index.held(hashes, PAGE) == {"d0": 1024}
    index.void("d0", "i2")
    assert index.held(hashes, PAGE) == {}
    assert len(index) == 0


def test_memory_is_bounded_and_the_root_outlives_the_end() -> None:
    """Over the limit the least recently recorded goes first, deepest first, so that prefixes stay usable."""
    index = index_of("d0", limit=4)
    old, new = chain(32 * PAGE, variant=1), chain(16 * PAGE, variant=2)
    index.record("d0", "i1", old, PAGE)
    assert index.held(old, PAGE) == {"d0": 2048}
    index.record("d0", "i1", new, PAGE)
    assert len(index) == 4
    assert index.held(old, PAGE) == {"d0": 1024}
    assert index.held(new, PAGE) == {"d0": 1024}
    index.record("d0", "i1", old[:16], PAGE)
    index.record("d0", "i1", chain(8 * PAGE, variant=3), PAGE)
    assert index.held(old, PAGE) == {"d0": 1024}
    assert index.held(new, PAGE) == {"d0": 512}


def test_bits_are_reused() -> None:
    """Engines that come and go under new ids do not make the masks longer."""
    index = ResidencyIndex()
    for number in range(1000):
        index.admit(f"e{number}", "i")
        index.record(f"e{number}", "i", chain(8 * PAGE), PAGE)
        index.void(f"e{number}", "i")
    assert index._by_bit == {}
    index.admit("last", "i")
    assert max(index._by_bit) == 1


# ---------------------------------------------------------------- against brute force


class NaiveEngine:
    """Checkpoint -> what it stands on; ends in a list, oldest first; beliefs by walking pages one by one."""

    def __init__(self, incarnation: str, limit: int) -> None:
        self.incarnation = incarnation
        self.limit = limit
        self.below: dict[bytes, bytes | None] = {}
        self.recorded: list[bytes] = []
        """Least recently recorded first; what was never recorded as an end itself is not in it."""
        self.renewed: set[bytes] = set()
        """Recorded as an end while others stood on it."""

    def record(self, hashes: Sequence[bytes]) -> None:
        below = None
        for pages in range(1, len(hashes) + 1):
            if pages == len(hashes) or pages * PAGE % CHECKPOINT_TOKENS == 0:
                self.below.setdefault(hashes[pages - 1], below)
                below = hashes[pages - 1]
        if below is not None:
            if below in self.below.values():
                self.renewed.add(below)
            self.recorded = [*(page for page in self.recorded if page != below), below]
        while len(self.below) > self.limit:
            self.drop()

    def drop(self) -> None:
        """The oldest end goes. What it stood on is the oldest now, unless it was an end itself."""
        standing = set(self.below.values())
        oldest = next(page for page in self.recorded if page not in standing)
        self.recorded.remove(oldest)
        below = self.below.pop(oldest)
        if below is not None and below not in self.below.values():
            renewed = below in self.renewed
            self.renewed.discard(below)
            self.recorded = [page for page in self.recorded if page != below]
            self.recorded = [*self.recorded, below] if renewed else [below, *self.recorded]

    def held(self, hashes: Sequence[bytes]) -> int:
        best = 0
        for pages in range(1, len(hashes) + 1):
            present = hashes[pages - 1] in self.below
            if present:
                best = pages * PAGE
            elif pages * PAGE % CHECKPOINT_TOKENS == 0:
                break
        return best


VARIANTS = st.integers(0, 3)
PAGES = st.integers(0, 40)
ENGINES = st.sampled_from(["d0", "d1", "p0"])
SHARED = 20 * PAGE


class ResidencyMachine(RuleBasedStateMachine):
    """Chains of four prompts that share a trunk, on three engines that come and go."""

    @initialize(limit=st.sampled_from([3, 6, 1000]))
    def start(self, limit: int) -> None:
        self.limit = limit
        self.index = ResidencyIndex()
        self.naive: dict[str, NaiveEngine] = {}

    @rule(engine_id=ENGINES, incarnation=st.sampled_from(["i1", "i2"]))
    def admit(self, engine_id: str, incarnation: str) -> None:
        self.index.admit(engine_id, incarnation, self.limit)
        known = self.naive.get(engine_id)
        if known is None or known.incarnation != incarnation:
            self.naive[engine_id] = NaiveEngine(incarnation, self.limit)

    @rule(engine_id=ENGINES, incarnation=st.sampled_from(["i1", "i2"]))
    def void(self, engine_id: str, incarnation: str) -> None:
        self.index.void(engine_id, incarnation)
        known = self.naive.get(engine_id)
        if known is not None and known.incarnation == incarnation:
            del self.naive[engine_id]

    @rule(
        engine_id=ENGINES, incarnation=st.sampled_from(["i1", "i2"]), variant=VARIANTS, pages=PAGES,
        by_merge=st.booleans(),
    )  # fmt: skip
    def record(self, engine_id: str, incarnation: str, variant: int, pages: int, by_merge: bool) -> None:
        whole = chain(40 * PAGE, variant, SHARED)
        if by_merge:
            self.index.merge(whole, PAGE, [Holding(engine_id, incarnation, pages * PAGE)])
        else:
            self.index.record(engine_id, incarnation, whole[:pages], PAGE)
        known = self.naive.get(engine_id)
        if known is not None and known.incarnation == incarnation:
            known.record(whole[:pages])

    @rule(variant=VARIANTS, pages=PAGES)
    def look_up(self, variant: int, pages: int) -> None:
        hashes = chain(pages * PAGE, variant, SHARED)
        expected = {name: engine.held(hashes) for name, engine in self.naive.items()}
        held = self.index.held(hashes, PAGE)
        assert held == {name: tokens for name, tokens in expected.items() if tokens}
        assert {name: self.index.held_by(name, hashes, PAGE) for name in self.naive} == expected
        asked = self.index.checkpoints(hashes, PAGE)
        assert asked == sorted(asked, reverse=True)
        assert set(chain_checkpoints(hashes, PAGE)) <= set(asked)
        assert set(held.values()) <= {tokens for tokens, _ in asked}

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "index"):
            self.index.check_invariants()


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(pages=st.integers(0, 200), page_size=st.sampled_from([1, 16, 64, 100, 512, 700]))
def test_what_was_recorded_is_found_whole(pages: int, page_size: int) -> None:
    """For every page size, a chain that was recorded is held to its last page."""
    hashes = tuple(number.to_bytes(32, "big") for number in range(pages))
    index = index_of("d0")
    index.record("d0", "i1", hashes, page_size)
    assert index.held(hashes, page_size) == ({"d0": pages * page_size} if pages else {})
