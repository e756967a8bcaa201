"""What transfer tests share: a peer process that is driven line by line, and checks of what was pulled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from antiphon.engines import wire
from antiphon.engines.rank_service import RankService
from tests.kv_peer import page_content

REPOSITORY = Path(__file__).parent.parent


class Peer:
    """The other engine: a process of its own, driven line by line."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kv_peer", json.dumps(options)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        info = json.loads(self.read_line())
        self.address: str = info["address"]
        self.incarnation: str = info["incarnation"]

    def read_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the peer ended with {self.process.wait(10.0)}"
        return line

    def tell(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read_line().strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(10.0)

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def prefetch(peer: Peer, chain: tuple[bytes, ...], deadline_s: float = 10.0, **changes: Any) -> wire.Prefetch:
    fields: dict[str, Any] = {
        "source_address": peer.address,
        "source_incarnation": peer.incarnation,
        "parent": b"",
        "hashes": chain,
        "deadline_s": deadline_s,
    }
    return wire.Prefetch(**(fields | changes))


def assert_holds(rank: RankService, chain: tuple[bytes, ...]) -> None:
    """All of `chain` is stored here, with the right bytes."""
    pin = rank.store.pin(chain, ttl_s=60.0, holder="test")
    assert len(pin.slots) == len(chain)
    memory = rank.store.memory
    assert memory is not None
    for slot, page_hash in zip(pin.slots, chain, strict=True):
        assert bytes(memory.view(slot)) == page_content(page_hash, memory.page_bytes)
    rank.store.unpin(pin.pin_id)


def wait_until(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)
