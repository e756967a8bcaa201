"""The Python client without a network: what it sends, what it sends again, and how it reads what comes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.client import Client, Overloaded, Refused, ServerFault, SessionBusy, StreamBroke, Unreachable
from antiphon.client.conversation import Conversation, Round, expectation, messages_of
from antiphon.client.errors import error_of
from antiphon.client.events import PAUSE_S, Events
from antiphon.client.results import Reply, ToolCall, tool_result
from antiphon.client.retries import Send, Wait
from antiphon.client.settings import http_settings
from antiphon.client.streams import StreamReader
from antiphon.client.tool_times import ToolTimes
from antiphon.client.wire import (
    CHAT,
    IDEMPOTENCY_KEY,
    RETRY_COUNT,
    Answer,
    Call,
    Outcome,
    reply_of,
    session_path,
)
from antiphon.scheduler.gateway.conversations import NOT_KEPT

REPLY = {"choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}
OK = Answer(200, {}, msgspec.json.encode(REPLY))
NOBODY = Unreachable("nobody")


def failed(status: int, code: str = "x", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, named, msgspec.json.encode({"error": {"message": "m", "code": code}}))


def drive(plan: Round, outcomes: Sequence[Outcome]) -> tuple[list[Call], list[float], Answer]:
    """Calls made, waits between them, the last answer; every outcome must be asked for."""
    calls, waits, left = [], [], list(outcomes)
    step = next(plan)
    while True:
        try:
            if isinstance(step, Send):
                calls.append(step.call)
                step = plan.send(left.pop(0))
            else:
                assert isinstance(step, Wait)
                waits.append(step.delay_s)
                step = plan.send(None)
        except StopIteration as done:
            assert not left
            return calls, waits, done.value


def begun(**more: Any) -> Conversation:
    """A conversation with one round behind it."""
    made = Conversation("s", None, {"model": "m"}, **more)
    made.finished(messages_of("hello"), reply_of(OK))
    return made


def ask(conversation: Conversation, *outcomes: Outcome) -> tuple[list[Call], list[float], Answer]:
    plan = conversation.round(messages_of("on"), {}, stream=False, final=False, max_retries=2)
    return drive(plan, outcomes)


# ---------------------------------------------------------------- what is sent


def test_the_first_round_is_a_chat_and_the_next_ones_bring_what_is_new() -> None:
    first = Conversation("s/1", "s", {"model": "m", "temperature": 0.5})
    ((call,), _, _) = drive(
        first.round(messages_of("hello"), {"max_tokens": 3}, stream=False, final=False, max_retries=0), [OK]
    )
    key = call.headers[IDEMPOTENCY_KEY]
    named = {"X-Session-ID": "s/1", "X-Parent-Session-ID": "s", IDEMPOTENCY_KEY: key}
    assert (call.path, dict(call.headers)) == (CHAT, named)
    assert call.body == {
        "model": "m",
        "temperature": 0.5,
        "max_tokens": 3,
        "messages": [{"role": "user", "content": "hello"}],
    }
    first.finished(messages_of("hello"), reply_of(OK))
    first.hints = expectation(gap_s=2.0, remaining_rounds=0)
    plan = first.round(messages_of("on"), {}, stream=True, final=True, max_retries=0)
    ((call,), _, _) = drive(plan, [OK])
    assert call.path == "/v1/sessions/s%2F1/rounds"
    assert call.body["messages"] == [{"role": "user", "content": "on"}]
    assert call.body["session"] == {
        "expected_gap_s": 2.0,
        "next_round": {"remaining_rounds": 0},
        "final": True,
        "must_exist": True,
    }
    assert call.stream and call.body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (410, "history_lost"), (404, "session_not_found"), (410, "session_closed"), (404, "not_found"),
        (501, "append_unavailable"), (503, "ledger_unavailable"),
    ],
)  # fmt: skip
def test_everything_is_sent_when_the_server_does_not_hold_it(status: int, code: str) -> None:
    """At once, and it counts as no retry."""
    calls, waits, answer = ask(begun(), failed(status, code), OK)
    assert [call.path for call in calls] == ["/v1/sessions/s/rounds", CHAT] and not waits
    assert [m["content"] for m in calls[1].body["messages"]] == ["hello", "yes", "on"]
    assert RETRY_COUNT not in calls[1].headers and answer.ok


@pytest.mark.parametrize("outcome", [NOBODY, failed(500), failed(502), failed(504), failed(408)])
def test_an_append_that_may_have_run_is_never_repeated_as_one(outcome: Outcome) -> None:
    """The whole conversation is the same round however often it comes; an append would be a second one."""
    calls, waits, _ = ask(begun(), outcome, OK)
    assert [call.path for call in calls] == ["/v1/sessions/s/rounds", CHAT]
    assert calls[1].headers[RETRY_COUNT] == "1" and len(waits) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_an_append_that_was_refused_at_the_door_is_repeated(status: int) -> None:
    calls, waits, _ = ask(begun(), failed(status, retry_after_ms="250"), OK)
    assert [call.path for call in calls] == ["/v1/sessions/s/rounds"] * 2 and waits == [0.25]


@pytest.mark.parametrize("outcome", [NOBODY, failed(502), failed(410, "history_lost"), failed(429)])
def test_every_try_of_a_round_has_the_same_key(outcome: Outcome) -> None:
    """Append or whole: so that the gateway knows them as one call. The next round has another key."""
    conversation = begun()
    calls, _, _ = ask(conversation, outcome, OK)
    (key,) = {call.headers[IDEMPOTENCY_KEY] for call in calls}
    conversation.finished(messages_of("on"), reply_of(OK))
    (following,), _, _ = ask(conversation, OK)
    assert len(calls) == 2
    assert len(key) == 32 and following.headers[IDEMPOTENCY_KEY] != key


@pytest.mark.parametrize("outcome", [failed(400), failed(429, retry_after="999")])
def test_after_a_failure_everything_is_sent(outcome: Outcome) -> None:
    """The server may hold a round whose answer nobody has seen; once answered, appends go on."""
    conversation = begun()
    ask(conversation, outcome)
    ((call,), _, _) = ask(conversation, OK)
    assert call.path == CHAT and len(call.body["messages"]) == 3
    conversation.finished(messages_of("on"), reply_of(OK))
    assert ask(conversation, OK)[0][0].path == "/v1/sessions/s/rounds"


def test_a_round_that_the_server_does_not_keep_is_sent_again() -> None:
    """With the next one, which brings everything; the gateway's warning is known by its words."""
    session = {"id": "s", "warnings": ["about something else", NOT_KEPT]}
    unkept = Answer(200, {}, msgspec.json.encode({**REPLY, "session": session}))
    conversation = begun()
    conversation.finished(messages_of("on"), reply_of(unkept))
    ((call,), _, _) = ask(conversation, OK)
    assert call.path == CHAT and len(call.body["messages"]) == 5
    conversation.finished(messages_of("on"), reply_of(OK))
    assert ask(conversation, OK)[0][0].path == "/v1/sessions/s/rounds"


def test_a_resumed_session_has_nothing_to_send_again() -> None:
    """Its append is repeated only when nothing has happened of it; what is lost is the caller's to know."""
    resumed = Conversation("s", None, {}, resumed=True)
    assert ask(resumed, failed(410, "history_lost"))[2].status == 410
    assert ask(resumed, failed(502))[2].status == 502
    with pytest.raises(Unreachable):
        ask(resumed, NOBODY)
    assert ask(resumed, failed(429), OK)[2].ok


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize(
    ("outcomes", "waits"),
    [
        ([failed(400)], []),
        ([failed(409)], []),
        ([failed(500, x_should_retry="false")], []),
        ([failed(400, x_should_retry="true"), OK], None),
        ([failed(429, retry_after_ms="1500"), failed(503, retry_after="2"), OK], [1.5, 2.0]),
        ([failed(429, retry_after="121")], []),
        ([failed(503), failed(503), failed(503)], None),
        ([failed(503, retry_after_ms="soon"), OK], None),
        ([failed(503, retry_after_ms="-1"), OK], None),
        ([failed(503, retry_after_ms="inf"), OK], None),
    ],
)
def test_retries(outcomes: list[Outcome], waits: list[float] | None) -> None:
    """As the server wishes; without a wish after a moment that grows; never for the caller's own faults."""
    fresh = Conversation("s", None, {})
    calls, waited, answer = ask(fresh, *outcomes)
    assert answer is outcomes[-1] and len(calls) == len(outcomes)
    if waits is not None:
        assert waited == waits
    else:
        assert all(0.37 <= wait <= 1.0 for wait in waited)
    assert [call.headers.get(RETRY_COUNT) for call in calls] == [None, "1", "2"][: len(calls)]


def test_nobody_answers() -> None:
    with pytest.raises(Unreachable):
        ask(Conversation("s", None, {}), NOBODY, NOBODY, NOBODY)


# ---------------------------------------------------------------- conversation


def test_one_round_at_a_time() -> None:
    conversation = begun()
    conversation.begin()
    with pytest.raises(SessionBusy):
        conversation.begin()
    conversation.end()
    conversation.begin()


def test_a_round_that_became_a_fork_is_the_session_from_then_on() -> None:
    conversation = begun()
    answer = {**REPLY, "session": {"id": "s~2", "parent_id": "s", "round": 1}}
    conversation.finished(messages_of("on"), reply_of(Answer(200, {}, msgspec.json.encode(answer))))
    assert (conversation.id, conversation.parent_id) == ("s~2", "s")


@pytest.mark.parametrize("resumed", [False, True])
def test_an_append_says_behind_which_round_it_stands(resumed: bool) -> None:
    """By the number of the last answer, also of a fork that the server made; nothing if it said none."""
    conversation = Conversation("s", None, {}, resumed=resumed)
    if resumed:
        assert ask(conversation, OK)[0][0].body["session"] == {"must_exist": True}
    for number, (session, said) in enumerate((
        ({"id": "s", "round": 7}, {"after_round": 7}),
        ({"id": "s", "round": 8}, {"after_round": 8}),
        ({"id": "s~1", "parent_id": "s", "round": 1}, {"after_round": 1}),
        ({"id": "s~1", "round": None}, {}),
    )):  # fmt: skip
        answer = Answer(200, {}, msgspec.json.encode({**REPLY, "session": session}))
        conversation.finished(messages_of("on"), reply_of(answer))
        plan = conversation.round(messages_of("on"), {}, stream=number % 2 == 1, final=False, max_retries=0)
        ((call,), _, _) = drive(plan, [OK])
        assert call.path == session_path(conversation.id, "rounds")
        assert call.body["session"] == {"must_exist": True, **said}
    conversation.finished(messages_of("on"), reply_of(OK))
    (child,) = conversation.children(["t"], {}, known=True)
    assert "after_round" not in ask(child, OK)[0][0].body["session"]  # it begins its own count


def test_forks_begin_as_their_parent() -> None:
    """With ids made here; appending at once if the server lets them begin so, with everything otherwise."""
    parent = begun()
    ids = parent.fork_call(2).body["ids"]
    assert len(set(ids)) == 2 and all(child.startswith("s/") for child in ids)
    assert all(len(one) <= 255 for one in Conversation("x" * 255, None, {}).fork_call(1).body["ids"])
    for known, path, messages in ((True, session_path(ids[0], "rounds"), 1), (False, CHAT, 3)):
        child = parent.children(ids, {"temperature": 1}, known=known)[0]
        ((call,), _, _) = ask(child, OK)
        assert call.path == path and call.headers["X-Parent-Session-ID"] == "s"
        assert call.body["temperature"] == 1 and len(call.body["messages"]) == messages
    only_there = Conversation("s", None, {}, resumed=True).children(["t"], {}, known=True)[0]
    assert ask(only_there, OK)[0][0].path == session_path("t", "rounds")
    assert parent.messages == begun().messages
    with pytest.raises(ValueError, match="at least 1"):
        parent.fork_call(0)
    with pytest.raises(Refused):
        Conversation("s", None, {}, resumed=True).children(["t"], {}, known=False)


@pytest.mark.parametrize("wrong", [[], [{"content": "x"}], [{"role": 1}], ["text"], [None]])
def test_what_is_no_message(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        messages_of(wrong)


@pytest.mark.parametrize("name", ["messages", "stream", "session", "session_id", "n"])
def test_options_that_the_session_fills_in(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Conversation("s", None, {name: 1})


# ---------------------------------------------------------------- what comes

CALL = {"id": "c1", "function": {"name": "look", "arguments": '{"a"'}}
EVENTS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"reasoning_content": "Hm."}}]},
    {"choices": [{"delta": {"content": "line\u2028separated\x85 "}}]},
    {"choices": [{"delta": {"content": "é"}}]},
    {"choices": [{"delta": {"tool_calls": [{"index": 0, **CALL}]}}]},
    {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}}]},
    {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
     "session": {"id": "s", "round": 3, "new_key": 1}},
]  # fmt: skip
STREAM = b": ping\n\n" + b"".join(b"data: " + msgspec.json.encode(e) + b"\n\n" for e in EVENTS)
END = b"data: [DONE]\n\n"


def read(*pieces: bytes) -> tuple[Reply, str]:
    reader = StreamReader()
    shown = "".join(delta.text for piece in pieces for delta in reader.feed(piece))
    return reader.reply(), shown


@given(st.lists(st.integers(0, len(STREAM + END)), max_size=20))
def test_a_stream_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM + END)]
    whole = STREAM + END
    reply, shown = read(*(whole[a:b] for a, b in itertools.pairwise(places)))
    assert shown == reply.text == "line\u2028separated\x85 é"
    assert reply.reasoning == "Hm." and reply.finish_reason == "tool_calls"
    assert reply.tool_calls == (ToolCall("c1", "look", '{"a": 1}'),)
    assert reply.tool_calls[0].parsed() == {"a": 1}
    assert reply.usage is not None and reply.usage.cached_tokens == 4
    assert reply.session is not None and reply.session.round == 3
    assert tool_result(reply.tool_calls[0], "r") == {"role": "tool", "tool_call_id": "c1", "content": "r"}


@pytest.mark.parametrize(
    "broken",
    [
        STREAM,
        STREAM + b'data: {"error": {"message": "m", "code": "stream_broke"}}\n\n' + END,
        b"data: {\n\n" + END,
        b"data: []\n\n" + END,
        b'data: {"choices": [1]}\n\n' + END,
        b'data: {"choices": [], "usage": 3}\n\n' + END,
        b"data: \xff\n\n" + END,
    ],
)
def test_a_stream_that_broke_is_no_reply(broken: bytes) -> None:
    with pytest.raises(StreamBroke):
        read(broken)


@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_a_broken_stream(data: bytes) -> None:
    with contextlib.suppress(StreamBroke):
        read(b"data: " + data + b"\n")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": 1}]}'])
def test_an_answer_that_cannot_be_read_is_the_servers_fault(content: bytes) -> None:
    with pytest.raises(ServerFault):
        reply_of(Answer(200, {}, content))


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Refused), (401, Refused), (404, Refused), (410, Refused), (429, Overloaded), (503, Overloaded),
     (500, ServerFault), (502, ServerFault)],
)  # fmt: skip
def test_errors_by_whose_fault(status: int, kind: type[Exception]) -> None:
    body = msgspec.json.encode({"error": {"message": "too much", "code": "c", "param": "p"}})
    error = error_of(status, {"retry-after-ms": "1500", "x-request-id": "r"}, body)
    assert type(error) is kind
    assert (error.code, error.param, error.retry_after_s, error.request_id) == ("c", "p", 1.5, "r")
    assert "too much" in str(error)
    assert "<html>" in str(error_of(status, {}, b"<html>"))


# ---------------------------------------------------------------- events, settings


def test_events_leave_a_gateway_alone_that_does_not_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while; but a session that is unknown says nothing of others."""
    now_s = 100.0
    monkeypatch.setattr("antiphon.client.events.time.monotonic", lambda: now_s)
    events = Events()
    call = events.call("s", "tool_start", {"tool": "t", "expected_gap_s": None})
    assert call is not None and call.body == {"type": "tool_start", "tool": "t"}
    assert events.told(call, Answer(202, {}))
    assert not events.told(call, failed(404, "session_not_found"))
    assert events.call("s", "tool_end", {}) is not None
    assert not events.told(call, NOBODY)
    assert events.call("s", "tool_end", {}) is None
    now_s += PAUSE_S
    assert events.call("s", "tool_end", {}) is not None
    with pytest.raises(ValueError, match="tool_start"):
        events.call("s", "lunch", {})


def test_tool_times_move_towards_what_is_seen() -> None:
    times = ToolTimes()
    assert times.expected_s("t") is None
    times.learn("t", 1.0)
    assert times.expected_s("t") == 1.0
    times.learn("t", 2.0)
    assert times.expected_s("t") == pytest.approx(1.3)


def test_which_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, else the environment, else this machine; with or without OpenAI's /v1."""
    assert http_settings(None, None, 5.0)["base_url"] == "http://127.0.0.1:8000"
    monkeypatch.setenv("ANTIPHON_BASE_URL", "http://gateway/v1/")
    monkeypatch.setenv("ANTIPHON_API_KEY", "secret")
    found = http_settings(None, None, 5.0)
    assert found["base_url"] == "http://gateway"
    assert found["headers"]["Authorization"] == "Bearer secret"
    assert http_settings("https://other:1", "mine", 5.0)["headers"]["Authorization"] == "Bearer mine"
    for wrong in ("gateway:8000", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="base_url"):
            http_settings(wrong, None, 5.0)
    with Client() as client, pytest.raises(ValueError, match="resume"):
        client.session(resume=True)
