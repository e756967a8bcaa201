"""The directory of a simulated engine: the linker's own backend and puller, with a pause for a READ.

Everything but the READ is what real engines run: hello, reserve, confirm, publish, breaker. A READ takes
`LatencyModel.transfer_s` (links are not shared between transfers). A page that was corrupted does not match
its checksum on the way and is discarded by the puller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import msgspec

from antiphon.engines import wire
from antiphon.engines.directory_backend import StoreBackend
from antiphon.engines.faults import Faults
from antiphon.engines.link_faults import FaultyAgent, late_at_once
from antiphon.engines.nixl_agent import PeerMemory, ReadEnd, Span
from antiphon.engines.transfer import Puller
from antiphon.engines.virtual_kv import RIGHT_CONTENT, VirtualStore
from antiphon.policies.latency import LatencyModel


class VirtualAgent:
    """Stands where `NixlAgent` does: "reads" by waiting, then fills in what right pages hold."""

    def __init__(
        self,
        hello: wire.Hello,
        store: VirtualStore,
        latency: LatencyModel,
        faults: Faults,
        *,
        speed: float,
    ) -> None:
        self._hello = hello
        self._store = store
        self._latency = latency
        self._faults = faults
        self._speed = speed
        self._closing = threading.Event()

    def read(
        self,
        peer: PeerMemory,
        spans: Sequence[Span],
        *,
        timeout_s: float,
        on_late: Callable[[], None],
        on_late_end: Callable[[], None],
    ) -> tuple[ReadEnd, str]:
        """As `NixlAgent.read`; a late read ends at once, for nothing is really under way."""
        duration_s = self._latency.transfer_s(len(spans) * self._hello.page_size_tokens)
        duration_s *= self._faults.slow_factor / self._speed
        self._closing.wait(max(0.0, min(duration_s, timeout_s)))
        self._faults.reach("prefetch")
        if duration_s > timeout_s:
            return late_at_once(peer, timeout_s, on_late, on_late_end)
        for span in spans:
            self._store.content.view(span.local_offset // self._hello.page_bytes)[:] = RIGHT_CONTENT
        return ReadEnd.DONE, ""

    def close(self) -> None:
        """End waits that are under way."""
        self._closing.set()


class VirtualBackend(StoreBackend):
    """A `DirectoryBackend` over virtual pages, with faults on command."""

    def __init__(
        self,
        hello: wire.Hello,
        store: VirtualStore,
        agent: VirtualAgent,
        faults: Faults,
        key: bytes,
        *,
        fault_injection: bool,
    ) -> None:
        faulty = FaultyAgent(agent, store.content, hello.page_bytes) if fault_injection else None
        self._virtual_puller = Puller(hello, store, faulty or agent, key)
        super().__init__(hello, store, self._virtual_puller, faulty_agent=faulty)
        self._content = store.content
        self._agent = faulty or agent
        self._faults = faults

    def listens_on(self, address: str) -> None:
        """The directory's address, known once it is bound."""
        self._hello = msgspec.structs.replace(self._hello, kv_addresses=(address,))

    def reserve(self, request: wire.Reserve) -> wire.Reserved:
        reserved = super().reserve(request)
        self._faults.reach("reserve")
        # Of the bytes as they are now: all that a puller can see of a virtual page.
        seen = tuple(self._content.crc32(slot) for slot in reserved.slots)
        return msgspec.structs.replace(reserved, checksums=seen)

    def prefetch(self, request: wire.Prefetch) -> wire.Prefetched:
        self._faults.delay_prefetch()
        return super().prefetch(request)

    def close(self) -> None:
        """End transfers that are under way and drop connections to peers."""
        self._agent.close()
        self._virtual_puller.close()
