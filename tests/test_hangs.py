"""Engines that hang behind a health check that answers: their rounds go elsewhere, and nothing new comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.rounds import RoundRefused
from tests.replica_helpers import Cluster, cluster, until

QUICK = {"first_token_deadline_s": 3.0}
"""Each of three tries has a second."""
PROMPT = list(range(100, 200))


async def standing(c: Cluster, engine_id: str) -> Any:
    return next(item["standing"] for item in await c.replica.engines() if item["engine_id"] == engine_id)


def test_a_round_on_an_engine_that_hangs_goes_elsewhere(valkey_url: str) -> None:
    """At the deadline of its call, long before its own; the engine is shunned until a round has tried it."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", scheduler=QUICK) as c:
            hangs = "d0"
            await c.fault(hangs, fault="hang", count=1)
            handle, output = await c.run("s", PROMPT)
            receipt = handle.receipt
            assert receipt is not None and receipt.outcome is Outcome.COMPLETED and len(output) == 8
            first, second = receipt.tries
            assert first.failure.startswith(f"{hangs}: deadline") and first.elapsed_s > 0.9
            assert hangs not in (second.placement.home, second.placement.prefill_engine)
            assert await standing(c, hangs) in (["open"], ["half_open"]), (
                "its probes were answered all the time"
            )
            core = c.replica.core
            await until(lambda: hangs not in core.standings.engines.refused(c.replica.runtime.now()))
            again, _ = await c.run("t", list(range(300, 400)))
            assert again.receipt is not None and len(again.receipt.tries) == 1
            placement = again.receipt.tries[0].placement
            assert hangs in (placement.home, placement.prefill_engine), "the probe"
            assert await standing(c, hangs) == []
            loops = [engine.loop for engine in c.engines.values()]
            await until(lambda: not any(loop.running or loop.waiting for loop in loops))

    asyncio.run(scenario())


def test_when_all_hang_the_client_is_told_what_was_tried(valkey_url: str) -> None:
    """Every try with its engine, and nothing is left over on the engines."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", scheduler={"first_token_deadline_s": 1.5}) as c:
            for engine in ("p0", "d0"):
                await c.fault(engine, fault="hang", count=5)
            with pytest.raises(RoundRefused) as refused:
                await c.run("s", PROMPT)
            assert refused.value.code == "upstream_failed"
            message = str(refused.value)
            assert "local on d0: deadline" in message and "local on p0: deadline" in message
            loops = [engine.loop for engine in c.engines.values()]
            await until(lambda: not any(loop.running or loop.waiting for loop in loops))

    asyncio.run(scenario())
