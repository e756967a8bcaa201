"""A request that is made again is the same round: through gateways, ledger, engine, as a client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from antiphon.scheduler.access_config import LimitsConfig
from antiphon.scheduler.conversation import Conversation
from antiphon.scheduler.gateway.conversations import Conversations
from antiphon.scheduler.gateway.prompts import PromptTokenizer
from antiphon.scheduler.token_log import FencedOff, TokenLogs
from tests.append_helpers import CHAT, Gateway, Stack, line, stack, user
from tests.ledger_helpers import claim, ledger_at, until
from tests.test_token_log import said

AGAIN = {"X_Stainless_Retry_Count": "1"}
SLOW = {"max_tokens": 100_000, "ignore_eos": True}
"""A round that runs until it is aborted."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PromptTokenizer:
    return PromptTokenizer(tiny_model_dir)


@pytest.fixture
def run(valkey_url: str, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario on a stack whose engine answers with these lines."""

    def start(
        work: Callable[[Stack], Coroutine[Any, Any, None]], lines: Sequence[dict[str, Any]] = ()
    ) -> None:
        async def all_of_it() -> None:
            async with stack(valkey_url, tiny_model_dir, tmp_path / "script.jsonl", lines) as made:
                await work(made)

        asyncio.run(all_of_it())

    return start


async def counts(gateway: Gateway) -> dict[str, int]:
    await gateway.recorded()
    return await gateway.ledger.counters()


async def completed(gateway: Gateway) -> list[tuple[str, int]]:
    """(session, round number) of the completions that the ledger has."""
    receipts = await gateway.ledger.receipts(100)
    return [(r["session_id"], r["round_number"]) for r in receipts if r["outcome"] == "completed"]


async def session(gateway: Gateway, session_id: str) -> Any:
    found, _ = await gateway.ledger.sessions(100)
    return next(record for record in found if record.session_id == session_id)


async def streaming(gateway: Gateway) -> None:
    """Its round has begun to answer."""

    async def begun() -> bool:
        return any(live.handle.arm for live in gateway.replica.runtime._live.values())

    await until(begun)


@pytest.mark.parametrize("where", ["the same replica", "another replica"])
@pytest.mark.parametrize("by", ["key", "count"])
def test_a_retry_takes_over_from_a_try_that_still_runs(run: Callable[..., None], where: str, by: str) -> None:
    """The first try is aborted, its end is not recorded, and the round is still the session's first."""
    first_, again = ({"Idempotency_Key": "k"},) * 2 if by == "key" else ({}, AGAIN)

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            second = gateway if where == "the same replica" else other
            body = {"messages": [user("hello")], **SLOW}
            first = asyncio.create_task(gateway.events(CHAT, body, X_Session_ID="s", **first_))
            await streaming(gateway)
            (held,) = gateway.replica.runtime._live
            retried = asyncio.create_task(second.events(CHAT, body, X_Session_ID="s", **again))
            lines = await first
            assert lines[-1]["error"]["code"] == "stream_broke" and "retry" in lines[-1]["error"]["message"]
            assert held not in gateway.replica.runtime._live
            await streaming(second)
            retried.cancel()
            await asyncio.wait([retried])

            async def ended() -> bool:
                return (await counts(second)) == {"fenced": 1, "cancelled": 1}

            await until(ended)
            assert (await gateway.replica.receipts(10, "s"))[-1]["recorded"] == "fenced"
            assert (await second.replica.receipts(10, "s"))[0]["recorded"] == "yes"
            status, answer = await other.post(
                CHAT, {"messages": [user("hello")], "max_tokens": 4}, X_Session_ID="s"
            )
            assert status == 200 and answer["session"]["id"] == "s"

    run(work)


def test_a_retry_takes_over_though_its_client_may_have_one_round(
    valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The first try's place is the retry's. Nobody else gets one."""
    one = LimitsConfig(rounds_in_flight=1)

    async def all_of_it() -> None:
        async with stack(valkey_url, tiny_model_dir, None, limits=one) as made, made.gateway() as gateway:
            body = {"messages": [user("hello")], **SLOW}
            first = asyncio.create_task(gateway.events(CHAT, body, X_Session_ID="s"))
            await streaming(gateway)
            status, error = await gateway.post(CHAT, {"messages": [user("bye")]})
            assert (status, error["error"]["code"]) == (429, "rate_limit_exceeded")
            retried = asyncio.create_task(gateway.events(CHAT, body, X_Session_ID="s", **AGAIN))
            assert "retry" in (await first)[-1]["error"]["message"]
            await streaming(gateway)
            status, error = await gateway.post(CHAT, {"messages": [user("bye")]})
            assert (status, error["error"]["code"]) == (429, "rate_limit_exceeded")
            retried.cancel()
            await asyncio.wait([retried])

            async def there_is_room() -> bool:
                answer = await gateway.post(CHAT, {"messages": [user("bye")], "max_tokens": 4})
                return answer[0] == 200

            await until(there_is_room)

    asyncio.run(all_of_it())


def test_a_retry_is_the_next_try_of_a_round_that_was_cut_off(run: Callable[..., None]) -> None:
    """Cancelled, then done: number 1 both times; one completion; the next round is number 2."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            body = {"messages": [user("hello")], "max_tokens": 600, "ignore_eos": True}
            first = asyncio.create_task(gateway.post(CHAT, body, X_Session_ID="s", Idempotency_Key="k"))
            await streaming(gateway)
            first.cancel()
            await asyncio.wait([first])

            async def cancelled() -> bool:
                return (await counts(gateway)).get("cancelled") == 1

            await until(cancelled)
            status, answer = await other.post(CHAT, body, X_Session_ID="s", Idempotency_Key="k", **AGAIN)
            assert (status, answer["session"]["round"], answer["session"]["id"]) == (200, 1, "s")
            await other.recorded()
            assert (await session(other, "s")).rounds == 1
            status, answer = await other.post(
                CHAT, {"messages": [user("and")], "max_tokens": 4}, X_Session_ID="s"
            )
            assert (status, answer["session"]["round"]) == (200, 2)
            await other.recorded()
            assert await completed(other) == [("s", 2), ("s", 1)]

    run(work)


def test_an_answer_that_did_not_arrive_is_given_again(run: Callable[..., None]) -> None:
    """With a key: word for word, whole or as a stream, by any replica, without an engine."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            body = {"messages": [user("hello")], "max_tokens": 6}
            _, first = await gateway.post(CHAT, body, Idempotency_Key="k")
            status, again = await other.post(CHAT, body, Idempotency_Key="k", **AGAIN)
            assert (status, again) == (200, first)
            streamed = await gateway.events(CHAT, body, Idempotency_Key="stream", X_Session_ID="s")
            assert await other.events(CHAT, body, Idempotency_Key="stream", X_Session_ID="s") == streamed
            content = msgspec.json.encode({"model": "tiny", "temperature": 0, **body})
            headers = {"Idempotency-Key": "k"}
            async with other.http.post(other.url + CHAT, data=content, headers=headers) as answer:
                assert answer.headers["x-antiphon-replayed"] == "true"
                assert answer.headers["x-session-id"] == first["session"]["id"]
            assert not other.seen.requests
            assert await counts(gateway) == {"completed": 2}

    run(work)


def test_without_the_answer_the_round_runs_again(run: Callable[..., None]) -> None:
    """No key, or the answer is gone: the same number again, counted as repeated and not as completed."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            body = {"messages": [user("hello")], "max_tokens": 6}
            for headers, again in (({}, AGAIN), ({"Idempotency_Key": "k"}, {"Idempotency_Key": "k"})):
                name = "s" + headers.get("Idempotency_Key", "")
                _, first = await gateway.post(CHAT, body, X_Session_ID=name, **headers)
                await gateway.recorded()
                before, total = await session(gateway, name), await counts(gateway)
                if headers:
                    connection = gateway.ledger.connection
                    for key in await connection.command("KEYS", f"{connection.tag}:answer:*"):
                        await connection.command("DEL", key)
                status, answer = await other.post(CHAT, body, X_Session_ID=name, **again)
                assert (status, answer["session"]["id"], answer["session"]["round"]) == (200, name, 1)
                assert answer["choices"] == first["choices"]
                after = await counts(other)
                assert after == {**total, "repeated": total.get("repeated", 0) + 1}
                record = await session(other, name)
                assert (record.rounds, record.prompt_tokens, record.completion_tokens) == (
                    before.rounds, before.prompt_tokens, before.completion_tokens,
                )  # fmt: skip
                loaded = await other.logs.load("default", name)
                assert [m["role"] for m in loaded.messages] == ["user", "assistant"]

    run(work)


def test_a_retry_that_names_no_session_comes_to_the_first_try_s(run: Callable[..., None]) -> None:
    """A new conversation, and one that goes on: no second session, no fork."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            messages = [user("hello")]
            for number in (1, 2):
                body = {"messages": messages, "max_tokens": 6}
                _, first = await gateway.post(CHAT, body)
                await gateway.recorded()
                status, again = await other.post(CHAT, body, **AGAIN)
                await other.recorded()
                assert (status, again["session"]["id"]) == (200, first["session"]["id"])
                assert again["session"]["round"] == number
                messages = [*messages, again["choices"][0]["message"], user("go on")]
            sessions, _ = await gateway.ledger.sessions(10)
            assert [(s.session_id, s.rounds) for s in sessions] == [(first["session"]["id"], 2)]
            assert await counts(gateway) == {"completed": 2, "repeated": 2}

    run(work)


def test_two_clients_that_ask_the_same_do_not_meet(run: Callable[..., None]) -> None:
    """Without a session and without a key nobody can tell whose retry it is: it is a round of its own."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            body = {"messages": [user("hello")], "max_tokens": 4}
            answers = [await gateway.post(CHAT, body, **more) for more in ({}, {}, AGAIN)]
            assert len({answer["session"]["id"] for _, answer in answers}) == 3

    run(work)


def test_what_a_key_may_be(run: Callable[..., None]) -> None:
    """A malformed one is the client's error; so is one that is used for another request."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway:
            body = {"messages": [user("hello")], "max_tokens": 4}
            for key in ("", "a b", "k" * 256, "k\u00e9"):
                status, error = await gateway.post(CHAT, body, Idempotency_Key=key)
                assert (status, error["error"]["code"]) == (400, "invalid_idempotency_key"), key
            assert (await gateway.post(CHAT, body, Idempotency_Key="k" * 255))[0] == 200
            for other in (
                {**body, "messages": [user("bye")]}, {**body, "max_tokens": 5}, {**body, "temperature": 1},
                {**body, "session_id": "s"},
            ):  # fmt: skip
                status, error = await gateway.post(CHAT, other, Idempotency_Key="k" * 255)
                assert (status, error["error"]["code"]) == (422, "idempotency_key_reused"), other
                assert error["error"]["param"] == "Idempotency-Key"
            assert await counts(gateway) == {"completed": 1}

    run(work)


def test_an_append_that_is_sent_whole_the_second_time_is_the_same_call(
    run: Callable[..., None], tokenizer: PromptTokenizer
) -> None:
    """As our clients do it: the new messages first, then all of them, under one key."""

    async def work(made: Stack) -> None:
        async with made.gateway() as gateway, made.gateway() as other:
            _, first = await gateway.append("s", user("a"), max_tokens=20)
            _, second = await gateway.post(
                "/v1/sessions/s/rounds", {"messages": [user("b")], "max_tokens": 20}, Idempotency_Key="k"
            )
            await gateway.recorded()
            messages = [user("a"), first["choices"][0]["message"], user("b")]
            status, again = await other.post(
                CHAT, {"messages": messages, "max_tokens": 20}, X_Session_ID="s", Idempotency_Key="k"
            )
            assert (status, again["session"]["id"], again["session"]["round"]) == (200, "s", 2)
            assert again["choices"][0]["message"]["content"] == second["choices"][0]["message"]["content"]
            loaded = await other.logs.load("default", "s")
            assert [m["role"] for m in loaded.messages] == ["user", "assistant"] * 2

    run(work, [line(tokenizer, " one"), line(tokenizer, " two"), line(tokenizer, " two")])


def test_a_try_that_was_replaced_writes_no_history(
    run: Callable[..., None], tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is complete, but late: the retry has the session. What was said is the retry's answer."""
    late, go_on = asyncio.Event(), asyncio.Event()
    keep = Conversations.keep

    async def slowly(self: Conversations, *arguments: Any) -> Any:
        if not late.is_set():
            late.set()
            await go_on.wait()
        return await keep(self, *arguments)

    async def work(made: Stack) -> None:
        monkeypatch.setattr(Conversations, "keep", slowly)
        async with made.gateway() as gateway, made.gateway() as other:
            body = {"messages": [user("b")]}
            first = asyncio.create_task(gateway.post(CHAT, body, X_Session_ID="s"))
            await late.wait()
            status, answer = await other.post(CHAT, body, X_Session_ID="s", **AGAIN)
            assert status == 200
            go_on.set()
            _, late_one = await first
            assert late_one["session"]["warnings"]
            assert late_one["choices"] != answer["choices"]
            messages = (await TokenLogs(made.valkey_url, fleet=made.fleet).load("default", "s")).messages
            assert messages[-1]["content"] == answer["choices"][0]["message"]["content"]
            assert len(messages) == 2
            await gateway.recorded()
            await other.recorded()
            for where, recorded in ((gateway, "yes"), (other, "repeated")):
                (receipt,) = await where.replica.receipts(10, "s")
                assert (receipt["outcome"], receipt["recorded"]) == ("completed", recorded)

    run(work, [line(tokenizer, " old"), line(tokenizer, " new")])


def test_a_log_takes_nothing_from_an_older_claim(valkey_url: str) -> None:
    """By its fence, whenever it comes: before or after the newer claim has written."""

    async def scenario() -> None:
        logs, fleet = TokenLogs(valkey_url, fleet="fenced"), "t"
        empty = Conversation(fleet, "s")
        await logs.fence_off(fleet, "s", 7, 60.0)
        with pytest.raises(FencedOff):
            await logs.add(empty, "s", said(empty, [1, 2], [3], "old"), 60.0, fence=6)
        await logs.add(empty, "s", said(empty, [1, 2], [3], "new"), 60.0, fence=7)
        with pytest.raises(FencedOff):
            await logs.add(empty, "s", said(empty, [1, 2], [3], "old"), 60.0, fence=6)
        assert (await logs.load(fleet, "s")).messages[-1]["content"] == "NEW"
        await logs.fence_off(fleet, "s", 3, 60.0)  # an older one lowers nothing
        with pytest.raises(FencedOff):
            await logs.add(empty, "s", said(empty, [1, 2], [3], "old"), 60.0, fence=6)
        await logs.delete(fleet, "s")
        await logs.close()

    asyncio.run(scenario())


def test_a_claim_that_is_cut_off_is_given_back_at_once(valkey_url: str) -> None:
    """Without a heartbeat; and if it comes after that, it is refused."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await claim(ledger, "A", "r0", "other")
            cut_off = 0
            for turns in range(40):
                task = asyncio.create_task(claim(ledger, "A", f"r{turns}", f"s{turns}"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    break
                cut_off += 1

                async def settled() -> bool:
                    return not len(ledger._settling)

                await until(settled)
                following = await claim(ledger, "A", f"next{turns}", f"s{turns}")
                assert (following.session_id, following.round_number) == (f"s{turns}", 1), turns
            assert cut_off > 3

    asyncio.run(scenario())
