"""The gateway's errors over real HTTP: OpenAI's shape, real statuses, no trace left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from antiphon.scheduler.config import Config, GatewayConfig, SchedulerConfig
from antiphon.scheduler.rounds import RoundBroke, RoundHandle, RoundRefused
from tests.gateway_helpers import (
    CHAT,
    CHAT_PATH,
    TEXT,
    TEXT_PATH,
    FakeState,
    Start,
    running_gateway,
    sse_events,
    starter,
    text_chunk,
    three_words,
)


@pytest.fixture
def gateway(tiny_model_dir: Path) -> Start:
    return starter(tiny_model_dir)


BAD: dict[str, tuple[str, object, dict[str, str], int, str]] = {
    "malformed": (CHAT_PATH, b"{", {}, 400, "invalid_json"),
    "no object": (CHAT_PATH, [], {}, 400, "invalid_request"),
    "unknown model": (CHAT_PATH, {**CHAT, "model": "other"}, {}, 404, "model_not_found"),
    "no messages": (CHAT_PATH, {**CHAT, "messages": []}, {}, 400, "invalid_request"),
    "max_tokens 0": (TEXT_PATH, {**TEXT, "max_tokens": 0}, {}, 400, "invalid_request"),
    "max_tokens -5": (CHAT_PATH, {**CHAT, "max_tokens": -5}, {}, 400, "invalid_request"),
    "n 0": (CHAT_PATH, {**CHAT, "n": 0}, {}, 400, "invalid_request"),
    "two prompts": (TEXT_PATH, {**TEXT, "prompt": ["a", "b"]}, {}, 400, "several_prompts"),
    "foreign id": (TEXT_PATH, {**TEXT, "prompt": [512]}, {}, 400, "invalid_token_id"),
    "over the window": (TEXT_PATH, {**TEXT, "prompt": [1] * 8192}, {}, 400, "context_length_exceeded"),
    "long session id": (CHAT_PATH, CHAT, {"X-Session-ID": "s" * 256}, 400, "invalid_session_id"),
    "empty session id": (CHAT_PATH, {**CHAT, "session_id": ""}, {}, 400, "invalid_session_id"),
    "image": (
        CHAT_PATH,
        {
            **CHAT,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
        },
        {},
        400,
        "media_not_supported",
    ),
    "body over the limit": (CHAT_PATH, b'{"x": "' + b"y" * 200_000 + b'"}', {}, 413, "body_too_large"),
    "body far over the limit": (CHAT_PATH, b"y" * 2_000_000, {}, 413, "body_too_large"),
    "no such route": ("/v1/embeddings", {}, {}, 404, "not_found"),
    "wrong method": ("/v1/models", {}, {}, 405, "method_not_allowed"),
}
SMALL_BODIES = Config(gateway=GatewayConfig(body_limit_bytes=100_000))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_an_openai_error_and_leaves_no_trace(gateway: Start, name: str) -> None:
    """Status and code as documented, OpenAI's shape, a request id, and no round was submitted."""
    path, body, headers, status, code = BAD[name]

    async def scenario() -> None:
        async with gateway(config=SMALL_BODIES) as g:
            for stream in (False, True):
                sent = {**body, "stream": stream} if isinstance(body, dict) else body
                response, answer = await g.post(path, sent, **headers)
                assert response.status == status, answer
                assert set(answer["error"]) == {"message", "type", "param", "code"}
                assert answer["error"]["code"] == code and answer["error"]["message"]
                assert response.headers["X-Request-ID"] and "X-Session-ID" not in response.headers
            assert g.runner.requests == []
            assert f'antiphon_errors_total{{code="{code}"}} 2.0' in g.metrics.render().decode()

    asyncio.run(scenario())


def test_a_body_without_a_length_is_limited_too(gateway: Start) -> None:
    """The limit holds while reading: a chunked body announces nothing."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 10_000

    async def scenario() -> None:
        async with (
            gateway(config=SMALL_BODIES) as g,
            g.http.post(g.url + CHAT_PATH, data=pieces()) as response,
        ):
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"

    asyncio.run(scenario())


def test_a_body_that_does_not_come_is_a_408(gateway: Start) -> None:
    """A client that stalls in its own request is not waited for."""
    config = Config(gateway=GatewayConfig(body_deadline_s=0.05))

    async def scenario() -> None:
        async with gateway(config=config) as g:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
            writer.close()
            await writer.wait_closed()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("refusal", "status", "retry_ms"),
    [
        (RoundRefused("no_engine_available", "no engine", 1.5), 503, "1500"),
        (RoundRefused("upstream_failed", "three tries", 0.0), 502, None),
        (RoundRefused("bad_upstream_request", "x", 0.0, 422, b'{"message": "bad regex"}'), 422, None),
    ],
    ids=["no engine", "failed", "engine's 4xx"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_rounds_have_real_statuses(
    gateway: Start, refusal: RoundRefused, status: int, retry_ms: str | None, stream: bool
) -> None:
    """A round that never started is an HTTP error, streamed or not."""

    async def refuse(handle: RoundHandle) -> None:
        handle.finish(refusal)

    async def scenario() -> None:
        async with gateway(refuse) as g:
            response, answer = await g.post(CHAT_PATH, {**CHAT, "stream": stream})
            assert response.status == status and answer["error"]["code"] == refusal.code
            assert response.headers.get("retry-after-ms") == retry_ms
            assert ("Retry-After" in response.headers) == (retry_ms is not None)
            assert g.runner.gone == []

    asyncio.run(scenario())


def test_no_model_known_is_a_503(gateway: Start) -> None:
    """Before any engine has spoken, clients are told to come again."""

    async def scenario() -> None:
        async with gateway(state=FakeState(engines_alive=0, models=())) as g:
            response, answer = await g.post(CHAT_PATH, CHAT)
            assert response.status == 503 and answer["error"]["code"] == "no_engine_available"
            assert int(response.headers["retry-after-ms"]) > 0 and g.runner.requests == []

    asyncio.run(scenario())


def test_an_unusable_model_is_a_503(tmp_path: Path) -> None:
    """A model directory without a tokenizer is our operator's fault, not the client's."""

    async def scenario() -> None:
        async with running_gateway(three_words, tmp_path) as g:
            response, answer = await g.post(CHAT_PATH, CHAT)
            assert response.status == 503 and answer["error"]["code"] == "model_unavailable"

    asyncio.run(scenario())


async def breaks_after_one(handle: RoundHandle) -> None:
    await handle.push(text_chunk("a"))
    handle.finish(RoundBroke("the engine went away"))


def test_a_stream_that_breaks_ends_with_an_error_event(gateway: Start) -> None:
    """What came is kept, one error event follows, no [DONE], and the HTTP body ends properly."""

    async def scenario() -> None:
        async with gateway(breaks_after_one) as g:
            response, content = await g.post(TEXT_PATH, {**TEXT, "stream": True})
            events = sse_events(content)
            assert response.status == 200 and len(events) == 2
            assert events[0]["choices"][0]["text"] == "a"
            assert events[1]["error"]["message"] == "the engine went away"
            assert events[1]["error"]["code"] == "stream_broke"

    asyncio.run(scenario())


def test_a_whole_answer_that_breaks_is_a_502(gateway: Start) -> None:
    """Nothing of a broken answer is shown when none of it was sent."""

    async def scenario() -> None:
        async with gateway(breaks_after_one) as g:
            response, answer = await g.post(TEXT_PATH, TEXT)
            assert response.status == 502 and answer["error"]["code"] == "stream_broke"
            assert "X-Session-ID" not in response.headers

    asyncio.run(scenario())


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_round_past_its_deadline_is_given_up(gateway: Start, started: bool, stream: bool) -> None:
    """The client gets a 504, or an error event once the stream has begun; the round is aborted."""
    config = Config(scheduler=SchedulerConfig(request_deadline_s=0.1))

    async def stalls(handle: RoundHandle) -> None:
        if started:
            await handle.push(text_chunk("a"))
        await asyncio.Event().wait()

    async def scenario() -> None:
        async with gateway(stalls, config=config) as g:
            response, answer = await g.post(TEXT_PATH, {**TEXT, "stream": stream})
            error = sse_events(answer)[-1]["error"] if started and stream else answer["error"]
            assert error["code"] == "deadline_exceeded"
            assert response.status == (200 if started and stream else 504)
            assert len(g.runner.gone) == 1

    asyncio.run(scenario())


def test_a_bug_is_a_500_in_openais_shape(gateway: Start, caplog: pytest.LogCaptureFixture) -> None:
    """An exception of ours is logged and answered without its words."""

    async def nonsense(handle: RoundHandle) -> None:
        handle.finish(KeyError("secret detail"))

    async def scenario() -> None:
        async with gateway(nonsense) as g:
            response, answer = await g.post(CHAT_PATH, CHAT)
            assert response.status == 500 and answer["error"]["code"] == "internal_error"
            assert "secret" not in str(answer)

    asyncio.run(scenario())
    assert "secret detail" in caplog.text


def test_openais_own_client_sees_our_errors(gateway: Start) -> None:
    """openai-python raises its own class for each: not found, bad request, and an error inside a stream."""
    openai = pytest.importorskip("openai")

    async def scenario() -> None:
        async with (
            gateway(breaks_after_one) as g,
            openai.AsyncOpenAI(base_url=f"{g.url}/v1", api_key="none", max_retries=0) as client,
        ):
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(**TEXT, n=0)
            assert caught.value.param == "n"
            stream = await client.completions.create(**TEXT, stream=True)
            with pytest.raises(openai.APIError, match="the engine went away"):
                async for _ in stream:
                    pass

    asyncio.run(scenario())
