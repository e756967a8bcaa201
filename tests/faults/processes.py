"""Processes of a run: started, killed, stopped and continued by pid, each with its log in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STOP_DEADLINE_S = 15.0
POLL_S = 0.02
LOG_TAIL_BYTES = 3000


@dataclass(slots=True)
class Managed:
    """One process that can be started again with the same command."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    stopped: bool = False
    lives: int = 0
    descendants: list[int] = field(default_factory=list)
    """Of an engine that was stopped: SGLang is several processes."""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        assert not self.alive, f"{self.name} runs already"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                start_new_session=True,
            )
        self.lives += 1

    def kill(self) -> None:
        """kill -9 of the process alone; returns when it and those below it, which follow it, are gone."""
        assert self.process is not None
        below = children_of(self.process.pid)
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)
        self.stopped = False
        deadline = time.monotonic() + STOP_DEADLINE_S
        while any(is_alive(pid) for pid in below):
            assert time.monotonic() < deadline, f"{self.name}: processes below it stay"
            time.sleep(POLL_S)

    def stop(self) -> None:
        """SIGSTOP, to all of an engine's processes."""
        assert self.process is not None
        self.descendants = [self.process.pid, *children_of(self.process.pid)]
        for pid in self.descendants:
            os.kill(pid, signal.SIGSTOP)
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        for pid in self.descendants:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        self.stopped = False

    def end(self) -> None:
        """SIGTERM, then SIGKILL."""
        if not self.alive or self.process is None:
            return
        if self.stopped:
            self.go_on()
        self.process.terminate()
        try:
            self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")


def is_alive(pid: int) -> bool:
    """Whether it runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Pids of all processes below one."""
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                below = [int(child) for child in children.read_text().split()]
            except OSError:
                continue
            found += below
            pending += below
    return found
