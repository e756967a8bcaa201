"""The one thread that owns NIXL: it registers the page store and runs READs from peers' stores.

A READ cannot be cancelled: after a timeout its bytes may still land. So every read ends as DONE, as FAILED
(nothing can land any more) or as LATE; a late one keeps its handle here and calls `on_late_end` when it can
no longer write. Silence of a peer is never reported by NIXL: the caller's deadline is the only one.
The thread blocks on its queue when nothing is in flight.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 64 * 1024 * 1024
"""Posted per handle at most: posting copies inline on some transports and holds the thread."""

PROGRESS_DELAY_US = 20_000
"""NIXL's Python API sets 0, which makes its progress thread spin on a whole core; arrivals wake it anyway."""

_POLL_MIN_S = 0.0002
_POLL_MAX_S = 0.004
_POLL_LATE_S = 0.25
_START_TIMEOUT_S = 60.0


class NixlError(Exception):
    """NIXL is not installed, or the agent could not be created."""


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """What a hello says about where a peer's store is."""

    engine: str
    """Engine and rank: a new agent of the same engine replaces the old one."""
    agent_name: str
    metadata: bytes
    address: int


@dataclass(frozen=True, slots=True)
class Span:
    """One run of bytes to read: offsets from the beginning of either store."""

    local_offset: int
    remote_offset: int
    size: int


class ReadEnd(Enum):
    DONE = "done"
    FAILED = "failed"
    """Nothing was read, and nothing can land any more."""
    LATE = "late"
    """Given up; bytes may still land until `on_late_end` is called (never, if it cannot be known)."""


@dataclass(slots=True, eq=False)
class _Read:
    peer: PeerMemory
    batches: list[Sequence[Span]]
    on_late: Callable[[], None]
    on_late_end: Callable[[], None]
    handle: Any = None
    end: ReadEnd | None = None
    reason: str = ""
    abandoned: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, timeout_s: float) -> tuple[ReadEnd, str]:
        """How it ended; after `timeout_s` it is abandoned and LATE."""
        with self.changed:
            if self.changed.wait_for(lambda: self.end is not None, max(0.0, timeout_s)):
                assert self.end is not None
                end, reason = self.end, self.reason
            else:
                self.abandoned = True
                end, reason = ReadEnd.LATE, f"READ not finished within {timeout_s:.3g} s"
            if end is ReadEnd.LATE:
                # Under the lock: `finish` cannot call on_late_end before.
                self.on_late()
            return end, reason

    def finish(self, end: ReadEnd, reason: str = "") -> None:
        with self.changed:
            self.end, self.reason = end, reason
            self.changed.notify_all()
            tell = self.abandoned and end is not ReadEnd.LATE
        if tell:
            self.on_late_end()


def merge_spans(spans: Sequence[Span]) -> list[Span]:
    """Join neighbours that are adjacent on both sides: NIXL does not, and pays per descriptor."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.local_offset + last.size == span.local_offset
            and last.remote_offset + last.size == span.remote_offset
            and last.size + span.size <= MAX_BATCH_BYTES
        ):
            merged[-1] = Span(last.local_offset, last.remote_offset, last.size + span.size)
        else:
            merged.append(span)
    return merged


def cut_batches(spans: Sequence[Span]) -> list[Sequence[Span]]:
    """Group spans into batches of at most MAX_BATCH_BYTES (a larger span is a batch of its own)."""
    batches: list[Sequence[Span]] = []
    batch: list[Span] = []
    size = 0
    for span in spans:
        if batch and size + span.size > MAX_BATCH_BYTES:
            batches.append(batch)
            batch, size = [], 0
        batch.append(span)
        size += span.size
    return [*batches, batch] if batch else batches


class NixlAgent:
    """Reads into [address, address + size_bytes) of this process, which it registers for peers to read."""

    def __init__(
        self, name: str, address: int, size_bytes: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts the thread and waits for the agent; raises NixlError saying what to do.

        `environment` are UCX and NIXL variables; those that the user has set already stay as they are.
        """
        self.name = name
        self._address = address
        self._size_bytes = size_bytes
        self._commands: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        self._in_flight: list[_Read] = []
        self._known: dict[str, str] = {}
        """Agent name -> engine, of every remote agent that NIXL has been told of."""
        for variable, value in (environment or {}).items():
            os.environ.setdefault(variable, value)
        ready: Future[bytes] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="antiphon-nixl", daemon=True)
        self._thread.start()
        self.metadata = ready.result(_START_TIMEOUT_S)

    def read(
        self,
        peer: PeerMemory,
        spans: Sequence[Span],
        *,
        timeout_s: float,
        on_late: Callable[[], None],
        on_late_end: Callable[[], None],
    ) -> tuple[ReadEnd, str]:
        """Read `spans` from `peer`; returns how it ended and why. Blocks at most `timeout_s`.

        For a LATE read `on_late` is called first, on the caller's thread, and `on_late_end`, on the NIXL
        thread, once the read can no longer write.
        """
        read = _Read(peer, cut_batches(merge_spans(spans)), on_late, on_late_end)
        self._commands.put(read)
        return read.wait(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        self._commands.put(None)
        self._thread.join(timeout_s)

    # ------------------------------------------------------------ on the thread

    def _run(self, ready: Future[bytes]) -> None:
        try:
            self._create()
            ready.set_result(self._agent.get_agent_metadata())
        except Exception as error:
            ready.set_exception(
                error if isinstance(error, NixlError) else NixlError(f"NIXL agent {self.name}: {error!r}")
            )
            return
        wait_s = _POLL_MIN_S
        while True:
            try:
                read = self._commands.get(timeout=wait_s if self._in_flight else None)
            except queue.Empty:
                slowest_s = _POLL_LATE_S if all(r.abandoned for r in self._in_flight) else _POLL_MAX_S
                wait_s = min(wait_s * 1.5, slowest_s)
            else:
                if read is None:
                    break
                wait_s = _POLL_MIN_S
                self._in_flight.append(read)
            self._in_flight = [r for r in self._in_flight if not self._advance(r)]
        if not self._in_flight:  # else the agent stays: a handle in flight may still write
            self._agent.deregister_memory(self._registered)
            del self._agent

    def _create(self) -> None:
        api = _import_nixl()
        self._disconnected: type[Exception] = api.nixlBind.nixlRemoteDisconnectError
        plain_config = api.nixlBind.nixlAgentConfig

        class CalmConfig(plain_config):  # type: ignore[misc, valid-type]  # no stubs
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, PROGRESS_DELAY_US if name == "pthrDelay" else value)

        api.nixlBind.nixlAgentConfig = CalmConfig
        try:
            self._agent = api.nixl_agent(self.name, api.nixl_agent_config(backends=["UCX"]))
        except Exception as error:
            tls, devices, home = (os.environ.get(name) for name in ("UCX_TLS", "UCX_NET_DEVICES", "HOME"))
            raise NixlError(
                f"NIXL agent {self.name} could not be created: {error!r}. UCX_TLS={tls!r} must include tcp, "
                f"UCX_NET_DEVICES={devices!r} must be up, and HOME={home!r} must be readable"
            ) from error
        finally:
            api.nixlBind.nixlAgentConfig = plain_config
        self._registered = self._agent.register_memory([(self._address, self._size_bytes, 0, "")], "DRAM")

    def _advance(self, read: _Read) -> bool:
        """Post or check one read; True when it is over."""
        try:
            if read.handle is None:
                if read.abandoned:
                    read.finish(ReadEnd.FAILED, "given up before it was posted")
                    return True
                self._post(read)
                if read.handle is None:
                    return True
                state = self._agent.transfer(read.handle)
            else:
                state = self._agent.check_xfer_state(read.handle)
        except self._disconnected as error:
            self._release(read)
            self._forget(read.peer.agent_name, read)
            read.finish(ReadEnd.FAILED, f"peer {read.peer.engine} disconnected: {error}")
            return True
        except Exception as error:
            return self._lose(read, repr(error))
        if state == "PROC":
            return False
        if state != "DONE":
            return self._lose(read, f"state {state!r}")
        self._release(read)
        read.batches.pop(0)
        if read.batches and not read.abandoned:
            return self._advance(read)
        read.finish(ReadEnd.DONE)
        return True

    def _post(self, read: _Read) -> None:
        """Make the handle of the next batch; on failure the read is finished, and nothing was posted."""
        import numpy as np  # NIXL needs it, a light install does not have it

        try:
            if not read.batches:
                read.finish(ReadEnd.DONE)
                return
            self._know(read.peer)
            spans = read.batches[0]
            local = [(self._address + span.local_offset, span.size, 0) for span in spans]
            remote = [(read.peer.address + span.remote_offset, span.size, 0) for span in spans]
            read.handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(np.array(local, dtype=np.uint64), "DRAM"),
                self._agent.get_xfer_descs(np.array(remote, dtype=np.uint64), "DRAM"),
                read.peer.agent_name,
            )
        except Exception as error:
            read.finish(ReadEnd.FAILED, f"READ from {read.peer.engine} could not be set up: {error!r}")

    def _lose(self, read: _Read, what: str) -> bool:
        """An end that says nothing about the bytes: their slots can never be trusted again."""
        logger.error("NIXL: READ from %s ended unclearly: %s", read.peer.engine, what)
        read.finish(ReadEnd.LATE, f"READ ended unclearly: {what}")
        return True

    def _release(self, read: _Read) -> None:
        handle, read.handle = read.handle, None
        try:
            self._agent.release_xfer_handle(handle)
        except Exception as error:
            logger.warning("NIXL: releasing a handle failed: %r", error)

    def _know(self, peer: PeerMemory) -> None:
        """Tell NIXL of the peer; an earlier life of the same engine goes first."""
        if peer.agent_name in self._known:
            return
        for name in [name for name, engine in self._known.items() if engine == peer.engine]:
            self._forget(name, None)
        added = self._agent.add_remote_agent(peer.metadata)
        name = added.decode() if isinstance(added, bytes) else added
        self._known[name] = peer.engine
        if name != peer.agent_name:
            self._forget(name, None)
            raise NixlError(f"metadata of {peer.agent_name} is that of {name}")

    def _forget(self, agent_name: str, ending: _Read | None) -> None:
        """Drop a remote agent, unless a read from it is in flight: that could not be followed any more."""
        if agent_name not in self._known or any(
            read.peer.agent_name == agent_name and read.handle is not None and read is not ending
            for read in self._in_flight
        ):
            return
        del self._known[agent_name]
        try:
            self._agent.remove_remote_agent(agent_name)
        except Exception as error:
            logger.warning("NIXL: removing agent %s failed: %r", agent_name, error)


def _import_nixl() -> ModuleType:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    missing = []
    for name in ("nixl_cu12._api", "nixl_cu13._api", "nixl._api"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name}: {error}")
    raise NixlError(f"NIXL is not installed: pip install --no-deps nixl-cu12==1.5.1 ({'; '.join(missing)})")
