"""Raw bytes at a gateway: whatever a stranger sends, the next good request is answered."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.gateway_helpers import TEXT, TEXT_PATH, running_gateway, three_words

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
NOISE = (
    b"\x00" * 300,
    b"GET / HTTP/9.9\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}",
    HEAD + b"X-Session-ID: " + b"a" * 200_000 + b"\r\n\r\n",
    HEAD + b"".join(b"X-%d: y\r\n" % number for number in range(20_000)) + b"\r\n",
    HEAD + b"X-Session-Hints: " + b'"' * 30_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Authorization: Bearer \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Content-Length: 300000\r\n\r\n" + b"[" * 300_000,
    HEAD,
)


def test_noise_is_refused_and_good_requests_are_served(tiny_model_dir: Path) -> None:
    """Bad framing, absurd headers, deep nesting, changed bytes, half requests that stay open: an answer of
    4xx or a closed connection, never a 5xx; 60 connections stay open meanwhile."""
    dice = random.Random(5)

    async def send(port: int, raw: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(raw)
            await writer.drain()
            writer.write_eof()
            return await asyncio.wait_for(reader.read(65_536), 10.0)
        except OSError:
            return b""
        finally:
            writer.close()

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir) as gateway:
            port = int(gateway.url.rsplit(":", 1)[1])
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
            for _, writer in held:
                writer.write(HEAD[: dice.randrange(len(HEAD))])
            for raw in NOISE:
                edited = bytearray(raw)
                edited[dice.randrange(min(len(edited), 200))] ^= 1 << dice.randrange(8)
                for each in (raw, bytes(edited)):
                    status = (await send(port, each)).split(b" ")[1:2]
                    assert not status or not status[0].startswith(b"5"), (each[:200], status)
            response, answer = await gateway.post(TEXT_PATH, TEXT)
            assert response.status == 200, answer
            for _, writer in held:
                writer.close()

    asyncio.run(scenario())
