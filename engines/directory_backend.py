"""What an engine's directory answers: one rank's page store and puller behind the requests of `wire.py`."""

from __future__ import annotations

import threading

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryError
from antiphon.engines.link_faults import FaultyAgent
from antiphon.engines.page_store import PageStore
from antiphon.engines.transfer import Puller

MAX_PIN_TTL_S = 600.0
MAX_WAIT_S = 5.0
MAX_PREFETCH_S = 600.0
MAX_OPEN_PINS = 65_536


class StoreBackend:
    """A `DirectoryBackend` over real pages."""

    def __init__(
        self, hello: wire.Hello, store: PageStore, puller: Puller, *, faulty_agent: FaultyAgent | None = None
    ) -> None:
        """`faulty_agent`: the puller's, with fault injection switched on."""
        self._hello = hello
        self._store = store
        self._puller = puller
        self._faulty_agent = faulty_agent
        self._lock = threading.Lock()
        self._served_pages = 0
        self._pinned_pages: dict[int, int] = {}
        """Pin -> its pages, of pins that peers have not given back."""

    @property
    def hello(self) -> wire.Hello:
        return self._hello

    def touch(self, request: wire.Touch) -> wire.Touched:
        return wire.Touched(self._store.touch(request.tip))

    def lookup(self, request: wire.Lookup) -> wire.Found:
        self._store.learn(request.hashes)
        return wire.Found(self._store.prefix_pages(request.hashes))

    def chain(self, request: wire.Chain) -> wire.ChainPages:
        return wire.ChainPages(*self._store.chain(request.tip))

    def reserve(self, request: wire.Reserve) -> wire.Reserved:
        mine = self._hello.incarnation
        if request.source_incarnation != mine:
            raise DirectoryError("void_incarnation", f"this is {mine}, not {request.source_incarnation}")
        if not 0 < request.ttl_s <= MAX_PIN_TTL_S:
            raise DirectoryError("bad_request", f"ttl_s must be in (0, {MAX_PIN_TTL_S}], is {request.ttl_s}")
        if request.wait_s > 0:
            self._store.wait_for(request.hashes, min(request.wait_s, MAX_WAIT_S))
        self._store.learn(request.hashes)
        pin = self._store.pin(request.hashes, ttl_s=request.ttl_s, holder=request.puller)
        with self._lock:
            self._pinned_pages[pin.pin_id] = len(pin.slots)
            if len(self._pinned_pages) > MAX_OPEN_PINS:  # never given back: they have run out long ago
                del self._pinned_pages[next(iter(self._pinned_pages))]
        return wire.Reserved(pin.pin_id, pin.slots, pin.checksums)

    def confirm(self, request: wire.Confirm) -> wire.Confirmed:
        held = self._store.unpin(request.pin_id)
        with self._lock:
            pages = self._pinned_pages.pop(request.pin_id, 0)
            if held:
                self._served_pages += pages
        return wire.Confirmed(held)

    def prefetch(self, request: wire.Prefetch) -> wire.Prefetched:
        if not 0 < request.deadline_s <= MAX_PREFETCH_S:
            raise DirectoryError(
                "bad_request", f"deadline_s must be in (0, {MAX_PREFETCH_S}], is {request.deadline_s}"
            )
        return self._puller.pull(request)

    def stats(self, request: wire.Stats) -> wire.StatsReply:
        counts = self._store.counts()
        totals = self._puller.totals
        with self._lock:
            served = self._served_pages
        return wire.StatsReply(
            free_pages=counts.free,
            used_pages=counts.used,
            inflight_pages=counts.inflight,
            quarantined_pages=counts.quarantined,
            pins=counts.pins,
            pending_offloads=counts.pending_offloads,
            pulled_pages_total=totals.pulled_pages,
            pulled_bytes_total=totals.pulled_bytes,
            served_pages_total=served,
            evicted_pages_total=counts.evicted_total,
            discarded_pages_total=totals.discarded_pages,
        )

    def corrupt(self, request: wire.Corrupt) -> wire.Corrupted:
        self._injected()
        return wire.Corrupted(self._store.corrupt(request.page_hash))

    def link_fault(self, request: wire.LinkFault) -> wire.LinkFaults:
        if not (0 <= request.seconds < MAX_PREFETCH_S and request.bytes_per_s >= 0 and request.count >= 0):
            raise DirectoryError("bad_request", f"{request} is out of range")
        return self._injected().arm(request)

    def _injected(self) -> FaultyAgent:
        if self._faulty_agent is None:
            raise DirectoryError("denied", "this engine was started without fault injection")
        return self._faulty_agent
