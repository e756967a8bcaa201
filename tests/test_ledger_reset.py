"""A ledger that resets its connections, under the event loop that the gateway runs on."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import uvloop

from antiphon.scheduler.ledger_connection import LedgerConnection

CALLS = 5
RESET_ARRIVES_S = 0.02
NO_LINGER = struct.pack("ii", 1, 0)
"""A close sends RST."""


@pytest.fixture
def resetting_port() -> Iterator[int]:
    """Of a server that answers a call and then resets the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            while (asked := connection.recv(65536)) and b"PING" not in asked:
                connection.sendall(b"+OK\r\n" * asked.count(b"CLIENT"))
            connection.sendall(b"+PONG\r\n")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5.0)


def test_a_connection_that_was_reset_is_opened_again(resetting_port: int) -> None:
    """uvloop says RuntimeError when something is written to a connection that is gone: `make faults` found
    that rounds ended with a 500 by it (redis.cut.decode, seed 1)."""

    async def scenario() -> None:
        connection = LedgerConnection(f"redis://127.0.0.1:{resetting_port}", "tests", 2.0, 4)
        try:
            for _ in range(CALLS):
                assert await connection.command("PING")
                await asyncio.sleep(RESET_ARRIVES_S)
        finally:
            await connection.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
