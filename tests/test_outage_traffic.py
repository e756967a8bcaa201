"""Redis breaks under traffic to two replicas: every round is answered, alike by both, and recorded once."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from antiphon.scheduler.valkey import EmbeddedValkey
from tests.append_helpers import CHAT, Gateway, stack, user
from tests.faults.proxy import Proxy
from tests.replica_helpers import until
from tests.test_outage import free_port, proxied, roll_back

SESSIONS, FLAPS = 3, 2
DEADLINE_S = 30.0


class Traffic:
    """Sessions that ask one thing at a time, until it is `over`; every request is made again at the other
    replica."""

    def __init__(self, gateways: list[Gateway]) -> None:
        self.answered = 0
        self.over = asyncio.Event()
        self.rounds: Counter[str] = Counter()
        self._gateways = gateways

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(SESSIONS):
                group.create_task(self._session(f"s{number}"))

    async def _session(self, name: str) -> None:
        said: list[dict[str, Any]] = []
        while not self.over.is_set():
            number = self.rounds[name]
            said.append(user(f"{name} asks for thing {number}"))
            first, then = self._gateways[:: 1 if number % 2 else -1]
            one = await self._ask(first, name, number, said)
            two = await self._ask(then, name, number, said)
            assert one == two, "the retry is answered something else"
            said.append(one)
            self.rounds[name] += 1
            self.answered += 1

    async def _ask(
        self, gateway: Gateway, name: str, number: int, said: list[dict[str, Any]]
    ) -> dict[str, Any]:
        named = {"X_Session_ID": name, "Idempotency_Key": f"{name}-{number}"}
        status, answer = await gateway.post(CHAT, {"messages": said, "max_tokens": 6}, **named)
        assert status == 200, answer
        message: dict[str, Any] = answer["choices"][0]["message"]
        return message

    async def after(self, rounds: int) -> None:
        """So many more have been answered."""
        goal = self.answered + rounds
        await until(lambda: self.answered >= goal, DEADLINE_S)


Injury = Callable[[EmbeddedValkey, Proxy, Traffic, Path], Awaitable[None]]


async def kill(server: EmbeddedValkey, proxy: Proxy, traffic: Traffic, files: Path) -> None:
    """The embedded server is started again by its watch, from its append-only file."""
    killed = server.pointer.pid
    os.kill(killed, signal.SIGKILL)
    await until(lambda: server.pointer.pid != killed, DEADLINE_S)


async def stop(server: EmbeddedValkey, proxy: Proxy, traffic: Traffic, files: Path) -> None:
    os.kill(server.pointer.pid, signal.SIGSTOP)
    try:
        await traffic.after(4)
    finally:
        os.kill(server.pointer.pid, signal.SIGCONT)


async def empty(server: EmbeddedValkey, proxy: Proxy, traffic: Traffic, files: Path) -> None:
    nothing = files.parent.parent / "nothing"
    nothing.mkdir()
    await asyncio.to_thread(roll_back, server, files, nothing)


async def older(server: EmbeddedValkey, proxy: Proxy, traffic: Traffic, files: Path) -> None:
    """As a failover to a replica that was behind."""
    await asyncio.to_thread(shutil.copytree, files, files.parent.parent / "older")
    await traffic.after(3)
    await asyncio.to_thread(roll_back, server, files, files.parent.parent / "older")


async def flap(server: EmbeddedValkey, proxy: Proxy, traffic: Traffic, files: Path) -> None:
    """Away and back with every other round."""
    for _ in range(FLAPS):
        for how in ("reset", "silent", "close"):
            proxy.cut(how)
            await traffic.after(1)
            proxy.heal()
            await traffic.after(1)


@pytest.mark.parametrize("injuries", [(stop, flap), (kill, empty, older)], ids=["data stays", "data is lost"])
def test_every_round_is_answered_and_recorded_once(
    tmp_path: Path, tiny_model_dir: Path, injuries: tuple[Injury, ...]
) -> None:
    async def scenario(server: EmbeddedValkey) -> None:
        async with (
            proxied(server.pointer.port) as proxy,
            stack(f"redis://127.0.0.1:{proxy.port}", tiny_model_dir, None) as s,
            s.gateway() as a,
            s.gateway() as b,
            asyncio.timeout(DEADLINE_S),
        ):
            traffic = Traffic([a, b])
            running = asyncio.create_task(traffic.run())
            for injury in injuries:
                await traffic.after(2)
                await injury(server, proxy, traffic, tmp_path / "data" / "appendonlydir")
            await traffic.after(2)
            traffic.over.set()
            await running
            await until(lambda: all(g.replica.readiness().ledger == "ok" for g in (a, b)), DEADLINE_S)
            await asyncio.gather(a.recorded(), b.recorded())
            receipts = await a.ledger.receipts(1000)
            completed = [r for r in receipts if r["outcome"] == "completed"]
            recorded = Counter(r["session_id"].partition("~")[0] for r in completed)
            lossless = stop in injuries
            doubles = a.ledger.doubles + b.ledger.doubles
            assert doubles["repeated"], "rounds ran at both replicas"
            for name in (f"s{number}" for number in range(SESSIONS)):
                assert recorded[name] == traffic.rounds[name] or (
                    not lossless and recorded[name] < traffic.rounds[name]
                )

    with EmbeddedValkey.start(tmp_path / "data", port=free_port()) as server:
        asyncio.run(scenario(server))
