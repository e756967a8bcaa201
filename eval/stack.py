"""A whole stack as child processes: Valkey, engines, gateway. For the demo and for tests on real parts.

Every process is ended on the way out, by pid, and its log stays in the stack's directory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from antiphon.engines.base import EngineRecord
from antiphon.scheduler.fleet_key import KEY_VARIABLE, load_or_create_fleet_key
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.valkey import EmbeddedValkey

POLL_S = 0.1
STOP_DEADLINE_S = 20.0
LOG_TAIL_LINES = 30

CPU_ENGINE_FLAGS = ("--max-total-tokens", "32768", "--max-running-requests", "16")


class StackError(Exception):
    """A part did not come up or died; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One `antiphon engine` process."""

    engine_id: str
    pool: str
    port: int
    options: tuple[str, ...] = ()
    """More options of `antiphon engine`."""
    sglang: tuple[str, ...] = CPU_ENGINE_FLAGS


@dataclass(slots=True)
class _Part:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Stack:
    """Owns the processes that it starts; use as an async context manager."""

    def __init__(self, directory: Path, ledger_url: str | None = None, fleet: str = "default") -> None:
        """`ledger_url` None = an embedded Valkey of its own in `directory`/state."""
        self.directory = directory
        self.fleet = fleet
        self.state_dir = directory / "state"
        self.ledger_url = ledger_url or ""
        self.gateway_url = ""
        self.engines: dict[str, EngineRecord] = {}
        self._valkey: EmbeddedValkey | None = None
        self._parts: dict[str, _Part] = {}
        self._environment: dict[str, str] = {}

    @property
    def fleet_key(self) -> bytes:
        return load_or_create_fleet_key(self.state_dir)

    async def __aenter__(self) -> Self:
        (self.directory / "logs").mkdir(parents=True, exist_ok=True)
        if not self.ledger_url:
            self._valkey = await asyncio.to_thread(EmbeddedValkey.start, self.state_dir)
            self.ledger_url = self._valkey.url
        self._environment = dict(os.environ) | {KEY_VARIABLE: self.fleet_key.decode()}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self._stop_all))

    # ---- starting

    async def start_engines(
        self, model: Path, specs: Sequence[EngineSpec], deadline_s: float = 300.0
    ) -> None:
        """Start the engines side by side; returns when all are registered. Raises `StackError`."""
        for spec in specs:
            arguments = [
                *("engine", "--model", str(model), "--port", str(spec.port), "--ledger", self.ledger_url),
                *("--fleet", self.fleet, "--pool", spec.pool, "--engine-id", spec.engine_id),
                *("--state-dir", str(self.state_dir), *spec.options, "--", *spec.sglang),
            ]
            self._spawn(spec.engine_id, arguments)
        names = {spec.engine_id for spec in specs}

        async def registered() -> bool:
            ledger = Ledger(self.ledger_url, fleet=self.fleet)
            try:
                self.engines |= {record.engine_id: record for record in await ledger.engines()}
            except LedgerUnavailable as error:
                raise StackError(f"the ledger is away: {error}") from error
            finally:
                await ledger.close()
            return names <= self.engines.keys()

        await self._until(registered, names, deadline_s, "engines are not registered")

    async def start_gateway(
        self, *arguments: str, port: int, name: str = "gateway", engines: int = 1, deadline_s: float = 60.0
    ) -> str:
        """Start `antiphon serve`; returns its URL when it is ready and sees `engines` engines."""
        url = f"http://127.0.0.1:{port}"
        self._spawn(
            name,
            [
                *("serve", "--port", str(port), "--ledger", self.ledger_url, "--fleet", self.fleet),
                *("--state-dir", str(self.state_dir), *arguments),
            ],
        )

        async def ready() -> bool:
            status, listed = await fetch_json(f"{url}/v1/engines")
            alive = [e for e in listed.get("data", ()) if "pool" in e] if status == 200 else []
            return (await fetch_json(f"{url}/ready"))[0] == 200 and len(alive) >= engines

        await self._until(ready, {name}, deadline_s, "the gateway is not ready")
        self.gateway_url = url
        return url

    def _spawn(self, name: str, arguments: Sequence[str]) -> None:
        log = self.directory / "logs" / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "antiphon.scheduler.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        self._parts[name] = _Part(name, process, log)

    async def _until(
        self,
        condition: Callable[[], Coroutine[None, None, bool]],
        parts: set[str],
        deadline_s: float,
        complaint: str,
    ) -> None:
        """Poll a condition; a part that dies meanwhile, or the deadline, is a `StackError`."""
        deadline = time.monotonic() + deadline_s
        while not await condition():
            for part in (self._parts[name] for name in parts):
                if (code := part.process.poll()) is not None:
                    raise StackError(f"{part.name} ended with status {code}:\n{_tail(part.log)}")
            if time.monotonic() > deadline:
                logs = "\n".join(f"{name}:\n{_tail(self._parts[name].log)}" for name in sorted(parts))
                raise StackError(f"{complaint} after {deadline_s:g} s\n{logs}")
            await asyncio.sleep(POLL_S)

    # ---- ending

    def pid(self, name: str) -> int:
        return self._parts[name].process.pid

    def kill(self, name: str) -> None:
        """kill -9, as a crash would; returns when the process is gone."""
        process = self._parts.pop(name).process
        process.kill()
        process.wait()

    async def stop(self, name: str) -> int:
        """SIGTERM, then SIGKILL after a deadline; the exit status."""
        return await asyncio.to_thread(self._stop_one, self._parts.pop(name))

    def _stop_one(self, part: _Part) -> int:
        part.process.send_signal(signal.SIGTERM)
        try:
            return part.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            part.process.kill()
            return part.process.wait()

    def _stop_all(self) -> None:
        """The gateway first, so that it can still finish with its engines; the ledger last."""
        for name in list(reversed(self._parts)):
            part = self._parts.pop(name)
            self._stop_one(part)
        if self._valkey is not None:
            self._valkey.stop()
            self._valkey = None


async def fetch_json(url: str, deadline_s: float = 5.0) -> tuple[int, Mapping[str, Any]]:
    """(status, JSON object); (0, {}) when nobody answers."""
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            body = await answer.json(content_type=None)
            return answer.status, body if isinstance(body, dict) else {}
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return 0, {}


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-LOG_TAIL_LINES:])
