"""Simulated engines in processes of their own, which can be stopped as a hung machine would be, and go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from antiphon.engines.base import EngineError, EngineRecord
from antiphon.engines.http import HttpEngine
from antiphon.scheduler.ledger import Ledger
from tests.replica_helpers import KEY, Cluster, cluster, until

IDLE_DEADLINE_S = 10.0


@dataclass(slots=True)
class Fleet:
    """Engine processes that are registered in one ledger."""

    url: str
    ledger: Ledger
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    adapters: dict[str, HttpEngine] = field(default_factory=dict)

    async def start(self, engine_id: str, **options: Any) -> None:
        """Begin a life of this engine; `up` waits for it."""
        pool = "prefill" if engine_id.startswith("p") else "decode"
        told: dict[str, Any] = {
            "ledger": self.url,
            "fleet": self.ledger.connection.fleet,
            "engine_id": engine_id,
        }
        told |= {"pool": pool, "fault_injection": True, **options}
        code = f"from antiphon.engines.simulated import *;run_simulated(SimulatedOptions(**{told!r}))"
        environment = {**os.environ, "ANTIPHON_FLEET_KEY": KEY.decode()}
        self.processes[engine_id] = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, env=environment
        )

    async def record(self, engine_id: str, *, not_incarnation: str = "") -> EngineRecord:
        """Its registration, once it is there."""
        end = time.monotonic() + 20.0
        while True:
            for record in await self.ledger.engines():
                if record.engine_id == engine_id and record.incarnation != not_incarnation:
                    return record
            assert time.monotonic() < end, f"{engine_id} does not register"
            await asyncio.sleep(0.02)

    async def connect(self, engine_id: str) -> HttpEngine:
        """A connection past the replica."""
        adapter = HttpEngine(await self.record(engine_id), KEY)
        self.adapters[engine_id] = adapter
        await adapter.connect(10.0)
        return adapter

    def stop(self, engine_id: str) -> None:
        self.processes[engine_id].send_signal(signal.SIGSTOP)

    def go_on(self, engine_id: str) -> None:
        self.processes[engine_id].send_signal(signal.SIGCONT)

    async def kill(self, engine_id: str) -> None:
        """kill -9."""
        process = self.processes.pop(engine_id)
        process.kill()
        await process.wait()

    async def idle(self, engine_id: str) -> None:
        """Nothing runs or waits there, says the engine; fails after a deadline."""
        adapter, end = self.adapters[engine_id], time.monotonic() + IDLE_DEADLINE_S
        while True:
            with contextlib.suppress(EngineError):
                load = await adapter.load(deadline_s=1.0)
                if load.running_requests == load.waiting_requests == 0:
                    return
            assert time.monotonic() < end, f"{engine_id} still works: {load}"
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for adapter in self.adapters.values():
            await adapter.close()
        for engine_id in list(self.processes):
            self.go_on(engine_id)
            await self.kill(engine_id)


@contextlib.asynccontextmanager
async def processes(
    valkey_url: str, policy: str, engines: str, *, scheduler: dict[str, Any], **options: Any
) -> AsyncIterator[tuple[Cluster, Fleet]]:
    """A replica in this loop, with its engines in processes; all are up."""
    async with cluster(valkey_url, policy, engines="", scheduler=scheduler) as c:
        fleet = Fleet(valkey_url, c.ledger)
        try:
            for engine_id in engines.split():
                await fleet.start(engine_id, **options)
            for engine_id in engines.split():
                await fleet.connect(engine_id)
            await until(lambda: c.replica.readiness().engines_alive == len(engines.split()), 20.0)
            yield c, fleet
        finally:
            await fleet.close()
