"""Redis away, slow, emptied, rolled back: what two replicas on it make of their sessions' rounds."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from antiphon.client import AsyncClient
from antiphon.scheduler.gateway.prompts import PromptTokenizer
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.append_helpers import CHAT, stack, user
from tests.faults.proxy import Proxy
from tests.replica_helpers import KEY, Cluster, cluster, until

LONG = [8 + n % 200 for n in range(1200)]


@asynccontextmanager
async def second_replica(first: Cluster, url: str) -> AsyncIterator[Cluster]:
    """Another one on the same engines and ledger."""
    config = first.replica._config
    ledger = Ledger(url, fleet=config.ledger.fleet)
    async with AsyncExitStack() as exits:
        exits.push_async_callback(ledger.close)
        made = Cluster(Replica(config, ledger, KEY, "second", Metrics()), ledger, first.engines)
        await exits.enter_async_context(made.replica.running())
        await until(lambda: made.replica.readiness().engines_alive == len(first.engines))
        await until(lambda: made.replica.readiness().ledger == "ok")
        yield made


@contextmanager
def stopped(server: EmbeddedValkey) -> Iterator[None]:
    os.kill(server.pointer.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pointer.pid, signal.SIGCONT)


def test_without_the_ledger_replicas_find_a_session_where_the_other_left_it(tmp_path: Path) -> None:
    """The first round on one replica, the second on the other: one home, and its KV is used."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with (
            cluster(server.url, "local", engines="d0 d1 d2") as a,
            second_replica(a, server.url) as b,
        ):
            with stopped(server):
                for number in range(4):
                    ids = [*LONG, *range(10 + number, 60 + number)]
                    ids[0] = 300 + number  # nothing is shared between sessions
                    one, _ = await a.run(f"s{number}", ids)
                    two, _ = await b.run(f"s{number}", [*ids, *range(100, 150)])
                    assert one.receipt and two.receipt
                    assert one.receipt.degraded and two.receipt.degraded
                    assert one.receipt.home == two.receipt.home
                    assert two.receipt.cached_tokens >= 1200

    with EmbeddedValkey.start(tmp_path) as server:
        asyncio.run(scenario(server))


def test_residency_is_rebuilt_from_the_directories_after_a_loss(tmp_path: Path) -> None:
    """Redis comes back empty: a replica that never had the session finds its home and its KV."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with (
            cluster(server.url, "local", engines="d0 d1 d2") as a,
            second_replica(a, server.url) as b,
        ):
            await b.run("other", LONG[5:300])
            one, _ = await a.run("s", LONG)
            await a.recorded()
            await a.ledger.connection.command("FLUSHALL")
            two, _ = await b.run("s", [*LONG, *range(100, 150)])
            assert one.receipt and two.receipt and not two.receipt.degraded
            assert one.receipt.home == two.receipt.home
            assert two.receipt.cached_tokens >= 1184

    with EmbeddedValkey.start(tmp_path) as server:
        asyncio.run(scenario(server))


@asynccontextmanager
async def proxied(target_port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(free_port(), target_port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def test_an_append_to_a_rolled_back_ledger_is_refused_and_our_client_heals_it(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Redis comes back without the last round: there is no answer to a conversation with a hole."""

    async def scenario(server: EmbeddedValkey) -> None:
        files, older = tmp_path / "data" / "appendonlydir", tmp_path / "older"
        async with (
            stack(server.url, tiny_model_dir, None) as s,
            s.gateway() as a,
            proxied(port_of(a.url)) as proxy,
            AsyncClient(f"http://127.0.0.1:{proxy.port}") as client,
        ):
            session = client.session("s", model="tiny", max_tokens=4)
            await session.append("the first thing")
            await a.recorded()
            assert (await a.ledger.connection.command("WAITAOF", 1, 0, 10_000))[0] == 1
            await asyncio.to_thread(shutil.copytree, files, older)
            await session.append("the second thing")
            await a.recorded()
            await asyncio.to_thread(roll_back, server, files, older)
            async with s.gateway() as b:  # another replica: nothing in its memory
                proxy.target_port = port_of(b.url)
                proxy.cut("close")
                proxy.heal()
                status, error = await b.append("s", user("x"), session={"after_round": 2})
                assert (status, error["error"]["code"]) == (410, "history_lost"), error
                reply = await session.append("the third thing")
                assert reply.session is not None and reply.session.id == "s"
                said = text_of(tiny_model_dir, b.prompts[-1])
                assert "the second thing" in said and "the third thing" in said
                await session.append("the fourth thing")  # it may append again

    with EmbeddedValkey.start(tmp_path / "data") as server:
        asyncio.run(scenario(server))


def roll_back(server: EmbeddedValkey, files: Path, older: Path) -> None:
    """kill -9, and the files as they were: what it is restarted with."""
    killed = server.pointer.pid
    os.kill(killed, signal.SIGKILL)
    shutil.rmtree(files)
    shutil.copytree(older, files)
    end = time.monotonic() + 20
    while server.pointer.pid == killed:
        assert time.monotonic() < end, "the server is not restarted"
        time.sleep(0.01)


def text_of(model_dir: Path, ids: list[int]) -> str:
    return PromptTokenizer(model_dir).decode(ids)


@pytest.mark.parametrize(
    ("injury", "first_s", "next_s"),
    [
        (lambda proxy: proxy.cut("silent"), 1.0, 0.8),
        (lambda proxy: proxy.cut("reset"), 1.0, 0.8),
        (lambda proxy: proxy.slow(1.0, 0), 1.5, 0.8),
        (lambda proxy: proxy.slow(0.15, 0), 2.0, 0.8),
    ],
    ids=["silent", "reset", "2 s", "0.3 s"],
)
def test_a_ledger_that_is_slow_costs_its_deadline_once(
    tmp_path: Path, tiny_model_dir: Path, injury: Callable[[Proxy], None], first_s: float, next_s: float
) -> None:
    """All that a request asks of it together: whose session, its history, its claim, keeping the answer."""

    async def scenario(server: EmbeddedValkey) -> None:
        port = server.pointer.port
        async with (
            proxied(port) as proxy,
            stack(f"redis://127.0.0.1:{proxy.port}", tiny_model_dir, None) as s,
            s.gateway() as gateway,
        ):
            said: list[dict[str, Any]] = [user("hello there")]
            status, answer = await gateway.post(CHAT, {"messages": said, "max_tokens": 4})
            assert status == 200
            said += [answer["choices"][0]["message"], user("and more")]
            await gateway.recorded()
            injury(proxy)
            took = []
            for number in range(4):
                began, body = time.monotonic(), {"messages": said, "max_tokens": 4}
                status, answer = await gateway.post(CHAT, body, Idempotency_Key=f"k{number}")
                took.append(time.monotonic() - began)
                assert status == 200, answer
            assert took[0] < first_s and min(took[1:]) < next_s and max(took) < first_s
            proxy.heal()
            await until(lambda: gateway.replica.readiness().ledger == "ok")

    with EmbeddedValkey.start(tmp_path / "data", port=free_port()) as server:
        asyncio.run(scenario(server))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
