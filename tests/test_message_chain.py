"""The hash chain over messages: equal for what clients make of an answer, different for all else."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from antiphon.scheduler.gateway.message_chain import chain, links, reply_message, scope_of, trail

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "be brief"}
USER: Message = {"role": "user", "content": "how is the weather?"}
CALL: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Bonn", "days": 1}'},
        }
    ],
}
RESULT: Message = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
ANSWER: Message = {"role": "assistant", "content": "It rains."}

texts = st.text(max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
calls = st.fixed_dictionaries({
    "id": texts,
    "type": st.just("function"),
    "function": st.fixed_dictionaries({
        "name": texts,
        "arguments": st.dictionaries(texts, json_values, max_size=3).map(json.dumps),
    }),
})  # fmt: skip
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts},
    optional={"name": texts, "tool_call_id": texts, "tool_calls": st.lists(calls, min_size=1, max_size=2)},
)
conversations = st.lists(messages, min_size=1, max_size=6)


@given(conversations, st.lists(messages, max_size=3))
def test_a_longer_conversation_begins_with_the_shorter_one(first: list[Message], more: list[Message]) -> None:
    """Each value covers what is before it and nothing after."""
    whole = chain([*first, *more])
    assert len(whole) == len(first) + len(more)
    assert whole[: len(first)] == chain(first)
    assert len(set(whole)) == len(whole)


@given(conversations, st.data())
def test_a_change_shows_from_there_on(conversation: list[Message], data: st.DataObject) -> None:
    """In the value of the message that was changed and of all behind it; not before."""
    at = data.draw(st.integers(0, len(conversation) - 1))
    other = data.draw(messages)
    changed = [*conversation[:at], other, *conversation[at + 1 :]]
    assume(meaning(other) != meaning(conversation[at]))
    before, after = chain(conversation), chain(changed)
    assert before[:at] == after[:at]
    assert all(old != new for old, new in zip(before[at:], after[at:], strict=True))


def meaning(message: Message) -> object:
    """What may not be lost, said in another way than the code does."""
    called = [
        (call["function"]["name"], numbers(json.loads(call["function"]["arguments"])))
        for call in message.get("tool_calls") or ()
    ]
    told = (message.get("name") or "", message.get("tool_call_id") or "")
    return (message["role"], message["content"] or "", *told, msgspec.json.encode(called, order="sorted"))


def numbers(value: Any) -> Any:
    """1.0 is 1."""
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    return [numbers(inner) for inner in value] if isinstance(value, list) else value


@given(conversations)
def test_what_clients_do_to_messages_changes_nothing(conversation: list[Message]) -> None:
    """Null for empty text, one part for a string, arguments written anew, fields that only some know."""
    sent_back = copy.deepcopy(conversation)
    for message in sent_back:
        text = message["content"]
        message["content"] = [{"type": "text", "text": text}] if text else None
        message["reasoning_content"] = "let me think"
        message["annotations"] = []
        message.setdefault("name", None)
        message.setdefault("tool_calls", [])
        for call in message["tool_calls"]:
            function = call["function"]
            parsed = json.loads(function["arguments"])
            function["arguments"] = json.dumps(parsed, indent=1, sort_keys=True, ensure_ascii=False)
            call["id"] = "client's own"
            call["index"] = 0
    assert chain(sent_back) == chain(conversation)


@given(conversations)
def test_our_answer_is_hashed_as_it_comes_back(conversation: list[Message]) -> None:
    """`reply_message` of what we sent and what the client makes of it have one value."""
    sent = {"reasoning_content": "hm", "matched_stop": 2, **conversation[-1], "role": "assistant"}
    returned = {key: value for key, value in sent.items() if key in ("role", "content", "tool_calls")}
    assert chain([reply_message(sent)]) == chain([returned])


@pytest.mark.parametrize(
    "other",
    [
        {**USER, "role": "assistant"},
        {**USER, "name": "Ann"},
        {**USER, "content": "how is the weather"},
        {**USER, "content": [{"type": "text", "text": "how is "}, {"type": "text", "text": "the weather?"}]},
        {**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {**USER, "tool_call_id": "1"},
        {**CALL},
    ],
    ids=str,
)
def test_what_a_prompt_shows_counts(other: Message) -> None:
    """Role, name, text and its seams, pictures, calls."""
    assert chain([USER]) != chain([other])


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ('{"days":1,"city":"Bonn"}', True),
        ('{"days":1.0,"city":"Bonn"}', True),
        ({"days": 1, "city": "Bonn"}, True),
        ('{"days":2,"city":"Bonn"}', False),
        ('{"days":"1","city":"Bonn"}', False),
        ('{"days":1,"city":"Bonn"', False),
        (None, False),
        ("[" * 100_000, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_count_as_what_they_parse_to(arguments: object, same: bool) -> None:
    """Text that is no JSON counts as text; nothing that a model writes is too much."""
    message = copy.deepcopy(CALL)
    message["tool_calls"][0]["function"]["arguments"] = arguments
    assert (chain([USER, message]) == chain([USER, CALL])) is same


def test_the_old_form_of_a_call_counts() -> None:
    """`function_call`, as before there could be several."""
    old = {"role": "assistant", "function_call": CALL["tool_calls"][0]["function"]}
    assert chain([old]) == chain([CALL]) != chain([{"role": "assistant", "content": None}])


def test_tools_stand_in_front_of_everything() -> None:
    """Other tools, another conversation; none and an empty list are the same."""
    tool = {"type": "function", "function": {"name": "weather"}}
    assert chain([USER], []) == chain([USER], None) != chain([USER], [tool])
    assert chain([USER], [tool]) != chain([USER], [tool, tool])


def test_openers_are_nobodys_own() -> None:
    """Up to the first answer a conversation may look like any other; with it, it is one."""
    whole = links([SYSTEM, USER, CALL, RESULT, ANSWER, USER])
    assert (whole.system_messages, whole.openers) == (1, 2)
    assert whole.own() == (whole.values[5], whole.values[4], whole.values[3], whole.values[2])
    assert links([SYSTEM, USER]).own() == ()
    assert links([ANSWER]).own() == links([ANSWER]).values
    assert links([]).own() == links([]).turns == ()


def test_a_turn_outlives_what_was_before_it() -> None:
    """After compaction the summary is new, the latest turns are not; other system messages are others."""
    before = links([SYSTEM, USER, CALL, RESULT, ANSWER])
    after = links([SYSTEM, {"role": "user", "content": "summary: weather"}, CALL, RESULT, ANSWER, USER])
    assert after.turns[0] == before.turns[0]
    assert after.turns[1] != before.turns[1]
    assert not set(after.own()) & set(before.own())
    elsewhere = links([{**SYSTEM, "content": "be long"}, USER, CALL, RESULT, ANSWER])
    assert not set(elsewhere.turns) & set(before.turns)


def test_scopes_keep_apart() -> None:
    """Tenant, model, cache key: another one is another scope; no key is not the empty key."""
    scopes = [
        scope_of("t", "m"), scope_of("t", "m", ""), scope_of("t", "m", "k"), scope_of("tm", ""),
        scope_of("", "tm"),
    ]  # fmt: skip
    assert len(set(scopes)) == len(scopes)
    assert scope_of("t", "m", "k") == scope_of("t", "m", "k")


@given(conversations, st.lists(st.integers(0, 6), max_size=3), st.booleans())
def test_a_trail_says_what_links_say(chat: list[Message], cuts: list[int], with_tools: bool) -> None:
    """However a conversation is cut into steps, the last values are those of the whole."""
    tools = [{"type": "function", "function": {"name": "f"}}] if with_tools else None
    found, at = trail((), tools), 0
    for cut in sorted({*(min(cut, len(chat)) for cut in cuts), len(chat)}):
        found, at = trail(chat[at:cut], None, found), cut
    whole = links(chat, tools)
    assert found == trail(chat, tools) and found.value == whole.tip
    assert found.own == whole.own() and found.turn == next(iter(whole.turns), None)
    assert trail(chat, tools, kept=2).own == whole.own()[:2]
