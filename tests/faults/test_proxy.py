"""The proxy does to a connection what it says, and what it passes on is what came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from antiphon.engines.launch_options import find_free_ports
from tests.faults.proxy import Cut, Proxy

DEADLINE_S = 5.0
SILENCE_S = 0.2
HELLO = b"hello" * 20_000


@asynccontextmanager
async def echoing() -> AsyncIterator[Proxy]:
    """A proxy before a server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(find_free_ports("127.0.0.1", 1), server.sockets[0].getsockname()[1])
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        server.close()


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: bytes = HELLO) -> bytes:
    """What comes back for it."""
    async with asyncio.timeout(DEADLINE_S):
        writer.write(what)
        await writer.drain()
        return await reader.readexactly(len(what))


def test_it_passes_everything_on_and_slowly_if_told() -> None:
    async def scenario() -> None:
        async with echoing() as proxy:
            streams = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await said(*streams) == HELLO
            proxy.slow(0.1, 0.0)
            started = time.monotonic()
            assert await said(*streams, b"x") == b"x"
            assert time.monotonic() - started >= 0.2
            proxy.heal()
            assert await said(*streams) == HELLO
            streams[1].close()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_cut_ends_connections_and_refuses_new_ones(how: Cut) -> None:
    async def ends(reader: asyncio.StreamReader) -> bool:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await reader.read(1) == b"" and how == "close"
        except ConnectionResetError:
            return how == "reset"

    async def scenario() -> None:
        async with echoing() as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await said(reader, writer) == HELLO
            proxy.cut(how)
            assert await ends(reader)
            again, more = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await ends(again)
            proxy.heal()
            fresh = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await said(*fresh) == HELLO
            for each in (writer, more, fresh[1]):
                each.close()

    asyncio.run(scenario())


def test_silence_holds_what_is_said_until_it_is_healed() -> None:
    async def scenario() -> None:
        async with echoing() as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await said(reader, writer) == HELLO
            proxy.cut("silent")
            writer.write(b"late")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SILENCE_S):
                    await reader.read(1)
            proxy.heal()
            async with asyncio.timeout(DEADLINE_S):
                assert await reader.readexactly(4) == b"late"
            writer.close()

    asyncio.run(scenario())
