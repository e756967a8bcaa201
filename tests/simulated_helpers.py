"""Simulated engines for tests: a pair in a thread of its own, and small tools around HttpEngine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from antiphon.engines.base import Chunk, EngineRecord, GenerateRequest
from antiphon.engines.fleet_secrets import engine_http_key
from antiphon.engines.http import HttpEngine
from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions

FLEET_KEY = b"a key for the tests of a fleet.."
PAGE = 16
FAST = SimulatedOptions(speed=20.0, fault_injection=True)


@dataclass(frozen=True, slots=True)
class Pair:
    """What a test needs to know of two engines of one fleet."""

    prefill: EngineRecord
    decode: EngineRecord
    fleet_key: bytes


@contextlib.contextmanager
def simulated_pair(options: SimulatedOptions = FAST) -> Iterator[Pair]:
    """A prefill and a decode engine on an event loop in another thread, as if they were processes."""
    ready: list[Pair] = []
    started = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with (
            SimulatedEngine(options, fleet_key=FLEET_KEY) as prefill,
            SimulatedEngine(options, fleet_key=FLEET_KEY) as decode,
        ):
            ready.append(Pair(prefill.record, decode.record, FLEET_KEY))
            stop.append(lambda: loop.call_soon_threadsafe(done.set))
            started.set()
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="simulated pair")
    thread.start()
    assert started.wait(30), "the simulated engines did not start"
    try:
        yield ready[0]
    finally:
        stop[0]()
        thread.join(30)


@contextlib.asynccontextmanager
async def engine(
    options: SimulatedOptions = FAST, **more: Any
) -> AsyncIterator[tuple[SimulatedEngine, HttpEngine]]:
    """One simulated engine in this loop and its adapter, connected."""
    async with SimulatedEngine(options, fleet_key=FLEET_KEY, **more) as simulated:
        adapter = HttpEngine(simulated.record, FLEET_KEY)
        try:
            await adapter.connect(10.0)
            yield simulated, adapter
        finally:
            await adapter.close()


def make_prompt(name: str, tokens: int) -> list[int]:
    """Token ids that no prompt of another name shares a page with; all fit into a vocabulary of 512."""
    ids: list[int] = []
    counter = 0
    while len(ids) < tokens:
        ids.extend(5 + byte for byte in hashlib.sha256(f"{name} {counter}".encode()).digest())
        counter += 1
    return ids[:tokens]


def make_rid() -> str:
    return uuid.uuid4().hex


def make_request(
    prompt: list[int],
    max_tokens: int,
    *,
    path: str = "/v1/completions",
    rid: str = "",
    session_id: str = "",
    cache_salt: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> GenerateRequest:
    """A greedy request; `more` goes into the body."""
    rid = rid or make_rid()
    body = {"model": "default", "temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens}
    return GenerateRequest(path, prompt, rid, session_id or rid, {**body, **(more or {})}, cache_salt)


@dataclass(frozen=True, slots=True)
class Answer:
    chunks: tuple[Chunk, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    @property
    def finish_reason(self) -> str | None:
        return next((chunk.finish_reason for chunk in self.chunks if chunk.finish_reason), None)

    @property
    def cached_tokens(self) -> int:
        usages = [chunk.usage for chunk in self.chunks if chunk.usage is not None]
        assert usages, "the answer has no usage"
        return usages[-1].cached_tokens


async def answer(adapter: HttpEngine, request: GenerateRequest, deadline_s: float = 60.0) -> Answer:
    """The whole stream."""
    async with contextlib.aclosing(adapter.generate(request, deadline_s=deadline_s)) as stream:
        return Answer(tuple([chunk async for chunk in stream]))


async def until(condition: Callable[[], Awaitable[bool]], deadline_s: float = 20.0) -> None:
    """Poll until true; an AssertionError after the deadline."""
    end = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < end, f"not true within {deadline_s} s"
        await asyncio.sleep(0.01)


async def is_idle(adapter: HttpEngine) -> bool:
    """Nothing runs, waits or holds device pages."""
    load = await adapter.load(deadline_s=10.0)
    return load.running_requests == load.waiting_requests == load.used_tokens == 0


def engine_key(fleet_key: bytes) -> dict[str, str]:
    """The header that opens an engine's HTTP."""
    return {"Authorization": f"Bearer {engine_http_key(fleet_key)}"}


async def post(
    record: EngineRecord, path: str, body: dict[str, Any], fleet_key: bytes = FLEET_KEY
) -> tuple[int, Any]:
    """Status and JSON (or text) of one plain HTTP call."""
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=60), headers=engine_key(fleet_key)
        ) as session,
        session.post(record.url + path, json=body) as response,
    ):
        if response.content_type == "application/json":
            return response.status, await response.json()
        return response.status, await response.text()
