"""`antiphon drain` and its route: what it says, to whom, and how it ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp

from antiphon.scheduler.access_config import KeyConfig
from antiphon.scheduler.config import Config, ModelConfig
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.metrics import Metrics
from tests.replica_helpers import Cluster, cluster, until
from tests.test_drain import some_sessions, talk
from tests.test_sessions_api import MODEL, listening


@asynccontextmanager
async def gateway(c: Cluster, model_dir: Path, *keys: KeyConfig) -> AsyncIterator[str]:
    config = Config(model=ModelConfig(str(model_dir), (MODEL,)), keys=keys)
    tokenizers = TokenizerSource(lambda: str(model_dir))
    app = create_app(c.replica, tokenizers, config, c.replica, Metrics(), drains=c.replica.drains)
    async with listening(app) as (url, _):
        yield url


@dataclass(frozen=True, slots=True)
class Done:
    exit_code: int
    output: str
    errors: str


async def drain(url: str, *arguments: str, key: str = "") -> Done:
    """The command, as a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "antiphon.scheduler.cli", "drain", *arguments),
        env={**os.environ, "ANTIPHON_URL": url, "ANTIPHON_API_KEY": key},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, output.decode(), errors.decode())


async def test_an_engine_is_drained_and_taken_back(valkey_url: str, tiny_model_dir: Path) -> None:
    """The last line says that it is safe to stop; with --undo it is used again."""
    async with cluster(valkey_url, "local", engines="d0 d1") as c, gateway(c, tiny_model_dir) as url:
        await talk(c, some_sessions())
        done = await drain(url, "d0", "--timeout", "20")
        assert done.exit_code == 0, done.output
        assert "d0: safe to stop; 3 sessions moved" in done.output.splitlines()[-1]
        told = await drain(url, "d0", "--no-wait", "--json")
        assert '"safe":true' in told.output
        undone = await drain(url, "d0", "--undo")
        assert undone.exit_code == 0 and "not draining" in undone.output
        await until(lambda: not c.replica.core.standings.draining)


async def test_what_cannot_be_drained_is_said(valkey_url: str, tiny_model_dir: Path) -> None:
    """Unknown engines, the only one, and a deadline that passes."""
    async with cluster(valkey_url, "local", engines="d0") as c, gateway(c, tiny_model_dir) as url:
        unknown = await drain(url, "nobody")
        assert unknown.exit_code != 0 and "No engine 'nobody' is up; up are: d0" in unknown.errors
        undone = await drain(url, "nobody", "--undo")
        assert undone.exit_code != 0 and "No engine 'nobody' is up; up are: d0" in undone.errors
        alone = await drain(url, "d0")
        assert alone.exit_code != 0 and "the only one of its model" in alone.errors
    async with cluster(valkey_url, "local", engines="d0 d1") as c, gateway(c, tiny_model_dir) as url:
        await c.ledger.heartbeat("a gateway that does not look", 60.0)
        late = await drain(url, "d0", "--timeout", "0.1")
        assert late.exit_code == 3 and "of 2 gateways have seen it" in late.output


async def test_what_the_route_says_of_engines(valkey_url: str, tiny_model_dir: Path) -> None:
    """404 by every method for one that is neither up nor marked; the mark of a dead one is taken back."""
    async with cluster(valkey_url, "local", engines="d0") as c, gateway(c, tiny_model_dir) as url:

        async def ask(method: str, engine_id: str) -> tuple[int, Any]:
            path = f"{url}/v1/engines/{engine_id}/drain"
            async with aiohttp.ClientSession() as http, http.request(method, path) as answer:
                return answer.status, await answer.json()

        for method in ("GET", "POST", "DELETE"):
            status, error = await ask(method, "nobody")
            assert (status, error["error"]["code"]) == (404, "engine_not_found"), method
            assert "up are: d0" in error["error"]["message"]
        assert (await ask("POST", "d0"))[1]["error"]["code"] == "no_other_engine"
        for method in ("GET", "DELETE"):
            status, told = await ask(method, "d0")
            assert (status, told["draining"]) == (200, False), method
        await c.replica.drains.mark("dead", "its last life")
        status, told = await ask("GET", "dead")
        assert (status, told["draining"]) == (200, True)
        assert (await ask("DELETE", "dead"))[0] == 200 and (await ask("DELETE", "dead"))[0] == 404


async def test_only_admins_drain(valkey_url: str, tiny_model_dir: Path) -> None:
    """A tenant's key is refused for every method."""
    user = KeyConfig("user", "t", key_sha256=sha256(b"a-tenants-key").hexdigest())
    async with cluster(valkey_url, "local", engines="d0 d1") as c, gateway(c, tiny_model_dir, user) as url:
        for arguments in (["d0"], ["d0", "--undo"]):
            refused = await drain(url, *arguments, key="a-tenants-key")
            assert refused.exit_code != 0 and "admin keys only" in refused.errors
        assert await c.replica.drains.marks() == {}
