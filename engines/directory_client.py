"""Both clients of the directory: blocking (linkers pull by it) and asyncio (the scheduler's, with a pool).

Either authenticates both ways before it believes a word, and speaks one request at a time per connection.
A connection on which anything went wrong is closed: request and reply may be out of step.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from antiphon.engines import wire
from antiphon.engines.handshake import (
    MAX_HANDSHAKE_BYTES,
    DirectoryError,
    ReplyT,
    check_reply,
    check_welcome,
    load_fleet_key,
    make_auth,
    read_frame,
    read_frame_async,
    remaining_s,
    split_address,
    translated,
    write_frame,
)

__all__ = ["AsyncDirectoryClient", "DirectoryClient", "DirectoryError", "load_fleet_key"]


class DirectoryClient:
    """One blocking connection, used by one thread at a time. Connects on the first `ask`."""

    def __init__(self, address: str, key: bytes, peer: str) -> None:
        self.address = address
        self.hello: wire.Hello | None = None
        """Of the connection that is open now."""
        self._key = key
        self._peer = peer
        self._sock: socket.socket | None = None

    def connect(self, deadline_s: float) -> wire.Hello:
        """Open and authenticate unless open already; raises DirectoryError."""
        hello: wire.Hello = self._guard(self._connect, deadline_s)
        return hello

    def ask(self, request: wire.Request, reply_type: type[ReplyT], *, deadline_s: float) -> ReplyT:
        """Send `request`, return its reply; raises DirectoryError. Any error but a Failure closes."""

        reply = self._guard(lambda deadline: self._exchange(request, deadline), deadline_s)
        return check_reply(reply, reply_type)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self.hello = None

    def _exchange(self, request: wire.Request, deadline: float) -> Any:
        """A kept connection may have been closed by the peer meanwhile: then once more, on a fresh one.

        Repeating is harmless: a second Reserve leaves a pin that runs out, a second Confirm says "not held".
        """
        kept = self._sock is not None
        try:
            return self._exchange_once(request, deadline)
        except TimeoutError:
            raise
        except (OSError, EOFError):
            if not kept:
                raise
            self.close()
            return self._exchange_once(request, deadline)

    def _exchange_once(self, request: wire.Request, deadline: float) -> Any:
        self._connect(deadline)
        assert self._sock is not None
        write_frame(self._sock, request, deadline)
        return read_frame(self._sock, deadline)

    def _connect(self, deadline: float) -> wire.Hello:
        if self._sock is not None and self.hello is not None:
            return self.hello
        self._sock = socket.create_connection(split_address(self.address), remaining_s(deadline))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        challenge = read_frame(self._sock, deadline, MAX_HANDSHAKE_BYTES)
        auth, expected_mac = make_auth(challenge, self._peer, self._key)
        write_frame(self._sock, auth, deadline)
        self.hello = check_welcome(read_frame(self._sock, deadline, MAX_HANDSHAKE_BYTES), expected_mac)
        return self.hello

    def _guard(self, action: Callable[[float], Any], deadline_s: float) -> Any:
        try:
            return action(time.monotonic() + deadline_s)
        except DirectoryError:
            self.close()
            raise
        except (OSError, EOFError, wire.WireError) as error:
            self.close()
            raise translated(error, self.address, deadline_s) from error


# ---------------------------------------------------------------- asyncio


class _Connection:
    """One authenticated asyncio connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: wire.Hello) -> None:
        self.hello = hello
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: str, key: bytes, peer: str) -> _Connection:
        host, port = split_address(address)
        reader, writer = await asyncio.open_connection(host, port)
        try:
            challenge = await read_frame_async(reader, MAX_HANDSHAKE_BYTES)
            auth, expected_mac = make_auth(challenge, peer, key)
            writer.write(wire.encode(auth))
            await writer.drain()
            hello = check_welcome(await read_frame_async(reader, MAX_HANDSHAKE_BYTES), expected_mac)
        except BaseException:
            writer.close()
            raise
        return cls(reader, writer, hello)

    @property
    def usable(self) -> bool:
        return not self._writer.is_closing() and not self._reader.at_eof()

    async def exchange(self, request: wire.Request) -> Any:
        self._writer.write(wire.encode(request))
        await self._writer.drain()
        return await read_frame_async(self._reader, wire.MAX_FRAME_BYTES)

    def close(self) -> None:
        self._writer.close()


class AsyncDirectoryClient:
    """A pool of connections to one directory, for one event loop; `ask` may be called concurrently.

    `hello` is that of the newest connection; if it names another incarnation, older connections are dropped.
    """

    def __init__(self, address: str, key: bytes, peer: str, *, max_connections: int = 8) -> None:
        self.address = address
        self.hello: wire.Hello | None = None
        self._key = key
        self._peer = peer
        self._idle: list[_Connection] = []
        self._max_connections = max_connections
        self._slots = asyncio.Semaphore(max_connections)
        self._closed = False

    async def connect(self, *, deadline_s: float) -> wire.Hello:
        """Open a fresh connection and return the hello; raises DirectoryError."""

        async def refresh() -> wire.Hello:
            async with self._slots:
                connection = await self._open()
                self._put_back(connection)
                return connection.hello

        hello: wire.Hello = await self._guard(refresh, deadline_s)
        return hello

    async def ask(self, request: wire.Request, reply_type: type[ReplyT], *, deadline_s: float) -> ReplyT:
        """Send `request` on an idle or new connection, return its reply; raises DirectoryError."""

        async def exchange() -> Any:
            async with self._slots:
                return await self._exchange(request)

        return check_reply(await self._guard(exchange, deadline_s), reply_type)

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: wire.Request) -> Any:
        """A kept connection may have been closed by the peer meanwhile: then once more, on a fresh one.

        Repeating is harmless: a second Reserve leaves a pin that runs out, a second Confirm says "not held".
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.usable:
                connection.close()
                continue
            try:
                return await self._exchange_on(connection, request)
            except (OSError, asyncio.IncompleteReadError):
                break
        return await self._exchange_on(await self._open(), request)

    async def _exchange_on(self, connection: _Connection, request: wire.Request) -> Any:
        try:
            reply = await connection.exchange(request)
        except BaseException:
            connection.close()
            raise
        self._put_back(connection)
        return reply

    async def _open(self) -> _Connection:
        connection = await _Connection.open(self.address, self._key, self._peer)
        if self.hello is not None and self.hello.incarnation != connection.hello.incarnation:
            while self._idle:
                self._idle.pop().close()
        self.hello = connection.hello
        return connection

    def _put_back(self, connection: _Connection) -> None:
        if self._closed or len(self._idle) >= self._max_connections:
            connection.close()  # `connect` opens a fresh one each time
        else:
            self._idle.append(connection)

    async def _guard(self, action: Callable[[], Awaitable[Any]], deadline_s: float) -> Any:
        try:
            async with asyncio.timeout(deadline_s):
                return await action()
        except (OSError, EOFError, wire.WireError) as error:
            raise translated(error, self.address, deadline_s) from error
