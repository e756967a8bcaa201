"""Engine processes that are stopped with rounds in flight, and go on: no round waits, none stays there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import pytest

from antiphon.engines.base import EngineError, FailureKind
from antiphon.engines.simulated_request import expected_tokens
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.rounds import RoundHandle
from antiphon.scheduler.states import Phase
from tests.replica_helpers import Cluster, until
from tests.simulated_helpers import make_prompt, make_request, post
from tests.stopped_engines import Fleet, processes

DEADLINE_S = 4.5
"""For a first token: each of three tries has a third. So long an answer may be silent, too."""
WELL_BEFORE_S = 4.0
QUICK = {"first_token_deadline_s": DEADLINE_S}
VOCABULARY = 512


async def greedy(c: Cluster, session: str, prompt: list[int], tokens: int) -> tuple[RoundHandle, list[int]]:
    async with c.replica.submit(c.request(session, prompt, tokens, temperature=0)) as handle:
        await handle.start()
        return handle, [t async for chunk in handle for t in chunk.token_ids]


def phases(c: Cluster, engine_id: str) -> list[Phase]:
    """Of the rounds that the engine is at work for now."""
    return [round.phase for round in c.replica.core.rounds.values() if round.engine_id == engine_id]


def right(prompt: list[int], output: list[int]) -> bool:
    return tuple(output) == expected_tokens(prompt, len(output), VOCABULARY)


async def stopped_while(
    c: Cluster, fleet: Fleet, engine_id: str, phase: Phase, prompts: dict[str, list[int]], tokens: int
) -> list[RoundHandle]:
    """Stop the engine with rounds in that phase there; all end elsewhere, right. Then it goes on, idle."""
    tasks = [asyncio.create_task(greedy(c, session, prompt, tokens)) for session, prompt in prompts.items()]
    await until(lambda: phase in phases(c, engine_id))
    fleet.stop(engine_id)
    stopped_s = time.monotonic()
    ended = await asyncio.wait_for(asyncio.gather(*tasks), 30.0)
    assert time.monotonic() - stopped_s < WELL_BEFORE_S
    for (handle, output), prompt in zip(ended, prompts.values(), strict=True):
        assert handle.receipt is not None and handle.receipt.outcome is Outcome.COMPLETED
        assert len(output) == tokens and right(prompt, output)
    fleet.go_on(engine_id)
    await fleet.idle(engine_id)
    handles = [handle for handle, _ in ended]
    assert any(try_.failure.startswith(engine_id) for handle in handles for try_ in handle.receipt.tries)  # type: ignore[union-attr]
    return handles


def test_a_decode_engine_that_is_stopped_before_and_after_first_tokens(valkey_url: str) -> None:
    async def scenario() -> None:
        async with processes(valkey_url, "local", "d0 d1", scheduler=QUICK) as (c, fleet):
            prompts = {f"s{n}": make_prompt(f"before {n}", 200) for n in range(4)}
            await stopped_while(c, fleet, "d0", Phase.GENERATING, prompts, 8)
            # Shunned for a moment, then tried again: what comes now may go to either.
            refused = c.replica.core.standings.engines.refused
            await until(lambda: not refused(c.replica.runtime.now()))
            await until(lambda: not c.replica.core.standings.suspect)
            prompts = {f"t{n}": make_prompt(f"after {n}", 100) for n in range(4)}
            handles = await stopped_while(c, fleet, "d0", Phase.DECODING, prompts, 100)
            assert any("tokens)" in try_.failure for h in handles for try_ in h.receipt.tries)  # type: ignore[union-attr]

    asyncio.run(scenario())


def test_a_prefill_engine_that_is_stopped(valkey_url: str) -> None:
    async def scenario() -> None:
        async with processes(valkey_url, "ampd", "p0 d0", scheduler=QUICK) as (c, fleet):
            prompts = {f"s{n}": make_prompt(f"prefill {n}", 400) for n in range(3)}
            await stopped_while(c, fleet, "p0", Phase.PREFILLING, prompts, 8)

    asyncio.run(scenario())


# ---------------------------------------------------------------- an abort that comes too late


async def abandoned(fleet: Fleet, engine_id: str, begin: Callable[[str], Awaitable[object]]) -> None:
    """What was begun is given up while the engine is stopped, and its abort fails: it ends all the same."""
    rid = make_request([1], 1).rid
    async with asyncio.timeout(20.0):
        await begin(rid)
    adapter = fleet.adapters[engine_id]
    with pytest.raises(EngineError) as late:
        await adapter.abort(rid, deadline_s=0.2)
    assert late.value.kind is FailureKind.DEADLINE
    fleet.go_on(engine_id)
    await fleet.idle(engine_id)


def test_an_abort_that_failed_leaves_no_work_behind(valkey_url: str) -> None:
    """A decode that takes minutes, before and after its first token, and a prefill that hangs."""

    async def scenario() -> None:
        async with processes(valkey_url, "local", "d0", scheduler=QUICK, speed=0.3) as (_, fleet):
            adapter = fleet.adapters["d0"]
            request = make_request(make_prompt("late", 100), 4000)

            async def decode(rid: str, *, stop_first: bool) -> None:
                if stop_first:
                    fleet.stop("d0")
                answer = adapter.generate(replace(request, rid=rid), deadline_s=0.3 if stop_first else 20.0)
                with contextlib.suppress(EngineError):
                    async with contextlib.aclosing(answer) as chunks:
                        async for _ in chunks:
                            fleet.stop("d0")
                            return
                assert stop_first, "no token came"

            async def prefill(rid: str) -> None:
                await post(adapter.record, "/antiphon/faults", {"fault": "hang"})
                fleet.stop("d0")
                with pytest.raises(EngineError):
                    await adapter.prefill(
                        make_prompt("prefill", 100), rid, session_id=rid, cache_salt=None, deadline_s=0.3
                    )

            await abandoned(fleet, "d0", partial(decode, stop_first=True))
            await abandoned(fleet, "d0", partial(decode, stop_first=False))
            await abandoned(fleet, "d0", prefill)

    asyncio.run(scenario())
