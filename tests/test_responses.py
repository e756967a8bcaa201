"""/v1/responses as a translation: items to messages, events to a response; and what is stored between."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway import responses
from antiphon.scheduler.gateway.blocks import Blocks, Change
from antiphon.scheduler.gateway.relay import AnswerForm, fold
from antiphon.scheduler.gateway.requests import parse_chat
from antiphon.scheduler.gateway.response_events import ResponseEvents, document, told_again
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.response_store import NOTHING, LedgerUnavailable, Past, ResponseStore

BODY: dict[str, Any] = {"model": "m", "input": "hi"}


def parse(**change: Any) -> responses.ResponsesBody:
    return responses.parse_response_request(msgspec.json.encode(BODY | change))


def messages_of(items: Any) -> list[dict[str, Any]]:
    return responses.new_messages(parse(input=items))


def chat_of(**change: Any) -> dict[str, Any]:
    body = parse(**change)
    return responses.chat_request(body, [], responses.new_messages(body), None)


# ---------------------------------------------------------------- requests


def test_items_become_messages() -> None:
    """What one answer held (thoughts, text, calls) becomes the one message that the chat route gave."""
    items = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {
            "type": "reasoning",
            "id": "rs",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "assistant", "content": "So."},
    ]
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    assert messages_of(items) == [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", **call}, {"id": "c2", **call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": "So."},
    ]


def test_fields_become_the_chats() -> None:
    schema = {"type": "object"}
    tool = {"type": "function", "name": "f", "parameters": schema, "strict": True}
    chat = chat_of(
        instructions="Be short.",
        max_output_tokens=9,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        tools=[tool, tool | {"name": "g"}],
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "g"}],
        },
        temperature=0.5,
        seed=3,
        prompt_cache_key="k",
    )
    assert chat["messages"][0] == {"role": "system", "content": "Be short."}
    assert chat["response_format"]["json_schema"] == {"name": "n", "schema": schema, "strict": True}
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["g"] and chat["tool_choice"] == "required"
    expected = {"max_completion_tokens": 9, "reasoning_effort": "low", "temperature": 0.5, "seed": 3}
    assert chat.items() >= expected.items() and chat["prompt_cache_key"] == "k"
    parse_chat(msgspec.json.encode(chat))
    named = chat_of(tools=[tool], tool_choice={"type": "function", "name": "f"})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "f"}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ({"truncation": "auto"}, "truncation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"conversation": "c", "previous_response_id": "r"}, "conversation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_wrong_field_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(**change)
    assert (caught.value.status, caught.value.param) == (400, param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "name", "call_id", "arguments", "output", "id"]
            ),
            inner
            | st.sampled_from(
                [
                    "message",
                    "user",
                    "assistant",
                    "function_call",
                    "function_call_output",
                    "reasoning",
                    "input_text",
                ]
            ),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["input", "tools", "tool_choice", "text", "reasoning", "include"]), JSON)
)
def test_any_body_is_translated_or_refused(change: dict[str, Any]) -> None:
    """A 400, or a chat that the chat route takes or refuses by a 400: never anything else."""
    try:
        chat = chat_of(**change)
        parse_chat(msgspec.json.encode(chat))
    except ApiError as error:
        assert error.status == 400


# ---------------------------------------------------------------- answers

PIECE = st.text("ab é\n", min_size=1, max_size=4)
DELTA = st.one_of(
    st.builds(lambda text: {"content": text}, PIECE),
    st.builds(lambda text: {"reasoning_content": text}, PIECE),
    st.builds(
        lambda index, text: {"tool_calls": [{"index": index, "function": {"arguments": text}}]},
        st.integers(0, 2),
        PIECE,
    ),
    st.just({"role": "assistant", "content": ""}),
)
STREAM = st.lists(DELTA, max_size=12)


def chat_events(deltas: list[dict[str, Any]], finish: str = "stop") -> list[dict[str, Any]]:
    """A chat's stream as relay.py gives it; calls begin with their name, in order, as parsers say them."""
    events: list[dict[str, Any]] = []
    known = 0
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            call["index"] = min(call["index"], known)
            if call["index"] == known:
                head = {"index": known, "id": f"c{known}", "type": "function",
                        "function": {"name": f"f{known}", "arguments": ""}}  # fmt: skip
                events.append({"choices": [{"index": 0, "delta": {"tool_calls": [head]}}]})
                known += 1
        events.append({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return [
        *events,
        {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
        {"choices": [], "usage": usage, "session": {"id": "s1"}, "created": 5},
    ]


async def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the chat route would have answered, whole."""

    async def stream() -> Any:
        for event in msgspec.json.decode(msgspec.json.encode(events)):
            yield event

    form = AnswerForm(
        chat=True,
        model="m",
        answer_id="a",
        stream=False,
        include_usage=True,
        token_ids=False,
        identified_by="new",
    )
    return await fold(stream(), form)


@given(STREAM)
def test_blocks_say_what_the_chat_route_says(deltas: list[dict[str, Any]]) -> None:
    """The message that is stored as history is the one that a client of the chat route would send back."""
    events = chat_events(deltas)
    blocks = Blocks()
    steps = [step for event in events for step in blocks.feed(event)] + list(blocks.end())
    whole = asyncio.run(folded(events))
    assert blocks.message() == whole["choices"][0]["message"]
    opened = [step.block.number for step in steps if step.change is Change.OPENED]
    closed = [step.block.number for step in steps if step.change is Change.CLOSED]
    assert opened == closed == list(range(len(blocks.blocks)))


EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@given(STREAM, st.sampled_from(["stop", "length", "tool_calls"]))
def test_events_are_what_openais_types_say(deltas: list[dict[str, Any]], finish: str) -> None:
    """Numbered, of the client's own types, and adding up to the response at the end."""
    made = ResponseEvents(parse(), "resp_1", 5)
    events = made.begin()
    for event in chat_events(deltas, finish):
        events += made.feed(event)
    events += [*made.end(), made.last()]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(msgspec.to_builtins(event), strict=False)
    final = Response.model_validate(msgspec.to_builtins(events[-1]["response"]))
    assert final.status == ("incomplete" if finish == "length" else "completed")
    assert made.session_id == "s1" and final.usage and final.usage.total_tokens == 8
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert final.output_text == text
    added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert added == list(range(len(final.output))) and final.output
    again = responses.new_messages(parse(input=[item.to_dict() for item in final.output]))
    said = [message for message in again if message.get("tool_calls") or message.get("content")]
    calls = [call["id"] for message in said for call in message.get("tool_calls", ())]
    assert calls == [call["id"] for call in made.reply().get("tool_calls", ())]


@given(STREAM, st.sampled_from(["stop", "length", "tool_calls"]))
def test_a_stored_response_is_told_again(deltas: list[dict[str, Any]], finish: str) -> None:
    """In events of the same types, each block in one piece, that add up to the same items."""
    made = ResponseEvents(parse(), "resp_1", 5)
    events = made.begin()
    for event in chat_events(deltas, finish):
        events += made.feed(event)
    events += [*made.end(), made.last()]
    stored = msgspec.json.decode(document(events[-1]["response"]))
    again = told_again(parse(stream=True), stored)
    assert [event["sequence_number"] for event in again] == list(range(len(again)))
    assert again[-1]["type"] == events[-1]["type"] and again[-1]["response"] == stored
    for event in again:
        EVENT.validate_python(msgspec.to_builtins(event), strict=False)
    done = [event["item"] for event in again if event["type"] == "response.output_item.done"]
    assert msgspec.to_builtins(done) == stored["output"]


def test_a_failure_is_an_event_with_the_response() -> None:
    made = ResponseEvents(parse(), "resp_1", 5)
    made.begin()
    failed = made.failed("the engine died")
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    EVENT.validate_python(msgspec.to_builtins(failed))


# ---------------------------------------------------------------- the store


def with_stores(url: str, work: Callable[[ResponseStore, ResponseStore], Awaitable[None]]) -> None:
    """Two replicas' stores of one fleet."""

    async def main() -> None:
        fleet = f"responses-{uuid.uuid4().hex[:8]}"
        ledgers = [Ledger(url, fleet=fleet) for _ in range(2)]
        try:
            await work(*(ResponseStore(ledger, 60.0) for ledger in ledgers))
        finally:
            for ledger in ledgers:
                await ledger.close()

    asyncio.run(main())


async def put(
    store: ResponseStore,
    name: str,
    past: Past,
    *said: bytes,
    tenant: str = "t",
    conversation: str | None = None,
) -> bool:
    return await store.put(
        tenant, name, b'{"id": "%s"}' % name.encode(), past=past, messages=said, session_id=f"s-{name}",
        conversation_id=conversation,
    )  # fmt: skip


def test_a_second_replica_goes_on(valkey_url: str) -> None:
    """Messages add up over responses, whichever replica makes them; tenants see nothing of each other."""

    async def work(one: ResponseStore, other: ResponseStore) -> None:
        assert await put(one, "a", NOTHING, b"1", b"2")
        past = await other.past("t", "a")
        assert past == Past(past.list_id if past else "", ("1", "2"), "s-a", is_tip=True, previous="a")
        assert past and await put(other, "b", past, b"3", b"4")
        after = await one.past("t", "b")
        assert after and after.messages == ("1", "2", "3", "4") and after.is_tip
        assert await one.past("u", "b") is None and await one.get("u", "b") is None
        assert await one.get("t", "b") == '{"id": "b"}'
        assert await one.delete("t", "b") and not await other.delete("t", "b")
        assert await other.past("t", "b") is None

    with_stores(valkey_url, work)


def test_branches_keep_to_themselves(valkey_url: str) -> None:
    """Two responses at once on one past: neither sees the other's messages."""

    async def work(one: ResponseStore, other: ResponseStore) -> None:
        await put(one, "root", NOTHING, b"1")
        past = await one.past("t", "root")
        assert past
        await asyncio.gather(*(put(store, f"b{n}", past, b"%d" % n) for n, store in ((5, one), (6, other))))
        assert await asyncio.gather(one.past("t", "b5"), other.past("t", "b6"))
        for n in (5, 6):
            found = await one.past("t", f"b{n}")
            assert found and found.messages == ("1", str(n)) and found.is_tip
        root = await one.past("t", "root")
        assert root and root.messages == ("1",) and not root.is_tip

    with_stores(valkey_url, work)


def test_conversations_point_to_their_last_response(valkey_url: str) -> None:
    async def work(one: ResponseStore, other: ResponseStore) -> None:
        assert await one.last_of("t", "c") is None
        await put(one, "a", NOTHING, b"1", conversation="c")
        past = await one.past("t", "a")
        assert past
        await put(other, "b", past, b"2", conversation="c")
        assert await one.last_of("t", "c") == "b" and await one.last_of("u", "c") is None

    with_stores(valkey_url, work)


def test_a_past_that_is_gone_is_not_gone_on_from(valkey_url: str) -> None:
    """Its list has expired meanwhile: nothing is stored, rather than half a conversation."""

    async def work(one: ResponseStore, other: ResponseStore) -> None:
        assert not await put(one, "x", Past("nolist", ("1", "2"), "s", is_tip=True), b"3")
        assert await other.get("t", "x") is None

    with_stores(valkey_url, work)


def test_a_ledger_that_is_away_is_said_to_be(tmp_path: Any) -> None:
    async def main() -> None:
        ledger = Ledger(f"unix://{tmp_path}/nobody.sock", fleet="f")
        try:
            with pytest.raises(LedgerUnavailable):
                await ResponseStore(ledger, 60.0).past("t", "a")
        finally:
            await ledger.close()

    asyncio.run(main())
