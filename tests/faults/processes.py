"""Processes of a run: started, killed, stopped and continued by pid, each with its log in a file."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STOP_DEADLINE_S = 15.0
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
        """kill -9; returns when it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)
        self.stopped = False

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
