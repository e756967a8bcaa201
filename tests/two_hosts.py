"""Two hosts on one machine: network namespaces A and B, joined by a cable, with a network more on each.

Needs root (`ip netns`). Nothing in them can reach anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

CLONE_NEWNET = 0x40000000
STOP_DEADLINE_S = 15.0

ValueT = TypeVar("ValueT")


class NoNamespaces(Exception):
    """This machine does not let us make any; the message says why."""


@dataclass(slots=True)
class Host:
    """One namespace, with what runs in it."""

    namespace: str
    address: str
    """On the cable."""
    other_address: str
    """On the network where nothing of ours may listen."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=dict(env),
                cwd=Path(__file__).parent.parent,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def listening(self) -> set[str]:
        """Local addresses of listening TCP and bound UDP sockets, without ports."""
        shown = _run("ip", "netns", "exec", self.namespace, "ss", "-Hltun")
        return {line.split()[4].rpartition(":")[0].partition("%")[0] for line in shown.splitlines()}

    def inside(self, action: Callable[[], ValueT]) -> ValueT:
        """Run it in a thread that lives in the namespace."""
        results: list[ValueT] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with Path(f"/run/netns/{self.namespace}").open("rb") as file:
                    if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(action())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"in {self.namespace}")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """A and B; their processes are ended and they are gone afterwards. Raises `NoNamespaces`."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("ss") is None:
        raise NoNamespaces("network namespaces need root, and ip and ss of iproute2")
    name = secrets.token_hex(3)
    hosts = tuple(
        Host(f"antiphon-{side}-{name}", f"10.203.7.{number}", f"10.204.7.{number}")
        for number, side in ((1, "a"), (2, "b"))
    )
    made: list[str] = []
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
            made.append(host.namespace)
        ends = [f"veth{side}{name}" for side in "ab"]
        _run("ip", "link", "add", ends[0], "netns", hosts[0].namespace, "type", "veth",
             "peer", "name", ends[1], "netns", hosts[1].namespace)  # fmt: skip
        for host, end in zip(hosts, ends, strict=True):
            inside = ("ip", "-n", host.namespace)
            _run(*inside, "link", "set", "lo", "up")
            _run(*inside, "address", "add", f"{host.address}/24", "dev", end)
            _run(*inside, "link", "set", end, "up")
            _run(*inside, "link", "add", "other0", "type", "veth", "peer", "name", "other1")
            _run(*inside, "address", "add", f"{host.other_address}/24", "dev", "other0")
            for device in ("other0", "other1"):
                _run(*inside, "link", "set", device, "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            for process in reversed(host.processes):
                _end(process)
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
