"""The gateway over real HTTP: what it answers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from antiphon.engines.base import Chunk
from antiphon.scheduler.config import Config, ModelConfig, SchedulerConfig
from antiphon.scheduler.rounds import RoundHandle
from tests.gateway_helpers import (
    CHAT,
    CHAT_PATH,
    TEXT,
    TEXT_PATH,
    FakeState,
    Start,
    chat_chunk,
    sse_events,
    starter,
    text_chunk,
    three_words,
)


@pytest.fixture
def gateway(tiny_model_dir: Path) -> Start:
    return starter(tiny_model_dir)


def test_a_streamed_chat(gateway: Start) -> None:
    """Unnamed events, the words in order, usage and session last, then [DONE]; headers name the round."""

    async def scenario() -> None:
        async with gateway() as g:
            body = {
                **CHAT,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
            response, content = await g.post(CHAT_PATH, body, X_Session_ID="s-1")
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/event-stream")
            assert response.headers["Cache-Control"] == "no-cache"
            assert response.headers["X-Accel-Buffering"] == "no"
            assert response.headers["X-Session-ID"] == "s-1"
            assert response.headers["X-Session-Round"] == "1"
            assert response.headers["X-Antiphon-Arm"] == "local"
            assert response.headers["X-Request-ID"] == g.runner.requests[0].round_id
            assert b"event:" not in content
            *events, usage, done = sse_events(content)
            assert done == "[DONE]"
            assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == " one two three"
            assert [i for e in events for i in e["choices"][0].get("token_ids", ())] == [10, 11, 12]
            assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
            assert usage["session"]["id"] == "s-1" and usage["choices"] == []

    asyncio.run(scenario())


def test_a_whole_chat_and_a_whole_completion(gateway: Start) -> None:
    """Without `stream` the same rounds come as one object, with usage, session and the true cached tokens."""

    async def scenario() -> None:
        async with gateway() as g:
            response, chat = await g.post(CHAT_PATH, {**CHAT, "session_id": "s-2"})
            assert response.status == 200 and response.headers["X-Session-ID"] == "s-2"
            assert chat["object"] == "chat.completion" and chat["id"].startswith("chatcmpl-")
            assert chat["choices"][0]["message"] == {"role": "assistant", "content": " one two three"}
            assert chat["choices"][0]["finish_reason"] == "stop"
            assert chat["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
            assert chat["session"] == {
                "id": "s-2",
                "parent_id": None,
                "round": 1,
                "arm": "local",
                "identified_by": "body:session_id",
                "expires_in_s": None,
                "worker": "e0",
            }
            _, text = await g.post(TEXT_PATH, {**TEXT, "return_token_ids": True})
            assert text["object"] == "text_completion" and text["id"].startswith("cmpl-")
            assert text["choices"][0]["text"] == " one two three"
            assert text["choices"][0]["token_ids"] == [10, 11, 12]
            assert text["usage"]["total_tokens"] == 6 and text["model"] == "tiny"

    asyncio.run(scenario())


def test_usage_is_stripped_from_a_stream_that_did_not_ask(gateway: Start) -> None:
    """A stream without `include_usage` has neither usage nor token ids."""

    async def scenario() -> None:
        async with gateway() as g:
            _, content = await g.post(TEXT_PATH, {**TEXT, "stream": True})
            assert b"usage" not in content and b"token_ids" not in content
            assert len(sse_events(content)) == 4

    asyncio.run(scenario())


def test_what_the_round_is_given(gateway: Start) -> None:
    """Token ids of the whole prompt, engine fields without ours, limits, targets, salt and session."""

    async def scenario() -> None:
        async with gateway() as g:
            extra = {"temperature": 0, "max_tokens": 7, "session": {"id": "s", "slo": {"ttft_ms": 250}}}
            await g.post(TEXT_PATH, {**TEXT, **extra, "cache_salt": "pepper", "rid": "x"})
            request = g.runner.requests[0]
            assert request.input_ids == (1, 2, 3) and request.path == TEXT_PATH
            assert request.body == {"temperature": 0, "max_tokens": 7}
            assert (request.session_id, request.cache_salt, request.max_output_tokens) == ("s", "pepper", 7)
            assert (request.slo_ttft_s, request.slo_itl_s) == (0.25, SchedulerConfig().slo_itl_s)
            await g.post(CHAT_PATH, CHAT)
            chat = g.runner.requests[1]
            assert chat.max_output_tokens == 8192 - len(chat.input_ids)
            assert chat.session_id.startswith("sess_")

    asyncio.run(scenario())


def test_a_fork_is_named_in_the_answer(gateway: Start) -> None:
    """The session that the round really ran in stands in headers and body."""

    async def forked(handle: RoundHandle) -> None:
        handle.session_id, handle.parent_id, handle.round_number = "s-fork", "s", 3
        await three_words(handle)

    async def scenario() -> None:
        async with gateway(forked) as g:
            response, answer = await g.post(CHAT_PATH, {**CHAT, "session_id": "s"})
            assert response.headers["X-Session-ID"] == answer["session"]["id"] == "s-fork"
            assert answer["session"]["parent_id"] == "s" and response.headers["X-Session-Round"] == "3"

    asyncio.run(scenario())


def test_chunks_are_relayed_as_they_come(gateway: Start) -> None:
    """The client has an event before the engine has made the next one."""
    go_on = asyncio.Event()

    async def stepwise(handle: RoundHandle) -> None:
        await handle.push(text_chunk("a"))
        await go_on.wait()
        await handle.push(text_chunk("b", (), "stop"))
        handle.finish()

    async def scenario() -> None:
        async with (
            gateway(stepwise) as g,
            g.http.post(g.url + TEXT_PATH, json={**TEXT, "stream": True}) as response,
        ):
            first = await response.content.readuntil(b"\n\n")
            assert json.loads(first[6:])["choices"][0]["text"] == "a"
            go_on.set()
            assert (await response.content.read()).endswith(b"data: [DONE]\n\n")

    asyncio.run(scenario())


def test_openais_own_client(gateway: Start) -> None:
    """openai-python reads whole answers and streams of ours, and the session beside them."""
    openai = pytest.importorskip("openai")

    async def scenario() -> None:
        async with gateway() as g, openai.AsyncOpenAI(base_url=f"{g.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(**CHAT, extra_body={"session_id": "s"})
            assert whole.choices[0].message.content == " one two three"
            assert whole.session["id"] == "s"
            assert whole.usage.prompt_tokens_details.cached_tokens == 2
            stream = await client.chat.completions.create(
                **CHAT, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == " one two three" and chunks[-1].usage.completion_tokens == 3
            assert [model.id async for model in await client.models.list()] == ["tiny"]

    asyncio.run(scenario())


# ---------------------------------------------------------------- the other pages


def test_pages(gateway: Start) -> None:
    """Models, health, readiness, engines, sessions, receipts and metrics answer what they promise."""
    items = [{"session_id": "a", "n": 1}, {"session_id": "b", "n": 2}]

    async def scenario() -> None:
        async with gateway(state=FakeState(receipt_items=items, window_tokens=4096)) as g:
            _, models = await g.get("/v1/models")
            assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [("tiny", 4096)]
            assert (await g.get("/v1/models/tiny"))[1]["object"] == "model"
            response, answer = await g.get("/v1/models/none")
            assert response.status == 404 and answer["error"]["code"] == "model_not_found"
            assert (await g.get("/health"))[1] == {"status": "ok", "policy": "adaptive"}
            response, ready = await g.get("/ready")
            assert response.status == 200 and ready["engines_alive"] == 1 and ready["ledger"] == "ok"
            assert (await g.get("/v1/engines"))[1]["data"][0]["engine_id"] == "e0"
            assert len((await g.get("/v1/sessions?limit=2"))[1]["data"]) == 2
            assert (await g.get("/v1/receipts?session_id=b"))[1]["data"] == [items[1]]
            assert (await g.get("/v1/receipts?limit=1"))[1]["data"] == [items[0]]
            for limit in ("0", "x", "-1", "10001", "٣", "9" * 5000):
                response, answer = await g.get(f"/v1/receipts?limit={limit}")
                assert response.status == 400 and answer["error"]["param"] == "limit"
            response, text = await g.get("/metrics")
            assert response.content_type == "text/plain" and b"antiphon_engines_alive 1.0" in text
            assert b'antiphon_http_requests_total{route="/v1/models",status="200"} 1.0' in text
            assert b'route="other",status="404"' in text

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("state", "ready"),
    [
        (FakeState(engines_alive=0), False),
        (FakeState(ledger="starting"), False),
        (FakeState(ledger="degraded"), True),
    ],
    ids=["no engine", "starting", "degraded"],
)
def test_readiness(gateway: Start, state: FakeState, ready: bool) -> None:
    """Ready needs an engine and a ledger that was seen once; a ledger that is away degrades, no more."""

    async def scenario() -> None:
        async with gateway(state=state) as g:
            response, answer = await g.get("/ready")
            assert response.status == (200 if ready else 503)
            assert answer["ready"] is ready and answer["ledger"] == state.ledger
            assert (await g.get("/health"))[0].status == 200

    asyncio.run(scenario())


def test_model_names(gateway: Start, tiny_model_dir: Path) -> None:
    """Names are the configuration's own, else the engines' ids and their last part, else the directory's."""

    async def scenario() -> None:
        async with gateway(state=FakeState(models=("/models/tiny",))) as g:
            assert [m["id"] for m in (await g.get("/v1/models"))[1]["data"]] == ["tiny", "/models/tiny"]
            for name in ("tiny", "/models/tiny"):
                assert (await g.post(TEXT_PATH, {**TEXT, "model": name}))[0].status == 200
        by_path = Config(model=ModelConfig(path=str(tiny_model_dir)))
        async with gateway(config=by_path, state=FakeState(models=())) as g:
            assert [m["id"] for m in (await g.get("/v1/models"))[1]["data"]] == [tiny_model_dir.name]
        config = Config(model=ModelConfig(names=("agent",)))
        async with gateway(config=config) as g:
            assert (await g.post(TEXT_PATH, {**TEXT, "model": "agent"}))[1]["model"] == "agent"
            assert (await g.post(TEXT_PATH, TEXT))[0].status == 404

    asyncio.run(scenario())


def test_the_clients_request_id_comes_back(gateway: Start) -> None:
    """A good one is kept for answer and log, a bad one replaced; rounds always get an id of their own."""

    async def scenario() -> None:
        async with gateway() as g:
            for given, kept in (("mine", True), ("a b", False), ("x" * 200, False)):
                response, _ = await g.post(TEXT_PATH, TEXT, X_Request_ID=given)
                assert (response.headers["X-Request-ID"] == given) == kept
            assert all(request.round_id.startswith("r") for request in g.runner.requests)
            assert len({request.round_id for request in g.runner.requests}) == 3

    asyncio.run(scenario())


def test_each_request_is_one_log_line(gateway: Start, caplog: pytest.LogCaptureFixture) -> None:
    """The line has route, status, duration, session, round and arm."""
    caplog.set_level("INFO", "antiphon")

    async def scenario() -> None:
        async with gateway() as g:
            await g.post(TEXT_PATH, {**TEXT, "session_id": "s-9"})
            await g.get("/health")

    asyncio.run(scenario())
    lines = [vars(record) for record in caplog.records if record.message == "request"]
    assert len(lines) == 1
    shown = {name: lines[0][name] for name in ("path", "status", "session", "round", "arm")}
    assert shown == {"path": TEXT_PATH, "status": 200, "session": "s-9", "round": 1, "arm": "local"}
    assert lines[0]["elapsed_s"] > 0


def test_long_prompts_do_not_stall_others(gateway: Start) -> None:
    """While one client's large prompt is tokenised, the event loop serves others."""
    long = {**CHAT, "messages": [{"role": "user", "content": "word " * 400_000}]}

    async def scenario() -> None:
        async with gateway() as g:
            posted = asyncio.ensure_future(g.post(CHAT_PATH, long))
            answered = 0
            while not posted.done():
                await g.get("/health")
                answered += 1
            response, answer = await posted
            assert response.status == 400 and answer["error"]["code"] == "context_length_exceeded"
            assert answered > 5

    asyncio.run(scenario())


def test_ids_after_the_last_word_reach_the_client(gateway: Start) -> None:
    """An id-only event that comes after the finish reason is still relayed before [DONE]."""

    async def late_ids(handle: RoundHandle) -> None:
        await handle.push(chat_chunk({"content": "x"}, (), "stop"))
        await handle.push(Chunk(None, (5, 6)))
        handle.finish()

    async def scenario() -> None:
        async with gateway(late_ids) as g:
            _, content = await g.post(CHAT_PATH, {**CHAT, "stream": True, "return_token_ids": True})
            assert sse_events(content)[-2]["choices"][0]["token_ids"] == [5, 6]

    asyncio.run(scenario())


def test_the_window_is_the_smaller_of_engine_and_model(gateway: Start) -> None:
    """An engine started with a shorter context bounds the prompt."""
    state = replace(FakeState(), window_tokens=100)

    async def scenario() -> None:
        async with gateway(state=state) as g:
            response, answer = await g.post(TEXT_PATH, {**TEXT, "prompt": [1] * 100})
            assert response.status == 400 and "100 tokens" in answer["error"]["message"]
            await g.post(TEXT_PATH, {**TEXT, "prompt": [1] * 95, "max_tokens": 50})
            assert g.runner.requests[0].max_output_tokens == 5

    asyncio.run(scenario())
