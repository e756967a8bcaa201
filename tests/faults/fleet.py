"""The stack under test: a Valkey, two gateways, one prefill and two decode engines, each behind proxies.

    client -> [gateway's proxy] -> gateway -> [engine's proxy] -> engine
                     gateway and engine -> [a ledger proxy of its own] -> Valkey
    gateway and engines -> [engine's directory proxy] -> engine's directory

All are processes of the product's own commands. What a run has killed is started again by `repair`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from antiphon.engines import wire
from antiphon.engines.directory_client import AsyncDirectoryClient, DirectoryError
from antiphon.engines.launch_options import find_free_ports
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.valkey import server_binary
from tests.faults import readiness
from tests.faults.processes import Managed
from tests.faults.proxy import Proxy

Condition = Callable[[], Awaitable[bool]]

GATEWAYS = ("gw0", "gw1")
POOLS = {"p0": "prefill", "d0": "decode", "d1": "decode"}
FLEET = "faults"
ASK_DEADLINE_S = 3.0
POLL_S = 0.05
BREAKERS_S = 8.0
"""Waited for breakers to close; one of a link that nobody uses stays as it is."""
PORTS = 24
VALKEY_OPTIONS = (
    "--bind", "127.0.0.1", "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
    "--maxmemory-policy", "noeviction",
)  # fmt: skip
SETTINGS = """
[gateway]
shutdown_grace_s = 2.0

[scheduler]
policy = "remote_pull_always"
request_deadline_s = 25.0
first_token_deadline_s = 10.0
slo_ttft_s = 5.0
slo_itl_s = 0.5

[model]
names = ["model"]
"""


class FleetError(Exception):
    """The stack does not come up, or not again; the message has the ends of logs."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one engine."""

    http: int
    directory: int
    proxied_http: int
    proxied_directory: int


@dataclass(slots=True)
class Fleet:
    """Use `running`."""

    directory: Path
    model: Path
    engine_options: Sequence[str] = ("--simulated",)
    engine_flags: Sequence[str] = ()
    """For SGLang."""
    simulated: bool = True
    start_deadline_s: float = 60.0
    engine_ids: tuple[str, ...] = tuple(POOLS)
    settings: str = SETTINGS
    processes: dict[str, Managed] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    """gateway: gw0, gw1; ledger of whom: redis-gw0, ..; engine: p0, ..; directory: p0-kv, .."""
    ports: dict[str, Ports] = field(default_factory=dict)
    key: bytes = field(default_factory=lambda: secrets.token_hex(16).encode())
    valkey_port: int = 0
    http: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=ASK_DEADLINE_S))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        try:
            await self._plan()
            self.processes["redis"].start()
            await self.until(partial(readiness.ledger_answers, self), "the ledger does not answer")
            for name in (*self.engine_ids, *GATEWAYS):
                self.processes[name].start()
            await self.ready()
            yield self
        finally:
            for process in reversed(self.processes.values()):
                await asyncio.to_thread(process.end)
            for proxy in self.proxies.values():
                await proxy.close()
            await self.http.aclose()

    # ---- what there is

    def gateway_url(self, number: int) -> str:
        """As clients reach it."""
        return f"http://127.0.0.1:{self.proxies[GATEWAYS[number]].port}"

    def ledger(self) -> Ledger:
        """Not through a proxy."""
        return Ledger(f"redis://127.0.0.1:{self.valkey_port}", fleet=FLEET, deadline_s=ASK_DEADLINE_S)

    def proxies_of(self, component: str) -> list[Proxy]:
        """Of a process: what leads to it, and from it to the ledger; of the ledger: all that leads to it."""
        if component == "redis":
            return [proxy for name, proxy in self.proxies.items() if name.startswith("redis-")]
        names = (component, f"{component}-kv", f"redis-{component}")
        return [self.proxies[name] for name in names if name in self.proxies]

    async def ask_directory(self, engine_id: str, request: Any, reply: type[Any]) -> Any:
        """Not through a proxy. Raises `DirectoryError`."""
        address = f"127.0.0.1:{self.ports[engine_id].directory}"
        client = AsyncDirectoryClient(address, self.key, "faults")
        try:
            return await client.ask(request, reply, deadline_s=ASK_DEADLINE_S)
        finally:
            await client.close()

    async def link_fault(self, engine_id: str, fault: wire.LinkFault) -> wire.LinkFaults:
        """Of the READs of one engine."""
        answer: wire.LinkFaults = await self.ask_directory(engine_id, fault, wire.LinkFaults)
        return answer

    # ---- starting, and starting again

    async def _plan(self) -> None:
        """Ports, proxies and commands of everything."""
        shutil.rmtree(self.directory, ignore_errors=True)
        (self.directory / "data").mkdir(parents=True)
        (self.directory / "antiphon.toml").write_text(self.settings)
        ports = iter(range(first := find_free_ports("127.0.0.1", PORTS), first + PORTS))
        environment = dict(os.environ) | {"ANTIPHON_FLEET_KEY": self.key.decode()}
        environment.pop("ANTIPHON_REDIS_URL", None)
        self.valkey_port = next(ports)

        def add(name: str, command: Sequence[str]) -> None:
            log = self.directory / f"{name}.log"
            self.processes[name] = Managed(name, command, log, environment)

        async def proxied(name: str, target_port: int) -> int:
            self.proxies[name] = Proxy(next(ports), target_port)
            await self.proxies[name].start()
            return self.proxies[name].port

        data = str(self.directory / "data")
        add("redis", [server_binary(), "--port", str(self.valkey_port), "--dir", data, *VALKEY_OPTIONS])
        antiphon = (sys.executable, "-m", "antiphon.scheduler.cli")
        common = ("--fleet", FLEET, "--state-dir", str(self.directory / "state"))
        for name in self.engine_ids:
            http, kv = next(ports), next(ports)
            at = Ports(http, kv, await proxied(name, http), await proxied(f"{name}-kv", kv))
            self.ports[name] = at
            ledger = f"redis://127.0.0.1:{await proxied(f'redis-{name}', self.valkey_port)}"
            add(name, [
                *antiphon, "engine", "--model", str(self.model), "--port", str(http), "--kv-port", str(kv),
                "--advertise", f"127.0.0.1:{at.proxied_http}",
                "--advertise-kv", f"127.0.0.1:{at.proxied_directory}", "--ledger", ledger,
                "--pool", POOLS[name], "--engine-id", name, "--fault-injection", "--replace", *common,
                *self.engine_options, "--", *self.engine_flags,
            ])  # fmt: skip
        for name in GATEWAYS:
            port = next(ports)
            await proxied(name, port)
            ledger = f"redis://127.0.0.1:{await proxied(f'redis-{name}', self.valkey_port)}"
            settings = str(self.directory / "antiphon.toml")
            add(name, [*antiphon, "serve", "--config", settings, "--port", str(port), "--ledger", ledger,
                       "--model", str(self.model), *common])  # fmt: skip

    async def repair(self) -> None:
        """Everything healed, running and ready again."""
        for proxy in self.proxies.values():
            proxy.heal()
        for process in self.processes.values():
            if process.stopped:
                process.go_on()
            if not process.alive:
                process.start()
        await self.ready()
        for engine_id in self.engine_ids:
            with contextlib.suppress(DirectoryError):
                await self.link_fault(engine_id, wire.LinkFault("clear"))
            if self.simulated:
                await self.arm(engine_id, {"fault": "clear"})
        for number in range(len(GATEWAYS)):
            what = f"{GATEWAYS[number]} sends nothing by the prefill engine"
            await self.until(partial(readiness.transfers, self, number), what)
            deadline = time.monotonic() + BREAKERS_S
            while time.monotonic() < deadline and not await readiness.breakers_closed(self, number):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    async def ready(self) -> None:
        """Until both gateways see the ledger and every engine's present life."""
        await self.until(partial(readiness.is_ready, self), "the stack is not ready")

    async def until(self, condition: Condition, complaint: str) -> None:
        """Raises `FleetError` after the deadline, or when a process ends."""
        deadline = time.monotonic() + self.start_deadline_s
        while not await condition():
            dead = [name for name, process in self.processes.items() if process.lives and not process.alive]
            if dead or time.monotonic() > deadline:
                names = dead or list(self.processes)
                logs = [self.processes[name] for name in names if self.processes[name].log.exists()]
                tails = "\n".join(f"--- {process.name}:\n{process.log_tail()}" for process in logs)
                raise FleetError(f"{complaint}; ended: {dead or 'none'}\n{tails}")
            await asyncio.sleep(POLL_S)

    async def arm(self, engine_id: str, fault: dict[str, Any]) -> None:
        """A fault of a simulated engine (`engines/faults.py`)."""
        url = f"http://127.0.0.1:{self.ports[engine_id].http}/antiphon/faults"
        (await self.http.post(url, json=fault)).raise_for_status()

    def wipe_ledger(self) -> None:
        """Its append-only files; it must not run."""
        shutil.rmtree(self.directory / "data")
        (self.directory / "data").mkdir()
