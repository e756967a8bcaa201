"""What the contract tests share: scenarios with a pair of engines of either kind, through `HttpEngine`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import ROOT
from tests.simulated_helpers import (
    Pair,
    is_idle,
    make_rid,
    until,
)

Scenario = Callable[[HttpEngine, HttpEngine], Awaitable[None]]

PATHS = ("/v1/completions", "/v1/chat/completions")
DEADLINE_S = 60.0
"""Real engines on a busy machine are slow; nothing waits for it when all is well."""


def play(pair: Pair, scenario: Scenario) -> None:
    """Run one scenario with both engines connected; afterwards both must be idle."""

    async def main() -> None:
        prefill, decode = HttpEngine(pair.prefill, pair.fleet_key), HttpEngine(pair.decode, pair.fleet_key)
        async with contextlib.AsyncExitStack() as stack:
            for adapter in (prefill, decode):
                stack.push_async_callback(adapter.close)
                await adapter.connect(DEADLINE_S)
            await scenario(prefill, decode)
            for adapter in (prefill, decode):
                await until(partial(is_idle, adapter))

    asyncio.run(main())


async def prefill_on(adapter: HttpEngine, prompt: list[int], cache_salt: str | None = None) -> int:
    """Cached tokens of a prefill."""
    rid = make_rid()
    result = await adapter.prefill(prompt, rid, session_id=rid, cache_salt=cache_salt, deadline_s=DEADLINE_S)
    assert result.prompt_tokens == len(prompt)
    return result.cached_tokens


async def pull(
    puller: HttpEngine, source: HttpEngine, hashes: tuple[bytes, ...], parent: bytes = ROOT
) -> int:
    """Pages that a prefetch that must succeed brought."""
    record = source.record
    result = await puller.prefetch(
        record.kv_addresses, record.incarnation, parent, hashes, deadline_s=DEADLINE_S
    )
    assert result.pages == len(hashes), result.reason
    assert result.reason == ""
    return result.pulled_pages
