"""/v1/responses that are asked again: the same response, from where its first try began, by any replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from antiphon.scheduler.gateway.prompts import PromptTokenizer
from antiphon.scheduler.gateway.response_events import ResponseEvents
from antiphon.scheduler.response_store import LedgerUnavailable, ResponseStore
from tests.append_helpers import Gateway, line, stack
from tests.ledger_helpers import until

RESPONSES = "/v1/responses"
AGAIN = {"X_Stainless_Retry_Count": "1"}
KEY = {"Idempotency_Key": "k"}
TRIES = pytest.mark.parametrize(("first", "again"), [(KEY, KEY), ({}, AGAIN)], ids=["key", "count"])
SLOW = {"max_output_tokens": 100_000, "ignore_eos": True}
"""A round that runs until it is aborted."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PromptTokenizer:
    return PromptTokenizer(tiny_model_dir)


@pytest.fixture
def run(valkey_url: str, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario on two gateways over an engine that answers with these lines."""

    def start(
        work: Callable[[Gateway, Gateway], Coroutine[Any, Any, None]], lines: Sequence[dict[str, Any]] = ()
    ) -> None:
        async def all_of_it() -> None:
            async with (
                stack(valkey_url, tiny_model_dir, tmp_path / "script.jsonl", lines) as made,
                made.gateway() as gateway,
                made.gateway() as other,
            ):
                await work(gateway, other)

        asyncio.run(all_of_it())

    return start


async def ask(gateway: Gateway, text: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    status, answer = await gateway.post(
        RESPONSES, {"input": text, "max_output_tokens": 6} | body, **(headers or {})
    )
    assert status == 200, answer
    await gateway.recorded()
    return answer


async def said_in(gateway: Gateway, conversation: str) -> list[str]:
    """What users said in a conversation, as the next request would go on from."""
    store = ResponseStore(gateway.ledger, 60.0)
    last = await store.last_of("default", conversation)
    past = await store.past("default", last) if last else None
    messages = [msgspec.json.decode(message) for message in (past.messages if past else ())]
    return [message["content"] for message in messages if message["role"] == "user"]


async def streaming(gateway: Gateway) -> None:
    """Its round has begun to answer."""

    async def begun() -> bool:
        return any(live.handle.arm for live in gateway.replica.runtime._live.values())

    await until(begun)


async def counts(gateway: Gateway) -> dict[str, int]:
    await gateway.recorded()
    return await gateway.ledger.counters()


@TRIES
@pytest.mark.parametrize("by", ["conversation", "previous_response_id"])
def test_a_stored_response_is_given_again(
    run: Callable[..., None], by: str, first: dict[str, str], again: dict[str, str]
) -> None:
    """The first of its conversation and one that goes on: same object, no round, nothing grows."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        opened = await ask(gateway, "a", first and {"Idempotency_Key": "a"}, conversation="c")
        repeated = await ask(other, "a", {"Idempotency_Key": "a"} if first else again, conversation="c")
        assert repeated == opened
        onwards = {by: "c" if by == "conversation" else opened["id"]}
        made = await ask(gateway, "b", first, **onwards)
        assert made["session"]["id"] == opened["session"]["id"] and made["session"]["round"] == 2
        for where in (gateway, other):
            assert await ask(where, "b", again, **onwards) == made
        assert await counts(gateway) == {"completed": 2} and not other.seen.requests
        if by == "conversation":
            assert await said_in(other, "c") == ["a", "b"]
        third = await ask(other, "b", previous_response_id=made["id"])
        assert third["session"] == made["session"] | {"round": 3} and third["id"] != made["id"]

    run(work)


@TRIES
def test_a_conversation_that_has_gone_on_gives_the_old_answer(
    run: Callable[..., None], first: dict[str, str], again: dict[str, str]
) -> None:
    """The same words said twice are two rounds; a retry is of the later one without a key."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        made = [
            await ask(gateway, "go on", first and {"Idempotency_Key": f"k{n}"}, conversation="c")
            for n in range(3)
        ]
        assert [m["session"]["round"] for m in made] == [1, 2, 3]
        for n in range(3):
            repeated = await ask(other, "go on", again and ({"Idempotency_Key": f"k{n}"} if first else again),
                                 conversation="c")  # fmt: skip
            assert repeated == made[n if first else 2]
        assert await said_in(other, "c") == ["go on"] * 3

    run(work)


@TRIES
def test_streams_tell_it_again(
    run: Callable[..., None], first: dict[str, str], again: dict[str, str]
) -> None:
    """Asked whole and then as a stream, and the other way round; headers say that it is kept."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        body = {"input": "hi", "conversation": "c", "max_output_tokens": 6}
        events = await gateway.events(RESPONSES, body, **first)
        final = events[-1]["response"]
        told = await other.events(RESPONSES, body, **again)
        assert told[-1]["response"] == final
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        kinds = [event["type"] for event in events]
        assert [event["type"] for event in told] == list(dict.fromkeys(kinds))
        assert await ask(other, "hi", again, conversation="c") == final
        headers = {name.replace("_", "-"): value for name, value in again.items()}
        content = msgspec.json.encode({"model": "tiny", "temperature": 0, **body})
        async with other.http.post(other.url + RESPONSES, data=content, headers=headers) as answer:
            assert answer.headers["x-antiphon-replayed"] == "true"
            assert answer.headers["x-session-id"] == final["session"]["id"]
            assert answer.headers["x-session-round"] == "1"
        assert await counts(gateway) == {"completed": 1}

    run(work)


@TRIES
@pytest.mark.parametrize("where", ["the same replica", "another replica"])
def test_a_try_that_still_runs_is_taken_over(
    run: Callable[..., None], where: str, first: dict[str, str], again: dict[str, str]
) -> None:
    """From where it began; the response has its id, and stands in the conversation once."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        second = gateway if where == "the same replica" else other
        opened = await ask(gateway, "a", conversation="c")
        body = {"input": "b", "conversation": "c", **SLOW}
        running = asyncio.create_task(gateway.events(RESPONSES, body, **first))
        await streaming(gateway)
        (held,) = gateway.replica.runtime._live
        retried = asyncio.create_task(second.events(RESPONSES, body, **again))
        lines = await running
        assert lines[-1]["type"] == "response.failed" and held not in gateway.replica.runtime._live
        await streaming(second)
        retried.cancel()
        await asyncio.wait([retried])

        async def ended() -> bool:
            return (await counts(second)) == {"completed": 1, "fenced": 1, "cancelled": 1}

        await until(ended)
        assert await said_in(other, "c") == ["a"]
        last = await ask(other, "b", conversation="c")
        # The round that was cut off has number 2.
        assert (last["session"]["id"], last["session"]["round"]) == (opened["session"]["id"], 3)
        assert lines[0]["response"]["id"] != last["id"]

    run(work)


@TRIES
def test_a_try_that_died_before_it_was_stored(
    run: Callable[..., None], first: dict[str, str], again: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client hung up: the retry has its id and its round."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        opened = await ask(gateway, "a", conversation="c")
        body = {"input": "b", "conversation": "c", "max_output_tokens": 600, "ignore_eos": True}
        seen: list[str] = []
        begin = ResponseEvents.begin

        def noted(self: ResponseEvents) -> Any:
            seen.append(self.response_id)
            return begin(self)

        monkeypatch.setattr(ResponseEvents, "begin", noted)
        running = asyncio.create_task(gateway.events(RESPONSES, body, **first))
        await streaming(gateway)
        await until_true(lambda: seen)
        running.cancel()
        await asyncio.wait([running])

        async def cancelled() -> bool:
            return (await counts(gateway)).get("cancelled") == 1

        await until(cancelled)
        status, answer = await other.post(RESPONSES, body, **again)
        assert (status, answer["id"]) == (200, seen[0])
        assert answer["session"]["id"] == opened["session"]["id"] and answer["session"]["round"] == 2
        assert await said_in(gateway, "c") == ["a", "b"]

    run(work)


async def until_true(condition: Callable[[], object]) -> None:
    async def holds() -> bool:
        return bool(condition())

    await until(holds)


@TRIES
def test_a_late_first_try_is_not_stored(
    run: Callable[..., None], tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch,
    first: dict[str, str], again: dict[str, str],
) -> None:  # fmt: skip
    """It answers after its retry has begun: what is kept is the retry's answer, once."""
    late, go_on = asyncio.Event(), asyncio.Event()
    put = ResponseStore.put

    async def slowly(self: ResponseStore, *arguments: Any, **more: Any) -> bool:
        if not late.is_set():
            late.set()
            await go_on.wait()
        return await put(self, *arguments, **more)

    async def work(gateway: Gateway, other: Gateway) -> None:
        monkeypatch.setattr(ResponseStore, "put", slowly)
        running = asyncio.create_task(ask(gateway, "a", first, conversation="c"))
        await late.wait()
        await gateway.recorded()
        answer = await ask(other, "a", again, conversation="c")
        go_on.set()
        late_one = await running
        assert late_one["id"] == answer["id"] and (late_one["store"], answer["store"]) == (False, True)
        kept = await ResponseStore(gateway.ledger, 60.0).get("default", answer["id"])
        assert kept is not None and msgspec.json.decode(kept) == answer
        assert await said_in(other, "c") == ["a"]

    run(work, [line(tokenizer, " old"), line(tokenizer, " new")])


@TRIES
def test_a_try_that_was_answered_and_not_stored(
    run: Callable[..., None], first: dict[str, str], again: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replica lost the ledger in between: the retry stores it, and the round is recorded once."""
    put = ResponseStore.put
    failed: list[bool] = []

    async def fails_once(self: ResponseStore, *arguments: Any, **more: Any) -> bool:
        if not failed:
            failed.append(True)
            raise LedgerUnavailable("away for a moment")
        return await put(self, *arguments, **more)

    async def work(gateway: Gateway, other: Gateway) -> None:
        monkeypatch.setattr(ResponseStore, "put", fails_once)
        made = await ask(gateway, "a", first, conversation="c")
        assert not made["store"] and await said_in(gateway, "c") == []
        same = await ask(other, "a", again, conversation="c")
        assert same["store"] and (same["id"], same["output"]) == (made["id"], made["output"])
        assert same["created_at"] == made["created_at"] and same["session"]["id"] == made["session"]["id"]
        assert await said_in(other, "c") == ["a"]
        assert (await counts(other))["completed"] == 1
        assert (await ask(other, "b", conversation="c"))["session"]["round"] == 2

    run(work)


@TRIES
def test_a_branch_is_made_once(
    run: Callable[..., None], first: dict[str, str], again: dict[str, str]
) -> None:
    """Also one that is not stored, whose round runs again: in the same child of its session."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        root = await ask(gateway, "a")
        await ask(gateway, "b", previous_response_id=root["id"])
        for n, store in enumerate((True, False)):
            key = first and {"Idempotency_Key": f"k{n}"}
            branch = await ask(gateway, f"c{n}", key, previous_response_id=root["id"], store=store)
            assert branch["session"]["parent_id"] == root["session"]["id"]
            same = await ask(other, f"c{n}", key or again, previous_response_id=root["id"], store=store)
            assert (same["id"], same["output"]) == (branch["id"], branch["output"])
            assert same["session"]["id"] == branch["session"]["id"] and same["session"]["round"] == 1
        sessions, _ = await gateway.ledger.sessions(10)
        assert len(sessions) == 3

    run(work)


def test_a_key_is_of_one_body(run: Callable[..., None]) -> None:
    """Another one gets 422, and so does another session; what was refused binds nothing."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        wrong = {"input": "a", "conversation": "c", "session": {"append": True}}
        refused = {"input": "a", "conversation": "c", "temperature": 0, "seed": 1, "min_p": 7}
        for body in (wrong, refused):
            status, error = await gateway.post(RESPONSES, body, **KEY)
            assert (status, error["error"]["type"]) == (400, "invalid_request_error"), error
        made = await ask(gateway, "a", KEY, conversation="c")
        changes: list[dict[str, Any]] = [
            {"input": "b"}, {"conversation": "d"}, {"tools": []}, {"max_output_tokens": 5},
        ]  # fmt: skip
        for change in changes:
            body = {"input": "a", "max_output_tokens": 6, "conversation": "c"} | change
            status, error = await other.post(RESPONSES, body, **KEY)
            assert (status, error["error"]["code"]) == (422, "idempotency_key_reused"), change
        body = {"input": "a", "max_output_tokens": 6, "conversation": "c"}
        status, error = await other.post(RESPONSES, body, X_Session_ID="s", **KEY)
        assert (status, error["error"]["code"]) == (422, "idempotency_key_reused")
        status, error = await other.post(RESPONSES, body, Idempotency_Key="a b")
        assert (status, error["error"]["code"]) == (400, "invalid_idempotency_key")
        assert await ask(other, "a", KEY, conversation="c") == made

    run(work)


def test_two_clients_that_ask_the_same_keep_their_own(run: Callable[..., None]) -> None:
    """Without key, conversation and session nobody can tell whose retry it is."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        answers = [await ask(where, "hi", more) for where, more in
                   ((gateway, None), (other, None), (other, AGAIN))]  # fmt: skip
        assert len({answer["id"] for answer in answers}) == 3
        named = [await ask(gateway, "yo", {"X_Session_ID": name}) for name in ("s", "t")]
        assert await ask(other, "yo", {"X_Session_ID": "s", **AGAIN}) == named[0]

    run(work)


def test_the_ledger_may_be_away(run: Callable[..., None]) -> None:
    """A response that begins a conversation needs nothing from it: it is answered, and not stored."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        gateway.ledger.connection.failures.failed()
        status, answer = await gateway.post(RESPONSES, {"input": "hi", "max_output_tokens": 4}, **KEY)
        assert status == 200 and answer["output"]

    run(work)


def test_a_conversation_that_went_on_without_a_failed_try_is_kept(run: Callable[..., None]) -> None:
    """The retry of a try that was never stored comes behind what was said meanwhile."""

    async def work(gateway: Gateway, other: Gateway) -> None:
        await ask(gateway, "a", conversation="c")
        body = {"input": "b", "conversation": "c", "max_output_tokens": 600, "ignore_eos": True}
        running = asyncio.create_task(gateway.events(RESPONSES, body, **KEY))
        await streaming(gateway)
        running.cancel()
        await asyncio.wait([running])

        async def cancelled() -> bool:
            return (await counts(gateway)).get("cancelled") == 1

        await until(cancelled)
        await ask(gateway, "c", conversation="c")
        status, answer = await other.post(RESPONSES, body, **KEY)
        assert status == 200, answer
        assert await said_in(other, "c") == ["a", "c", "b"]

    run(work)
