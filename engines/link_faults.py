"""Faults of a link on command: what a puller's READ can be made to do wrong, by `wire.LinkFault`.

Only with fault injection switched on; for tests of what stands behind a READ (deadline, confirm, checksums).

    slow     the READ is done, but that is seen late: after `seconds`, or as `bytes_per_s` says
    cut      silence until the caller's deadline, as of a peer whose network is gone (`seconds` 0), or a READ
             that fails after `seconds`, as of a connection that was reset
    corrupt  the bytes are wrong when they have arrived
    clear    all of the above is undone

`count` reads are hit, those that begin first; 0 = all until `clear`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from antiphon.engines import wire
from antiphon.engines.nixl_agent import PeerMemory, ReadEnd, Span
from antiphon.engines.page_memory import PageMemory


class Agent(Protocol):
    """What a puller needs of NIXL."""

    def read(
        self,
        peer: PeerMemory,
        spans: Sequence[Span],
        *,
        timeout_s: float,
        on_late: Callable[[], None],
        on_late_end: Callable[[], None],
    ) -> tuple[ReadEnd, str]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Armed:
    fault: wire.LinkFault
    left: int
    """Reads that it still hits; below 0 = all."""


class FaultyAgent:
    """An agent whose reads go wrong when they are told to; else those of the agent behind it."""

    def __init__(self, agent: Agent, memory: PageMemory, page_bytes: int) -> None:
        """`memory` is what `agent` reads into; a span's offsets count `page_bytes` a page."""
        self._agent = agent
        self._memory = memory
        self._page_bytes = page_bytes
        self._lock = threading.Lock()
        self._armed: list[_Armed] = []
        self._cleared = threading.Event()
        """Ends waits that are under way."""
        self.hit_reads = 0
        self.reading = 0

    def arm(self, fault: wire.LinkFault) -> wire.LinkFaults:
        """Add a fault, or clear all; how many reads were hit so far, and how many are under way."""
        with self._lock:
            if fault.kind == "clear":
                self._armed.clear()
                self._cleared.set()
            elif fault.kind != "none":
                self._cleared = threading.Event()
                self._armed.append(_Armed(fault, fault.count or -1))
            return wire.LinkFaults(self.hit_reads, self.reading)

    def read(
        self,
        peer: PeerMemory,
        spans: Sequence[Span],
        *,
        timeout_s: float,
        on_late: Callable[[], None],
        on_late_end: Callable[[], None],
    ) -> tuple[ReadEnd, str]:
        """As the agent's."""
        fault, cleared = self._begin()
        try:
            if fault is not None and fault.kind == "cut":
                return self._cut(peer, fault, cleared, timeout_s, on_late, on_late_end)
            started = time.monotonic()
            end, why = self._agent.read(
                peer, spans, timeout_s=timeout_s, on_late=on_late, on_late_end=on_late_end
            )
            if fault is None or end is not ReadEnd.DONE:
                return end, why
            if fault.kind == "corrupt":
                for span in spans:
                    self._memory.corrupt(span.local_offset // self._page_bytes)
                return end, why
            size_bytes = sum(span.size for span in spans)
            due_s = fault.seconds + (size_bytes / fault.bytes_per_s if fault.bytes_per_s else 0.0)
            left_s = started + timeout_s - time.monotonic()
            cleared.wait(max(0.0, min(due_s, left_s)))
            if due_s > left_s and not cleared.is_set():
                return late_at_once(peer, timeout_s, on_late, on_late_end)
            return end, why
        finally:
            with self._lock:
                self.reading -= 1

    def close(self) -> None:
        self._cleared.set()
        self._agent.close()

    def _begin(self) -> tuple[wire.LinkFault | None, threading.Event]:
        with self._lock:
            self.reading += 1
            if not self._armed:
                return None, self._cleared
            armed = self._armed[0]
            armed.left -= 1
            if armed.left == 0:
                self._armed.pop(0)
            self.hit_reads += 1
            return armed.fault, self._cleared

    def _cut(
        self,
        peer: PeerMemory,
        fault: wire.LinkFault,
        cleared: threading.Event,
        timeout_s: float,
        on_late: Callable[[], None],
        on_late_end: Callable[[], None],
    ) -> tuple[ReadEnd, str]:
        if 0 < fault.seconds < timeout_s:
            cleared.wait(fault.seconds)
            return ReadEnd.FAILED, f"peer {peer.engine} disconnected: cut on command"
        cleared.wait(max(0.0, timeout_s))
        return late_at_once(peer, timeout_s, on_late, on_late_end)


def late_at_once(
    peer: PeerMemory, timeout_s: float, on_late: Callable[[], None], on_late_end: Callable[[], None]
) -> tuple[ReadEnd, str]:
    """Nothing is really under way, so it ends at once."""
    on_late()
    on_late_end()
    return ReadEnd.LATE, f"READ of {peer.engine} not finished within {timeout_s:.3g} s"
