"""What clients may send: every wrong body has its own clear error, and no body makes the parser fail."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.scheduler.errors import ApiError, from_refusal, upstream_message
from antiphon.scheduler.gateway import requests
from antiphon.scheduler.gateway.session_fields import read_said
from antiphon.scheduler.rounds import RoundRefused

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def parse(body: object, chat: bool) -> requests.Body:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.parse_chat(raw) if chat else requests.parse_completion(raw)[0]


BOTH = json.dumps({**CHAT, **TEXT}).encode()
BAD_JSON: list[bytes] = [
    b"", b"{", b'{"model": "m"', b"nonsense", BOTH + b"x", b'{"model": "\xff"}', b'{"model": "\\ud800"}',
    b'{"zzz": ' + b"[" * 100_000, b'{"model": NaN}', b"\x00",
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD_JSON, ids=range(len(BAD_JSON)))
def test_malformed_json_is_a_400(raw: bytes) -> None:
    """Bytes that are no JSON text get `invalid_json`, whatever is wrong with them."""
    for chat in (True, False):
        with pytest.raises(ApiError) as caught:
            parse(raw, chat)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


BAD_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_regex": "[0"}, "stop_regex"),
    ({"stop_regex": ["a+", "(("]}, "stop_regex"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"n": 129}, "n"),
    ({"n": 0}, "n"),
    ({"n": 2, "return_token_ids": True}, "return_token_ids"),
    ({"lora_path": "adapter"}, "lora_path"),
    ({"best_of": 3}, "best_of"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"stop": 7}, "stop"),
    ({"stop": [7]}, "stop[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"session": "s"}, "session"),
    ({"session_id": 5}, "session_id"),
    ({"extra_key": "a"}, "extra_key"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"logit_bias": {"5": "x"}}, "logit_bias[...]"),
    ({"seed": 2**63}, "seed"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"response_format": "json"}, "response_format"),
]


@pytest.mark.parametrize(("change", "param"), BAD_BOTH, ids=[json.dumps(change) for change, _ in BAD_BOTH])
def test_a_wrong_field_is_named(change: dict[str, Any], param: str) -> None:
    """A field of a wrong type or range is a 400 whose `param` is its path, on both routes."""
    for chat, body in ((True, CHAT), (False, TEXT)):
        with pytest.raises(ApiError) as caught:
            parse({**body, **change}, chat)
        assert caught.value.status == 400
        assert caught.value.param == param
        assert caught.value.message


BAD_CHAT: list[tuple[object, str | None]] = [
    ([], None),
    (None, None),
    ("hi", None),
    ({}, "model"),
    ({"model": "m"}, "messages"),
    ({**CHAT, "messages": []}, "messages"),
    ({**CHAT, "messages": "hi"}, "messages"),
    ({**CHAT, "messages": ["hi"]}, "messages[0]"),
    ({**CHAT, "messages": [{}]}, "messages[0].role"),
    ({**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({**CHAT, "messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({**CHAT, "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({**CHAT, "messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({**CHAT, "messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls"),
    ({**CHAT, "messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages[0].tool_calls"),
    ({**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({**CHAT, "tools": [{}]}, "tools[0]"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0]"),
    ({**CHAT, "tool_choice": "perhaps"}, "tool_choice"),
    ({**CHAT, "tool_choice": "required"}, "tool_choice"),
    ({**CHAT, "tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice"),
    ({**CHAT, "tool_choice": {"function": 5}}, "tool_choice"),
    ({**CHAT, "top_logprobs": 99}, "top_logprobs"),
    ({**CHAT, "audio": {"voice": "x", "format": "wav"}}, "audio"),
    ({**CHAT, "modalities": ["text", "audio"]}, "modalities"),
    (
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
    ),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHAT, ids=range(len(BAD_CHAT)))
def test_a_wrong_chat_body_is_a_400(body: object, param: str | None) -> None:
    """What only the chat route checks is refused there with the path of the fault."""
    with pytest.raises(ApiError) as caught:
        parse(body, True)
    assert (caught.value.status, caught.value.param) == (400, param)


BAD_PROMPTS: list[Any] = [
    None,
    "",
    [],
    {},
    5,
    True,
    [[]],
    [""],
    [[1], [2]],
    ["a", "b"],
    [1, "a"],
    [1.5],
    [True],
    [[1, None]],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=map(repr, BAD_PROMPTS))
def test_a_wrong_prompt_is_a_400(prompt: object) -> None:
    """A prompt is one text or one list of ids; several prompts are refused as such."""
    with pytest.raises(ApiError) as caught:
        parse({**TEXT, "prompt": prompt}, False)
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    assert (caught.value.code == "several_prompts") == several


@pytest.mark.parametrize(
    ("prompt", "parsed"), [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))]
)
def test_the_four_forms_of_one_prompt(prompt: object, parsed: object) -> None:
    """Text or ids, bare or as the only element of a list, are one prompt."""
    assert requests.parse_completion(msgspec.json.encode({**TEXT, "prompt": prompt}))[1] == parsed


def test_nulls_are_not_given() -> None:
    """Clients send null for what they leave out: it is neither an error nor passed on."""
    nulls = {name: None for name in ("max_tokens", "stop", "tools", "seed", "stream_options", "session", "n")}
    body = parse({**CHAT, **nulls}, True)
    assert requests.engine_fields(body, 5) == {"messages": CHAT["messages"], "max_tokens": 5}


def test_only_known_fields_reach_the_engine() -> None:
    """An engine's routing fields cannot be set by a client, ours are taken out, the rest passes unchanged."""
    passed = {
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 7,
        "logprobs": True,
        "min_tokens": 2,
        "ignore_eos": True,
        "n": 1,
    }
    ours = {"session_id": "s", "session": {"id": "s"}, "stream": True, "return_token_ids": True, "best_of": 1}
    foreign = {"rid": "x", "bootstrap_host": "h", "session_params": {}, "input_ids": [1]}
    body = parse({**CHAT, **passed, **ours, **foreign, "max_completion_tokens": 9}, True)
    assert requests.engine_fields(body, 9) == {"messages": CHAT["messages"], "max_tokens": 9, **passed}


def test_output_limit() -> None:
    """The limit is what was asked, the route's default, or what the window leaves, whichever is least."""
    assert requests.output_limit(parse(CHAT, True), 90, 100) == 10
    assert requests.output_limit(parse({**CHAT, "max_tokens": 4}, True), 90, 100) == 4
    both = {**CHAT, "max_tokens": 4, "max_completion_tokens": 6}
    assert requests.output_limit(parse(both, True), 90, 100) == 6
    assert requests.output_limit(parse({**CHAT, "max_tokens": 400}, True), 90, 100) == 10
    assert requests.output_limit(parse(TEXT, False), 10, 100) == 16
    assert requests.output_limit(parse(TEXT, False), 99, 100) == 1


@pytest.mark.parametrize("prompt_tokens", [100, 101, 5000])
def test_a_prompt_that_fills_the_window_is_refused(prompt_tokens: int) -> None:
    """One token must be left for the answer; the message has both numbers."""
    with pytest.raises(ApiError) as caught:
        requests.output_limit(parse(TEXT, False), prompt_tokens, 100)
    assert caught.value.code == "context_length_exceeded"
    assert str(prompt_tokens) in caught.value.message
    assert "100" in caught.value.message


def test_min_tokens_follows_the_limit() -> None:
    """`min_tokens` above the asked maximum is refused; above what the window leaves, it is cut with it."""
    with pytest.raises(ApiError) as caught:
        requests.output_limit(parse({**CHAT, "min_tokens": 5, "max_tokens": 4}, True), 1, 100)
    assert caught.value.param == "min_tokens"
    body = parse({**CHAT, "min_tokens": 50, "max_tokens": 60}, True)
    limit = requests.output_limit(body, 90, 100)
    assert requests.engine_fields(body, limit)["min_tokens"] == limit == 10


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    """An id without an embedding would break the engine for everybody."""
    requests.check_token_ids((0, 99), 100)
    for ids, wrong in (((5, 100), 100), ((5, -1), -1), ((10**30,), 10**30)):
        with pytest.raises(ApiError, match=str(wrong)) as caught:
            requests.check_token_ids(ids, 100)
        assert caught.value.code == "invalid_token_id"


def test_tools_in_the_prompt_follow_tool_choice() -> None:
    """The template gets all tools, only the named one, or none."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]

    def shown(choice: object) -> list[str] | None:
        body = requests.parse_chat(msgspec.json.encode({**CHAT, "tools": tools, "tool_choice": choice}))
        chosen = requests.template_tools(body)
        return None if chosen is None else [tool["function"]["name"] for tool in chosen]

    assert shown(None) == shown("auto") == shown("required") == ["a", "b"]
    assert shown("none") is None
    assert shown({"type": "function", "function": {"name": "b"}}) == ["b"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("code", "engine_status", "status"),
    [
        ("no_engine_available", 0, 503),
        ("upstream_failed", 0, 502),
        ("bad_upstream_request", 422, 422),
        ("bad_upstream_request", 409, 400),
        ("bad_upstream_request", 0, 400),
        ("bad_upstream_request", 500, 400),
    ],
)
def test_refusals_become_statuses(code: str, engine_status: int, status: int) -> None:
    """A refused round has the status of whose fault it was, and never 409."""
    error = from_refusal(RoundRefused(code, "why", 0.25, engine_status, b'{"message": "their words"}'))
    assert error.status == status
    assert error.message == ("their words" if code == "bad_upstream_request" else "why")
    assert error.headers().get("retry-after-ms") == (None if code == "bad_upstream_request" else "250")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"object": "error", "message": "b"}', "b"),
        (b'{"error": "c"}', "c"),
        (b'{"detail": [1]}', "[1]"),
        (b"plain \xff", "plain \ufffd"),
        (b"", ""),
        (b"[" * 100_000, "[" * 2000),
    ],
    ids=range(7),
)
def test_messages_of_engines_are_found(body: bytes, text: str) -> None:
    """Whatever shape an engine's error has, its words come out, bounded."""
    assert upstream_message(body) == text


# ---------------------------------------------------------------- fuzz

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({*requests.ChatBody.__struct_fields__, *requests.CompletionBody.__struct_fields__})
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": JSON}))
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool"]) | JSON,
        "content": st.text(max_size=5)
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": JSON}))
        | JSON,
        "tool_calls": st.lists(st.fixed_dictionaries({"function": JSON}), max_size=2) | JSON,
    },
)
BODIES = st.builds(
    lambda base, changes: {**base, **changes},
    st.sampled_from([CHAT, TEXT, {}]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4)
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
)


@settings(max_examples=400, deadline=None)
@given(raw=st.binary(max_size=60) | BODIES.map(msgspec.json.encode), chat=st.booleans())
def test_any_body_is_parsed_or_refused(raw: bytes, chat: bool) -> None:
    """No bytes whatever make the parser raise anything but an `ApiError` of status 400."""
    try:
        body = parse(raw, chat)
        limit = requests.output_limit(body, 10, 100)
        msgspec.json.encode(requests.engine_fields(body, limit))
        read_said({}, body)
        if isinstance(body, requests.ChatBody):
            requests.template_tools(body)
            requests.template_kwargs(body)
    except ApiError as error:
        assert error.status == 400
        assert error.message
