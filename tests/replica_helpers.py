"""A replica over simulated engines and the real Valkey, in one event loop, for tests of the driver."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from antiphon.engines.base import Chunk
from antiphon.engines.prompt import Prompt
from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.scheduler.config import Config, GatewayConfig, LedgerConfig, RecordConfig, SchedulerConfig
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.rounds import RoundHandle, RoundRequest

KEY = b"tests-only-fleet-key-0123456789abcdef"


@dataclass(slots=True)
class Cluster:
    """One replica, its ledger, and engines p0 (prefill) and d0 (decode)."""

    replica: Replica
    ledger: Ledger
    engines: dict[str, SimulatedEngine] = field(default_factory=dict)

    def request(self, session_id: str, ids: list[int], max_tokens: int = 8, **body: Any) -> RoundRequest:
        return RoundRequest(
            round_id=uuid.uuid4().hex,
            session_id=session_id,
            tenant="t",
            path="/v1/completions",
            prompt=Prompt(ids),
            body={"model": "simulated", "max_tokens": max_tokens, "ignore_eos": True, **body},
            max_output_tokens=max_tokens,
            slo_ttft_s=5.0,
            slo_itl_s=1.0,
        )

    async def run(
        self, session_id: str, ids: list[int], max_tokens: int = 8
    ) -> tuple[RoundHandle, list[int]]:
        """One whole round: its handle and output ids."""
        async with self.replica.submit(self.request(session_id, ids, max_tokens)) as handle:
            await handle.start()
            return handle, [t async for chunk in handle for t in chunk.token_ids]

    async def recorded(self) -> None:
        """The ledger has all completions: a session's next round is then no fork."""
        await until(lambda: not self.replica.runtime._recording)

    async def fault(self, engine_id: str, **fault: Any) -> None:
        url = f"{self.engines[engine_id].record.url}/antiphon/faults"
        async with aiohttp.ClientSession() as client, client.post(url, json=fault) as answer:
            assert answer.status == 200, await answer.text()


@asynccontextmanager
async def cluster(
    valkey_url: str, policy: str, *, engines: str = "p0 d0", **options: Any
) -> AsyncIterator[Cluster]:
    """Up and ready; `options` go to every engine. All runs 20 times faster than its profile.

    Readers that lag hold engines back, unless `answers_memory_bytes` says otherwise.
    """
    fleet = uuid.uuid4().hex
    ledger = Ledger(valkey_url, fleet=fleet)
    config = Config(
        gateway=GatewayConfig(
            shutdown_grace_s=options.pop("grace_s", 0.05),
            answers_memory_bytes=options.pop("answers_memory_bytes", 1),
        ),
        scheduler=SchedulerConfig(policy=policy, **options.pop("scheduler", {})),
        ledger=LedgerConfig(fleet=fleet),
        record=RecordConfig(directory=options.pop("record", "")),
        repool=options.pop("repool", RepoolConfig()),
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(ledger.close)
        made = Cluster(Replica(config, ledger, KEY, uuid.uuid4().hex, Metrics()), ledger)
        for engine_id in engines.split():
            pool = "prefill" if engine_id.startswith("p") else "decode"
            settings: dict[str, Any] = {
                "engine_id": engine_id,
                "pool": pool,
                "ledger": valkey_url,
                "fleet": fleet,
                "fault_injection": True,
                "speed": 20.0,
            } | options
            engine = SimulatedEngine(SimulatedOptions(**settings), fleet_key=KEY)
            made.engines[engine_id] = await stack.enter_async_context(engine)
        await stack.enter_async_context(made.replica.running())
        await until(lambda: made.replica.readiness().engines_alive == len(made.engines))
        await until(lambda: made.replica.readiness().ledger == "ok" or not engines)
        yield made


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Let the loop go on until the condition holds; fails the test after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {condition}"
        await asyncio.sleep(0.005)


async def collect(handle: RoundHandle) -> list[Chunk]:
    return [chunk async for chunk in handle]
