"""Real engines for tests: started by the product's own command, awaited in the registry, ended by pid."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import redis.asyncio

from antiphon.engines.base import EngineRecord
from antiphon.engines.launch_options import find_free_ports
from antiphon.engines.registry import list_engines

START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 20.0
POLL_S = 0.1
LOG_TAIL_BYTES = 6000

ValueT = TypeVar("ValueT")


def wait_for(what: str, probe: Callable[[], ValueT | None], deadline_s: float = 10.0) -> ValueT:
    """Poll until `probe` returns something other than None or False; fails naming `what`."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if value := probe():
            return value
        time.sleep(POLL_S)
    raise AssertionError(f"{what}: not within {deadline_s} s")


def free_port() -> int:
    return find_free_ports("127.0.0.1", 1)


@dataclass(slots=True)
class EngineProcess:
    """One engine started by a test run, with its log in a file."""

    engine_id: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls, engine_id: str, arguments: Sequence[str], log: Path, *, module: str = "antiphon.engines.launcher"
    ) -> EngineProcess:
        """Run `python -m MODULE --engine-id ID ARGUMENTS`; the environment carries the fleet key."""
        command = [sys.executable, "-m", module, f"--engine-id={engine_id}", *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return cls(engine_id, process, log)

    def wait_registered(self, ledger: str, deadline_s: float = START_DEADLINE_S) -> EngineRecord:
        """Its record, once it is in the registry; fails with the end of its log."""

        def probe() -> EngineRecord | None:
            if (status := self.process.poll()) is not None:
                raise AssertionError(f"engine {self.engine_id} exited with {status}:\n{self.log_tail()}")
            return registered(ledger).get(self.engine_id)

        try:
            return wait_for(f"engine {self.engine_id} in the registry", probe, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_tail()}") from None

    def kill(self) -> None:
        """SIGKILL the main process only: its children must follow by themselves."""
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)

    def stop(self) -> int:
        """SIGTERM, then SIGKILL if that takes too long; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)

    def log_tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")


def registered(ledger: str) -> dict[str, EngineRecord]:
    """Engine id -> record of every live engine of the default fleet."""

    async def read() -> dict[str, EngineRecord]:
        async with redis.asyncio.Redis.from_url(ledger, decode_responses=True) as client:
            return {record.engine_id: record for record in await list_engines(client)}

    return asyncio.run(read())


def descendants(pid: int) -> list[int]:
    """Pids of a process and all below it, itself first; [] when it is gone."""
    if not alive(pid):
        return []
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    return found


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
