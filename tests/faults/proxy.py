"""A TCP proxy that can be slow, cut and healed: what a network does to a connection. One event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 64 * 1024
NO_LINGER = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: a close sends RST."""

Cut = Literal["reset", "silent", "close"]


@dataclass(eq=False, slots=True)
class _Link:
    """One connection through the proxy: both ends."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None

    def end(self, how: Cut) -> None:
        for writer in (self.client, self.server):
            if writer is None:
                continue
            if how == "reset":
                sock: socket.socket | None = writer.get_extra_info("socket")
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Listens on 127.0.0.1:`port` and passes on to 127.0.0.1:`target_port`, as told."""

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self.target_port = target_port
        self._latency_s = 0.0
        self._bytes_per_s = 0.0
        self._cut: Cut | None = None
        self._passes = asyncio.Event()
        self._passes.set()
        self._links: dict[_Link, asyncio.Task[None] | None] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self._passes.set()
        tasks = [task for task in self._links.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def slow(self, latency_s: float, bytes_per_s: float) -> None:
        """Every piece comes later, in both directions, on connections that are there too."""
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def cut(self, how: Cut) -> None:
        """reset: RST on all connections and new ones; close: FIN; silent: nothing passes, nothing ends."""
        self._cut = how
        if how == "silent":
            self._passes.clear()
        else:
            for link in list(self._links):
                link.end(how)

    def heal(self) -> None:
        """What was held up by silence passes now, as TCP would send it again."""
        self._cut = None
        self._latency_s = self._bytes_per_s = 0.0
        self._passes.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links[link] = asyncio.current_task()
        try:
            if self._cut in ("reset", "close"):
                link.end(self._cut)
                return
            await self._passes.wait()
            try:
                server_reader, link.server = await asyncio.open_connection("127.0.0.1", self.target_port)
            except OSError:
                link.end("reset")
                return
            pumps = [
                asyncio.ensure_future(self._pump(reader, link.server)),
                asyncio.ensure_future(self._pump(server_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except asyncio.CancelledError:
            pass  # by `close`: nobody waits for this task
        finally:
            del self._links[link]
            link.end(self._cut or "close")

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until its end; an error ends both."""
        while piece := await reader.read(CHUNK_BYTES):
            await self._passes.wait()
            wait_s = self._latency_s + (len(piece) / self._bytes_per_s if self._bytes_per_s else 0.0)
            if wait_s:
                await asyncio.sleep(wait_s)
                await self._passes.wait()
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
