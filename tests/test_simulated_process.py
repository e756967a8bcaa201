"""The simulated engine as a product: options, registration, and the process that the command line starts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from antiphon.engines.base import EngineError, EngineRecord, FailureKind
from antiphon.engines.faults import DIE_STATUS
from antiphon.engines.http import HttpEngine
from antiphon.engines.registry import list_engines
from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions, with_sglang_flags
from tests.engine_processes import free_port
from tests.simulated_helpers import (
    FAST,
    FLEET_KEY,
    answer,
    make_prompt,
    make_request,
    post,
    until,
)


@pytest.mark.parametrize(
    "change",
    [
        {"pool": "both"}, {"chunk_tokens": 8}, {"speed": 0.0}, {"pool_tokens": 8}, {"vocab_tokens": 0},
        {"page_size_tokens": 0},
    ],
)  # fmt: skip
def test_options_that_cannot_be(change: dict[str, Any]) -> None:
    """Wrong options are refused when they are made, naming the field."""
    with pytest.raises(ValueError, match=next(iter(change))):
        SimulatedOptions(**change)


def test_sglang_flags_that_mean_something_here() -> None:
    """The flags of a real engine's command line set the same things; others are refused by name."""
    words = ["--chunked-prefill-size", "256", "--max-total-tokens=4096", "--served-model-name", "m"]
    options = with_sglang_flags(SimulatedOptions(), words)
    assert (options.chunk_tokens, options.pool_tokens, options.model_id) == (256, 4096, "m")
    assert with_sglang_flags(SimulatedOptions(), ["--chunked-prefill-size", "-1"]).chunk_tokens == 0
    with pytest.raises(ValueError, match="--tp"):
        with_sglang_flags(SimulatedOptions(), ["--tp", "2"])
    with pytest.raises(ValueError, match="--page-size"):
        with_sglang_flags(SimulatedOptions(), ["--page-size"])


def test_engine_registers_while_it_is_up(valkey_url: str) -> None:
    """The ledger lists the engine's record from its start to its end."""
    import redis.asyncio

    async def main() -> None:
        client = redis.asyncio.Redis.from_url(valkey_url, decode_responses=True)
        options = replace(FAST, ledger=valkey_url, fleet="simulated-registers", engine_id="sim-0")
        async with SimulatedEngine(options, fleet_key=FLEET_KEY) as simulated:
            assert await list_engines(client, "simulated-registers") == (simulated.record,)
        assert await list_engines(client, "simulated-registers") == ()
        await client.aclose()

    asyncio.run(main())


async def start_process(port: int) -> asyncio.subprocess.Process:
    """A simulated engine in a process of its own, as the command line starts it."""
    code = (
        "from antiphon.engines.simulated import *;"
        f"run_simulated(SimulatedOptions(port={port}, fault_injection=True, speed=20.0))"
    )
    environment = {**os.environ, "ANTIPHON_FLEET_KEY": FLEET_KEY.decode()}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=environment)


async def is_up(port: int) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/health") as got:
            return got.status == 200
    except aiohttp.ClientConnectionError:
        return False


def test_process_stops_on_sigterm() -> None:
    """SIGTERM ends the process with status 0, even in the middle of an answer."""

    async def main() -> None:
        port = free_port()
        process = await start_process(port)
        try:
            await until(lambda: is_up(port))
            body = {"prompt": [1, 2, 3], "max_tokens": 8000}
            url = f"http://127.0.0.1:{port}/v1/completions"
            async with aiohttp.ClientSession() as session:
                running = asyncio.create_task(session.post(url, json={**body, "stream": True}))
                response = await running
                await response.content.readany()
                process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), 20) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(main())


def test_process_dies_on_command() -> None:
    """`die` ends the process at once in the middle of an answer: the client sees a broken stream."""

    async def main() -> None:
        port = free_port()
        process = await start_process(port)
        try:
            await until(lambda: is_up(port))
            record = EngineRecord("dying", f"http://127.0.0.1:{port}", "decode", "")
            adapter = HttpEngine(record, FLEET_KEY)
            fault = {"fault": "die", "point": "decode", "after_tokens": 5}
            assert (await post(adapter.record, "/antiphon/faults", fault))[0] == 200
            with pytest.raises(EngineError) as caught:
                await answer(adapter, make_request(make_prompt("die", 20), 100))
            assert caught.value.kind is FailureKind.BROKEN
            assert await asyncio.wait_for(process.wait(), 20) == DIE_STATUS
            await adapter.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(main())
