"""The directory server: the frames of `wire.py` over TCP, on threads of its own, in front of a backend.

What a request means is the backend's matter (`DirectoryBackend`): real pages in an engine, virtual ones in a
simulated engine. The server owns connections, authentication, limits and deadlines. All threads block, so an
idle server costs nothing. One thread accepts, one serves each connection; a backend sees many threads.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from antiphon.engines import wire
from antiphon.engines.handshake import (
    MAX_HANDSHAKE_BYTES,
    DirectoryError,
    read_exactly,
    read_frame,
    write_frame,
)

logger = logging.getLogger(__name__)


class DirectoryBackend(Protocol):
    """What stands behind a directory. Methods may block within the request's own deadline.

    A request that cannot be served raises DirectoryError(code, message): the peer gets it as `wire.Failure`.
    Any other exception is logged and becomes Failure(internal).
    """

    @property
    def hello(self) -> wire.Hello: ...

    def touch(self, request: wire.Touch) -> wire.Touched: ...

    def lookup(self, request: wire.Lookup) -> wire.Found: ...

    def chain(self, request: wire.Chain) -> wire.ChainPages: ...

    def reserve(self, request: wire.Reserve) -> wire.Reserved: ...

    def confirm(self, request: wire.Confirm) -> wire.Confirmed: ...

    def prefetch(self, request: wire.Prefetch) -> wire.Prefetched: ...

    def stats(self, request: wire.Stats) -> wire.StatsReply: ...

    def corrupt(self, request: wire.Corrupt) -> wire.Corrupted: ...

    def link_fault(self, request: wire.LinkFault) -> wire.LinkFaults: ...


@dataclass(frozen=True, slots=True)
class DirectoryLimits:
    max_connections: int = 256
    handshake_s: float = 5.0
    """From accept to a proven key."""
    idle_s: float = 900.0
    """A connection that asks nothing for so long is closed; clients reconnect by themselves."""
    frame_s: float = 10.0
    """From the first byte of a request to its last, and for sending a reply."""


class DirectoryServer:
    """Serves one backend on host:port (port 0 = any free one) from `start` to `close`."""

    def __init__(
        self,
        backend: DirectoryBackend,
        key: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: DirectoryLimits | None = None,
    ) -> None:
        """Binds at once, so that the address is known; raises OSError naming the address."""
        self._backend = backend
        self._key = key
        self._limits = limits or DirectoryLimits()
        self._handlers: dict[type[wire.Message], Callable[[Any], wire.Frame]] = {
            wire.Touch: backend.touch,
            wire.Lookup: backend.lookup,
            wire.Chain: backend.chain,
            wire.Reserve: backend.reserve,
            wire.Confirm: backend.confirm,
            wire.Prefetch: backend.prefetch,
            wire.Stats: backend.stats,
            wire.Corrupt: backend.corrupt,
            wire.LinkFault: backend.link_fault,
        }
        try:
            self._listener = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise OSError(f"directory cannot listen on {host}:{port}: {error}; is the port free?") from error
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept_loop, name="antiphon-directory", daemon=True)

    def start(self) -> None:
        self._acceptor.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop accepting, cut all connections, wait for their threads. May be called twice."""
        with self._lock:
            self._closing = True
            open_connections = dict(self._connections)
        # shutdown wakes the thread that blocks in accept; some systems refuse it on a listener, harmlessly.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in open_connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + timeout_s
        for thread in (self._acceptor, *open_connections.values()):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _accept_loop(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                # Out of file descriptors, or a connection that died in the queue: the service goes on.
                logger.warning("directory %s: accept failed: %s", self.address, error)
                time.sleep(0.1)
                continue
            thread = threading.Thread(
                target=self._connection_loop, args=(sock,), name=f"antiphon-directory-{peer[1]}", daemon=True
            )
            with self._lock:
                full = self._closing or len(self._connections) >= self._limits.max_connections
                if not full:
                    self._connections[sock] = thread
            if full:
                self._turn_away(sock)
            else:
                thread.start()

    def _turn_away(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            write_frame(
                sock, wire.Failure("busy", "directory has too many connections"), time.monotonic() + 0.1
            )

    def _connection_loop(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._handshake(sock):
                while True:
                    self._serve_one(sock)
        except (OSError, EOFError) as error:
            # The peer went away, fell silent, or we are closing: nothing to tell anybody.
            logger.debug("directory %s: connection ended: %s", self.address, error)
        except wire.WireError as error:
            logger.warning("directory %s: closing a connection: %s", self.address, error)
            self._say_goodbye(sock, wire.Failure("bad_request", str(error)))
        finally:
            with self._lock:
                self._connections.pop(sock, None)
            sock.close()

    def _handshake(self, sock: socket.socket) -> bool:
        deadline = time.monotonic() + self._limits.handshake_s
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        write_frame(sock, wire.Challenge(wire.PROTOCOL_VERSION, nonce), deadline)
        auth = read_frame(sock, deadline, MAX_HANDSHAKE_BYTES)
        if (
            not isinstance(auth, wire.Auth)
            or len(auth.nonce) != wire.NONCE_BYTES
            or not hmac.compare_digest(auth.mac, wire.client_mac(self._key, nonce, auth.nonce))
        ):
            logger.warning("directory %s: denied a peer that does not know the fleet key", self.address)
            self._say_goodbye(sock, wire.Failure("denied", "the fleet key does not match"))
            return False
        welcome = wire.Welcome(wire.server_mac(self._key, nonce, auth.nonce), self._backend.hello)
        write_frame(sock, welcome, deadline)
        return True

    def _serve_one(self, sock: socket.socket) -> None:
        prefix = read_exactly(sock, 1, time.monotonic() + self._limits.idle_s)
        deadline = time.monotonic() + self._limits.frame_s
        prefix += read_exactly(sock, 3, deadline)
        request = wire.decode(read_exactly(sock, wire.body_length(prefix), deadline))
        reply = self._answer(request)
        try:
            write_frame(sock, reply, time.monotonic() + self._limits.frame_s)
        except wire.WireError as error:
            write_frame(sock, wire.Failure("internal", str(error)), time.monotonic() + self._limits.frame_s)

    def _answer(self, request: wire.Message) -> wire.Frame:
        handler = self._handlers.get(type(request))
        if handler is None:
            return wire.Failure("bad_request", f"{type(request).__name__} is not a request")
        if any(len(page_hash) > wire.HASH_BYTES for page_hash in getattr(request, "hashes", ())):
            return wire.Failure("bad_request", f"no page hash has more than {wire.HASH_BYTES} bytes")
        try:
            return handler(request)
        except DirectoryError as error:
            return wire.Failure(error.code, str(error))
        except Exception as error:
            logger.exception("directory %s: %s failed", self.address, type(request).__name__)
            return wire.Failure("internal", f"{type(error).__name__}: {error}")

    def _say_goodbye(self, sock: socket.socket, failure: wire.Failure) -> None:
        with contextlib.suppress(OSError, EOFError):
            write_frame(sock, failure, time.monotonic() + 1.0)
            # Closing with unread bytes would reset the connection and take the message with it.
            sock.shutdown(socket.SHUT_WR)
            read_exactly(sock, 1, time.monotonic() + 0.5)
