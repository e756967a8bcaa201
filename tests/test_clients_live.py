"""Unmodified OpenAI and Anthropic clients against the live stack: gateway process and real SGLang engines."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import AsyncOpenAI, OpenAI

from antiphon.engines.base import EngineRecord
from antiphon.engines.fleet_secrets import engine_http_key
from tests.conftest import FLEET_KEY, SglangPair
from tests.engine_processes import wait_for
from tests.simulated_helpers import engine_key
from tests.test_stack import gateway

PAGE = 16
DEADLINE_S = 30.0
IDLE_S = 5.0
"""4,000 tokens of two choices take far longer."""


@pytest.fixture(scope="module")
def url(
    sglang_pair: SglangPair, valkey_url: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`antiphon serve` over the shared engines, with the default policy."""
    directory = tmp_path_factory.mktemp("clients-live")
    with asyncio.Runner() as runner:
        stack = gateway(sglang_pair, valkey_url, directory, tiny_model_dir)
        yield runner.run(stack.__aenter__())
        runner.run(stack.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as made:
        yield made


@pytest.fixture(scope="module")
def plain(plain_engine: EngineRecord) -> Iterator[OpenAI]:
    """The same client, of the engine that no gateway uses."""
    with OpenAI(
        base_url=f"{plain_engine.url}/v1",
        api_key=engine_http_key(FLEET_KEY),
        max_retries=0,
        timeout=DEADLINE_S,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> str:
    return tiny_model_dir.name


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def named(session_id: str | None, **fields: Any) -> Any:
    """The session's header, and fields that the client does not know."""
    return {"extra_headers": {"X-Session-ID": session_id} if session_id else {}, "extra_body": fields}


def salt() -> str:
    """Nothing that another test left is found."""
    return uuid.uuid4().hex


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens or 0)


@pytest.mark.parametrize("session_id", [None, "live-chat"])
def test_chat(client: OpenAI, plain: OpenAI, model: str, session_id: str | None) -> None:
    """Whole, streamed and by the client's accumulator: the plain engine's text, end and usage."""
    asked: Any = {
        "model": model, "messages": user(f"What is {session_id}? " * 6), "max_tokens": 10, "temperature": 0,
    }  # fmt: skip
    wanted: Any = plain.chat.completions.create(**asked)
    own = named(session_id, cache_salt=salt())
    for turn in range(2):
        whole: Any = client.chat.completions.create(**asked, **own)
        assert whole.choices[0].message.content == wanted.choices[0].message.content
        assert whole.choices[0].finish_reason == wanted.choices[0].finish_reason
        counted = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [getattr(whole.usage, name) for name in counted] == [
            getattr(wanted.usage, name) for name in counted
        ]
        if turn == 0 or session_id:  # without an id the same words again are another conversation
            assert cached(whole) == (whole.usage.prompt_tokens - 1) // PAGE * PAGE * turn
    chunks: list[Any] = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}, **own)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == wanted.choices[0].message.content
    assert chunks[-1].usage.total_tokens == wanted.usage.total_tokens
    assert cached(chunks[-1]) > 0 or not session_id
    asked["max_tokens"], ended = 30, {"regex": "it is (this|that)"}  # the helper wants a whole answer
    with client.chat.completions.stream(**asked, **named(session_id, **ended)) as stream:
        final = stream.get_final_completion()
    wanted = plain.chat.completions.create(**asked, extra_body=ended)
    assert final.choices[0].message.content == wanted.choices[0].message.content
    assert final.choices[0].finish_reason == wanted.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("session_id", [None, "live-text"])
def test_completions(client: OpenAI, plain: OpenAI, model: str, session_id: str | None) -> None:
    asked: Any = {
        "model": model, "prompt": f"Once upon a time there was {session_id} " * 4, "max_tokens": 10,
        "temperature": 0,
    }  # fmt: skip
    wanted = plain.completions.create(**asked)
    own = named(session_id, cache_salt=salt())
    whole = client.completions.create(**asked, **own)
    assert whole.choices[0].text == wanted.choices[0].text and whole.usage and wanted.usage
    assert whole.choices[0].finish_reason == wanted.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == wanted.usage.total_tokens and cached(whole) == 0
    chunks: list[Any] = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True}, **own)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == wanted.choices[0].text
    if session_id:
        assert cached(chunks[-1]) == (whole.usage.prompt_tokens - 1) // PAGE * PAGE


def test_async_client(url: str, plain: OpenAI, model: str) -> None:
    """Four conversations at once, whole and streamed."""
    words = [f"async number {n} " * 5 for n in range(4)]
    asked: Any = {"model": model, "max_tokens": 8, "temperature": 0}
    wanted = [
        plain.chat.completions.create(messages=user(text), **asked).choices[0].message.content
        for text in words
    ]

    async def main() -> list[str]:
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S
        ) as client:

            async def whole(text: str) -> str:
                got = await client.chat.completions.create(messages=user(text), **asked)
                return got.choices[0].message.content or ""

            async def streamed(text: str) -> str:
                stream: Any = await client.chat.completions.create(messages=user(text), stream=True, **asked)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(text) for text in words for ask in (whole, streamed)))

    both = asyncio.run(main())
    assert both[::2] == both[1::2] == wanted


def test_two_conversations_without_an_id_are_told_apart(client: OpenAI, model: str) -> None:
    """Interleaved: each keeps its session, counts its rounds, and computes only what is new."""
    talks = {name: user(f"This is the {name} talk. " * 6) for name in ("first", "second")}
    seen: dict[str, list[tuple[str, int]]] = {name: [] for name in talks}
    held = dict.fromkeys(talks, 0)
    for _ in range(3):
        for name, messages in talks.items():
            got: Any = client.chat.completions.create(
                model=model, messages=messages, max_tokens=20, temperature=0
            )
            seen[name].append((got.session["id"], got.session["round"]))
            assert got.session["identified_by"] and cached(got) >= max(held[name] - 1, 0) // PAGE * PAGE
            held[name] = got.usage.total_tokens
            messages += [
                {"role": "assistant", "content": got.choices[0].message.content},
                {"role": "user", "content": "and then?"},
            ]
    ids = {name: {session_id for session_id, _ in rounds} for name, rounds in seen.items()}
    assert all(len(found) == 1 for found in ids.values()) and ids["first"] != ids["second"], seen
    assert all([number for _, number in rounds] == [1, 2, 3] for rounds in seen.values())


@pytest.mark.parametrize("how", ["header", "route"])
def test_a_fork_shares_its_parents_kv(client: OpenAI, url: str, model: str, how: str) -> None:
    """The child's first round finds all of what was said in the parent, its answer included."""
    messages = user(f"The trunk of many branches, by {how}. " * 8)
    asked: Any = {"model": model, "max_tokens": 24, "temperature": 0}
    parent = f"live-parent-{how}"
    asked["extra_body"] = {"cache_salt": salt()}
    first: Any = client.chat.completions.create(
        messages=messages, extra_headers={"X-Session-ID": parent}, **asked
    )
    assert cached(first) == 0
    said, held = first.choices[0].message.content, first.usage.total_tokens
    children = [f"live-child-{how}-{n}" for n in range(2)]
    if how == "route":
        made = httpx.post(f"{url}/v1/sessions/{parent}/fork", json={"ids": children}, timeout=DEADLINE_S)
        assert made.status_code == 200, made.text
        assert [child["parent_id"] for child in made.json()["data"]] == [parent, parent]
        assert "warnings" not in made.json()
    for child in children:
        headers = {"X-Session-ID": child}
        if how == "header":
            headers["X-Parent-Session-ID"] = parent
        history = [
            *messages,
            {"role": "assistant", "content": said},
            {"role": "user", "content": f"go on as {child}"},
        ]
        got: Any = client.chat.completions.create(messages=history, extra_headers=headers, **asked)
        assert got.session["id"] == child and got.session["parent_id"] == parent
        assert cached(got) >= (held - 1) // PAGE * PAGE, (cached(got), held)


def test_responses(client: OpenAI, plain: OpenAI, model: str) -> None:
    """Whole, streamed, and gone on with: the text of the plain engine's chat."""
    words = "A response, please. " * 6
    wanted = plain.chat.completions.create(model=model, messages=user(words), max_tokens=10, temperature=0)
    asked: Any = {"model": model, "max_output_tokens": 10, "temperature": 0}
    whole: Any = client.responses.create(input=words, **asked)
    assert whole.output_text == wanted.choices[0].message.content and wanted.usage
    assert whole.usage.total_tokens == wanted.usage.total_tokens
    events: list[Any] = list(client.responses.create(input=words, stream=True, **asked))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    more: Any = client.responses.create(input="And?", previous_response_id=whole.id, **asked)
    assert more.session["id"] == whole.session["id"]
    held = whole.usage.total_tokens
    assert more.usage.input_tokens_details.cached_tokens >= (held - 1) // PAGE * PAGE


def test_anthropic_messages(url: str, plain: OpenAI, model: str) -> None:
    """Whole and streamed: the text of the plain engine's chat."""
    words = "A message, please. " * 6
    wanted = plain.chat.completions.create(model=model, messages=user(words), max_tokens=10, temperature=0)
    asked: Any = {"model": model, "max_tokens": 10, "messages": user(words)}
    asked["extra_body"] = {"temperature": 0}
    with Anthropic(base_url=url, api_key="any", max_retries=0, timeout=DEADLINE_S) as client:
        whole: Any = client.messages.create(**asked)
        assert [block.text for block in whole.content] == [wanted.choices[0].message.content]
        assert whole.stop_reason == "max_tokens" and wanted.usage
        read = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        assert (read, whole.usage.output_tokens) == (wanted.usage.prompt_tokens, 10)
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert text == wanted.choices[0].message.content and final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 10


@pytest.mark.parametrize("how", ["chat", "completions", "whole chat"])
def test_a_client_that_leaves_several_choices_early(
    url: str, sglang_pair: SglangPair, model: str, how: str
) -> None:
    """The engines are idle again soon, and nothing is reserved or leased for the round any more."""
    engines = [record.url for record in (sglang_pair.prefill, sglang_pair.decode)]
    session_id = f"live-left-{how.replace(' ', '-')}"

    def running() -> int:
        found = [
            httpx.get(f"{each}/v1/loads?include=core", headers=engine_key(FLEET_KEY)).json()["loads"]
            for each in engines
        ]
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for loads in found for load in loads)

    def reserved() -> list[Any]:
        views = httpx.get(f"{url}/v1/engines").json()["data"]
        assert len(views) == 2
        names = ("batch", "queue_s", "queued_rounds", "incoming_bytes", "outgoing_bytes")
        return [view[name] for view in views for name in names if view[name]]

    def leased() -> bool:
        return bool(httpx.get(f"{url}/v1/sessions/{session_id}").json()["in_flight"])

    async def leave() -> None:
        asked: Any = {"model": model, "n": 2, "max_tokens": 4000, "temperature": 0}
        asked |= {"stream": how != "whole chat", **named(session_id, ignore_eos=True)}
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            words = f"two of {how}, please " * 4
            if how == "completions":
                call: Any = client.completions.create(prompt=words, **asked)
            else:
                call = client.chat.completions.create(messages=user(words), **asked)
            if how == "whole chat":
                task = asyncio.create_task(call)
                await asyncio.to_thread(wait_for, "two running", lambda: running() == 2)
                task.cancel()
                await asyncio.wait([task])
                return
            stream = await call
            seen: set[int] = set()
            async for chunk in stream:
                seen |= {choice.index for choice in chunk.choices}
                if seen == {0, 1}:
                    break
            await asyncio.to_thread(wait_for, "two running", lambda: running() == 2)
            assert reserved() and leased()
            await stream.close()

    asyncio.run(leave())
    wait_for("idle engines", lambda: running() == 0, IDLE_S)
    wait_for("reservations given back", lambda: not reserved(), IDLE_S)
    wait_for("the lease given back", lambda: not leased(), IDLE_S)
