"""Tiers as trees of branches, against a model that keeps every page for itself."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.held import Held
from antiphon.engines.tiers import Tier

Page = tuple[int, int]
"""(number of the branch whose content it is, depth)."""


def pages_of(branch: Branch, depth: int) -> list[Page]:
    """The first `depth` pages along a branch."""
    pages: list[Page] = []
    at = branch
    for page in reversed(range(depth)):
        while at.parent is not None and page < at.fork_pages:
            at = at.parent
        pages.append((at.number, page))
    return pages[::-1]


class NaiveTier:
    """Pages with parents, locks and a time of last use each; eviction looks at all of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.private = 0
        self.parents: dict[Page, Page | None] = {}
        self.used: dict[Page, int] = {}
        self.locks: Counter[Page] = Counter()
        self.uses = 0

    def match(self, branch: Branch, depth: int) -> int:
        pages = pages_of(branch, depth)
        return next((n for n, page in enumerate(pages) if page not in self.parents), depth)

    def mark(self, branch: Branch, depth: int) -> None:
        self.uses += 1
        for page in pages_of(branch, depth):
            self.used[page] = self.uses

    def lock(self, branch: Branch, depth: int) -> None:
        self.locks.update(pages_of(branch, depth))

    def unlock(self, branch: Branch, depth: int) -> None:
        self.mark(branch, depth)
        self.locks -= Counter(pages_of(branch, depth))

    def add(self, branch: Branch, depth: int) -> None:
        parent: Page | None = None
        for page in pages_of(branch, depth):
            self.parents.setdefault(page, parent)
            parent = page

    def evict(self, count: int) -> int:
        for evicted in range(count):
            inner = set(self.parents.values())
            leaves = [page for page in self.parents if page not in inner and not self.locks[page]]
            if not leaves:
                return evicted
            del self.parents[min(leaves, key=lambda page: self.used[page])]
        return count

    @property
    def available(self) -> int:
        return self.capacity - self.private - len(self.locks)

    def make_room(self, count: int) -> int:
        """How many of so many pages there is room for, after eviction."""
        free = self.capacity - self.private - len(self.parents)
        return free + self.evict(count - free) if count > free else count


class TierMachine(RuleBasedStateMachine):
    """The same calls on both; requests hold locks and private pages as the engine's do."""

    @initialize(capacity=st.integers(10, 40), forks=st.lists(st.integers(1, 9), min_size=3, max_size=6))
    def start(self, capacity: int, forks: list[int]) -> None:
        self.tier = Tier(capacity)
        self.naive = NaiveTier(capacity)
        self.branches = [Branch(0), Branch(1)]
        for number, fork in enumerate(forks, 2):
            self.branches.append(Branch(number, self.branches[number * fork % (number - 1)], fork))
        self.requests: list[tuple[Branch, int, Held | None, int]] = []
        """(branch, locked depth, record, private pages)."""

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        branch = data.draw(st.sampled_from(self.branches))
        held = self.naive.match(branch, 40)
        depth = data.draw(st.integers(0, held + 1))
        assert self.tier.touch(Chain(branch, depth)) == (depth if depth <= held else 0)
        if 0 < depth <= held:
            self.naive.mark(branch, depth)

    @rule(data=st.data(), more=st.integers(1, 9), gap=st.sampled_from([0, 0, 0, 1]))
    def extend(self, data: st.DataObject, more: int, gap: int) -> None:
        branch = data.draw(st.sampled_from(self.branches))
        held = self.naive.match(branch, 40)
        want = 0 if gap else held
        if not gap:
            self.naive.lock(branch, held)
            want += self.naive.make_room(more)
            self.naive.unlock(branch, held)
            self.naive.add(branch, want)
            if want > held:
                self.naive.mark(branch, want)
        assert self.tier.extend(branch, held + more, held + gap) == want

    @rule(data=st.data(), depth=st.integers(0, 16), private=st.integers(0, 8))
    def admit(self, data: st.DataObject, depth: int, private: int) -> None:
        """Lock what is there, take pages behind it."""
        branch = data.draw(st.sampled_from(self.branches))
        record, held = self.tier.find(branch, depth)
        assert held == self.naive.match(branch, depth)
        if record is not None:
            self.tier.lock(record, held)
            self.naive.lock(branch, held)
        fits = private <= self.naive.available
        assert self.tier.take(private) == fits
        if fits:
            assert self.naive.make_room(private) == private
            self.naive.private += private
        self.requests.append((branch, held, record, private if fits else 0))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), joining=st.integers(1, 8))
    def adopt(self, data: st.DataObject, joining: int) -> None:
        """Private pages join the tree, maybe on a branch that forks off further on."""
        index = data.draw(st.integers(0, len(self.requests) - 1))
        branch, locked, record, private = self.requests[index]
        joining = min(joining, private)
        if joining:
            forks = [other for other in self.branches if pages_of(other, locked) == pages_of(branch, locked)]
            branch = data.draw(st.sampled_from(forks))
            depth = locked + joining
            before = self.naive.match(branch, depth)
            tip, was_held = self.tier.adopt(record, locked, branch, depth)
            assert was_held == before
            self.naive.private -= joining
            self.naive.add(branch, depth)
            self.naive.lock(branch, depth)
            self.naive.locks -= Counter(pages_of(branch, locked))
            self.requests[index] = branch, depth, tip, private - joining

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.requests) - 1))
        branch, locked, record, private = self.requests.pop(index)
        if record is not None:
            self.tier.unlock(record, locked)
            self.naive.unlock(branch, locked)
        self.tier.give_back(private)
        self.naive.private -= private

    @rule(count=st.integers(0, 10))
    def evict(self, count: int) -> None:
        assert self.tier.evict(count) == self.naive.evict(count)

    @invariant()
    def same(self) -> None:
        self.tier.check_invariants()
        for branch in self.branches:
            assert self.tier.match(Chain(branch, 40)) == self.naive.match(branch, 40)
        assert self.tier.tree_pages == len(self.naive.parents)
        assert self.tier.locked_pages == len(self.naive.locks)
        assert self.tier.available_pages == self.naive.available


TestTierAgainstPages = TierMachine.TestCase
TestTierAgainstPages.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_old_tail_goes_before_the_head_in_use() -> None:
    """What a compaction left behind is evicted although the head of its branch is used by the new one."""
    tier = Tier(20)
    old = Branch(0)
    new = Branch(1, old, 4)
    other = Branch(2)
    assert tier.extend(old, 10, 0) == 10
    assert tier.extend(other, 4, 0) == 4
    assert tier.extend(new, 8, 4) == 8
    tier.evict(5)
    assert [tier.match(Chain(branch, 99)) for branch in (old, new, other)] == [5, 8, 4]
    tier.evict(3)
    assert [tier.match(Chain(branch, 99)) for branch in (old, new, other)] == [4, 8, 2]


def test_a_chain_without_its_head_is_not_kept() -> None:
    """The page after a page that is missing could never be found, so it is not taken in."""
    tier = Tier(20)
    branch = Branch(0)
    assert tier.extend(branch, 6, 2) == 0
    assert tier.tree_pages == 0
    assert tier.extend(branch, 6, 0) == 6


def test_no_store_holds_nothing() -> None:
    """A tier of no pages takes nothing and evicts nothing."""
    tier = Tier(0)
    assert tier.extend(Branch(0), 5, 0) == 0
    assert tier.match(Chain(Branch(0), 5)) == tier.evict(3) == 0


def test_giving_back_too_much_is_an_error() -> None:
    """More private pages cannot come back than are out."""
    tier = Tier(4)
    assert tier.take(2)
    with pytest.raises(ValueError, match="3 pages given back, 2 are out"):
        tier.give_back(3)


def test_hundreds_of_forks() -> None:
    """A chain over a branch per page is held, locked and evicted like any other."""
    tier = Tier(3000)
    branch = Branch(0)
    for number in range(1, 2000):
        branch = Branch(number, branch, number)
    assert tier.extend(branch, 2000, 0) == 2000
    record, depth = tier.find(branch, 2000)
    assert record is not None
    tier.lock(record, depth)
    assert (tier.locked_pages, tier.evict(10)) == (2000, 0)
    tier.unlock(record, depth)
    assert tier.evict(1500) == 1500
    assert tier.match(Chain(branch, 2000)) == 500
    tier.check_invariants()


def test_a_trunk_stays_up_to_its_last_fork() -> None:
    """A branch that others fork off is evicted down to the deepest fork that is in use, not further."""
    tier = Tier(40)
    trunk = Branch(0)
    early, late = Branch(1, trunk, 3), Branch(2, trunk, 6)
    for branch in (trunk, early, late):
        tier.extend(branch, 10, 0)
    assert tier.evict(5) == 5
    assert [tier.match(Chain(branch, 10)) for branch in (trunk, early, late)] == [6, 9, 10]
    tier.check_invariants()


def test_each_part_of_a_branch_has_its_own_last_use() -> None:
    """Touching or releasing the head of a branch does not renew its tail, however often that happened."""
    tier = Tier(40)
    long, short = Branch(0), Branch(1)
    tier.extend(long, 10, 0)
    tier.extend(short, 3, 0)
    record, _ = tier.find(long, 10)
    assert record is not None
    tier.lock(record, 6)
    tier.unlock(record, 6)
    tier.touch(Chain(long, 8))

    def evicted_by(pages: int) -> list[int]:
        tier.evict(pages)
        return [tier.match(Chain(branch, 10)) for branch in (long, short)]

    assert evicted_by(2) == [8, 3]
    assert evicted_by(1) == [8, 2]
    tier.lock(record, 4)
    tier.unlock(record, 4)
    tier.touch(Chain(short, 2))
    assert evicted_by(4) == [4, 2]
    assert evicted_by(1) == [3, 2]


@pytest.mark.parametrize("answer_pages", [0, 3])
def test_a_session_that_forks_every_round_stays_one_stretch(answer_pages: int) -> None:
    """Each round keeps the prompt and not the thinking: the tip stands on one stretch, whatever became of
    the ends of earlier rounds, and all of them are found."""
    tier = Tier(10_000)
    branches = [Branch(0)]
    prompt = 10
    for number in range(1, 300):
        tier.extend(branches[-1], prompt, prompt - 4 if number > 1 else 0)
        tier.extend(branches[-1], prompt + answer_pages, prompt)
        branches.append(Branch(number, branches[-1], prompt))
        prompt += 4
    record, depth = tier.find(branches[-1], 10_000)
    assert record is not None
    assert (record.fork, record.parent, depth) == (0, None, prompt - 4)
    for number, branch in enumerate(branches[:-1]):
        assert tier.match(Chain(branch, 10_000)) == 10 + 4 * number + answer_pages
    tier.check_invariants()
    tier.lock(record, depth)
    tier.evict(10_000)
    assert tier.tree_pages == depth
    assert [tier.match(Chain(branch, 10_000)) for branch in branches[:3]] == [10, 14, 18]
    tier.check_invariants()


def test_what_was_evicted_is_not_found_in_what_took_its_place() -> None:
    """A branch whose end was evicted ends where another goes on, not where it once ended."""
    tier = Tier(100)
    old = Branch(0)
    newer, other = Branch(1, old, 8), Branch(2, old, 5)
    tier.extend(old, 8, 0)
    tier.extend(newer, 10, 8)
    tier.evict(5)
    tier.extend(other, 9, 5)
    assert [tier.match(Chain(branch, 99)) for branch in (old, newer, other)] == [5, 5, 9]
    tier.check_invariants()


def test_split_keeps_when_each_part_was_used() -> None:
    """Both parts of a stretch know of their own pages when they were used."""
    record = Held(Branch(0), None, 0)
    record.held, record.used, record.older = 10, 5, [(4, 3), (7, 1)]
    tail = record.split(6)
    assert (record.held, record.used, record.older) == (6, 5, [(4, 3)])
    assert (tail.fork, tail.held, tail.used, tail.older) == (6, 10, 3, [(7, 1)])
    assert tail.parent is record and record.kids == {6: 1}
