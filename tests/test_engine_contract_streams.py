"""What the scheduler may rely on, of either kind of engine: streams, aborts, deadlines and errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from antiphon.engines.base import EngineError, EngineRecord, FailureKind
from antiphon.engines.http import HttpEngine
from tests.engine_contract import DEADLINE_S, PATHS, play
from tests.simulated_helpers import (
    Pair,
    answer,
    is_idle,
    make_prompt,
    make_request,
    make_rid,
    until,
)

pytest_plugins = ["tests.engine_pair"]


@pytest.mark.parametrize("path", PATHS)
def test_abort_ends_the_stream_and_frees_the_engine(engine_pair: Pair, path: str) -> None:
    """An aborted answer ends as a failure at once, and its pages are free again."""
    request = make_request(make_prompt(f"abort {path}", 200), 4000, path=path)

    def shown(decode: HttpEngine) -> Callable[[], Awaitable[bool]]:
        async def probe() -> bool:
            load = await decode.load(deadline_s=DEADLINE_S)
            return load.running_requests == 1 and load.used_tokens >= 200

        return probe

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        async with contextlib.aclosing(decode.generate(request, deadline_s=DEADLINE_S)) as stream:
            await anext(stream)
            await until(shown(decode))  # a snapshot of some steps ago
            await decode.abort(request.rid, deadline_s=DEADLINE_S)
            with pytest.raises(EngineError) as caught:
                async for _ in stream:
                    pass
        assert caught.value.kind is FailureKind.BROKEN
        await until(lambda: is_idle(decode))

    play(engine_pair, scenario)


def test_abort_of_a_waiting_prefill(engine_pair: Pair) -> None:
    """A prefill that was given up by its deadline is stopped by an abort of its rid."""
    prompt = make_prompt("slow prefill", 6000)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        rid = make_rid()
        with pytest.raises(EngineError) as caught:
            await prefill.prefill(prompt, rid, session_id=rid, cache_salt=None, deadline_s=0.002)
        assert caught.value.kind is FailureKind.DEADLINE
        await prefill.abort(rid, deadline_s=DEADLINE_S)
        await until(lambda: is_idle(prefill), DEADLINE_S)

    play(engine_pair, scenario)


def test_abort_hits_one_of_two_similar_rids(engine_pair: Pair) -> None:
    """Of rids of one length that differ in the last character only the one named is aborted."""
    stem = make_rid()[:-1]
    prompt = make_prompt("similar rids", 100)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        doomed, spared = (make_request(prompt, 300, rid=f"{stem}{last}") for last in "01")
        answers = [asyncio.create_task(answer(decode, request)) for request in (doomed, spared)]

        async def both_run() -> bool:
            return (await decode.load(deadline_s=DEADLINE_S)).running_requests == 2

        await until(both_run)
        await decode.abort(doomed.rid, deadline_s=DEADLINE_S)
        with pytest.raises(EngineError):
            await answers[0]
        assert len((await answers[1]).token_ids) == 300

    play(engine_pair, scenario)


def test_abort_of_an_unknown_rid_is_no_error(engine_pair: Pair) -> None:
    """Aborting twice, or what never was, does nothing."""

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        await decode.abort(make_rid(), deadline_s=DEADLINE_S)

    play(engine_pair, scenario)


@pytest.mark.parametrize("path", PATHS)
def test_closing_the_stream_frees_the_engine(engine_pair: Pair, path: str) -> None:
    """A reader that leaves early stops the decode."""
    request = make_request(make_prompt(f"leave {path}", 100), 4000, path=path)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        async with contextlib.aclosing(decode.generate(request, deadline_s=DEADLINE_S)) as stream:
            await anext(stream)
        await until(lambda: is_idle(decode))

    play(engine_pair, scenario)


def test_deadline_for_the_first_event(engine_pair: Pair) -> None:
    """A stream that does not begin in time raises DEADLINE."""
    request = make_request(make_prompt("deadline", 4000), 4)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        with pytest.raises(EngineError) as caught:
            await answer(decode, request, deadline_s=0.002)
        assert caught.value.kind is FailureKind.DEADLINE
        await decode.abort(request.rid, deadline_s=DEADLINE_S)
        await until(lambda: is_idle(decode), DEADLINE_S)

    play(engine_pair, scenario)


@pytest.mark.parametrize("path", PATHS)
def test_prompt_over_the_window_is_a_bad_request(engine_pair: Pair, path: str) -> None:
    """The engine blames the request with a 400, which another engine would give, too."""

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        assert decode.hello is not None
        prompt = make_prompt("too long", decode.hello.context_tokens + 1)
        with pytest.raises(EngineError) as caught:
            await answer(decode, make_request(prompt, 4, path=path))
        assert caught.value.kind is FailureKind.BAD_REQUEST
        assert caught.value.status == 400
        assert b"context length" in caught.value.body

    play(engine_pair, scenario)


@pytest.mark.parametrize("path", PATHS)
def test_ids_are_ours_not_the_clients(engine_pair: Pair, path: str) -> None:
    """Token ids come with the chunks and not in the data that a client sees, unless it asked for them."""
    prompt = make_prompt(f"ids {path}", 50)
    flag = "return_token_ids" if path == "/v1/completions" else "return_output_ids_in_sglext"

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        plain = await answer(decode, make_request(prompt, 6, path=path))
        assert len(plain.token_ids) == 6
        shown = str([chunk.data for chunk in plain.chunks])
        assert "token_ids" not in shown and "sglext" not in shown
        asked = await answer(decode, make_request(prompt, 6, path=path, more={flag: True}))
        assert asked.token_ids == plain.token_ids
        assert "_ids" in str([chunk.data for chunk in asked.chunks])

    play(engine_pair, scenario)


@pytest.mark.parametrize("path", PATHS)
def test_usage_comes_once_at_the_end(engine_pair: Pair, path: str) -> None:
    """The finish reason comes once, then usage with the tokens of prompt, output and cache."""
    prompt = make_prompt(f"usage {path}", 77)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        got = await answer(decode, make_request(prompt, 9, path=path))
        assert [chunk.finish_reason for chunk in got.chunks if chunk.finish_reason] == ["length"]
        usages = [chunk.usage for chunk in got.chunks if chunk.usage is not None]
        assert len(usages) == 1
        assert got.chunks[-1].usage is usages[0]
        assert (usages[0].prompt_tokens, usages[0].completion_tokens, usages[0].cached_tokens) == (77, 9, 0)

    play(engine_pair, scenario)


def test_eight_streams_at_once(engine_pair: Pair) -> None:
    """Answers that run together are the answers that they would be alone."""
    prompts = [make_prompt(f"together {number}", 60 + 25 * number) for number in range(8)]

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        together = await asyncio.gather(
            *(
                answer(decode, make_request(prompt, 24, path=PATHS[number % 2]))
                for number, prompt in enumerate(prompts)
            )
        )
        for prompt, got in zip(prompts, together, strict=True):
            assert got.finish_reason == "length"
            alone = await answer(prefill, make_request(prompt, 24))
            assert got.token_ids == alone.token_ids

    play(engine_pair, scenario)


def test_connection_refused_is_unreachable(engine_pair: Pair) -> None:
    """An engine that is not there raises UNREACHABLE from every call, with no wait for the deadline."""

    async def main() -> None:
        absent = HttpEngine(EngineRecord("gone", "http://127.0.0.1:1", "decode", "x"), engine_pair.fleet_key)
        try:
            for call in (
                absent.connect(DEADLINE_S),
                absent.load(deadline_s=DEADLINE_S),
                absent.abort("x", deadline_s=DEADLINE_S),
                answer(absent, make_request([1, 2, 3], 4)),
            ):
                with pytest.raises(EngineError) as caught:
                    await call
                assert caught.value.kind is FailureKind.UNREACHABLE
        finally:
            await absent.close()

    asyncio.run(main())
