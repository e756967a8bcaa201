"""`HttpEngine` on real SGLang engines: identity, abort, disconnect, refusals, load, spoilt pages, idle."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from antiphon.engines import wire
from antiphon.engines.base import Chunk, EngineError, EngineRecord, FailureKind, GenerateRequest
from antiphon.engines.directory_client import AsyncDirectoryClient
from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import page_hashes
from tests.conftest import SglangFleet, SglangPair
from tests.engine_calls import CHAT, COMPLETIONS, answer, connected, random_prompt, random_rid
from tests.engine_processes import cpu_seconds, descendants

IDLE_WINDOWS, IDLE_WINDOW_S = 3, 10.0
IDLE_LIMIT = 0.01
"""Of a core: what the linker may add to an idle engine."""


def endless(rid: str, prompt: list[int]) -> GenerateRequest:
    body = {"max_tokens": 4000, "temperature": 0, "ignore_eos": True}
    return GenerateRequest(COMPLETIONS, prompt, rid, "s", body)


async def until(what: str, probe: Callable[[], Awaitable[bool]], deadline_s: float = 5.0) -> float:
    """Seconds until `probe` was true."""
    started = time.monotonic()
    while not await probe():
        assert time.monotonic() - started < deadline_s, f"{what}: not within {deadline_s} s"
    return time.monotonic() - started


def running(engine: HttpEngine) -> Callable[[], Awaitable[bool]]:
    """The report is a snapshot of some steps ago: it has to be waited for."""

    async def probe() -> bool:
        report = await engine.load(deadline_s=5.0)
        assert report.pool_tokens == 32768
        return report.running_requests >= 1 and report.used_tokens >= 60

    return probe


def idle(engine: HttpEngine) -> Callable[[], Awaitable[bool]]:
    async def probe() -> bool:
        return (await engine.load(deadline_s=5.0)).running_requests == 0

    return probe


# ---------------------------------------------------------------- identity


def test_hello_tells_the_truth(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """The directory's hello is the engine that was asked for: type, page, pool, window, one rank."""

    async def go() -> None:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            hello = decode.hello
            assert hello is not None and hello.incarnation == sglang_pair.decode.incarnation
            assert (hello.engine_id, hello.dtype, hello.transport) == ("decode-0", "float32", "nixl")
            assert (hello.page_size_tokens, hello.page_bytes, hello.pool_tokens) == (16, 32768, 32768)
            assert (hello.context_tokens, hello.rank, hello.world_size) == (8192, 0, 1)
            assert hello.store_pages * hello.page_size_tokens > hello.pool_tokens
            assert hello.kv_addresses == sglang_pair.decode.kv_addresses

    asyncio.run(go())


def test_wrong_identity_is_found_out(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """A record of another incarnation, another engine's directory, or a foreign key never connects."""
    decode, prefill = sglang_pair.decode, sglang_pair.prefill
    wrong = [
        (dataclasses.replace(decode, incarnation="0" * 32), fleet_key),
        (dataclasses.replace(decode, kv_addresses=prefill.kv_addresses), fleet_key),
        (dataclasses.replace(decode, kv_addresses=decode.kv_addresses * 2), fleet_key),
        (decode, b"another-key-0123456789"),
    ]

    async def go() -> None:
        for record, key in wrong:
            with pytest.raises(EngineError):
                async with connected(record, key=key):
                    pass

    asyncio.run(go())


# ---------------------------------------------------------------- abort and disconnect


def test_abort_ends_one_request_only(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """Abort by rid breaks that stream at once and frees its tokens; the sibling's answer is not touched."""

    async def go() -> None:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            generator = random.Random(11)
            prompt = random_prompt(generator, 60)
            alone, _ = await answer(decode, prompt, random_rid(generator), CHAT)
            victim = random_rid(generator)
            chunks = decode.generate(endless(victim, random_prompt(generator, 60)), deadline_s=30.0)
            await anext(chunks)
            sibling = asyncio.create_task(answer(decode, prompt, random_rid(generator), CHAT))
            await until("the report shows the request", running(decode))
            await decode.abort(victim, deadline_s=5.0)
            with pytest.raises(EngineError) as caught:
                async with asyncio.timeout(5.0):
                    async for _ in chunks:
                        pass
            assert caught.value.kind is FailureKind.BROKEN and "abort" in str(caught.value)
            assert (await sibling)[0] == alone
            await until("the engine is idle", idle(decode))

    asyncio.run(go())


def test_a_reader_that_leaves_frees_the_engine(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """Closing the iterator ends the decode within a second, without an abort."""

    async def go() -> float:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            generator = random.Random(12)
            chunks = decode.generate(
                endless(random_rid(generator), random_prompt(generator, 40)), deadline_s=30.0
            )
            await anext(chunks)
            await chunks.aclose()
            return await until("the engine is idle", idle(decode))

    assert asyncio.run(go()) < 1.5


# ---------------------------------------------------------------- requests


def test_the_engines_own_refusals(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """What SGLang calls a bad request arrives as one, with its status and body, on every route."""

    async def go() -> None:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            too_long = [300] * 8300
            bad_schema = {
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}
            }
            requests: list[tuple[str, list[int], dict[str, Any]]] = [
                (COMPLETIONS, too_long, {"max_tokens": 4}),
                (CHAT, too_long, {"max_tokens": 4}),
                (COMPLETIONS, [300], {"max_tokens": -1}),
                (CHAT, [300], {"max_tokens": 4, **bad_schema}),
            ]
            for number, (path, prompt, body) in enumerate(requests):
                with pytest.raises(EngineError) as caught:
                    async for _ in decode.generate(
                        GenerateRequest(path, prompt, f"{number:032x}", "s", body), deadline_s=20.0
                    ):
                        pass
                assert caught.value.kind is FailureKind.BAD_REQUEST and caught.value.status in (400, 422)
                assert caught.value.body
            with pytest.raises(EngineError) as caught:
                await decode.prefill(too_long, "f" * 32, session_id="s", cache_salt=None, deadline_s=20.0)
            assert caught.value.kind is FailureKind.BAD_REQUEST

    asyncio.run(go())


def test_grammar_works_on_a_cpu(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """A JSON schema binds even this random model: the engine's own features pass through."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    body = {
        "max_tokens": 400,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }

    async def go() -> list[Chunk]:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            request = GenerateRequest(CHAT, [300, 301], "e" * 32, "s", body)
            return [chunk async for chunk in decode.generate(request, deadline_s=30.0)]

    chunks = asyncio.run(go())
    choices = [chunk.data["choices"][0] for chunk in chunks if chunk.data and chunk.data["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    value = msgspec.json.decode(text)
    assert value["city"] in ("Rome", "Oslo") and isinstance(value["big"], bool)
    usage = next(chunk.usage for chunk in chunks if chunk.usage)
    assert sum(len(chunk.token_ids) for chunk in chunks) == usage.completion_tokens


# ---------------------------------------------------------------- pages


def test_a_spoilt_page_is_never_used(
    sglang_pair: SglangPair, plain_engine: EngineRecord, fleet_key: bytes
) -> None:
    """A page whose bytes changed in the source's store is discarded by the puller: late, never wrong."""

    async def go() -> None:
        records = (sglang_pair.prefill, sglang_pair.decode, plain_engine)
        async with connected(*records, key=fleet_key) as (prefill, decode, plain):
            generator = random.Random(13)
            prompt = random_prompt(generator, 200)
            hashes = page_hashes(prompt, 16)
            await prefill.prefill(
                prompt, random_rid(generator), session_id="s", cache_salt=None, deadline_s=30.0
            )
            directory = AsyncDirectoryClient(sglang_pair.prefill.kv_addresses[0], fleet_key, "tests")
            reply = await directory.ask(wire.Corrupt(hashes[4]), wire.Corrupted, deadline_s=5.0)
            await directory.close()
            assert reply.found
            source = sglang_pair.prefill
            result = await decode.prefetch(
                source.kv_addresses, source.incarnation, b"", hashes, deadline_s=10.0
            )
            assert result.pages == 4 and result.reason
            expected, _ = await answer(plain, prompt, random_rid(generator), COMPLETIONS)
            got, usage = await answer(decode, prompt, random_rid(generator), COMPLETIONS)
            assert got == expected and usage.cached_tokens == 64

    asyncio.run(go())


def test_a_dead_source_only_costs_time(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """Nobody at the source's address, or another incarnation there: zero pages, a reason, no exception."""

    async def go() -> None:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            hashes = page_hashes(random_prompt(random.Random(14), 64), 16)
            source = sglang_pair.prefill
            for addresses, incarnation in (
                (("127.0.0.1:9",), source.incarnation),
                (source.kv_addresses, "0" * 32),
                (source.kv_addresses * 2, source.incarnation),
            ):
                started = time.monotonic()
                result = await decode.prefetch(addresses, incarnation, b"", hashes, deadline_s=3.0)
                assert (result.pages, result.pulled_bytes) == (0, 0) and result.reason
                assert time.monotonic() - started < 4.0

    asyncio.run(go())


# ---------------------------------------------------------------- idle cost


def test_idle_linker_costs_next_to_nothing(sglang_fleet: SglangFleet) -> None:
    """The linker adds less than 1 % of a core to the same idle engine without it."""
    trees = {name: descendants(sglang_fleet.processes[name].process.pid) for name in ("decode-0", "plain-0")}
    added = []
    for _ in range(IDLE_WINDOWS):
        started, before = time.monotonic(), {name: cpu_seconds(pids) for name, pids in trees.items()}
        # Measuring is the one thing that does need the time to pass.
        time.sleep(IDLE_WINDOW_S)
        elapsed_s = time.monotonic() - started
        used = {name: (cpu_seconds(pids) - before[name]) / elapsed_s for name, pids in trees.items()}
        added.append(used["decode-0"] - used["plain-0"])
    print(f"\nidle linker adds {[f'{100 * share:.2f} %' for share in added]} of a core")
    assert statistics.median(added) < IDLE_LIMIT
