"""/v1/messages as a translation: blocks to messages, events to a message."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway import messages
from antiphon.scheduler.gateway.error_shapes import error_body
from antiphon.scheduler.gateway.message_events import MessageEvents
from antiphon.scheduler.gateway.requests import parse_chat
from tests.test_responses import STREAM, chat_events

BODY: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"name": "look", "description": "d", "input_schema": {"type": "object"}}


def parse(**change: Any) -> messages.MessagesBody:
    return messages.parse_messages_request(msgspec.json.encode(BODY | change))


def chat_of(**change: Any) -> dict[str, Any]:
    return messages.chat_request(parse(**change))


# ---------------------------------------------------------------- requests


def test_blocks_become_messages() -> None:
    """Results are messages of their own, in their place; thoughts and cache marks are left out."""
    cached = {"cache_control": {"type": "ephemeral"}}
    said = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one", **cached}, {"type": "text", "text": "two"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Let me "},
                {"type": "text", "text": "see."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"q": "é"}},
                {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "sun", "is_error": True},
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "short.", **cached}]
    calls = [
        {"id": name, "type": "function", "function": {"name": "look", "arguments": arguments}}
        for name, arguments in (("t1", '{"q":"é"}'), ("t2", "{}"))
    ]
    assert chat_of(messages=said, system=system)["messages"] == [
        {"role": "system", "content": "Be\nshort."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "sun"},
        {"role": "user", "content": "and now?"},
    ]


def test_fields_become_the_chats() -> None:
    chat = chat_of(
        stop_sequences=["x"],
        temperature=0.5,
        top_k=4,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
        thinking={"type": "disabled"},
        metadata={"session_id": "s"},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    function = {"name": "look", "description": "d", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert chat["chat_template_kwargs"] == {"thinking": False, "enable_thinking": False}
    expected = {
        "stop": ["x"],
        "temperature": 0.5,
        "top_k": 4,
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "max_completion_tokens": 9,
        "metadata": {"session_id": "s"},
    }
    assert chat.items() >= expected.items()
    assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}
    parse_chat(msgspec.json.encode(chat))
    choices = {"auto": "auto", "any": "required", "none": "none"}
    for theirs, ours in choices.items():
        assert chat_of(tools=[TOOL], tool_choice={"type": theirs})["tool_choice"] == ours


def test_an_answer_that_has_begun_is_gone_on_with() -> None:
    begun = [*BODY["messages"], {"role": "assistant", "content": "So"}]
    assert chat_of(messages=begun)["continue_final_message"] is True
    assert "continue_final_message" not in chat_of()


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
        "messages",
    ),
    ({"messages": [{"role": "assistant", "content": [{"type": {}}]}]}, "messages[0].content[0]"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0]"),
    ({"tools": [{"name": "w"}]}, "tools[0]"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
    ({"temperature": 1.5}, "temperature"),
    ({"session": {"id": "s", "append": True}}, "session.append"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_wrong_field_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(**change)
    assert (caught.value.status, caught.value.param) == (400, param)


WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "system",
        "text",
        "tool_use",
        "tool_result",
        "thinking",
        "image",
        "auto",
        "any",
        "tool",
    ]
)
NAMES = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "name",
        "id",
        "input",
        "tool_use_id",
        "input_schema",
        "format",
        "schema",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "system", "tools", "tool_choice", "thinking", "output_config"]), JSON
    )
)
def test_any_body_is_translated_or_refused(change: dict[str, Any]) -> None:
    """A 400, or a chat that the chat route takes or refuses by a 400: never anything else."""
    try:
        parse_chat(msgspec.json.encode(chat_of(**change)))
    except ApiError as error:
        assert error.status == 400


# ---------------------------------------------------------------- answers

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@given(STREAM, st.sampled_from(["stop", "length", "tool_calls"]))
def test_events_are_what_anthropics_types_say(deltas: list[dict[str, Any]], finish: str) -> None:
    """Of the client's own types; blocks begin and end one after the other and add up to the whole."""
    made = MessageEvents(parse(), "msg_1")
    events = made.begin()
    for event in chat_events(deltas, finish):
        events += made.feed(event)
    events += made.end()
    typed = [EVENT.validate_python(event) for event in events if event["type"] != "ping"]
    assert typed[0].type == "message_start" and typed[-1].type == "message_stop"
    whole = Message.model_validate(made.whole())
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    assert whole.stop_reason == typed[-2].delta.stop_reason == reasons[finish]
    assert whole.usage.output_tokens == typed[-2].usage.output_tokens == 3
    said: list[str] = []
    for event in typed[1:-2]:
        if event.type == "content_block_start":
            assert event.index == len(said)
            said.append("")
        elif event.type == "content_block_delta":
            delta = event.delta.model_dump()
            said[event.index] += str(delta.get("text") or delta.get("thinking") or "")
    texts = [
        getattr(block, "text", None) or getattr(block, "thinking", None) or "" for block in whole.content
    ]
    assert texts == said


def test_a_call_whose_arguments_are_no_json_keeps_them() -> None:
    """An answer that was cut in a call: the text is not lost, and the block is well-formed."""
    made = MessageEvents(parse(), "msg_1")
    made.begin()
    function = {"name": "look", "arguments": '{"q": "a lo'}
    call = {"index": 0, "id": "c", "function": function}
    made.feed({"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": "length"}]})
    made.end()
    assert made.whole()["content"][0]["input"] == {"_arguments": '{"q": "a lo'}


def test_cached_tokens_are_counted_apart() -> None:
    made = MessageEvents(parse(), "msg_1")
    usage = {"prompt_tokens": 50, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 48}}
    made.feed({"choices": [], "usage": usage})
    assert made.end()[-2]["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 48,
        "output_tokens": 3,
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors_on_its_routes_have_its_shape(status: int, kind: str) -> None:
    error = ApiError(status, "code", "what")
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        assert error_body(path, error) == {"type": "error", "error": {"type": kind, "message": "what"}}
    for path in ("/v1/messages2", "/v1/chat/completions"):
        assert error_body(path, error) == error.body()
