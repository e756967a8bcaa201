"""Clients that go away, at every moment, over real HTTP: their rounds are given up at once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from antiphon.scheduler.rounds import RoundHandle
from tests.gateway_helpers import (
    CHAT_PATH,
    TEXT,
    TEXT_PATH,
    Script,
    Start,
    chat_chunk,
    starter,
    text_chunk,
    until,
)


@pytest.fixture
def gateway(tiny_model_dir: Path) -> Start:
    return starter(tiny_model_dir)


async def never_starts(handle: RoundHandle) -> None:
    await asyncio.Event().wait()


async def starts_and_stalls(handle: RoundHandle) -> None:
    chat = handle.request.path == CHAT_PATH
    await handle.push(chat_chunk({"content": "a"}) if chat else text_chunk("a"))
    await asyncio.Event().wait()


async def never_stops(handle: RoundHandle) -> None:
    while True:
        await handle.push(text_chunk("word " * 50))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [never_starts, starts_and_stalls, never_stops], ids=lambda s: s.__name__)
def test_a_client_that_goes_away_aborts_its_round(gateway: Start, script: Script, stream: bool) -> None:
    """Before the first token, between tokens and under back-pressure: the round is given up at once."""

    async def scenario() -> None:
        async with gateway(script) as g:
            port = int(g.url.rpartition(":")[2])
            body = json.dumps({**TEXT, "stream": stream}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST {TEXT_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await until(lambda: len(g.runner.requests) == 1)
            if stream and script is not never_starts:
                assert b" 200 " in await reader.readline()
            writer.transport.abort()
            await until(lambda: len(g.runner.gone) == 1)
            await until(lambda: not g.runner.tasks)
            phase = "waiting" if script is never_starts else "answering"
            expected = f'antiphon_client_disconnects_total{{phase="{phase}"}} 1.0'
            await until(lambda: expected in g.metrics.render().decode())
            await until(lambda: "antiphon_http_requests_in_flight 0.0" in g.metrics.render().decode())

    asyncio.run(scenario())


def test_a_client_that_goes_away_in_its_body_starts_no_round(gateway: Start) -> None:
    """Half a request is no request."""

    async def scenario() -> None:
        async with gateway() as g:
            _, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            await writer.drain()
            await until(lambda: "antiphon_http_requests_in_flight 1.0" in g.metrics.render().decode())
            writer.transport.abort()
            await until(lambda: 'client_disconnects_total{phase="body"} 1.0' in g.metrics.render().decode())
            assert g.runner.requests == []

    asyncio.run(scenario())


def test_a_completed_round_is_not_given_up(gateway: Start) -> None:
    """Clients that close after the answer cost nothing, even with many at once on kept connections."""

    async def scenario() -> None:
        async with gateway() as g:
            answers = await asyncio.gather(
                *(g.post(TEXT_PATH, {**TEXT, "stream": index % 2 == 0}) for index in range(40))
            )
            assert all(response.status == 200 for response, _ in answers)
            assert g.runner.gone == [] and len(g.runner.requests) == 40
            assert len({request.round_id for request in g.runner.requests}) == 40
            assert "client_disconnects_total{" not in g.metrics.render().decode()

    asyncio.run(scenario())
