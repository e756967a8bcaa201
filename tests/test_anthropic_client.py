"""Anthropic's own client, unmodified, against the live stack: gateway and simulated engine as processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.live_stack import Line, LiveStack, live_stack, tool_call

TOOL: Any = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "cache_control": {"type": "ephemeral"},
}
CALL: Line = {"text": "Let me see.", "tool_calls": [tool_call("weather", city="Zürich")]}
TWO_CALLS: Line = {"tool_calls": [tool_call("weather", city="Bern"), tool_call("weather", city="Basel")]}
THOUGHT: Line = {"reasoning": "It rained yesterday.", "text": "It will rain."}
RAIN: Line = {"text": "It rains in Zürich."}
JOKE: Line = {"text": json.dumps({"setup": "Why?"})}
STOPPED: Line = {"text": "one two HALT three"}

ANSWERS: dict[str, list[Line]] = {
    "tools": [CALL, RAIN],
    "tools-stream": [TWO_CALLS],
    "thinking": [THOUGHT],
    "thinking-stream": [THOUGHT, RAIN],
    "stop": [STOPPED, STOPPED],
    "schema": [JOKE],
    "claude-code-1": [CALL, RAIN],
}


@pytest.fixture(scope="module")
def stack(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveStack]:
    script = [{**line, "session_id": name} for name, lines in ANSWERS.items() for line in lines]
    with live_stack(tmp_path_factory.mktemp("anthropic"), valkey_url, tiny_model_dir, script) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: LiveStack) -> Iterator[Anthropic]:
    with Anthropic(base_url=stack.url, api_key="any", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> str:
    return tiny_model_dir.name


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def in_session(name: str) -> dict[str, str]:
    return {"X-Session-ID": name}


def test_whole_and_streamed_are_the_same(client: Anthropic, model: str) -> None:
    """The client's accumulated message is the whole answer; usage is complete at the end."""
    system: Any = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    whole = client.messages.create(model=model, max_tokens=8, system=system, messages=user("same"))
    assert (whole.stop_reason, whole.usage.output_tokens, whole.role) == ("max_tokens", 8, "assistant")
    with client.messages.stream(model=model, max_tokens=8, system=system, messages=user("same")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 8
    cached = final.usage.cache_read_input_tokens or 0
    read = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert final.usage.input_tokens + cached == read and cached > 0, "the first call left its KV"


def test_the_order_of_events(client: Anthropic, model: str) -> None:
    """As the API's documents have it: every block begins and ends, the message around them."""
    events: list[Any] = list(
        client.messages.create(model=model, max_tokens=3, messages=user("order"), stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_tools(client: Anthropic, model: str) -> None:
    """A call, its result, the answer; the history goes back as the client's own blocks."""
    messages = user("weather in Zürich?")
    options: Any = {"model": model, "max_tokens": 100, "tools": [TOOL], "extra_headers": in_session("tools")}
    first = client.messages.create(messages=messages, **options)
    assert first.stop_reason == "tool_use" and [b.type for b in first.content] == ["text", "tool_use"]
    call: Any = first.content[-1]
    assert (call.name, call.input) == ("weather", {"city": "Zürich"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(messages=messages, **options)
    assert second.stop_reason == "end_turn" and second.usage.cache_read_input_tokens
    assert [block.text for block in second.content if block.type == "text"] == [RAIN["text"]]


def test_tools_streamed(client: Anthropic, model: str) -> None:
    with client.messages.stream(
        model=model,
        max_tokens=100,
        tools=[TOOL],
        tool_choice={"type": "any"},
        messages=user("weather?"),
        extra_headers=in_session("tools-stream"),
    ) as stream:
        final = stream.get_final_message()
    calls: list[Any] = [block for block in final.content if block.type == "tool_use"]
    assert [call.input for call in calls] == [{"city": "Bern"}, {"city": "Basel"}]
    assert final.stop_reason == "tool_use"


def test_a_forced_tool(client: Anthropic, model: str) -> None:
    got = client.messages.create(
        model=model, max_tokens=100, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"},
        messages=user("go"),
    )  # fmt: skip
    call: Any = got.content[0]
    assert call.type == "tool_use" and set(call.input) == {"city"}


def test_thinking(client: Anthropic, model: str) -> None:
    """What the engine gives as reasoning is a thinking block; sent back, it is taken and left out."""
    whole = client.messages.create(
        model=model, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024},
        messages=user("rain?"), extra_headers=in_session("thinking"),
    )  # fmt: skip
    assert [block.type for block in whole.content] == ["thinking", "text"]
    headers = in_session("thinking-stream")
    with client.messages.stream(
        model=model, max_tokens=2000, messages=user("rain?"), extra_headers=headers
    ) as stream:
        final = stream.get_final_message()
    thought: Any = final.content[0]
    assert thought.thinking == THOUGHT["reasoning"]
    history: Any = [*user("rain?"), {"role": "assistant", "content": final.content}, *user("sure?")]
    again = client.messages.create(model=model, max_tokens=50, messages=history, extra_headers=headers)
    assert again.content


def test_a_stop_sequence_is_named(client: Anthropic, model: str) -> None:
    for stream in (False, True):
        options: Any = {
            "model": model, "max_tokens": 50, "messages": user("x"), "stop_sequences": ["HALT"],
            "extra_headers": in_session("stop"),
        }  # fmt: skip
        if stream:
            with client.messages.stream(**options) as events:
                got: Any = events.get_final_message()
        else:
            got = client.messages.create(**options)
        assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", "HALT")
        assert got.content[0].text == "one two "


def test_an_output_schema(client: Anthropic, model: str) -> None:
    schema: Any = {"type": "object", "properties": {"setup": {"type": "string"}}, "required": ["setup"]}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    got: Any = client.messages.create(model=model, max_tokens=50, messages=user("joke"), output_config=config)
    assert set(json.loads(got.content[0].text)) == {"setup"}


def test_the_beginning_of_an_answer(client: Anthropic, model: str) -> None:
    """A last message of the assistant is gone on with: the prompt ends in it."""
    before = client.messages.count_tokens(model=model, messages=user("x"))
    history: Any = [*user("x"), {"role": "assistant", "content": "So"}]
    begun = client.messages.count_tokens(model=model, messages=history)
    assert before.input_tokens < begun.input_tokens <= before.input_tokens + 2
    assert client.messages.create(model=model, max_tokens=3, messages=history).content


def test_counted_tokens_are_those_of_the_answer(client: Anthropic, model: str) -> None:
    options: Any = {"model": model, "messages": user("count me"), "tools": [TOOL], "system": "short"}
    counted = client.messages.count_tokens(**options)
    got = client.messages.create(max_tokens=2, **options)
    assert counted.input_tokens == got.usage.input_tokens + (got.usage.cache_read_input_tokens or 0)


def test_claude_codes_headers_name_the_session(client: Anthropic, stack: LiveStack, model: str) -> None:
    """With its query, beta flags and metadata; the second round is the same session's."""
    options: Any = {
        "model": model,
        "max_tokens": 100,
        "tools": [TOOL],
        "metadata": {"user_id": "u"},
        "extra_headers": {"x-claude-code-session-id": "claude-code-1", "anthropic-beta": "x-2025-01-01"},
        "extra_query": {"beta": "true"},
    }
    first: Any = client.messages.create(messages=user("weather?"), **options)
    assert first.session["id"] == "claude-code-1" and first.stop_reason == "tool_use"


def test_async_client(stack: LiveStack, model: str) -> None:
    async def main() -> None:
        async with AsyncAnthropic(base_url=stack.url, api_key="any", max_retries=0) as client:

            async def streamed(n: int) -> str:
                async with client.messages.stream(
                    model=model, max_tokens=6, messages=user(f"async {n}")
                ) as stream:
                    return "".join([text async for text in stream.text_stream])

            texts = await asyncio.gather(*(streamed(n) for n in (1, 2, 1, 2)))
        assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]

    asyncio.run(main())


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, "does not exist"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, anthropic.BadRequestError, "text only"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, anthropic.BadRequestError, "your own"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tool_choice"),
    ],
)
def test_errors_have_anthropics_shape(
    client: Anthropic, model: str, change: dict[str, Any], error: type[anthropic.APIStatusError], said: str
) -> None:
    with pytest.raises(error) as caught:
        client.messages.create(**({"model": model, "max_tokens": 3, "messages": user("x")} | change))
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"].endswith("_error")
    assert said in body["error"]["message"]
