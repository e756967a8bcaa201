"""`HttpEngine` against scripted HTTP servers: what it sends, what it hands on, and which error is whose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from antiphon.engines.base import (
    Chunk,
    EngineError,
    EngineRecord,
    FailureKind,
    GenerateRequest,
    LoadReport,
    PrefillResult,
    Usage,
)
from antiphon.engines.http import HttpEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUEST = GenerateRequest(COMPLETIONS, [1, 2, 3], "rid-1", "s")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[HttpEngine]:
    """An engine without linker whose HTTP server is `handler`."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
    await site.start()
    port = runner.addresses[0][1]
    engine = HttpEngine(EngineRecord("e", f"http://127.0.0.1:{port}", "decode", "i"), b"")
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


def events(*values: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(value)}\n\n" for value in values] + ["data: [DONE]\n\n"] * done
    return "".join(lines).encode()


def streaming(content: bytes, *, then: Callable[[web.Request], Awaitable[None]] | None = None) -> Handler:
    """Answers every request with this event stream, then does `then` before it ends."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(content)
        if then is not None:
            await then(request)
        return response

    return handler


def answering(status: int, body: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    return handler


async def collect(
    engine: HttpEngine, path: str = COMPLETIONS, deadline_s: float = 5.0, **body: Any
) -> list[Chunk]:
    request = GenerateRequest(path, [1, 2, 3], "rid-1", "s", body)
    async with aclosing(engine.generate(request, deadline_s=deadline_s)) as chunks:
        return [chunk async for chunk in chunks]


def run_collect(handler: Handler, path: str = COMPLETIONS, **options: Any) -> list[Chunk]:
    async def go() -> list[Chunk]:
        async with serving(handler) as engine:
            return await collect(engine, path, **options)

    return asyncio.run(go())


def failure(handler: Handler, path: str = COMPLETIONS, **options: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        run_collect(handler, path, **options)
    return caught.value


def completion(text: str, ids: list[int], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish, "token_ids": ids, **more}
    return {"id": "rid-1", "choices": [choice], "usage": None}


USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}
COMPLETION = (
    completion(" a", [7], prompt_token_ids=[1, 2, 3]),
    completion(" b", [8], "length"),
    {"id": "rid-1", "choices": [], "usage": USAGE},
)
CHAT_ANSWER: tuple[dict[str, Any], ...] = (
    {"id": "rid-1", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"id": "rid-1", "choices": [{"index": 0, "delta": {"content": " a b"}, "finish_reason": None}]},
    {"id": "rid-1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"id": "rid-1", "choices": [], "usage": None, "sglext": {"output_ids": [[7, 8]]}},
    {"id": "rid-1", "choices": [], "usage": USAGE},
)


# ---------------------------------------------------------------- what comes back


def test_completion_ids_are_taken_out() -> None:
    """Ids of each chunk are handed on apart and are not in what the client sees; usage is parsed."""
    chunks = run_collect(streaming(events(*COMPLETION)))
    assert [chunk.token_ids for chunk in chunks] == [(7,), (8,), ()]
    assert [chunk.finish_reason for chunk in chunks] == [None, "length", None]
    assert chunks[-1].usage == Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    assert all("token_ids" not in json.dumps(chunk.data) for chunk in chunks)


def test_chat_ids_come_in_an_event_of_their_own() -> None:
    """The event that only carried ids has no data for the client; all others pass unchanged."""
    chunks = run_collect(streaming(events(*CHAT_ANSWER)), CHAT)
    assert [chunk.token_ids for chunk in chunks] == [(), (), (), (7, 8), ()]
    assert [chunk.data for chunk in chunks] == [*CHAT_ANSWER[:3], None, CHAT_ANSWER[4]]
    assert chunks[2].finish_reason == "stop"


def test_a_client_that_asked_for_ids_sees_them() -> None:
    """Ids stay in the data when the client's own request named the flag."""
    chunks = run_collect(streaming(events(*COMPLETION)), return_token_ids=True)
    assert chunks[0].data == COMPLETION[0]
    chunks = run_collect(streaming(events(*CHAT_ANSWER)), CHAT, return_output_ids_in_sglext=True)
    assert chunks[3].data == CHAT_ANSWER[3] and chunks[3].token_ids == (7, 8)


def test_request_carries_ours_over_the_clients_fields() -> None:
    """The whole prompt goes as ids, streamed, with rid, session and salt; the client's other fields stay."""
    bodies: list[tuple[str, dict[str, Any]]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append((request.path, await request.json()))
        return await streaming(events(*COMPLETION))(request)

    async def go() -> None:
        async with serving(handler) as engine:
            body = {"temperature": 0, "rid": "theirs", "stream": False, "stream_options": {"x": 1}}
            for path in (COMPLETIONS, CHAT):
                request = GenerateRequest(path, (1, 2, 3), "rid-1", "s", body, cache_salt="tenant")
                async for _ in engine.generate(request, deadline_s=5.0):
                    pass

    asyncio.run(go())
    ours = {"rid": "rid-1", "session_id": "s", "cache_salt": "tenant", "stream": True, "temperature": 0}
    for _, sent in bodies:
        assert ours.items() <= sent.items() and sent["stream_options"] == {"x": 1, "include_usage": True}
    (first, completions), (second, chat) = bodies
    assert (first, second) == (COMPLETIONS, CHAT)
    assert completions["prompt"] == [1, 2, 3] and completions["return_token_ids"] is True
    assert chat["input_ids"] == [1, 2, 3] and chat["return_output_ids_in_sglext"] is True and chat["messages"]


def test_prefill_asks_for_no_output() -> None:
    """A prefill is /generate with `max_new_tokens` 0 and answers what was computed and what was cached."""
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.update(await request.json(), path=request.path)
        meta = {"prompt_tokens": 40, "cached_tokens": 32, "finish_reason": {"type": "length", "length": 0}}
        return web.json_response({"output_ids": [], "meta_info": meta})

    async def go() -> PrefillResult:
        async with serving(handler) as engine:
            return await engine.prefill((1, 2), "rid-1", session_id="s", cache_salt=None, deadline_s=5.0)

    assert asyncio.run(go()) == PrefillResult(prompt_tokens=40, cached_tokens=32)
    assert seen["path"] == "/generate" and seen["sampling_params"]["max_new_tokens"] == 0
    assert seen["input_ids"] == [1, 2] and seen["rid"] == "rid-1"


def test_load_sums_data_parallel_ranks() -> None:
    """One report for the engine, however many schedulers it has."""
    one = {
        "num_running_reqs": 1,
        "num_waiting_reqs": 2,
        "num_waiting_uncached_tokens": 3,
        "num_used_tokens": 4,
        "max_total_num_tokens": 5,
    }

    async def go() -> LoadReport:
        async with serving(answering(200, {"loads": [one, one]})) as engine:
            return await engine.load(deadline_s=5.0)

    assert asyncio.run(go()) == LoadReport(2, 4, 6, 8, 10)


def test_engine_without_linker() -> None:
    """Without directories nothing can be pulled, and it says so instead of failing."""

    async def go() -> None:
        async with serving(answering(200, {})) as engine:
            await engine.connect(5.0)
            result = await engine.prefetch(["127.0.0.1:1"], "i", b"", [b"h"], deadline_s=1.0)
            assert (result.pages, result.pulled_bytes) == (0, 0) and "no KV linker" in result.reason
            assert await engine.lookup([b"h"], deadline_s=1.0) == 0 and engine.hello is None
            await engine.touch(b"h", deadline_s=1.0)

    asyncio.run(go())


# ---------------------------------------------------------------- whose fault


@pytest.mark.parametrize(
    ("status", "kind"),
    [(status, FailureKind.BAD_REQUEST) for status in (400, 413, 422)]
    + [(status, FailureKind.REFUSED) for status in (401, 404, 408, 429, 500, 503)],
)
def test_status_says_whose_fault_it_is(status: int, kind: FailureKind) -> None:
    """A 4xx blames the request, unless it blames the moment; a 5xx the engine. Status and body are kept."""
    error = failure(answering(status, {"message": "why"}))
    assert (error.kind, error.status, json.loads(error.body)) == (kind, status, {"message": "why"})
    assert "why" in str(error)


@pytest.mark.parametrize(("code", "kind"), [(503, FailureKind.REFUSED), (400, FailureKind.BAD_REQUEST)])
def test_error_event_before_the_first_chunk(code: int, kind: FailureKind) -> None:
    """An error event in a 200 stream counts like the status that it names, if nothing was passed on yet."""
    error = failure(streaming(events({"error": {"message": "External KV cache load failed", "code": code}})))
    assert (error.kind, error.status) == (kind, code) and "load failed" in str(error)


def test_abort_before_the_first_chunk_is_refused() -> None:
    """An answer that the engine aborted is no answer: try elsewhere."""
    assert failure(streaming(events(completion("", [], "abort")))).kind is FailureKind.REFUSED


@pytest.mark.parametrize(
    "content",
    [
        events(COMPLETION[0], done=False),
        events(COMPLETION[0]),
        events(COMPLETION[0], {"error": {"message": "m", "code": 503}}),
        events(COMPLETION[0], completion("", [], "abort")),
        events(COMPLETION[0], done=False) + b"data: {not json\n\n",
        events(COMPLETION[0], [1, 2]),
        events(COMPLETION[0], {"choices": [5]}),
    ],
    ids=[
        "cut off",
        "no finish reason",
        "error event",
        "abort",
        "not json",
        "not an object",
        "strange choice",
    ],
)
def test_after_the_first_chunk_everything_is_broken(content: bytes) -> None:
    """Once a token was passed on, no failure may look as if it could be retried."""

    async def go() -> None:
        async with serving(streaming(content)) as engine:
            chunks = engine.generate(REQUEST, deadline_s=5.0)
            await anext(chunks)
            with pytest.raises(EngineError) as caught:
                async for _ in chunks:
                    pass
            assert caught.value.kind is FailureKind.BROKEN

    asyncio.run(go())


def test_the_first_event_has_one_deadline_however_the_answer_begins() -> None:
    """Headers that come late leave less for the first event: a hung engine costs its deadline once."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(3600)
        return response

    async def go() -> float:
        async with serving(handler) as engine:
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(EngineError, match="nothing came within 1 s") as caught:
                await collect(engine, deadline_s=1.0)
            assert caught.value.kind is FailureKind.DEADLINE
            return asyncio.get_running_loop().time() - began_s

    assert asyncio.run(go()) < 1.4


def test_a_silence_is_asked_about_before_it_counts() -> None:
    """Work that the engine got meanwhile gives an answer more time; then silence is a missed deadline."""

    async def go() -> None:
        limits_s = iter([0.05, 0.2, 0.2])  # when it begins; when that is over, and so on

        async def silent(request: web.Request) -> None:
            await asyncio.sleep(3600)

        content = events(completion("a", [1]), done=False)
        async with serving(streaming(content, then=silent)) as engine:
            last = 0.3
            chunks = engine.generate(REQUEST, deadline_s=5.0, silence_s=lambda: next(limits_s, last))
            async with aclosing(chunks):
                await anext(chunks)
                began_s = asyncio.get_running_loop().time()
                with pytest.raises(EngineError) as caught:
                    await anext(chunks)
            assert caught.value.kind is FailureKind.DEADLINE
            assert asyncio.get_running_loop().time() - began_s >= 0.29

    asyncio.run(go())


def test_nothing_listens() -> None:
    """A dead engine is unreachable for every call."""

    async def go() -> None:
        async with serving(answering(200, {})) as engine:
            pass
        for call in (
            collect(engine),
            engine.connect(2.0),
            engine.load(deadline_s=2.0),
            engine.abort("r", deadline_s=2.0),
            engine.prefill([1], "r", session_id="s", cache_salt=None, deadline_s=2.0),
        ):
            with pytest.raises(EngineError) as caught:
                await call
            assert caught.value.kind is FailureKind.UNREACHABLE
        await engine.close()

    asyncio.run(go())


def test_connection_lost_before_the_answer_is_unreachable() -> None:
    """An engine that dies while it computes the first token can be replaced."""

    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    assert failure(hang_up).kind is FailureKind.UNREACHABLE


def test_connection_lost_in_the_stream_is_broken() -> None:
    """An engine that dies after its first token breaks the answer."""

    async def hang_up(request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()

    async def go() -> None:
        async with serving(streaming(events(COMPLETION[0], done=False), then=hang_up)) as engine:
            with pytest.raises(EngineError) as caught:
                async for _ in engine.generate(REQUEST, deadline_s=5.0):
                    pass
            assert caught.value.kind is FailureKind.BROKEN

    asyncio.run(go())


@pytest.mark.parametrize(
    "content", [b"", events(COMPLETION[0], done=False)], ids=["first event", "next event"]
)
def test_every_event_has_a_deadline(content: bytes) -> None:
    """A silent engine is given up after the deadline, before the first event and between two."""

    async def wait(request: web.Request) -> None:
        await asyncio.Event().wait()

    assert failure(streaming(content, then=wait), deadline_s=0.2).kind is FailureKind.DEADLINE


def test_leaving_early_closes_the_connection() -> None:
    """The engine learns at once that nobody reads: closing the iterator drops the connection."""

    async def go() -> None:
        gone = asyncio.Event()

        async def wait(request: web.Request) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                gone.set()

        async with serving(streaming(events(COMPLETION[0], done=False), then=wait)) as engine:
            chunks = engine.generate(REQUEST, deadline_s=5.0)
            assert (await anext(chunks)).token_ids == (7,)
            await chunks.aclose()
            async with asyncio.timeout(2.0):
                await gone.wait()

    asyncio.run(go())


@pytest.mark.parametrize("body", [b"[]", b"{}", b"not json", b'{"loads": [{}]}', b'{"meta_info": 5}'])
def test_nonsense_is_broken(body: bytes) -> None:
    """A 200 that is not what SGLang answers is the engine's fault, and named."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    async def go() -> None:
        async with serving(handler) as engine:
            for call in (
                engine.load(deadline_s=2.0),
                engine.prefill([1], "r", session_id="s", cache_salt=None, deadline_s=2.0),
            ):
                with pytest.raises(EngineError) as caught:
                    await call
                assert caught.value.kind is FailureKind.BROKEN

    asyncio.run(go())


def test_unknown_route() -> None:
    """A route that is no generating one is refused before anything is sent."""
    assert failure(answering(200, {}), "/v1/embeddings").kind is FailureKind.BAD_REQUEST
