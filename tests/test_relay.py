"""From engine chunks to what a client sees: events, and their fold into one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines.base import Chunk
from antiphon.engines.prompt import Prompt
from antiphon.scheduler.gateway import relay
from antiphon.scheduler.gateway.relay import AnswerForm
from antiphon.scheduler.rounds import RoundBroke, RoundHandle, RoundRequest
from tests.gateway_helpers import chat_chunk, make_receipt, text_chunk, usage_chunk

CHAT = AnswerForm(
    chat=True, model="m", answer_id="chatcmpl-1", stream=False, include_usage=True, token_ids=False,
    identified_by="new",
)  # fmt: skip
TEXT = replace(CHAT, chat=False, answer_id="cmpl-1")


def request(prompt_tokens: int = 10) -> RoundRequest:
    return RoundRequest("r1", "s1", "default", "/v1/x", Prompt(range(prompt_tokens)), {}, 5, 1.0, 1.0)


async def filled(chunks: list[Chunk], cached: int | None = 0, error: Exception | None = None) -> RoundHandle:
    """A handle whose stream has ended."""
    handle = RoundHandle(request())
    handle.round_number, handle.arm, handle.parent_id = 4, "remote_pull", "p1"
    for chunk in chunks:
        await handle.push(chunk)
    if cached is not None:
        handle.receipt = make_receipt(handle.request, cached_tokens=cached)
    handle.finish(error)
    return handle


def events(chunks: list[Chunk], form: AnswerForm, cached: int | None = 0) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [event async for event in relay.events(await filled(chunks, cached), form)]

    return asyncio.run(collect())


def folded(chunks: list[Chunk], form: AnswerForm) -> dict[str, Any]:
    async def fold() -> dict[str, Any]:
        return await relay.fold(relay.events(await filled(chunks), form), form)

    return asyncio.run(fold())


def test_every_event_has_our_id_and_the_clients_model() -> None:
    """The engine's id is its abort handle and its model name an internal one: neither is shown."""
    shown = events([text_chunk("a"), usage_chunk(10, 1, 0)], TEXT)
    assert [(event["id"], event["model"], event["created"]) for event in shown] == [("cmpl-1", "m", 5)] * 2
    assert "engine-rid" not in str(shown)


def test_usage_is_shown_only_when_asked() -> None:
    """Without `include_usage` the usage event and the null usages of other events are left out."""
    chunks = [text_chunk("a"), text_chunk("b", (), "stop"), usage_chunk(10, 2, 3)]
    silent = events(chunks, replace(TEXT, include_usage=False))
    assert len(silent) == 2 and all("usage" not in event for event in silent)
    asked = events(chunks, TEXT)
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 2
    assert all("usage" not in event for event in asked[:-1])


def test_cached_tokens_are_the_receipts() -> None:
    """The true value replaces the engine's own, bounded by the prompt; the rest of usage stays."""
    usage = events([usage_chunk(10, 2, 9)], TEXT, cached=4)[-1]["usage"]
    assert usage == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
        "reasoning_tokens": 0,
    }
    assert events([usage_chunk(10, 2, 9)], TEXT, cached=40)[-1]["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 10
    }


def test_usage_is_made_up_from_what_is_known() -> None:
    """An engine that sends no usage costs the client none of it."""
    usage = events([text_chunk("ab", (1, 2))], TEXT, cached=None)[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 2, 12)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_session_comes_with_usage() -> None:
    """The last event names session, parent, round and arm."""
    session = events([usage_chunk(10, 2, 0)], TEXT)[-1]["session"]
    assert session == {
        "id": "s1",
        "parent_id": "p1",
        "round": 4,
        "arm": "remote_pull",
        "identified_by": "new",
        "expires_in_s": None,
        "worker": "e0",
    }


def test_token_ids_only_when_asked() -> None:
    """Ids go into the first choice; an event that existed only for them is an empty delta or nothing."""
    chunks = [text_chunk("a", (7,)), Chunk(None, (8, 9)), Chunk(None)]
    silent = events(chunks, replace(TEXT, include_usage=False))
    assert len(silent) == 1 and "token_ids" not in silent[0]["choices"][0]
    asked = events(chunks, replace(TEXT, include_usage=False, token_ids=True))
    assert [event["choices"][0]["token_ids"] for event in asked] == [(7,), (8, 9)]
    assert asked[1]["choices"][0]["text"] == ""
    late = events([Chunk(None, (8,))], replace(CHAT, include_usage=False, token_ids=True))
    assert late[0]["choices"][0]["delta"] == {} and late[0]["object"] == "chat.completion.chunk"


def test_chunks_are_not_changed() -> None:
    """The relay works on copies: a chunk may be read by others."""
    chunk = usage_chunk(10, 1, 0)
    first = text_chunk("a", (7,))
    events([first, chunk], replace(TEXT, token_ids=True))
    assert first == text_chunk("a", (7,)) and chunk == usage_chunk(10, 1, 0)


def test_a_broken_stream_raises_after_its_chunks() -> None:
    """What came before the break is relayed, then the break shows."""

    async def scenario() -> None:
        shown = relay.events(await filled([text_chunk("a")], error=RoundBroke("gone")), TEXT)
        assert (await anext(shown))["choices"][0]["text"] == "a"
        with pytest.raises(RoundBroke):
            await anext(shown)

    asyncio.run(scenario())


def test_fold_of_text() -> None:
    """One completion object: text, finish reason, logprobs, ids, usage and session."""
    first = text_chunk("a", (1,))
    second = text_chunk("b", (2,), "length")
    assert first.data is not None and second.data is not None
    first.data["choices"][0]["logprobs"] = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": None}
    second.data["choices"][0]["logprobs"] = {"tokens": ["b"], "token_logprobs": [-2.0], "top_logprobs": None}
    second.data["choices"][0]["matched_stop"] = 5
    whole = folded([first, second, usage_chunk(10, 2, 0)], replace(TEXT, token_ids=True))
    assert whole["object"] == "text_completion" and whole["usage"]["total_tokens"] == 12
    assert whole["choices"] == [
        {
            "index": 0,
            "text": "ab",
            "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": None},
            "finish_reason": "length",
            "matched_stop": 5,
            "token_ids": [1, 2],
        }
    ]
    assert whole["session"]["round"] == 4


def test_fold_of_chat_with_reasoning_and_logprobs() -> None:
    """Role, reasoning and content are joined; chat logprobs are one list."""
    token = chat_chunk({"content": "x"}, (), "stop")
    assert token.data is not None
    token.data["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}]}
    chunks = [
        chat_chunk({"role": "assistant", "content": ""}),
        chat_chunk({"reasoning_content": "let me "}),
        chat_chunk({"reasoning_content": "think", "content": None}),
        token,
    ]
    whole = folded(chunks, CHAT)
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "x",
        "reasoning_content": "let me think",
    }
    assert whole["choices"][0]["logprobs"] == {"content": [{"token": "x", "logprob": -0.5}]}
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_fold_of_parallel_tool_calls() -> None:
    """Calls are told apart by index, their arguments joined; content is null beside them."""

    def call(index: int, arguments: str, **first: str) -> Chunk:
        function = {"arguments": arguments, **({"name": first["name"]} if first else {"name": None})}
        delta = {"index": index, "id": first.get("id"), "type": "function", "function": function}
        return chat_chunk({"tool_calls": [delta]})

    chunks = [
        chat_chunk({"role": "assistant"}),
        call(0, "", id="c0", name="search"),
        call(0, '{"q": '),
        call(1, "", id="c1", name="fetch"),
        call(0, '"x"}'),
        call(1, "{}"),
        chat_chunk({}, (), "tool_calls"),
    ]
    choice = folded(chunks, CHAT)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}},
            {"id": "c1", "type": "function", "function": {"name": "fetch", "arguments": "{}"}},
        ],
    }


def test_an_empty_answer_is_an_empty_text() -> None:
    """Without tool calls, content is "" and not null."""
    choice = folded([chat_chunk({"role": "assistant"}, (), "stop")], CHAT)["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ""}


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.text(max_size=4), st.lists(st.integers(0, 99), max_size=3)), max_size=8),
    chat=st.booleans(),
)
def test_fold_is_the_join_of_the_stream(pieces: list[tuple[str, list[int]]], chat: bool) -> None:
    """However an answer was cut into chunks, the whole has all its text and ids in order."""
    form = replace(CHAT if chat else TEXT, token_ids=True)
    chunks = [
        chat_chunk({"content": text}, tuple(ids)) if chat else text_chunk(text, tuple(ids))
        for text, ids in pieces
    ]
    end = chat_chunk({}, (), "stop") if chat else text_chunk("", (), "stop")
    choice = folded([*chunks, end], form)["choices"][0]
    text = choice["message"]["content"] if chat else choice["text"]
    assert text == "".join(piece for piece, _ in pieces)
    assert choice["token_ids"] == [token for _, ids in pieces for token in ids]


def test_frames_are_unnamed_events() -> None:
    """One `data:` line and a blank line: a named event would be taken for a chunk."""
    assert relay.frame({"a": "x\ny"}) == b'data: {"a":"x\\ny"}\n\n'


def test_an_empty_list_of_log_probabilities_stays_one() -> None:
    """`logprobs: 0` asks for no alternatives: SGLang then says [], not null."""
    said = text_chunk("a", (1,), "length")
    assert said.data is not None
    said.data["choices"][0]["logprobs"] = {"token_logprobs": [-1.0], "top_logprobs": [], "text_offset": None}
    whole = folded([said, said, usage_chunk(10, 2, 0)], TEXT)
    assert whole["choices"][0]["logprobs"] == {
        "token_logprobs": [-1.0, -1.0], "top_logprobs": [], "text_offset": None,
    }  # fmt: skip


@pytest.mark.parametrize("told", [1, 2])
def test_missing_log_probabilities_are_said(told: int) -> None:
    """Chats only: an engine may leave out those of tokens that bring no text."""
    said = [chat_chunk({"content": "a"}, (), None) for _ in range(told)]
    for chunk in said:
        assert chunk.data is not None
        chunk.data["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1.0}]}
    end = [chat_chunk({}, (), "stop"), usage_chunk(10, 2, 0)]
    whole = folded([*said, *end], replace(CHAT, logprobs=True))
    warnings = [] if told == 2 else [relay.LOGPROBS_MISSING.format(1)]
    assert list(whole["session"].get("warnings", ())) == warnings
    assert "warnings" not in folded([*said, *end], CHAT)["session"]


@given(st.text(), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_an_echo_is_what_the_client_sent(sent: str, indices: list[int]) -> None:
    """In the first event of each choice, and nowhere else."""
    form = replace(TEXT, echo=relay.Echo("shown", sent))
    chunks, seen = [], set()
    for index in indices:
        chunk = text_chunk("shown!" if index not in seen else "shown?")
        assert chunk.data is not None
        chunk.data["choices"][0]["index"] = index
        chunks.append(chunk)
        seen.add(index)
    whole = folded([*chunks, usage_chunk(10, 3, 0)], form)
    for choice in whole["choices"]:
        more = indices.count(choice["index"]) - 1
        assert choice["text"] == sent + "!" + "shown?" * more


def test_the_last_event_waits_until_the_ledger_knows_the_end() -> None:
    """Else the session's next round, sent at once, would find it busy and become a fork."""

    async def scenario() -> None:
        handle = await filled([text_chunk("a", (1,))])
        told = asyncio.Event()

        async def record() -> None:
            await told.wait()

        handle.recording = asyncio.create_task(record())
        answer = relay.events(handle, TEXT)
        assert (await anext(answer))["choices"]
        last = asyncio.ensure_future(_rest(answer))
        done, _ = await asyncio.wait({last}, timeout=0.05)
        assert not done
        told.set()
        assert (await last)[-1]["usage"]

    asyncio.run(scenario())


def test_a_ledger_that_does_not_answer_holds_no_answer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "RECORDED_DEADLINE_S", 0.01)

    async def scenario() -> None:
        handle = await filled([text_chunk("a", (1,))])
        handle.recording = asyncio.create_task(_never())
        assert (await _rest(relay.events(handle, TEXT)))[-1]["usage"]
        assert not handle.recording.done()
        handle.recording.cancel()

    asyncio.run(scenario())


async def _never() -> None:
    await asyncio.Event().wait()


async def _rest(answer: AsyncIterator[relay.Event]) -> list[relay.Event]:
    return [event async for event in answer]
