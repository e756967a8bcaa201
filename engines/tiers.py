"""A tier of KV in simulated time: device pool or page store, as a tree of stretches instead of pages.

What is held of a branch is a stretch of its chain (`held.py`). A stretch that is held beyond its fork implies
that its parent is held up to that fork, so only leaves are evicted, tail pages first, least recently used
first. Nothing here costs time per page, and nothing costs time per round of a session.

Use is marked at the tip only, so marking costs the same at any depth. What lies below a marked page cannot go
before it, and when the page went, whatever else is left was used later: so what was below it is next.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush, heapreplace
from operator import itemgetter

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.held import Held


class Tier:
    """`capacity_pages` pages: branches, and private pages of requests that no branch holds yet."""

    __slots__ = (
        "_ends", "_heap", "_records", "_uses", "capacity_pages", "evicted_pages", "locked_pages",
        "private_pages", "tree_pages",
    )  # fmt: skip

    def __init__(self, capacity_pages: int) -> None:
        self.capacity_pages = capacity_pages
        self.tree_pages = 0
        """Of all branches."""
        self.locked_pages = 0
        """Of them, those that cannot be evicted."""
        self.private_pages = 0
        self.evicted_pages = 0
        """Since the start."""
        self._records: dict[Branch, Held] = {}
        """The stretch with the deepest pages that are held of a branch, if it has any of its own."""
        self._ends: dict[Branch, int] = {}
        """How far an alias goes."""
        self._heap: list[tuple[int, Held]] = []
        """(last use of its deepest pages when queued, branch); checked when popped."""
        self._uses = 0

    @property
    def used_pages(self) -> int:
        """Not evictable: locked, or private."""
        return self.private_pages + self.locked_pages

    @property
    def available_pages(self) -> int:
        """Free or evictable."""
        return self.capacity_pages - self.private_pages - self.locked_pages

    # ------------------------------------------------------------ questions

    def match(self, chain: Chain) -> int:
        """How many pages of the chain, from the first on, are held."""
        return self.find(chain.branch, chain.pages)[1]

    def find(self, branch: Branch, pages: int) -> tuple[Held | None, int]:
        """How many of the first `pages` along a branch are held, and the stretch that the last one is in."""
        records = self._records
        record = records.get(branch)
        at = branch
        while record is None:
            if pages > at.fork_pages:
                pages = at.fork_pages
            if at.parent is None:
                return None, 0
            at = at.parent
            record = records.get(at)
        if record.branch is not at and pages > self._ends[at]:
            pages = self._ends[at]
        while pages <= record.fork:
            if record.parent is None:
                return None, 0
            record = record.parent
        held = record.held
        return record, pages if pages < held else held

    # ------------------------------------------------------------ use

    def touch(self, chain: Chain) -> int:
        """Mark the chain as just used; returns its pages, or 0 (and marks nothing) if it is not all held."""
        record, depth = self.find(*chain)
        if record is None or depth < chain.pages:
            return 0
        self.mark(record, depth)
        return depth

    def mark(self, record: Held, depth: int) -> None:
        """All pages up to `depth` of a held branch were used just now."""
        self._uses = use = self._uses + 1
        if depth >= record.held:
            record.used = use
            record.older = None
        else:
            record.mark(depth, use)

    def lock(self, record: Held, depth: int) -> int:
        """Protect the first `depth` pages along a branch (beyond its fork, and held) from eviction.

        Returns how many of them could have been evicted before.
        """
        before = self.locked_pages
        at: Held | None = record
        while at is not None:
            locks = at.locks
            count = locks.get(depth, 0)
            alone = not locks
            locks[depth] = count + 1
            if depth > at.locked:
                self.locked_pages += depth - at.locked
                at.locked = depth
            if not alone:
                break
            depth = at.fork
            at = at.parent
        return self.locked_pages - before

    def unlock(self, record: Held, depth: int) -> None:
        """Undo one `lock`. Its pages count as used just now."""
        self._uses = use = self._uses + 1
        if depth < record.held:
            record.mark(depth, use)
        else:
            record.used = use
            record.older = None
        self._drop_lock(record, depth)
        if not record.queued and record.held > record.locked:
            self._queue(record)

    def _drop_lock(self, record: Held, depth: int) -> None:
        at: Held | None = record
        while at is not None:
            locks = at.locks
            count = locks[depth]
            if count > 1:
                locks[depth] = count - 1
                return
            del locks[depth]
            if locks:
                if depth == at.locked:
                    at.locked = max(locks)
                    self.locked_pages -= depth - at.locked
                return
            self.locked_pages -= depth - at.fork
            depth = at.locked = at.fork
            at = at.parent

    # ------------------------------------------------------------ filling

    def take(self, pages: int) -> bool:
        """Get private pages, evicting as needed; False, changing nothing, if there are too few."""
        free = self.capacity_pages - self.private_pages - self.tree_pages
        if pages > free:
            if pages > self.capacity_pages - self.private_pages - self.locked_pages:
                return False
            self.evict(pages - free)
        self.private_pages += pages
        return True

    def give_back(self, pages: int) -> None:
        if pages > self.private_pages:
            raise ValueError(f"{pages} pages given back, {self.private_pages} are out")
        self.private_pages -= pages

    def adopt(self, old: Held | None, old_depth: int, branch: Branch, pages: int) -> tuple[Held, int]:
        """Private pages join the tree; the lock on (old, old_depth) moves to the first `pages` of `branch`.

        Returns the branch that is locked now and how deep the chain was held before: a page that another
        request put there meanwhile stays, and the second copy is freed.
        """
        self.private_pages -= pages - old_depth
        if old is not None and old.branch is branch:
            before = old.held
            if pages > before:
                self.tree_pages += pages - before
                old.held = pages
            else:
                before = pages
            locks = old.locks
            count = locks[old_depth]
            if count > 1:
                locks[old_depth] = count - 1
            else:
                del locks[old_depth]
            locks[pages] = locks.get(pages, 0) + 1
            if pages > old.locked:
                self.locked_pages += pages - old.locked
                old.locked = pages
            return old, before
        before, record = self.find(branch, pages)[1], self._grow(branch, pages)
        self.lock(record, pages)
        if old is not None:
            self._drop_lock(old, old_depth)
        return record, before

    def extend(self, branch: Branch, pages: int, from_pages: int) -> int:
        """Hold the first `pages` of `branch`, of which `from_pages` are here already, or as many as fit.

        Makes room by evicting other branches. Returns how many are held; 0, changing nothing, if the pages
        before `from_pages` are not all here: what follows a missing page could never be found.
        """
        record, held = self.find(branch, pages)
        if held >= pages or held < from_pages:
            return held if held >= from_pages else 0
        short = pages - held - (self.capacity_pages - self.private_pages - self.tree_pages)
        if short > 0:
            pages -= short - self._evict_others(record, held, short)
            if pages <= held:
                return held
        if record is None or record.branch is not branch:
            record = self._grow(branch, pages)
        else:
            self.tree_pages += pages - held
            record.held = pages
        self._uses = record.used = self._uses + 1
        record.older = None
        if not record.queued:
            self._queue(record)
        return pages

    def _evict_others(self, record: Held | None, held: int, pages: int) -> int:
        """Evict, but nothing of the chain that ends `held` pages deep in `record`."""
        if record is None:
            return self.evict(pages)
        if pages <= self.tree_pages - self.locked_pages - held:
            self.mark(record, held)  # last in line, and the others are enough
            return self.evict(pages)
        self.lock(record, held)
        evicted = self.evict(pages)
        self.unlock(record, held)
        return evicted

    def _grow(self, branch: Branch, pages: int) -> Held:
        """Hold the first `pages` along a branch; returns the stretch that they end in."""
        records = self._records
        missing: list[tuple[Branch, int]] = []
        at, depth = branch, pages
        while True:
            while depth <= at.fork_pages and at.parent is not None:
                at = at.parent
            record = records.get(at)
            if record is not None:
                if record.branch is not at and depth > self._ends[at]:
                    missing.append((at, depth))
                    depth = self._ends[at]
                break
            missing.append((at, depth))
            if at.parent is None:
                break
            depth, at = at.fork_pages, at.parent
        if record is not None:
            if record.held < depth:
                self.tree_pages += depth - record.held
                record.held = depth
            while depth <= record.fork and record.parent is not None:
                record = record.parent
        for at, further in reversed(missing):
            record = self._attach(at, record, depth if record is not None else 0)
            self.tree_pages += further - record.held
            record.held = depth = further
        assert record is not None
        return record

    def _attach(self, branch: Branch, below: Held | None, fork: int) -> Held:
        """The stretch, held up to `fork` so far, on which a branch goes on: `below` itself if it can."""
        end = self._ends.pop(branch, None)
        if end is not None:
            self._records[branch].aliases.remove((end, branch))
        if below is None:
            record = Held(branch, None, 0)
        elif below.held == fork:
            record = below
            for other in record.go_on_as(branch):
                self._alias(other, record, fork)
        elif below.locked <= fork and (not below.kids or max(below.kids) <= fork):
            # What was there becomes the side branch: the new one is in use.
            record = below
            tail = below.split(fork)
            for _, alias in (*tail.aliases, (0, tail.branch)):
                self._records[alias] = tail
            self._queue(tail)
            record.branch = branch
        else:
            record = Held(branch, below, fork)
            below.kids[fork] = below.kids.get(fork, 0) + 1
        self._records[branch] = record
        return record

    def _alias(self, branch: Branch, record: Held | None, end: int) -> None:
        """Of a branch is held what goes along a stretch up to `end`, if any of that is its own."""
        if record is not None and branch.fork_pages < end:
            self._records[branch] = record
            self._ends[branch] = end
            insort(record.aliases, (end, branch), key=itemgetter(0))
        else:
            del self._records[branch]
            self._ends.pop(branch, None)

    # ------------------------------------------------------------ eviction

    def evict(self, pages: int) -> int:
        """Drop up to `pages` pages, least recently used first, tail first; returns how many there were."""
        heap = self._heap
        if heap:
            queued_use, record = heap[0]
            if (
                record.held - record.locked > pages
                and record.used == queued_use
                and not (record.older or record.kids)
            ):  # by far the most frequent case
                record.held -= pages
                self.tree_pages -= pages
                self.evicted_pages += pages
                return pages
        left = pages
        while left > 0 and heap:
            queued_use, record = heap[0]
            floor = record.locked
            if record.kids:
                floor = max(floor, max(record.kids))
            if record.held <= floor:
                heappop(heap)  # it comes back when its lock or its last kid goes
                record.queued = False
                continue
            older = record.older
            start, use = older[-1] if older else (record.fork, record.used)
            if use > queued_use:
                heapreplace(heap, (use, record))
                continue
            dropped = record.held - (start if start > floor else floor)
            if dropped > left:
                dropped = left
            left -= dropped
            record.held -= dropped
            self.tree_pages -= dropped
            if older and record.held == start:
                older.pop()
            if record.held == record.fork:
                heappop(heap)
                self._remove(record)
        self.evicted_pages += pages - left
        return pages - left

    def _queue(self, record: Held) -> None:
        record.queued = True
        older = record.older
        heappush(self._heap, (older[-1][1] if older else record.used, record))

    def _remove(self, record: Held) -> None:
        """Nothing is left of a stretch: its parent may be a leaf now."""
        parent, fork = record.parent, record.fork
        for _, branch in (*record.aliases, (fork, record.branch)):
            self._alias(branch, parent, fork)
        if parent is None:
            return
        count = parent.kids[record.fork] - 1
        if count:
            parent.kids[record.fork] = count
            return
        del parent.kids[record.fork]
        if not parent.queued and parent.held > parent.locked:
            self._queue(parent)

    # ------------------------------------------------------------ checks

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict themselves. For tests."""
        tree = locked = 0
        queued = [record for _, record in self._heap]
        assert len(set(map(id, queued))) == len(queued), "a stretch is queued twice"
        stretches = {record for branch, record in self._records.items() if record.branch is branch}
        kids: dict[Held, dict[int, int]] = {record: {} for record in stretches}
        for branch, record in self._records.items():
            assert record in stretches, "an alias of nothing"
            assert (record.branch is branch) == (branch not in self._ends)
            assert record.branch is branch or (self._ends[branch], branch) in record.aliases
        for record in stretches:
            assert record.fork <= record.locked <= record.held > record.fork
            assert record.locked == max(record.locks, default=record.fork)
            assert sorted(depth for depth, _ in record.aliases) == [depth for depth, _ in record.aliases]
            if record.parent is not None:
                assert record.parent.held >= record.fork > record.parent.fork
                assert not record.locks or record.fork in record.parent.locks, "locked without its parent"
                counts = kids[record.parent]
                counts[record.fork] = counts.get(record.fork, 0) + 1
            tree += record.held - record.fork
            locked += record.locked - record.fork
        for record in stretches:
            assert record.kids == kids[record], "kids"
            assert record.queued == any(record is other for other in queued), "queue marks"
            floor = max(record.locked, max(record.kids, default=0))
            assert record.queued or record.held <= floor, "a leaf that cannot be evicted"
        assert tree == self.tree_pages and locked == self.locked_pages, "page counts"
        assert self.private_pages >= 0 and self.private_pages + tree <= self.capacity_pages
