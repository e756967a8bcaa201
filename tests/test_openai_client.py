"""OpenAI's own client, unmodified, against the live stack: gateway and simulated engine as processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.live_stack import Line, LiveStack, live_stack, tool_call

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
TOOL: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
CALL: Line = {"text": "Let me see.", "tool_calls": [tool_call("weather", city="Zürich", days=3)]}
TWO_CALLS: Line = {
    "tool_calls": [tool_call("weather", city="Bern", days=1), tool_call("weather", city="Basel", days=2)]
}
JOKE: Line = {"text": json.dumps({"setup": "Why?", "punchline": "Cats."})}
THOUGHT: Line = {"reasoning": "It rained yesterday.", "text": "It will rain."}
RAIN: Line = {"text": "It rains in Zürich."}

ANSWERS: dict[str, list[Line]] = {
    "chat-tools": [CALL, RAIN],
    "chat-tools-stream": [TWO_CALLS],
    "chat-parse": [JOKE],
    "chat-reasoning": [THOUGHT, THOUGHT],
    "responses-tools": [CALL, RAIN],
    "responses-tools-stream": [TWO_CALLS],
    "responses-parse": [JOKE],
    "responses-reasoning": [THOUGHT],
    "responses-cut": [{"text": "one two three four five six"}],
}


class Joke(BaseModel):
    setup: str
    punchline: str


@pytest.fixture(scope="module")
def stack(
    tiny_model_dir: Path, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveStack]:
    script = [{**line, "session_id": name} for name, lines in ANSWERS.items() for line in lines]
    with live_stack(tmp_path_factory.mktemp("openai"), valkey_url, tiny_model_dir, script) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: LiveStack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> str:
    return tiny_model_dir.name


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def in_session(name: str) -> dict[str, str]:
    return {"X-Session-ID": name}


# ---------------------------------------------------------------- chat and completions


def test_models(client: OpenAI, model: str) -> None:
    assert model in [entry.id for entry in client.models.list()]
    assert client.models.retrieve(model).id == model


def test_chat_whole_and_streamed_are_the_same(client: OpenAI, model: str) -> None:
    """Greedy or not, the same prompt gives the same tokens here; the stream ends with usage."""
    whole = client.chat.completions.create(model=model, messages=user("same"), max_completion_tokens=8)
    assert whole.choices[0].finish_reason == "length" and whole.usage
    assert whole.usage.completion_tokens == 8 and whole.usage.prompt_tokens_details is not None
    stream = client.chat.completions.create(
        model=model, messages=user("same"), max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("named", [True, False])
def test_two_conversations_are_told_apart(client: OpenAI, model: str, named: bool) -> None:
    """Interleaved, with a session header and without any id: each keeps its session and counts its rounds."""
    talks = {name: user(f"{name} talk, named: {named}") for name in ("first", "second")}
    seen: dict[str, list[tuple[str, int]]] = {name: [] for name in talks}
    for _ in range(3):
        for name, messages in talks.items():
            headers = in_session(f"talk-{name}") if named else {}
            got = client.chat.completions.create(
                model=model, messages=messages, max_tokens=6, extra_headers=headers
            )
            session: Any = got.session  # type: ignore[attr-defined]
            seen[name].append((session["id"], session["round"]))
            messages += [
                {"role": "assistant", "content": got.choices[0].message.content},
                {"role": "user", "content": "and then?"},
            ]
    ids = {name: {session_id for session_id, _ in rounds} for name, rounds in seen.items()}
    assert all(len(found) == 1 for found in ids.values()) and ids["first"] != ids["second"], seen
    assert all([number for _, number in rounds] == [1, 2, 3] for rounds in seen.values())


def test_several_choices(client: OpenAI, model: str) -> None:
    """`n`, whole and streamed: as many, in order, and different."""
    whole = client.chat.completions.create(model=model, messages=user("three"), max_tokens=5, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.usage and whole.usage.completion_tokens == 15 and whole.usage.prompt_tokens_details
    cached = whole.usage.prompt_tokens_details.cached_tokens
    assert cached == 0, "an engine computes the prompt of several choices first, and then calls it cached"
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=model, messages=user("three"), max_tokens=5, n=3, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    text = client.completions.create(model=model, prompt="three", max_tokens=4, n=2)
    assert len({choice.text for choice in text.choices}) == 2


def test_logprobs_and_echo(client: OpenAI, model: str) -> None:
    chat = client.chat.completions.create(
        model=model, messages=user("p"), max_tokens=4, logprobs=True, top_logprobs=2
    )
    found = chat.choices[0].logprobs
    assert found and found.content and [len(entry.top_logprobs) for entry in found.content] == [2] * 4
    text = client.completions.create(model=model, prompt="p q", max_tokens=3, logprobs=1, echo=True)
    logprobs = text.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert len(logprobs.tokens) > 3 and logprobs.token_logprobs[0] is None


def test_chat_tools(client: OpenAI, model: str) -> None:
    """A call, its result, the answer; the history goes back as the client's own objects."""
    headers = in_session("chat-tools")
    messages = user("weather in Zürich?")
    first = client.chat.completions.create(
        model=model, messages=messages, tools=[CHAT_TOOL], extra_headers=headers, seed=7
    )
    said = first.choices[0].message
    assert (
        first.choices[0].finish_reason == "tool_calls" and said.tool_calls and said.content == "Let me see."
    )
    call: Any = said.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Zürich", "days": 3}
    messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    second = client.chat.completions.create(
        model=model, messages=messages, tools=[CHAT_TOOL], extra_headers=headers
    )
    assert second.choices[0].message.content == RAIN["text"]
    assert second.usage and second.usage.prompt_tokens_details
    assert second.usage.prompt_tokens_details.cached_tokens, "the first round's KV was used"


def test_chat_tools_streamed(client: OpenAI, model: str) -> None:
    """Two parallel calls by the client's own accumulator."""
    with client.chat.completions.stream(
        model=model,
        messages=user("weather?"),
        tools=[CHAT_TOOL],
        extra_headers=in_session("chat-tools-stream"),
    ) as stream:
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls and [json.loads(call.function.arguments)["city"] for call in calls] == ["Bern", "Basel"]


def test_chat_forced_tool_and_schema(client: OpenAI, model: str) -> None:
    """Constraints that a grammar enforces reach the engine: a forced call, a forced JSON."""
    forced = client.chat.completions.create(
        model=model, messages=user("go"), tools=[CHAT_TOOL], tool_choice="required"
    )
    calls: Any = forced.choices[0].message.tool_calls
    assert set(json.loads(calls[0].function.arguments)) == {"city", "days"}
    scripted = client.chat.completions.parse(
        model=model, messages=user("joke"), response_format=Joke, extra_headers=in_session("chat-parse")
    )
    assert scripted.choices[0].message.parsed == Joke(setup="Why?", punchline="Cats.")
    by_grammar = client.chat.completions.parse(model=model, messages=user("joke"), response_format=Joke)
    assert by_grammar.choices[0].message.parsed is not None


def test_chat_reasoning(client: OpenAI, model: str) -> None:
    """The field that SGLang gives reaches the client, whole and in deltas."""
    headers = in_session("chat-reasoning")
    whole: Any = client.chat.completions.create(model=model, messages=user("rain?"), extra_headers=headers)
    assert whole.choices[0].message.reasoning_content == THOUGHT["reasoning"]
    deltas: list[Any] = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(
            model=model, messages=user("rain?"), extra_headers=headers, stream=True
        )
    ]
    assert "".join(d.reasoning_content or "" for d in deltas) == THOUGHT["reasoning"]
    assert "".join(d.content or "" for d in deltas) == THOUGHT["text"]


def test_async_client(stack: LiveStack, model: str) -> None:
    """Ten at once, half of them streamed, on one client."""

    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:

            async def whole(n: int) -> str:
                got = await client.chat.completions.create(
                    model=model, messages=user(f"async {n}"), max_tokens=6
                )
                return got.choices[0].message.content or ""

            async def streamed(n: int) -> str:
                stream = await client.chat.completions.create(
                    model=model, messages=user(f"async {n}"), max_tokens=6, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            both = await asyncio.gather(*(ask(n) for n in range(5) for ask in (whole, streamed)))
        assert both[::2] == both[1::2] and len(set(both)) == 5

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"n": 999}, openai.BadRequestError, "n"),
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"extra_body": {"lora_path": "x"}}, openai.BadRequestError, "lora_path"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "messages[0].content[0]",
        ),
    ],
)
def test_errors(
    client: OpenAI, model: str, change: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    """The client's own classes, with the field at fault."""
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": model, "messages": user("x"), "max_tokens": 3} | change))
    assert caught.value.param == param and caught.value.code


def test_an_adapter_is_refused_with_what_to_do(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="merge the adapter"):
        client.chat.completions.create(model=f"{model}:french", messages=user("x"))


# ---------------------------------------------------------------- responses


def test_response_whole_and_streamed(client: OpenAI, model: str) -> None:
    """The client's final object from the stream is the whole answer's equal but for ids and times."""
    whole = client.responses.create(model=model, input="same", max_output_tokens=8, store=False)
    assert whole.status == "incomplete" and whole.incomplete_details
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and whole.usage.output_tokens == 8
    events = list(client.responses.create(model=model, input="same", max_output_tokens=8, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == text == whole.output_text
    with client.responses.stream(model=model, input="same", max_output_tokens=8) as stream:
        for _ in stream:
            pass


def test_responses_go_on_from_each_other(client: OpenAI, stack: LiveStack, model: str) -> None:
    """`previous_response_id`: same session, next round, KV used; a branch is a child of that session."""
    first = client.responses.create(model=model, input="My name is Ada." * 8, max_output_tokens=16)
    second = client.responses.create(
        model=model, input="What is it?", previous_response_id=first.id, max_output_tokens=16
    )
    third = client.responses.create(
        model=model, input="Again?", previous_response_id=second.id, max_output_tokens=16, stream=True
    )
    done: Any = [event for event in third][-1]
    sessions: list[Any] = [first.session, second.session, done.response.session]  # type: ignore[attr-defined]
    assert len({session["id"] for session in sessions}) == 1
    assert [session["round"] for session in sessions] == [1, 2, 3]
    assert first.usage and second.usage and second.usage.input_tokens > first.usage.input_tokens + 16
    assert second.usage.input_tokens_details.cached_tokens > 0
    branch: Any = client.responses.create(
        model=model, input="Or not?", previous_response_id=first.id, max_output_tokens=4
    )
    assert branch.session["id"] != sessions[0]["id"] and branch.session["parent_id"] == sessions[0]["id"]
    onwards: Any = client.responses.create(
        model=model, input="Yes?", previous_response_id=branch.id, max_output_tokens=4
    )
    assert onwards.session["id"] == branch.session["id"]


def test_stored_responses(client: OpenAI, model: str) -> None:
    """Got as they were answered; deleted they are gone; what is not to be stored is not."""
    made = client.responses.create(model=model, input="keep", max_output_tokens=4, metadata={"a": "b"})
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    client.responses.delete(made.id)
    for gone in (
        made.id,
        client.responses.create(model=model, input="x", store=False, max_output_tokens=4).id,
    ):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model=model, input="go on", previous_response_id=gone)
        assert caught.value.param == "previous_response_id"


def test_conversation(client: OpenAI, model: str) -> None:
    """A conversation's name is enough to go on."""
    rounds: list[Any] = [
        client.responses.create(model=model, input=f"turn {n}", conversation="conv-1", max_output_tokens=4)
        for n in range(3)
    ]
    assert [answer.session["round"] for answer in rounds] == [1, 2, 3]
    assert {answer.conversation.id for answer in rounds} == {"conv-1"}


def test_response_tools(client: OpenAI, model: str) -> None:
    """A function call, its output, the answer; on the server's history."""
    headers = in_session("responses-tools")
    first = client.responses.create(
        model=model, input="weather?", tools=[TOOL], extra_headers=headers, instructions="Be short."
    )
    call: Any = first.output[-1]
    assert [item.type for item in first.output] == ["message", "function_call"]
    assert json.loads(call.arguments) == {"city": "Zürich", "days": 3}
    second = client.responses.create(
        model=model,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        previous_response_id=first.id,
        tools=[TOOL],
    )
    assert second.output_text == RAIN["text"] and second.status == "completed"


def test_response_tools_streamed(client: OpenAI, model: str) -> None:
    """Two calls by the client's own accumulator."""
    with client.responses.stream(
        model=model, input="weather?", tools=[TOOL], extra_headers=in_session("responses-tools-stream")
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    calls: list[Any] = [item for item in final.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Bern", "Basel"]
    assert [e.type for e in events].count("response.function_call_arguments.done") == 2


def test_response_structured_output(client: OpenAI, model: str) -> None:
    got = client.responses.parse(
        model=model, input="joke", text_format=Joke, extra_headers=in_session("responses-parse")
    )
    assert got.output_parsed == Joke(setup="Why?", punchline="Cats.")


def test_response_reasoning_and_logprobs(client: OpenAI, model: str) -> None:
    """Reasoning is an item of its own; log probabilities come where they are asked for."""
    got = client.responses.create(
        model=model,
        input="rain?",
        extra_headers=in_session("responses-reasoning"),
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    thought: Any = got.output[0]
    message: Any = got.output[1]
    assert thought.type == "reasoning" and thought.content[0].text == THOUGHT["reasoning"]
    assert got.output_text == THOUGHT["text"] and got.usage
    assert got.usage.output_tokens_details.reasoning_tokens == 3
    assert message.content[0].logprobs and len(message.content[0].logprobs[0].top_logprobs) == 2


def test_a_response_that_is_cut_is_incomplete(client: OpenAI, model: str) -> None:
    got = client.responses.create(
        model=model, input="x", max_output_tokens=3, extra_headers=in_session("responses-cut")
    )
    assert got.status == "incomplete" and got.output_text == "one two three"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"conversation": "c", "previous_response_id": "r"}, "conversation"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
    ],
)
def test_response_errors(client: OpenAI, model: str, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": model, "input": "x"} | change))
    assert caught.value.param == param


def test_async_responses(stack: LiveStack, model: str) -> None:
    """Two branches at once from one response: both answer, at most one keeps the session."""

    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:
            first = await client.responses.create(model=model, input="root", max_output_tokens=4)
            both: list[Any] = await asyncio.gather(
                *(
                    client.responses.create(
                        model=model, input=text, previous_response_id=first.id, max_output_tokens=4
                    )
                    for text in ("left", "right")
                )
            )
            assert both[0].session["id"] != both[1].session["id"]
            for branch in both:
                onwards = await client.responses.create(
                    model=model, input="on", previous_response_id=branch.id, max_output_tokens=4
                )
                assert onwards.usage and branch.usage
                assert onwards.usage.input_tokens > branch.usage.input_tokens

    asyncio.run(main())
