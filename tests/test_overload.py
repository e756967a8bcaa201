"""A replica that is asked for more than it takes: bounds, refusals at once, slow readers; over real HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from antiphon.scheduler.config import Config, GatewayConfig
from antiphon.scheduler.rounds import RoundHandle
from tests.gateway_helpers import TEXT, TEXT_PATH, Gateway, Start, starter, text_chunk, until

PAGES = ("/health", "/ready", "/metrics")


@pytest.fixture
def gateway(tiny_model_dir: Path) -> Start:
    return starter(tiny_model_dir)


def small(**keys: Any) -> Config:
    return Config(gateway=GatewayConfig(**keys))


async def never_starts(handle: RoundHandle) -> None:
    await asyncio.Event().wait()


async def never_stops(handle: RoundHandle) -> None:
    while True:
        await handle.push(text_chunk("word " * 500))


def shows(g: Gateway, line: str) -> bool:
    return f"antiphon_{line}\n" in g.metrics.render().decode()


async def opened(g: Gateway, body: bytes, announced: int | None = None, path: str = TEXT_PATH) -> Any:
    """A connection that has sent so much of a request; `announced` None: chunked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]), limit=2**10)
    framing = "Transfer-Encoding: chunked" if announced is None else f"Content-Length: {announced}"
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    writer.write(b"%x\r\n%b\r\n" % (len(body), body) if announced is None else body)
    return reader, writer


@pytest.mark.parametrize("path", [TEXT_PATH, "/v1/messages", "/v1/responses", "/v1/sessions/s/rounds"])
def test_rounds_beyond_the_bound_are_refused_at_once(gateway: Start, path: str) -> None:
    """Before their body is read; pages about the process go on, and a free seat is taken again."""

    async def scenario() -> None:
        async with gateway(never_starts, config=small(max_rounds=2)) as g:
            body = json.dumps(TEXT).encode()
            held = [await opened(g, body, len(body)) for _ in range(2)]
            await until(lambda: len(g.runner.requests) == 2)
            response, refused = await g.post(path, {"not": "a request at all"})
            assert response.status == 503 and refused["error"]["type"] == "overloaded_error", refused
            assert response.headers["retry-after-ms"] == "1000" and response.headers["retry-after"] == "1"
            if path == TEXT_PATH:
                assert refused["error"]["code"] == "overloaded"
            for page in PAGES:
                response, _ = await g.get(page)
                assert response.status == 200, page
            assert len(g.runner.requests) == 2 and shows(g, 'overloaded_total{bound="rounds"} 1.0')
            for _, writer in held:
                writer.transport.abort()
            await until(lambda: shows(g, "gateway_rounds 0.0"))
            held = [await opened(g, body, len(body))]
            await until(lambda: len(g.runner.requests) == 3)
            held[0][1].transport.abort()

    asyncio.run(scenario())


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_under_way_are_bounded(gateway: Start, chunked: bool) -> None:
    """By what is announced, or by what came: the one too many is refused, its bytes are given back."""
    config = small(body_limit_bytes=1000, bodies_memory_bytes=1500)

    async def scenario() -> None:
        async with gateway(config=config) as g:
            part = b" " * 900
            _, held = await opened(g, part, None if chunked else 950)
            kept = 900 if chunked else 950
            await until(lambda: shows(g, f"request_bodies_bytes {float(kept)}"))
            reader, other = await opened(g, part, None if chunked else 950)
            async with asyncio.timeout(5):
                assert b" 503 " in await reader.readline()
            assert shows(g, f"request_bodies_bytes {float(kept)}")
            assert shows(g, 'overloaded_total{bound="bodies"} 1.0')
            response, _ = await g.post(TEXT_PATH, TEXT)  # a small one has room
            assert response.status == 200
            held.transport.abort()
            other.transport.abort()
            await until(lambda: shows(g, "request_bodies_bytes 0.0"))
            assert len(g.runner.requests) == 1

    asyncio.run(scenario())


def test_a_body_over_the_limit_takes_no_more_room_than_the_limit(gateway: Start) -> None:
    config = small(body_limit_bytes=1000, bodies_memory_bytes=1000)

    async def scenario() -> None:
        async with gateway(config=config) as g:
            response, said = await g.post(TEXT_PATH, {**TEXT, "pad": "x" * 3000})
            assert response.status == 413 and said["error"]["code"] == "body_too_large"
            await until(lambda: shows(g, "request_bodies_bytes 0.0"))

    asyncio.run(scenario())


def test_a_reader_that_takes_nothing_is_cut_off(gateway: Start) -> None:
    """Its round is given up, however much there would be to say, and its seat is free again."""

    async def scenario() -> None:
        async with gateway(never_stops, config=small(reader_stall_s=0.2)) as g:
            body = json.dumps({**TEXT, "stream": True}).encode()
            reader, writer = await opened(g, body, len(body))
            assert b" 200 " in await reader.readline()
            await until(lambda: shows(g, "stalled_readers_total 1.0"))
            await until(lambda: len(g.runner.gone) == 1 and not g.runner.tasks)
            await until(lambda: shows(g, "gateway_rounds 0.0"))
            assert shows(g, 'client_disconnects_total{phase="answering"} 1.0')
            writer.transport.abort()

    asyncio.run(scenario())
