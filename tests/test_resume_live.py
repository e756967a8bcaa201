"""Answers of real SGLang engines, broken at every token: greedy text goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from antiphon.scheduler.config import Config, EngineConfig, LedgerConfig, SchedulerConfig
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.rounds import RoundHandle
from antiphon.scheduler.standing import Standings
from tests.conftest import SglangPair
from tests.core_helpers import Chosen
from tests.replica_helpers import Cluster, collect, until
from tests.test_resume_runtime import CHAT, TEXT, Seen

TOKENS = 24
PROMPT = [(37 + i * i * 7 + i * 11) % 400 + 40 for i in range(60)]
PIECES = "ü€你😀é好 a".encode()
"""The tiny model's first 256 tokens are bytes; an answer of these is words, characters and halves of them."""
BODIES: tuple[dict[str, Any], ...] = ({}, {"logit_bias": {str(byte): 100.0 for byte in set(PIECES)}})
AT_ONCE = 3


@dataclass(slots=True)
class CuttingProxy:
    """Between a replica and an engine: cuts streams after so many events, each once, in order."""

    target: tuple[str, int]
    cuts: deque[int] = field(default_factory=deque)
    port: int = 0
    broken: int = 0
    """Streams that were cut before their usage, which is the last event; one with fewer events is not."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        engine, to_engine = await asyncio.open_connection(*self.target)
        left: list[int] = []

        async def requests() -> None:
            while sent := await client.read(65536):
                if sent.startswith((b"POST /v1/completions", b"POST /v1/chat/completions")):
                    left[:] = [self.cuts.popleft()] if self.cuts else []
                to_engine.write(sent)
                await to_engine.drain()

        async def answers() -> None:
            while got := await engine.read(65536):
                for at in (i for i in range(len(got)) if got.startswith(b"data: {", i)) if left else ():
                    left[0] -= 1
                    if left[0] < 0:
                        event = got[at:].partition(b"\n\n")[0]
                        self.broken += b'"usage":{' not in event
                        to_client.write(got[:at])
                        await to_client.drain()
                        return
                to_client.write(got)
                await to_client.drain()

        pumps = [asyncio.create_task(requests()), asyncio.create_task(answers())]
        with contextlib.suppress(ConnectionError):
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        to_client.close()
        to_engine.close()


@asynccontextmanager
async def behind_proxy(
    pair: SglangPair, valkey_url: str, key: bytes
) -> AsyncIterator[tuple[Cluster, CuttingProxy]]:
    """A replica over both engines, whose rounds begin on the first; that one's streams can be cut."""
    host, _, port = pair.decode.url.removeprefix("http://").partition(":")
    proxy = CuttingProxy((host, int(port)))
    fleet = uuid.uuid4().hex
    ledger = Ledger(valkey_url, fleet=fleet)
    async with proxy.running() as url:
        engines = tuple(
            EngineConfig(record.engine_id, at, record.pool, record.kv_addresses)
            for record, at in ((pair.decode, url), (pair.prefill, pair.prefill.url))
        )
        config = Config(
            scheduler=SchedulerConfig(policy="local"), ledger=LedgerConfig(fleet=fleet), engines=engines
        )
        replica = Replica(config, ledger, key, uuid.uuid4().hex, Metrics())
        try:
            async with replica.running():
                await until(lambda: replica.readiness().engines_alive == 2 and replica.readiness().ready, 30)
                core = replica.core
                core.policy = Chosen()
                core.standings = Standings(CoreConfig(breaker_failures=10**6))  # it breaks all the time
                yield Cluster(replica, ledger), proxy
        finally:
            await ledger.close()


async def said(c: Cluster, path: str, body: dict[str, Any]) -> tuple[RoundHandle, Seen]:
    request = c.request(uuid.uuid4().hex, PROMPT, TOKENS, temperature=0, **body)
    fields: dict[str, Any] = {name: getattr(request, name) for name in request.__slots__}
    async with c.replica.submit(type(request)(**(fields | {"path": path}))) as handle:
        await handle.start()
        return handle, Seen(await collect(handle), path == CHAT)


async def break_everywhere(
    c: Cluster, proxy: CuttingProxy, path: str, body: dict[str, Any], whole: Seen
) -> list[int]:
    """The same round for each event at which its first stream can be cut: how many tries each took."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def broken() -> int:
        async with gate:
            handle, seen = await said(c, path, body)
        receipt = handle.receipt
        assert receipt is not None
        assert (seen.text, seen.ids) == (whole.text, whole.ids), receipt.tries
        assert (seen.finish, seen.roles) == (whole.finish, path == CHAT)
        (told,) = seen.told
        assert (told["prompt_tokens"], told["completion_tokens"]) == (len(PROMPT), TOKENS)
        return len(receipt.tries)

    proxy.broken = 0
    proxy.cuts.extend(range(1, TOKENS + 1))
    tries = await asyncio.gather(*(broken() for _ in range(TOKENS)))
    assert not proxy.cuts
    return tries


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_greedy_text_goes_on_at_every_token(
    sglang_pair: SglangPair, valkey_url: str, fleet_key: bytes, path: str
) -> None:
    """ASCII and other text, held back in halves: no letter and no space is lost or doubled at the seam."""

    async def scenario() -> None:
        async with behind_proxy(sglang_pair, valkey_url, fleet_key) as (c, proxy):
            for body in BODIES:
                _, whole = await said(c, path, body)
                assert whole.text.isascii() == (not body)
                tries = await break_everywhere(c, proxy, path, body, whole)
                # Engines put tokens that come close together into one event, and hold halves back. An answer
                # that lacks only its usage is whole.
                assert sum(tries) - TOKENS == proxy.broken >= 5

    asyncio.run(scenario())
