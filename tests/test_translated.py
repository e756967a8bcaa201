"""Routes that are translated to a chat: failures, deadlines, clients that leave, a ledger that is away."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from antiphon.engines.sse import SseParser
from antiphon.scheduler.config import Config, GatewayConfig, SchedulerConfig
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.response_store import ResponseStore
from antiphon.scheduler.rounds import RoundBroke, RoundHandle, RoundRefused
from tests.gateway_helpers import Start, chat_chunk, starter, until

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    RESPONSES: {"model": "tiny", "input": "hi"},
    MESSAGES: {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
}
ROUTES = pytest.mark.parametrize("path", list(BODIES))


@pytest.fixture
def gateway(tiny_model_dir: Path) -> Start:
    return starter(tiny_model_dir)


def events_of(content: bytes) -> list[Any]:
    return [msgspec.json.decode(event.data) for event in SseParser().feed(content)]


async def breaks_after_one(handle: RoundHandle) -> None:
    await handle.push(chat_chunk({"content": "a"}))
    handle.finish(RoundBroke("the engine went away"))


async def stalls_after_one(handle: RoundHandle) -> None:
    await handle.push(chat_chunk({"content": "a"}))
    await asyncio.Event().wait()


@ROUTES
def test_a_stream_that_breaks_says_so(gateway: Start, path: str) -> None:
    """In the API's own event, after what had come; the HTTP body ends properly."""

    async def scenario() -> None:
        async with gateway(breaks_after_one) as g:
            response, content = await g.post(path, BODIES[path] | {"stream": True})
        events = events_of(content)
        assert response.status == 200
        assert any(event.get("delta") for event in events)
        last = events[-1]
        if path == RESPONSES:
            assert last["type"] == "response.failed"
            assert last["response"]["error"]["message"] == "the engine went away"
        else:
            assert last["type"] == "error" and last["error"]["message"] == "the engine went away"

    asyncio.run(scenario())


@ROUTES
def test_a_whole_answer_that_breaks_is_a_502(gateway: Start, path: str) -> None:
    """With a status, since nothing of it was sent; in the route's own shape."""

    async def scenario() -> None:
        async with gateway(breaks_after_one) as g:
            response, answer = await g.post(path, BODIES[path])
        assert response.status == 502 and answer["error"]["message"] == "the engine went away"
        assert answer["error"]["type"] == ("server_error" if path == RESPONSES else "api_error")

    asyncio.run(scenario())


@ROUTES
def test_a_refused_round_has_a_real_status(gateway: Start, path: str) -> None:
    async def refused(handle: RoundHandle) -> None:
        handle.finish(RoundRefused("no_engine_available", "none is up", 2.0))

    async def scenario() -> None:
        async with gateway(refused) as g:
            response, answer = await g.post(path, BODIES[path] | {"stream": True})
        assert response.status == 503 and response.headers["retry-after-ms"] == "2000"
        assert answer["error"]["type"] == "overloaded_error"

    asyncio.run(scenario())


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
def test_a_round_past_its_deadline_is_given_up(gateway: Start, path: str, stream: bool) -> None:
    config = Config(scheduler=SchedulerConfig(request_deadline_s=0.1))

    async def scenario() -> None:
        async with gateway(stalls_after_one, config=config) as g:
            response, content = await g.post(path, BODIES[path] | {"stream": stream})
            assert response.status == (200 if stream else 504)
            said = str(events_of(content)[-1] if stream else content)
            assert "did not finish" in said and len(g.runner.gone) == 1

    asyncio.run(scenario())


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_round(gateway: Start, path: str, stream: bool) -> None:
    async def scenario() -> None:
        async with gateway(stalls_after_one) as g:
            body = json.dumps(BODIES[path] | {"stream": stream}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await until(lambda: len(g.runner.requests) == 1)
            writer.transport.abort()
            await until(lambda: len(g.runner.gone) == 1)
            await until(lambda: not g.runner.tasks)

    asyncio.run(scenario())


@ROUTES
def test_bad_input_leaves_no_trace(gateway: Start, path: str) -> None:
    """A 400 in the route's shape, and no round."""

    async def scenario() -> None:
        async with gateway() as g:
            for raw in (b"", b"nonsense", b"[]", b'{"model": 5}', json.dumps({"model": "tiny"}).encode()):
                response, answer = await g.post(path, raw)
                assert response.status == 400 and answer["error"]["message"], raw
                assert ("type" in answer) == (path == MESSAGES)
            assert not g.runner.requests

    asyncio.run(scenario())


def test_a_ledger_that_is_away_costs_the_storing(gateway: Start, tmp_path: Path) -> None:
    """The answer is given and says that it is not kept; what needs the past gets a 503."""

    async def scenario() -> None:
        ledger = Ledger(f"unix://{tmp_path}/nobody.sock", fleet="f")
        try:
            async with gateway(responses=ResponseStore(ledger, 60.0)) as g:
                response, answer = await g.post(RESPONSES, BODIES[RESPONSES])
                assert response.status == 200 and answer["store"] is False
                for change in ({"previous_response_id": "resp_1"}, {"conversation": "c"}):
                    response, error = await g.post(RESPONSES, BODIES[RESPONSES] | change)
                    assert response.status == 503 and error["error"]["code"] == "ledger_unavailable"
                assert (await g.get(f"{RESPONSES}/resp_1"))[0].status == 503
        finally:
            await ledger.close()

    asyncio.run(scenario())


def test_a_past_over_the_limit_is_refused(gateway: Start, valkey_url: str) -> None:
    """What came before counts like what is sent: a 413 that names it."""
    config = Config(gateway=GatewayConfig(body_limit_bytes=1000))

    async def scenario() -> None:
        ledger = Ledger(valkey_url, fleet="too-large")
        try:
            async with gateway(config=config, responses=ResponseStore(ledger, 60.0)) as g:
                _, first = await g.post(RESPONSES, BODIES[RESPONSES] | {"input": "x" * 500})
                more = {"input": "y" * 500, "previous_response_id": first["id"]}
                response, error = await g.post(RESPONSES, BODIES[RESPONSES] | more)
                assert response.status == 413 and error["error"]["param"] == "previous_response_id"
                assert len(g.runner.requests) == 1
        finally:
            await ledger.close()

    asyncio.run(scenario())


def test_appending_is_of_chats(gateway: Start) -> None:
    async def scenario() -> None:
        async with gateway() as g:
            body = BODIES[RESPONSES] | {"session": {"id": "s", "append": True}}
            response, error = await g.post(RESPONSES, body)
            assert response.status == 400 and error["error"]["param"] == "session.append"

    asyncio.run(scenario())
