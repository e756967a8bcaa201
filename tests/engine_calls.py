"""Short forms of engine calls that several tests make."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from antiphon.engines.base import EngineRecord, GenerateRequest, Usage
from antiphon.engines.http import HttpEngine
from antiphon.engines.stream import CHAT_PATH as CHAT
from antiphon.engines.stream import COMPLETIONS_PATH as COMPLETIONS

__all__ = ["CHAT", "COMPLETIONS", "answer", "connected", "random_prompt", "random_rid"]

DEADLINE_S = 120.0


@asynccontextmanager
async def connected(*records: EngineRecord, key: bytes) -> AsyncIterator[list[HttpEngine]]:
    """Engines that have said hello; closed at the end."""
    engines = [HttpEngine(record, key, peer="tests") for record in records]
    try:
        for engine in engines:
            await engine.connect(30.0)
        yield engines
    finally:
        for engine in engines:
            await engine.close()


async def answer(
    engine: HttpEngine,
    prompt: list[int],
    rid: str,
    path: str,
    salt: str | None = None,
    *,
    max_tokens: int = 24,
) -> tuple[list[int], Usage]:
    """Output ids and usage of one greedy answer of exactly `max_tokens`."""
    body = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = GenerateRequest(path, prompt, rid, rid[:8], body, cache_salt=salt)
    ids: list[int] = []
    usage: Usage | None = None
    async for chunk in engine.generate(request, deadline_s=DEADLINE_S):
        ids += chunk.token_ids
        usage = chunk.usage or usage
    assert usage is not None and usage.completion_tokens == len(ids) == max_tokens
    return ids, usage


def random_prompt(generator: random.Random, length: int) -> list[int]:
    """Ids of words of the tiny model's vocabulary."""
    return [generator.randrange(256, 509) for _ in range(length)]


def random_rid(generator: random.Random) -> str:
    return f"{generator.getrandbits(128):032x}"
