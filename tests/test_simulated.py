"""The simulated engine over HTTP: SGLang's routes, wire forms and errors."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from antiphon.engines.base import EngineError, FailureKind
from antiphon.engines.page_hash import page_hashes
from antiphon.engines.simulated_request import expected_tokens
from tests.simulated_helpers import (
    FAST,
    PAGE,
    answer,
    engine,
    is_idle,
    make_prompt,
    make_request,
    post,
    until,
)


async def sse_lines(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Events of a stream; the last line must be [DONE]."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        lines = [line for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_completions_stream_is_sglangs() -> None:
    """Every event of /v1/completions has SGLang's fields and its tokens' ids, the first one the prompt's."""
    prompt = make_prompt("completions", 40)

    async def main() -> None:
        async with engine() as (simulated, _):
            body = {
                "model": "m", "prompt": prompt, "max_tokens": 5, "stream": True, "rid": "r1",
                "return_token_ids": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            events = await sse_lines(simulated.record.url + "/v1/completions", body)
        want = expected_tokens(prompt, 5, 512)
        usage = events.pop()
        assert usage["choices"] == []
        assert usage["usage"] == {
            "prompt_tokens": 40, "total_tokens": 45, "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0}, "reasoning_tokens": 0,
        }  # fmt: skip
        assert all(
            (event["id"], event["object"], event["model"], event["usage"])
            == ("r1", "text_completion", "m", None)
            for event in events
        )
        choices = [event["choices"][0] for event in events]
        assert [token for choice in choices for token in choice["token_ids"]] == list(want)
        assert "".join(choice["text"] for choice in choices) == "".join(f" {token}" for token in want)
        assert choices[0]["prompt_token_ids"] == prompt
        assert not any("prompt_token_ids" in choice for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]

    asyncio.run(main())


def test_chat_stream_is_sglangs() -> None:
    """/v1/chat/completions: role, content, finish, then ids, then usage, each in an event of its own."""
    prompt = make_prompt("chat", 40)

    async def main() -> None:
        async with engine() as (simulated, _):
            body = {
                "model": "m", "messages": [{"role": "user", "content": "x"}], "input_ids": prompt,
                "max_completion_tokens": 5, "stream": True, "return_output_ids_in_sglext": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            url = simulated.record.url + "/v1/chat/completions"
            *events, finish, ids, usage = await sse_lines(url, body)
            status, text = await post(
                simulated.record, "/v1/chat/completions", {**body, "return_token_ids": True}
            )
        want = expected_tokens(prompt, 5, 512)
        assert usage["usage"]["completion_tokens"] == 5
        assert ids["choices"] == [] and ids["sglext"] == {"output_ids": [list(want)]}
        assert finish["choices"][0]["finish_reason"] == "length"
        deltas = [event["choices"][0]["delta"] for event in events]
        assert deltas[0] == {"reasoning_content": None, "role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in deltas) == "".join(f" {token}" for token in want)
        assert (status, "return_token_ids is not supported" in text["message"]) == (400, True)

    asyncio.run(main())


def test_answers_in_one_piece() -> None:
    """The same three routes without streaming."""
    prompt = make_prompt("one piece", 40)
    want = list(expected_tokens(prompt, 5, 512))

    async def main() -> None:
        async with engine() as (simulated, _):
            record = simulated.record
            sampling = {"sampling_params": {"max_new_tokens": 5}}
            _, native = await post(record, "/generate", {"input_ids": prompt, "rid": "r", **sampling})
            chat = {
                "messages": [{}],
                "input_ids": prompt,
                "max_tokens": 5,
                "return_output_ids_in_sglext": True,
            }
            _, chatted = await post(record, "/v1/chat/completions", chat)
            legacy = {"prompt": prompt, "max_tokens": 5, "return_token_ids": True}
            _, completed = await post(record, "/v1/completions", legacy)
            events = await sse_lines(
                record.url + "/generate", {"input_ids": prompt, "stream": True, **sampling}
            )
        assert native["output_ids"] == want
        assert native["meta_info"]["id"] == "r"
        assert native["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
        assert (
            chatted["choices"][0]["message"]["content"] == completed["choices"][0]["text"] == native["text"]
        )
        assert chatted["sglext"]["output_ids"] == [want]
        assert chatted["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
        assert completed["choices"][0]["token_ids"] == want
        assert events[-1]["output_ids"] == want, "every event of /generate repeats the answer so far"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/generate", {"input_ids": []}, "non-empty"),
        ("/generate", {"text": "hello"}, "input_ids"),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": -1}}, "at least 0"),
        ("/generate", {"input_ids": ["a"]}, "Expected `int`"),
        ("/v1/completions", {"prompt": "hello"}, "Expected `array`"),
        ("/v1/completions", {"prompt": [1], "max_tokens": 9000}, "context length"),
        ("/v1/completions", {"prompt": [1] * 9000}, "context length"),
        ("/v1/completions", {"prompt": [1], "n": 0}, "n must be 1 to 128"),
        ("/v1/chat/completions", {"messages": [], "input_ids": [1]}, "Messages cannot be empty"),
        ("/abort_request", [], "abort_request"),
        ("/antiphon/faults", {"fault": "none such"}, "not a fault"),
        ("/antiphon/faults", {"fault": "refuse", "count": 0}, "at least 1"),
    ],
)
def test_bad_requests_say_what_is_wrong(path: str, body: Any, says: str) -> None:
    """A request that SGLang would not take is a 400 with SGLang's error object, and leaves no trace."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            status, error = await post(simulated.record, path, body)
            assert (status, error["object"], error["code"]) == (400, "error", 400)
            assert says in error["message"]
            assert await is_idle(adapter)

    asyncio.run(main())


def test_rid_in_use_is_refused() -> None:
    """Two requests of one rid at once: the second is a bad request, as SGLang's."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            prompt = make_prompt("twice", 50)
            body = {"input_ids": prompt, "rid": "same", "sampling_params": {"max_new_tokens": 5000}}
            first = asyncio.create_task(post(simulated.record, "/generate", body))

            async def runs() -> bool:
                return not await is_idle(adapter)

            await until(runs)
            status, error = await post(simulated.record, "/generate", body)
            assert status == 400 and "Duplicate request ID" in error["message"]
            await adapter.abort("same", deadline_s=5.0)
            status, reply = await first
            assert status == 200
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
            said = reply["output_ids"]
            assert said == list(expected_tokens(prompt, len(said), 512))

    asyncio.run(main())


def test_abort_matches_by_prefix() -> None:
    """SGLang's rule: aborting "X" also aborts "Xb"; what was computed stays in the store."""

    async def main() -> None:
        async with engine() as (_, adapter):
            prompt = make_prompt("by prefix", 50)
            requests = [make_request(prompt, 5000, rid=rid) for rid in ("X", "Xb")]
            tasks = [asyncio.create_task(answer(adapter, request)) for request in requests]

            async def both() -> bool:
                return (await adapter.load(deadline_s=5.0)).running_requests == 2

            await until(both)
            await adapter.abort("X", deadline_s=5.0)
            for task in tasks:
                with pytest.raises(EngineError):
                    await task
            assert await adapter.lookup(page_hashes(prompt, PAGE), deadline_s=5.0) == 3

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_stops_the_work(stream: bool) -> None:
    """A dropped connection ends the decode soon, long before the answer would have ended."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            body = {"prompt": make_prompt("gone", 50), "max_tokens": 8000, "stream": stream}
            asking = asyncio.create_task(post(simulated.record, "/v1/completions", body))

            async def runs() -> bool:
                return simulated.loop.totals.output_tokens > 0

            await until(runs)
            asking.cancel()
            await until(lambda: is_idle(adapter))
            assert simulated.loop.totals.output_tokens < 2000

    asyncio.run(main())


def test_full_queue_is_refused() -> None:
    """With --max-queued-requests one too many is an abort with 503, as SGLang's; a waiting one is counted."""

    async def main() -> None:
        options = replace(FAST, max_running_requests=1, max_queued_requests=1)
        async with engine(options) as (_, adapter):
            prompts = [make_prompt(f"queue {number}", 50) for number in range(3)]
            first = asyncio.create_task(answer(adapter, make_request(prompts[0], 2000)))

            async def has(running: int, waiting: int) -> bool:
                load = await adapter.load(deadline_s=5.0)
                return (load.running_requests, load.waiting_requests) == (running, waiting)

            await until(lambda: has(1, 0))
            second = asyncio.create_task(answer(adapter, make_request(prompts[1], 3)))
            await until(lambda: has(1, 1))
            assert (await adapter.load(deadline_s=5.0)).waiting_uncached_tokens == 50
            with pytest.raises(EngineError, match="queue is full") as caught:
                await answer(adapter, make_request(prompts[2], 3))
            assert (caught.value.kind, caught.value.status) == (FailureKind.REFUSED, 503)
            assert len((await first).token_ids) == 2000
            assert len((await second).token_ids) == 3

    asyncio.run(main())


def test_flush_needs_an_idle_engine_and_keeps_the_store() -> None:
    """/flush_cache is refused while something runs; afterwards prefixes come from the store."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            prompt = make_prompt("flush", 100)
            running = asyncio.create_task(answer(adapter, make_request(prompt, 3000)))

            async def runs() -> bool:
                return not await is_idle(adapter)

            await until(runs)
            assert (await post(simulated.record, "/flush_cache", {}))[0] == 400
            running.cancel()
            await until(lambda: is_idle(adapter))
            assert (await post(simulated.record, "/flush_cache", {}))[0] == 200
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}}
            _, reply = await post(simulated.record, "/generate", body)
            assert reply["meta_info"]["cached_tokens_details"] == {"device": 0, "host": 96}

    asyncio.run(main())


def test_information_routes() -> None:
    """Model and server information name the model and what the engine was started with."""

    async def main() -> None:
        options = replace(FAST, model_id="some-model", model_path="dir", chunk_tokens=256, decode_interval=2)
        async with engine(options) as (simulated, _), aiohttp.ClientSession(simulated.record.url) as session:
            answers = {}
            for path in ("/get_model_info", "/server_info", "/v1/models", "/v1/loads"):
                async with session.get(path) as response:
                    assert response.status == 200
                    answers[path] = await response.json()
        assert answers["/get_model_info"]["served_model_name"] == "some-model"
        assert answers["/server_info"]["chunked_prefill_size"] == 256
        assert answers["/v1/models"]["data"][0]["max_model_len"] == 8192
        assert answers["/v1/loads"]["loads"][0]["max_total_num_tokens"] == 65536
        record = simulated.record
        assert (record.chunk_tokens, record.decode_interval) == (256, 2)
        assert (record.model_id, record.model_path) == ("some-model", "dir")

    asyncio.run(main())


def test_corrupt_page_changes_the_output() -> None:
    """Wrong KV is seen in the tokens, so that a check of outputs can fail here as it can on real engines."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            prompt = make_prompt("corrupt", 100)
            good = await answer(adapter, make_request(prompt, 10))
            assert simulated.store.corrupt(page_hashes(prompt, PAGE)[2])
            assert (await answer(adapter, make_request(prompt, 10))).token_ids == good.token_ids
            assert (await post(simulated.record, "/flush_cache", {}))[0] == 200
            assert (await answer(adapter, make_request(prompt, 10))).token_ids != good.token_ids

    asyncio.run(main())
