"""Answers that break after their first token go on from another engine; nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from antiphon.engines.simulated_request import expected_tokens
from antiphon.policies.base import Arm
from antiphon.scheduler.gateway import relay
from antiphon.scheduler.messages import EngineDown
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.rounds import STREAM_BUFFER_CHUNKS, RoundBroke, RoundHandle, RoundRequest
from tests.core_helpers import Chosen
from tests.replica_helpers import Cluster, cluster, collect, until

PROMPT = list(range(100, 200))
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENS = 10


def request_for(c: Cluster, path: str, tokens: int = TOKENS, **body: Any) -> RoundRequest:
    fields = {"temperature": 0, **body}
    made = c.request(uuid.uuid4().hex, PROMPT, tokens, **fields)
    changes = {name: getattr(made, name) for name in made.__slots__} | {"path": path}
    return RoundRequest(**changes)


def stopped_after(sleep: Callable[[float], Awaitable[object]], steps: int) -> Any:
    """A batch loop's clock that stops for good after so many steps."""
    left = steps

    async def wait(seconds: float) -> None:
        nonlocal left
        left -= 1
        await (sleep(seconds) if left >= 0 else asyncio.Event().wait())

    return wait


class Seen:
    """What a client makes of an answer's chunks."""

    def __init__(self, chunks: list[Any], chat: bool) -> None:
        self.ids = [token for chunk in chunks for token in chunk.token_ids]
        choices = [choice for chunk in chunks for choice in (chunk.data or {}).get("choices", ())]
        deltas = [choice["delta"] if chat else choice for choice in choices]
        self.text = "".join(delta.get("content" if chat else "text") or "" for delta in deltas)
        self.roles = sum(1 for delta in deltas if delta.get("role"))
        self.finish = [c["finish_reason"] for c in choices if c["finish_reason"]]
        self.usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
        self.told = [c.data["usage"] for c in chunks if c.data is not None and c.data.get("usage")]


def whole_text(tokens: int = TOKENS) -> str:
    return "".join(f" {token}" for token in expected_tokens(PROMPT, tokens, 512))


def check(handle: RoundHandle, chunks: list[Any], tries: int, tokens: int = TOKENS) -> None:
    chat = handle.request.path == CHAT
    seen, want = Seen(chunks, chat), list(expected_tokens(PROMPT, tokens, 512))
    assert seen.text == whole_text(tokens)
    assert seen.ids == want
    assert seen.roles == chat and seen.finish == ["length"]
    (usage,), (told,) = seen.usage, seen.told
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, tokens)
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (
        100, tokens, 100 + tokens,
    )  # fmt: skip
    assert handle.answered is not None and list(handle.answered) == PROMPT + want
    receipt = handle.receipt
    assert receipt is not None and receipt.outcome is Outcome.COMPLETED
    assert len(receipt.tries) == tries, receipt.tries
    assert receipt.prompt_tokens == 100 and receipt.completion_tokens == tokens
    assert receipt.home == receipt.tries[-1].placement.home


async def answer(c: Cluster, request: RoundRequest) -> tuple[RoundHandle, list[Any]]:
    async with c.replica.submit(request) as handle:
        await handle.start()
        return handle, await collect(handle)


@asynccontextmanager
async def first_choice(valkey_url: str, engines: str = "d0 d1", **options: Any) -> AsyncIterator[Cluster]:
    """Rounds run on the first engine that they may."""
    async with cluster(valkey_url, "local", engines=engines, **options) as c:
        c.replica.core.policy = Chosen()
        yield c


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_an_answer_goes_on_wherever_it_breaks(valkey_url: str, path: str) -> None:
    """At every token: the same text, ids and usage as if nothing had happened."""

    async def scenario() -> None:
        async with first_choice(valkey_url) as c:
            for after in range(1, TOKENS + 1):
                await c.fault("d0", fault="break_stream", after_tokens=after)
                handle, chunks = await answer(c, request_for(c, path))
                all_came = path == TEXT and after == TOKENS
                check(handle, chunks, 1 if all_came else 2)
                assert handle.receipt is not None
                if not all_came:
                    first, last = handle.receipt.tries
                    assert (first.placement.home, last.placement.home, last.failure) == ("d0", "d1", "")
                    assert "broken" in first.failure
                c.replica.core.check_invariants()
            await c.recorded()
            assert not c.replica.core.rounds

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (4, 2), (4, 4), (4, 7), (9, 10)])
def test_an_answer_may_break_twice(valkey_url: str, path: str, first: int, second: int) -> None:
    """Also within what is generated again, and before the second engine has said anything new."""

    async def scenario() -> None:
        async with first_choice(valkey_url, "d0 d1 d2") as c:
            await c.fault("d0", fault="break_stream", after_tokens=first)
            await c.fault("d1", fault="break_stream", after_tokens=min(second, TOKENS - 1))
            handle, chunks = await answer(c, request_for(c, path))
            left = TOKENS - first if path == TEXT else TOKENS
            check(handle, chunks, 3 if min(second, TOKENS - 1) < left else 2)
            c.replica.core.check_invariants()

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_an_engine_that_is_down_loses_nothing_of_a_reader_that_lags(valkey_url: str, path: str) -> None:
    """The driver waits for room in the reader's buffer when the engine is found dead."""
    tokens = 2 * STREAM_BUFFER_CHUNKS

    async def scenario() -> None:
        async with first_choice(valkey_url, speed=500.0) as c:
            async with c.replica.submit(request_for(c, path, tokens)) as handle:
                await handle.start()
                await until(lambda: handle.lagged)
                incarnation = c.engines["d0"].record.incarnation
                c.replica.runtime.post(EngineDown("d0", incarnation, "killed"))
                check(handle, await collect(handle), 2, tokens)
            assert handle.receipt is not None and "gone: killed" in handle.receipt.tries[0].failure
            assert handle.receipt.home == "d1" and "d0" not in c.replica.core.books.fleet.books
            c.replica.core.check_invariants()

    asyncio.run(scenario())


def test_an_engine_that_hangs_is_left_after_its_deadline(valkey_url: str) -> None:
    """It sends nothing more, and nobody says that it is down: the answer goes on, the old call is aborted."""

    async def scenario() -> None:
        async with first_choice(valkey_url) as c:
            calls = c.replica.runtime._calls
            calls.deadlines = replace(calls.deadlines, event_s=0.3)
            c.engines["d0"].loop._sleep = stopped_after(c.engines["d0"].loop._sleep, 4)
            handle, chunks = await answer(c, request_for(c, TEXT))
            check(handle, chunks, 2)
            assert handle.receipt is not None and "deadline" in handle.receipt.tries[0].failure

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"temperature": 0.7}, "only greedy"),
        ({"temperature": 0.7, "seed": 3}, "only greedy"),
        ({"stop": ["x"]}, "`stop`"),
        ({"n": 2}, "`n`"),
    ],
)
def test_other_answers_end_in_an_error(valkey_url: str, body: dict[str, Any], why: str) -> None:
    """What cannot go on breaks, and its receipt says why."""

    async def scenario() -> None:
        async with first_choice(valkey_url) as c:
            await c.fault("d0", fault="break_stream", after_tokens=3)
            with pytest.raises(RoundBroke):
                await answer(c, request_for(c, TEXT, **body))
            await until(lambda: not c.replica.core.rounds)
            (receipt,) = await c.replica.receipts(1, None)
            assert receipt["outcome"] == "failed" and len(receipt["tries"]) == 1
            assert any(why in note for note in receipt["notes"]), receipt["notes"]

    asyncio.run(scenario())


@pytest.mark.parametrize("engines", ["d0", "d0 d1 d2 d3"])
def test_without_another_engine_or_try_it_ends_in_an_error(valkey_url: str, engines: str) -> None:
    """Nobody is left; or all tries are used up."""

    async def scenario() -> None:
        async with first_choice(valkey_url, engines) as c:
            for engine_id in c.engines:
                await c.fault(engine_id, fault="break_stream", after_tokens=2)
            with pytest.raises(RoundBroke, match="could not go on elsewhere"):
                await answer(c, request_for(c, TEXT))
            await until(lambda: not c.replica.core.rounds)
            (receipt,) = await c.replica.receipts(1, None)
            assert receipt["outcome"] == "failed" and receipt["ttft_s"] is not None
            assert len(receipt["tries"]) == min(3, len(c.engines))

    asyncio.run(scenario())


@pytest.mark.parametrize("other", [True, False])
def test_a_seed_goes_on_between_deterministic_engines(valkey_url: str, other: bool) -> None:
    """Both must say so of themselves: an engine that does not gets none of it."""

    async def scenario() -> None:
        async with first_choice(valkey_url, deterministic=True) as c:
            assert all(item["deterministic"] for item in await c.replica.engines())
            engine: Any = c.replica._discovery.engines["d1"]
            engine._record = replace(engine._record, deterministic=other)
            await c.fault("d0", fault="break_stream", after_tokens=3)
            request = request_for(c, TEXT, temperature=0.7, seed=3)
            if other:
                check(*await answer(c, request), 2)
            else:
                with pytest.raises(RoundBroke, match="could not go on elsewhere"):
                    await answer(c, request)

    asyncio.run(scenario())


def test_the_session_goes_on_with_all_of_it(valkey_url: str) -> None:
    """Its KV is where the answer ended: the next round finds prompt and both parts of the answer there."""

    async def scenario() -> None:
        async with first_choice(valkey_url) as c:
            await c.fault("d0", fault="break_stream", after_tokens=20)
            request = request_for(c, TEXT, 40)
            handle, chunks = await answer(c, request)
            check(handle, chunks, 2, 40)
            receipt = handle.receipt
            assert receipt is not None and receipt.cached_tokens == 0, "both engines computed the prompt"
            await c.recorded()
            policy = c.replica.core.policy
            assert isinstance(policy, Chosen)
            policy.next.append((Arm.LOCAL, "d1", "d1"))
            assert handle.answered is not None
            again = c.request(request.session_id, [*handle.answered, 7], 8)
            later, _ = await answer(c, again)
            assert later.receipt is not None and later.session_id == request.session_id
            assert later.receipt.history_tokens == 128 and later.receipt.cached_tokens == 128
            book = c.replica.core.books.fleet.books["d1"]
            assert len(book.itl.samples) == 1, "an answer of two engines is no measure of one"

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_sees_one_answer(valkey_url: str, path: str, stream: bool) -> None:
    """One id, one role, one finish reason and one usage, as if one engine had answered."""
    form = relay.AnswerForm(path == CHAT, "m", "answer-1", stream, True, True, "explicit")

    async def seen(c: Cluster) -> Any:
        async with c.replica.submit(request_for(c, path)) as handle:
            await handle.start()
            events = relay.events(handle, form)
            found = [event async for event in events] if stream else [await relay.fold(events, form)]
        for event in found:
            event.pop("created")
            event.pop("session", None)
        if not stream:
            return found
        choices: list[dict[str, Any]] = [choice for event in found for choice in event["choices"]]
        told = [choice.get("delta") or choice for choice in choices]
        return (
            "".join(part.get("content") or part.get("text") or "" for part in told),
            [token for choice in choices for token in choice.get("token_ids", ())],
            [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
            [part["role"] for part in told if part.get("role")],
            [event["usage"] for event in found if event.get("usage")],
            {event["id"] for event in found},
        )

    async def scenario() -> None:
        async with first_choice(valkey_url) as c:
            whole = await seen(c)
            c.engines["d0"].loop.flush()
            await c.fault("d0", fault="break_stream", after_tokens=4)
            broken = await seen(c)
            assert broken == whole

    asyncio.run(scenario())
