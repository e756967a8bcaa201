"""Faults on command: each does what it says, as many times as it says, and can be undone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from antiphon.engines import wire
from antiphon.engines.base import EngineError, FailureKind
from antiphon.engines.directory_client import AsyncDirectoryClient
from antiphon.engines.faults import BreakStream, Clear, DelayPrefetch, Faults
from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import ROOT, page_hashes
from antiphon.engines.simulated import SimulatedEngine
from antiphon.engines.simulated_request import expected_tokens
from tests.simulated_helpers import (
    FAST,
    FLEET_KEY,
    PAGE,
    answer,
    engine,
    is_idle,
    make_prompt,
    make_request,
    make_rid,
    post,
    until,
)

PATHS = ("/v1/completions", "/v1/chat/completions")


async def arm(simulated: SimulatedEngine, fault: str, **fields: Any) -> None:
    status, reply = await post(simulated.record, "/antiphon/faults", {"fault": fault, **fields})
    assert status == 200, reply


@contextlib.asynccontextmanager
async def two_engines() -> AsyncIterator[tuple[SimulatedEngine, HttpEngine, SimulatedEngine, HttpEngine]]:
    async with engine() as (source, source_adapter), engine() as (puller, puller_adapter):
        yield source, source_adapter, puller, puller_adapter


async def prefilled(adapter: HttpEngine, prompt: list[int]) -> tuple[bytes, ...]:
    rid = make_rid()
    await adapter.prefill(prompt, rid, session_id=rid, cache_salt=None, deadline_s=10.0)
    return page_hashes(prompt, PAGE)


def test_faults_are_off_by_default() -> None:
    """An engine that was not started with fault injection has no such route and corrupts nothing."""

    async def main() -> None:
        async with engine(replace(FAST, fault_injection=False)) as (simulated, _):
            status, _ = await post(simulated.record, "/antiphon/faults", {"fault": "refuse"})
            assert status == 404
            directory = AsyncDirectoryClient(simulated.record.kv_addresses[0], FLEET_KEY, "test")
            with pytest.raises(Exception, match="without fault injection"):
                await directory.ask(wire.Corrupt(b"x" * 32), wire.Corrupted, deadline_s=5.0)
            await directory.close()

    asyncio.run(main())


@pytest.mark.parametrize("path", PATHS)
def test_refuse(path: str) -> None:
    """The next N requests are refused with 503, the one after is served."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "refuse", count=2)
            request = make_request(make_prompt("refuse", 20), 3, path=path)
            for _ in range(2):
                with pytest.raises(EngineError) as caught:
                    await answer(adapter, request)
                assert (caught.value.kind, caught.value.status) == (FailureKind.REFUSED, 503)
            assert len((await answer(adapter, request)).token_ids) == 3

    asyncio.run(main())


@pytest.mark.parametrize("path", PATHS)
def test_abort_as_after_a_failed_load(path: str) -> None:
    """A request that the engine aborts before its first token is REFUSED: another try makes sense."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "abort")
            request = make_request(make_prompt("abort", 20), 3, path=path)
            with pytest.raises(EngineError, match="External KV cache load failed") as caught:
                await answer(adapter, request)
            assert (caught.value.kind, caught.value.status) == (FailureKind.REFUSED, 503)
            assert await is_idle(adapter)
            assert len((await answer(adapter, request)).token_ids) == 3
            await arm(simulated, "abort")
            body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 0}}
            assert (await post(simulated.record, "/generate", body))[0] == 503

    asyncio.run(main())


@pytest.mark.parametrize("path", PATHS)
def test_hang_until_aborted(path: str) -> None:
    """A hanging request sends nothing, not even a status, while others are answered; abort ends it."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "hang")
            hanging = make_request(make_prompt("hang", 20), 3, path=path)
            with pytest.raises(EngineError) as caught:
                await answer(adapter, hanging, deadline_s=0.2)
            assert caught.value.kind is FailureKind.DEADLINE
            assert len((await answer(adapter, make_request(make_prompt("other", 20), 3))).token_ids) == 3
            await adapter.abort(hanging.rid, deadline_s=5.0)
            await until(lambda: is_idle(adapter))

    asyncio.run(main())


def test_a_prefill_hangs_too() -> None:
    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "hang")
            rid = make_rid()
            with pytest.raises(EngineError) as caught:
                await adapter.prefill(
                    make_prompt("hang", 40), rid, session_id=rid, cache_salt=None, deadline_s=0.2
                )
            assert caught.value.kind is FailureKind.DEADLINE
            await until(lambda: is_idle(adapter))
            await prefilled(adapter, make_prompt("hang", 40))

    asyncio.run(main())


def test_hang_ends_by_time_or_by_clear() -> None:
    """With seconds the request goes on by itself, without when the faults are cleared."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "hang", seconds=0.1)
            started = time.monotonic()
            assert len((await answer(adapter, make_request(make_prompt("timed", 20), 3))).token_ids) == 3
            assert time.monotonic() - started >= 0.1
            await arm(simulated, "hang")
            waiting = asyncio.create_task(answer(adapter, make_request(make_prompt("clear", 20), 3)))

            async def waits() -> bool:
                return (await adapter.load(deadline_s=5.0)).waiting_requests == 1

            await until(waits)
            await arm(simulated, "clear")
            assert len((await waiting).token_ids) == 3

    asyncio.run(main())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("after_tokens", [0, 4])
def test_break_stream(path: str, after_tokens: int) -> None:
    """The connection is cut after exactly so many tokens, and the engine stops working on them."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "break_stream", after_tokens=after_tokens)
            prompt = make_prompt("break", 20)
            words: list[str] = []
            with pytest.raises(EngineError) as caught:
                async for chunk in adapter.generate(make_request(prompt, 500, path=path), deadline_s=10.0):
                    for choice in (chunk.data or {})["choices"]:
                        words += (choice.get("text") or choice.get("delta", {}).get("content") or "").split()
            assert caught.value.kind is (FailureKind.BROKEN if after_tokens else FailureKind.UNREACHABLE)
            assert words == [str(token) for token in expected_tokens(prompt, after_tokens, 512)]
            await until(lambda: is_idle(adapter))

    asyncio.run(main())


def test_slow() -> None:
    """Every step takes `factor` times as long, until the faults are cleared."""

    async def main() -> None:
        async with engine() as (simulated, adapter):

            async def timed(name: str) -> float:
                started = time.monotonic()
                await answer(adapter, make_request(make_prompt(name, 200), 10))
                return time.monotonic() - started

            normal_s = await timed("normal")
            await arm(simulated, "slow", factor=20)
            assert await timed("slow") > 5 * normal_s
            await arm(simulated, "clear")
            assert simulated.faults.slow_factor == 1.0

    asyncio.run(main())


def test_drop_directory() -> None:
    """A dropped directory refuses connections while HTTP goes on; cleared, it is where it was."""

    async def main() -> None:
        async with two_engines() as (source, source_adapter, _, puller):
            hashes = await prefilled(source_adapter, make_prompt("drop", 100))
            await arm(source, "drop_directory")
            record = source.record
            lost = await puller.prefetch(
                record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=5.0
            )
            assert lost.pages == 0 and lost.reason
            assert len((await answer(source_adapter, make_request([1, 2, 3], 3))).token_ids) == 3
            await arm(source, "clear")
            back = await puller.prefetch(
                record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=5.0
            )
            assert (back.pages, back.reason) == (len(hashes), "")

    asyncio.run(main())


def test_late_prefetch_brings_nothing_and_leaks_nothing() -> None:
    """A transfer that would end after its deadline is discarded: no page visible, no slot or pin held."""

    async def main() -> None:
        async with two_engines() as (source, source_adapter, simulated, puller):
            hashes = await prefilled(source_adapter, make_prompt("late", 400))
            await arm(simulated, "slow", factor=2000)
            record = source.record
            result = await puller.prefetch(
                record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=0.2
            )
            assert (result.pages, result.pulled_pages) == (0, 0)
            assert result.reason

            async def settled() -> bool:
                return source.store.counts().pins == simulated.store.counts().inflight == 0

            await until(settled)
            assert simulated.store.counts().used == 0

    asyncio.run(main())


def test_delayed_prefetch() -> None:
    """The next prefetch waits first, then succeeds within its deadline."""

    async def main() -> None:
        async with two_engines() as (source, source_adapter, simulated, puller):
            hashes = await prefilled(source_adapter, make_prompt("delayed", 100))
            await arm(simulated, "delay_prefetch", seconds=0.2)
            record = source.record
            result = await puller.prefetch(
                record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=5.0
            )
            assert result.pages == len(hashes)
            assert result.elapsed_s >= 0.2

    asyncio.run(main())


def test_corrupt_page_is_discarded_by_the_puller() -> None:
    """Pages from a corrupted one on do not arrive, and the answer is recomputed right."""

    async def main() -> None:
        async with two_engines() as (source, source_adapter, _, puller):
            prompt = make_prompt("corrupt", 200)
            hashes = await prefilled(source_adapter, prompt)
            directory = AsyncDirectoryClient(source.record.kv_addresses[0], FLEET_KEY, "test")
            assert (await directory.ask(wire.Corrupt(hashes[5]), wire.Corrupted, deadline_s=5.0)).found
            await directory.close()
            record = source.record
            result = await puller.prefetch(
                record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=5.0
            )
            assert result.pages == 5
            assert "checksum" in result.reason
            got = await answer(puller, make_request(prompt, 10))
            assert got.cached_tokens == 80
            assert got.token_ids == expected_tokens(prompt, 10, 512)

    asyncio.run(main())


@pytest.mark.parametrize("point", ["prefill", "first_token", "decode"])
def test_die_points_of_an_answer(point: str) -> None:
    """The engine dies when a request gets to the point, once, and not before."""
    deaths: list[str] = []

    async def main() -> None:
        async with engine(FAST, die=lambda: deaths.append("died")) as (simulated, adapter):
            await arm(simulated, "die", point=point, after_tokens=3)
            assert deaths == []
            await answer(adapter, make_request(make_prompt("die", 20), 5))
            await answer(adapter, make_request(make_prompt("die", 20), 5))
            assert deaths == ["died"]

    asyncio.run(main())


@pytest.mark.parametrize("point", ["reserve", "prefetch"])
def test_die_points_of_a_transfer(point: str) -> None:
    """Source or puller dies in the middle of a transfer."""
    deaths: list[str] = []

    async def main() -> None:
        async with (
            engine(FAST, die=lambda: deaths.append("reserve")) as (source, source_adapter),
            engine(FAST, die=lambda: deaths.append("prefetch")) as (simulated, puller),
        ):
            hashes = await prefilled(source_adapter, make_prompt("die", 100))
            await arm(source if point == "reserve" else simulated, "die", point=point)
            record = source.record
            await puller.prefetch(record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=5.0)
            assert deaths == [point]

    asyncio.run(main())


def test_clear_ends_a_delay_early() -> None:
    """Whoever waits on command goes on when the faults are cleared."""

    async def main() -> None:
        async with engine() as (simulated, adapter):
            await arm(simulated, "delay_prefetch", seconds=60)
            record = simulated.record
            hashes = page_hashes(make_prompt("early", 32), PAGE)
            pulling = asyncio.create_task(
                adapter.prefetch(("127.0.0.1:1",), record.incarnation, ROOT, hashes, deadline_s=30.0)
            )

            async def delayed() -> bool:
                return not simulated.faults.armed(DelayPrefetch)

            await until(delayed)
            await arm(simulated, "clear")
            assert (await asyncio.wait_for(pulling, 10)).pages == 0

    asyncio.run(main())


def test_faults_are_taken_in_order() -> None:
    """A fault with a count is used up one by one, and nothing is left after a clear."""
    faults = Faults(die=lambda: None)
    faults.arm(BreakStream(count=2, after_tokens=1))
    faults.arm(BreakStream(after_tokens=9))
    taken = [faults.take_break() for _ in range(4)]
    assert [fault.after_tokens for fault in taken if fault] == [1, 1, 9]
    faults.arm(BreakStream())
    faults.arm(Clear())
    assert faults.take_break() is None
