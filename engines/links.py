"""Pulls between engines in simulated time: transfers that share the links of their two ends.

Every engine has one link each way. A transfer runs at what its worse end gives it: the link's bandwidth by
the transfers that are on it, source's way out or puller's way in; rates change whenever one starts or ends.
As in `transfer.py`, whole segments stay of a pull that ends early, a page that two pulls want is moved once,
and nothing is evicted from under a pull. Other than there, nothing is visible before the end, and a source
that evicts a page after the start still delivers it.
"""

from __future__ import annotations

from enum import Enum, auto
from heapq import heapify, heappop, heappush
from typing import Any

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.closed_form import ClosedFormEngine
from antiphon.engines.held import Held
from antiphon.engines.transfer import SEGMENT_BYTES

NEVER = float("inf")

_LATE = "the deadline passed"


class PullState(Enum):
    NEW = auto()
    OPENING = auto()
    """The round trip before the bytes, or nothing to bring."""
    BEHIND = auto()
    """Another pull brings what it wants first."""
    FLOWING = auto()
    OVER = auto()


# By name: on Python 3.11 a look-up through an Enum's class costs as much as a call.
NEW, OPENING, BEHIND, FLOWING, OVER = PullState


class Pull:
    """The first `pages` pages of a chain, from the store of `source` into the store of `puller`."""

    __slots__ = (
        "chain", "deadline_s", "due_s", "followers", "have_pages", "here", "locked", "pages", "pulled_bytes",
        "pulled_pages", "puller", "rate", "reason", "seq", "settled_s", "source", "started_s", "state", "tag",
        "there", "tip", "todo_bytes", "todo_pages", "wanted_page",
    )  # fmt: skip

    def __init__(
        self,
        tag: Any,
        puller: ClosedFormEngine,
        source: ClosedFormEngine,
        chain: Chain,
        pages: int,
        deadline_s: float = NEVER,
    ) -> None:
        """`tag`: the driver's own. `deadline_s`: a moment, not a duration."""
        self.tag = tag
        self.puller = puller
        self.source = source
        self.chain = chain
        self.pages = pages if pages < chain.pages else chain.pages
        self.deadline_s = deadline_s
        self.started_s = NEVER
        self.pulled_pages = 0
        self.pulled_bytes = 0
        self.have_pages = 0
        """At the end: pages of the chain, of those asked for, that are in the puller's store."""
        self.reason = ""
        """Why fewer came than were asked for."""
        # What follows is the network's.
        self.state = NEW
        self.seq = 0
        """Ties of events go by it; it changes with every new plan, so that the old one is void."""
        self.due_s = NEVER
        self.here: Port
        self.there: Port
        self.tip: Held | None = None
        self.locked = 0
        """In the puller's store: `tip` is locked so deep while this pull is under way."""
        self.wanted_page: tuple[Branch, int] | None = None
        """What makes others wait for this one."""
        self.followers: list[Pull] | None = None
        self.todo_pages = 0
        self.todo_bytes = 0.0
        self.rate = 0.0
        self.settled_s = 0.0


class Port:
    """An engine as the network sees it."""

    __slots__ = (
        "bytes_per_s", "coming", "engine", "fixed_s", "going", "gone", "leaders", "page_bytes", "store",
    )  # fmt: skip

    def __init__(self, engine: ClosedFormEngine, page_tokens: int) -> None:
        transfer = engine.spec.latency.transfer
        self.engine = engine
        self.store = engine.store
        self.bytes_per_s = engine.spec.group.link_bytes_per_s
        self.fixed_s = transfer.fixed_s
        self.page_bytes = page_tokens * transfer.kv_bytes_per_token
        self.gone = False
        self.coming: dict[Pull, None] = {}
        self.going: dict[Pull, None] = {}
        self.leaders: dict[tuple[Branch, int], Pull] = {}
        """First missing page -> the pull that brings it here."""


class Network:
    """All pulls under way. Deterministic: what falls on one moment goes by the order of planning."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.next_event_s = NEVER
        """When `advance` is due; inf when nothing is under way."""
        self._heap: list[tuple[float, int, Pull]] = []
        self._seq = 0
        self._ports: dict[ClosedFormEngine, Port] = {}
        self._under_way: dict[Pull, None] = {}

    # ------------------------------------------------------------ for the driver

    def start(self, pull: Pull, now: float) -> None:
        """Begin; what the two stores hold now decides what is brought."""
        pull.started_s = now
        pull.here, pull.there = here, _ = self._port(pull.puller), self._port(pull.source)
        self._under_way[pull] = None
        self._open(pull, now, here.fixed_s)
        self._refresh()

    def cancel(self, pull: Pull, now: float) -> None:
        """Nobody waits for it any more: it ends now with what it has, and is not reported."""
        if pull in self._under_way:
            self._end(pull, now, "cancelled")
            self._refresh()

    def advance(self, now: float) -> list[Pull]:
        """Do what is due at `now`, which must be `next_event_s`; returns the pulls that ended, in order."""
        ended: list[Pull] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, seq, pull = heappop(heap)
            if seq != pull.seq:
                continue
            if pull.state is FLOWING and pull.due_s <= now:
                self._end(pull, now, "", whole=True)
                ended.append(pull)
            elif pull.state is OPENING and pull.due_s <= now:
                if pull.todo_pages:
                    self._flow(pull, now)
                else:
                    self._end(pull, now, "")
                    ended.append(pull)
            else:
                self._end(pull, now, _LATE)
                ended.append(pull)
        self._refresh()
        return ended

    def engine_gone(self, engine: ClosedFormEngine, now: float) -> list[Pull]:
        """An engine is dead: pulls to and from it end now with what they have, later ones bring nothing."""
        self._port(engine).gone = True
        ended = [pull for pull in self._under_way if pull.puller is engine or pull.source is engine]
        for pull in ended:
            self._end(pull, now, f"{engine.engine_id} is gone")
        self._refresh()
        return ended

    def queued_bytes(self, engine: ClosedFormEngine, now: float) -> float:
        """What is still to come in over an engine's link."""
        return sum(_left_bytes(pull, now) for pull in self._port(engine).coming)

    # ------------------------------------------------------------ one pull

    def _port(self, engine: ClosedFormEngine) -> Port:
        port = self._ports.get(engine)
        if port is None:
            port = self._ports[engine] = Port(engine, self.page_tokens)
        return port

    def _open(self, pull: Pull, now: float, round_trip_s: float) -> None:
        """See what is missing; wait for who brings it already, or for the round trip."""
        here, branch, wanted = pull.here, pull.chain.branch, pull.pages
        tip, have = here.store.find(branch, wanted)
        if tip is not None:
            # What is here already must not be evicted to make room for what follows it.
            here.store.lock(tip, have)
        pull.tip, pull.locked = tip, have
        if have < wanted:
            first = _owner(branch, have), have
            leader = here.leaders.setdefault(first, pull)
            if leader is not pull:
                pull.state = BEHIND
                if leader.followers is None:
                    leader.followers = []
                leader.followers.append(pull)
                self._plan(pull, NEVER)
                return
            pull.wanted_page = first
            pull.todo_pages = self._offered(pull, branch, wanted, have)
            pull.todo_bytes = float(pull.todo_pages * here.page_bytes)
        pull.state = OPENING
        self._plan(pull, now + round_trip_s)

    def _offered(self, pull: Pull, branch: Branch, wanted: int, have: int) -> int:
        """How many of the missing pages the source has."""
        if pull.there.gone:
            pull.reason = f"{pull.source.engine_id} is gone"
            return 0
        store = pull.there.store
        record, depth = store.find(branch, wanted)
        if record is not None:
            store.mark(record, depth)
        offered = depth - have if depth > have else 0
        if depth < wanted:
            pull.reason = f"the source has only {offered} of {wanted - have} pages"
        return offered

    def _flow(self, pull: Pull, now: float) -> None:
        """The bytes start to flow."""
        pull.state = FLOWING
        pull.settled_s = now
        pull.there.going[pull] = None
        pull.here.coming[pull] = None
        self._share(pull.there.going, pull.here.coming, now)

    def _share(self, going: dict[Pull, None], coming: dict[Pull, None], now: float) -> None:
        """New rates for all on two links, where a pull has come or gone."""
        for pull in going | coming:
            pull.todo_bytes = max(0.0, pull.todo_bytes - pull.rate * (now - pull.settled_s))
            pull.settled_s = now
            here, there = pull.here, pull.there
            out_s, in_s = there.bytes_per_s / len(there.going), here.bytes_per_s / len(here.coming)
            pull.rate = out_s if out_s < in_s else in_s
            self._plan(pull, now + pull.todo_bytes / pull.rate)

    def _end(self, pull: Pull, now: float, reason: str, *, whole: bool = False) -> None:
        """It ends, early for a `reason`: publish what has come, and let those behind it go on."""
        here, there = pull.here, pull.there
        arrived = pull.todo_pages if whole else 0
        if pull.state is FLOWING:
            if not whole:
                arrived = _arrived_pages(pull, now)
            del there.going[pull], here.coming[pull]
            if there.going or here.coming:
                self._share(there.going, here.coming, now)
        pull.state = OVER
        self._seq = pull.seq = self._seq + 1
        del self._under_way[pull]
        if reason:
            pull.reason = reason
        _publish(pull, arrived)
        if pull.wanted_page is not None:
            del here.leaders[pull.wanted_page]
        for follower in pull.followers or ():
            if follower.state is BEHIND:
                _unlock(follower)
                self._open(follower, now, 0.0)

    # ------------------------------------------------------------ events

    def _plan(self, pull: Pull, due_s: float) -> None:
        pull.due_s = due_s
        self._seq = pull.seq = seq = self._seq + 1
        heappush(self._heap, (due_s if due_s < pull.deadline_s else pull.deadline_s, seq, pull))

    def _refresh(self) -> None:
        heap = self._heap
        if len(heap) > 64 and len(heap) > 4 * len(self._under_way):
            heap[:] = [entry for entry in heap if entry[1] == entry[2].seq]
            heapify(heap)
        while heap and heap[0][1] != heap[0][2].seq:
            heappop(heap)
        self.next_event_s = heap[0][0] if heap else NEVER


def _left_bytes(pull: Pull, now: float) -> float:
    return max(0.0, pull.todo_bytes - pull.rate * (now - pull.settled_s))


def _arrived_pages(pull: Pull, now: float) -> int:
    """Whole segments of a transfer that ends early."""
    page_bytes = pull.here.page_bytes
    pages = int((pull.todo_pages * page_bytes - _left_bytes(pull, now)) / page_bytes)
    segment = max(1, SEGMENT_BYTES // page_bytes)
    return min(pages // segment * segment, pull.todo_pages)


def _publish(pull: Pull, arrived: int) -> None:
    """What has come becomes visible in the puller's store."""
    store, branch, have = pull.here.store, pull.chain.branch, pull.locked
    if arrived:
        depth = store.extend(branch, have + arrived, have)
        pull.pulled_pages = depth - have
        pull.pulled_bytes = pull.pulled_pages * pull.here.page_bytes
        if pull.pulled_pages < arrived:
            pull.reason = f"the store has room for only {pull.pulled_pages} of {arrived} pages"
    _unlock(pull)
    pull.have_pages = store.find(branch, pull.pages)[1]


def _unlock(pull: Pull) -> None:
    if pull.tip is not None:
        pull.here.store.unlock(pull.tip, pull.locked)
        pull.tip = None


def _owner(branch: Branch, page: int) -> Branch:
    """Whose content a page along a branch is."""
    at = branch
    while at.parent is not None and page < at.fork_pages:
        at = at.parent
    return at
