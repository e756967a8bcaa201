"""Pulling pages from a peer's store into ours: reserve, NIXL READ, confirm, publish.

Pages become visible only after the source has confirmed that the pin was held until the READ was over: before
that the bytes may be torn. Whatever goes wrong costs pages, never correctness: `pull` returns how far it came
and why it stopped, and raises nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.engines import wire
from antiphon.engines.breaker import CircuitBreaker
from antiphon.engines.directory_client import DirectoryClient, DirectoryError
from antiphon.engines.link_faults import Agent
from antiphon.engines.nixl_agent import PeerMemory, ReadEnd, Span
from antiphon.engines.page_store import PageStore

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * 1024 * 1024
"""Reserved, read and published at a time: what has arrived when a deadline passes stays."""

_CONFIRM_GRACE_S = 1.0
"""A pin outlives the READ's deadline by this, so that a READ that ends in time can be confirmed."""

_SAME_KV = (
    "model_id", "model_revision", "dtype", "page_size_tokens", "page_bytes", "layout", "rank", "world_size",
    "transport",
)  # fmt: skip
"""Fields of two hellos that must be equal for pages to mean the same on both sides."""


def difference(ours: wire.Hello, theirs: wire.Hello) -> str:
    """Why pages must not move between these two; "" when they may."""
    for name in _SAME_KV:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            return f"{name} is {mine!r} here and {other!r} there"
    return ""


@dataclass(slots=True)
class PullTotals:
    pulled_pages: int = 0
    pulled_bytes: int = 0
    discarded_pages: int = 0
    """Read but not made visible."""


_LEFT_ALONE = frozenset({"unreachable", "deadline", "broken", "internal"})
"""Codes of a directory for which this engine leaves the peer alone for a while."""
_NO_WAY = _LEFT_ALONE | {"denied", "layout_mismatch"}
"""Codes for which the scheduler had better not send us there again. Not `busy`, nor what it asked wrongly."""


class _Stop(Exception):
    """Ends a pull, with the reason in words.

    `blame` = it counts against the peer; `way` = the way from there is bad, if nothing came by it; `torn` =
    even if something did.
    """

    def __init__(
        self, reason: str, *, blame: bool = False, way: bool | None = None, torn: bool = False
    ) -> None:
        super().__init__(reason)
        self.blame = blame
        self.way = blame if way is None else way
        self.torn = torn


@dataclass(slots=True)
class _Pull:
    """One pull under way."""

    request: wire.Prefetch
    started: float
    deadline: float
    pages: int = 0
    bytes: int = 0

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(slots=True)
class _Connections:
    """Idle connections by address; each is used by one thread at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    idle: dict[str, list[DirectoryClient]] = field(default_factory=dict)

    def take(self, address: str) -> DirectoryClient | None:
        with self.lock:
            kept = self.idle.get(address)
            return kept.pop() if kept else None

    def put_back(self, client: DirectoryClient) -> None:
        with self.lock:
            self.idle.setdefault(client.address, []).append(client)

    def close(self) -> None:
        with self.lock:
            for clients in self.idle.values():
                for client in clients:
                    client.close()
            self.idle.clear()


class Puller:
    """Pulls into one rank's store. Called from many threads."""

    def __init__(
        self,
        hello: wire.Hello,
        store: PageStore,
        agent: Agent,
        key: bytes,
        *,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._hello = hello
        self._store = store
        self._agent = agent
        self._key = key
        self._breaker = breaker or CircuitBreaker()
        self._connections = _Connections()
        self._lock = threading.Lock()
        self._under_way: dict[bytes, threading.Event] = {}
        """First page of every pull under way -> set when it has ended."""
        self.totals = PullTotals()

    def pull(self, request: wire.Prefetch) -> wire.Prefetched:
        """Bring what is missing of `request.hashes` from its source before the deadline. Raises nothing."""
        now = time.monotonic()
        pull = _Pull(request, now, now + request.deadline_s)
        self._store.learn((request.parent, *request.hashes))
        reason, blame = "", False
        try:
            self._pull_missing(pull)
        except _Stop as stop:
            reason, blame = str(stop), stop.torn or (stop.way and not pull.pages)
        except Exception as error:
            logger.exception("pull from %s failed", request.source_address)
            reason = f"internal error: {error!r}"
        with self._lock:
            self.totals.pulled_pages += pull.pages
            self.totals.pulled_bytes += pull.bytes
        return wire.Prefetched(
            pages=self._store.prefix_pages(request.hashes),
            pulled_pages=pull.pages,
            pulled_bytes=pull.bytes,
            elapsed_s=time.monotonic() - pull.started,
            reason=reason,
            blame=blame,
        )

    def close(self) -> None:
        self._connections.close()

    def _pull_missing(self, pull: _Pull) -> None:
        """Pull what is not here, once: who finds its first missing page under way waits for that pull."""
        hashes = pull.request.hashes
        while True:
            # What is here already must not be evicted to make room for what follows it.
            have = self._store.pin(hashes, ttl_s=pull.request.deadline_s + _CONFIRM_GRACE_S, holder="pull")
            try:
                if len(have.slots) == len(hashes):
                    return
                first = hashes[len(have.slots)]
                ended = threading.Event()
                with self._lock:
                    other = self._under_way.setdefault(first, ended)
                if other is ended:
                    try:
                        self._pull_from_source(pull, len(have.slots))
                    finally:
                        with self._lock:
                            del self._under_way[first]
                        ended.set()
                    return
            finally:
                self._store.unpin(have.pin_id)
            other.wait(self._time_left(pull))

    def _pull_from_source(self, pull: _Pull, have: int) -> None:
        source = pull.request.source_address
        if not self._breaker.allows(source):
            raise _Stop(f"{source} failed too often lately and is left alone for a while", way=True)
        client = self._connections.take(source) or DirectoryClient(source, self._key, self._hello.incarnation)
        try:
            peer = self._check(client, pull)
            step = max(1, SEGMENT_BYTES // self._hello.page_bytes)
            hashes = pull.request.hashes
            for start in range(have, len(hashes), step):
                parent = hashes[start - 1] if start else pull.request.parent
                self._pull_segment(pull, client, peer, parent, hashes[start : start + step])
        except DirectoryError as error:
            if error.code in _LEFT_ALONE:
                self._breaker.failed(source)
            raise _Stop(f"{error.code}: {error}", way=error.code in _NO_WAY) from error
        except _Stop as stop:
            if stop.blame:
                self._breaker.failed(source)
            raise
        else:
            self._breaker.succeeded(source)
        finally:
            self._connections.put_back(client)

    def _check(self, client: DirectoryClient, pull: _Pull) -> PeerMemory:
        """Connect, and make sure that it is the engine we were sent to and that its pages mean ours."""
        expected = pull.request.source_incarnation
        hello = client.connect(self._time_left(pull))
        if hello.incarnation != expected:
            client.close()  # a kept connection may be to an earlier life
            hello = client.connect(self._time_left(pull))
        if hello.incarnation != expected:
            raise DirectoryError(
                "void_incarnation", f"{client.address} is incarnation {hello.incarnation}, not {expected}"
            )
        if hello.incarnation == self._hello.incarnation:
            raise DirectoryError("bad_request", "an engine cannot pull from itself")
        unlike = difference(self._hello, hello)
        if unlike:
            raise DirectoryError("layout_mismatch", f"{client.address}: {unlike}")
        engine = f"{hello.engine_id}/{hello.rank}"
        return PeerMemory(engine, hello.agent_name, hello.agent_metadata, hello.store_address)

    def _pull_segment(
        self, pull: _Pull, client: DirectoryClient, peer: PeerMemory, parent: bytes, hashes: Sequence[bytes]
    ) -> None:
        """Reserve, read, confirm, publish one piece of the chain; raises unless all of it came."""
        left_s = self._time_left(pull)
        reserve = wire.Reserve(
            puller=self._hello.incarnation,
            source_incarnation=pull.request.source_incarnation,
            hashes=tuple(hashes),
            ttl_s=left_s + _CONFIRM_GRACE_S,
            wait_s=left_s / 2,
        )
        reserved = client.ask(reserve, wire.Reserved, deadline_s=left_s)
        slots = self._store.allocate(min(len(reserved.slots), len(hashes)))
        good = self._fill(pull, client, peer, reserved, slots)
        self._store.publish(parent, hashes[: len(good)], good)
        pull.pages += len(good)
        pull.bytes += len(good) * self._hello.page_bytes
        if len(good) < len(slots):
            raise _Stop(f"page {len(good)} arrived with a wrong checksum and was discarded", torn=True)
        if len(reserved.slots) < len(hashes):
            raise _Stop(f"the source has only {len(reserved.slots)} of {len(hashes)} pages")
        if len(slots) < len(hashes):
            raise _Stop(f"our store has room for only {len(slots)} of {len(hashes)} pages")

    def _fill(
        self,
        pull: _Pull,
        client: DirectoryClient,
        peer: PeerMemory,
        reserved: wire.Reserved,
        slots: tuple[int, ...],
    ) -> tuple[int, ...]:
        """READ into `slots`, confirm, check. Returns the slots that may be published; the others are given
        back or set aside. Raises when none may be."""
        page_bytes = self._hello.page_bytes
        spans = [
            Span(local * page_bytes, remote * page_bytes, page_bytes)
            for local, remote in zip(slots, reserved.slots, strict=False)
        ]
        end, why = self._agent.read(
            peer,
            spans,
            timeout_s=pull.left_s,
            on_late=lambda: self._store.quarantine(slots),
            on_late_end=lambda: self._store.release(slots),
        )
        if end is ReadEnd.LATE:
            self._count_discarded(len(slots))
            raise _Stop(why, blame=True)
        try:
            confirmed = client.ask(
                wire.Confirm(reserved.pin_id), wire.Confirmed, deadline_s=pull.left_s + _CONFIRM_GRACE_S
            )
        except BaseException:
            self._store.discard(slots)
            self._count_discarded(len(slots))
            raise
        if end is ReadEnd.FAILED or not confirmed.held:
            self._store.discard(slots)
            self._count_discarded(len(slots))
            raise _Stop(why or "the pin ran out while the pages were read", blame=end is ReadEnd.FAILED)
        good = self._count_good(slots, reserved.checksums)
        self._store.discard(slots[good:])
        self._count_discarded(len(slots) - good)
        return slots[:good]

    def _count_good(self, slots: Sequence[int], checksums: Sequence[int]) -> int:
        """How many pages, from the first on, are as the source stored them; all, if it keeps no checksums."""
        memory = self._store.memory
        if not checksums or memory is None:
            return len(slots)
        for position, (slot, checksum) in enumerate(zip(slots, checksums, strict=False)):
            if memory.crc32(slot) != checksum:
                return position
        return min(len(slots), len(checksums))  # a page whose sum was not told is not known to be good

    def _count_discarded(self, pages: int) -> None:
        with self._lock:
            self.totals.discarded_pages += pages

    def _time_left(self, pull: _Pull) -> float:
        if pull.left_s <= 0:
            raise _Stop("the deadline passed")
        return pull.left_s
