"""Gateways over HTTP with real replicas, a simulated engine that answers by a script, and a real Valkey."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvicorn

from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.scheduler.answers import Calls
from antiphon.scheduler.config import Config, GatewayConfig, LedgerConfig, SchedulerConfig
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.conversations import Conversations
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TokenizerSource
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.models import ONLY
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.response_store import ResponseStore
from antiphon.scheduler.rounds import RoundHandle, RoundRequest
from antiphon.scheduler.session_store import SessionStore
from antiphon.scheduler.token_log import TokenLogs
from tests.replica_helpers import KEY, until

MODEL = "tiny"
CHAT = "/v1/chat/completions"
DEADLINE_S = 20.0
Answer = tuple[int, dict[str, Any]]


class _Seen:
    """A replica that remembers what was submitted."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.requests: list[RoundRequest] = []

    def submit(self, request: RoundRequest) -> RoundHandle:
        self.requests.append(request)
        return self.replica.submit(request)

    async def explain(self, request: RoundRequest) -> dict[str, Any]:
        return await self.replica.explain(request)


@dataclass(slots=True)
class Gateway:
    """One replica with its HTTP door."""

    url: str
    http: aiohttp.ClientSession
    seen: _Seen
    logs: TokenLogs
    replica: Replica
    ledger: Ledger

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        content = msgspec.json.encode({"model": MODEL, "temperature": 0, **body})
        async with self.http.post(self.url + path, data=content, headers=named) as answer:
            return answer.status, await answer.json()

    async def append(self, session_id: str, *new: dict[str, Any], **body: Any) -> Answer:
        return await self.post(f"/v1/sessions/{session_id}/rounds", {"messages": new, **body})

    async def chat(self, session_id: str, *messages: dict[str, Any], **body: Any) -> Answer:
        return await self.post(CHAT, {"messages": messages, **body}, X_Session_ID=session_id)

    async def events(self, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
        """Of a stream."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        content = msgspec.json.encode({"model": MODEL, "temperature": 0, "stream": True, **body})
        async with self.http.post(self.url + path, data=content, headers=named) as answer:
            assert answer.status == 200, await answer.text()
            lines = [line[6:].strip() async for line in answer.content if line.startswith(b"data: ")]
        return ["[DONE]" if line == b"[DONE]" else msgspec.json.decode(line) for line in lines]

    async def recorded(self) -> None:
        await until(lambda: not self.replica.runtime._recording)

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of every prompt submitted here."""
        return [list(request.prompt) for request in self.seen.requests]


@dataclass(slots=True)
class Stack:
    """An engine, a ledger, and gateways that come and go."""

    valkey_url: str
    model_dir: Path
    fleet: str = field(default_factory=lambda: uuid.uuid4().hex)
    config: dict[str, Any] = field(default_factory=dict)

    @asynccontextmanager
    async def gateway(self, logs_url: str = "") -> AsyncIterator[Gateway]:
        """Another replica, until the block is left; with nothing in its memory.

        `logs_url`: another server for token logs than for the rest.
        """
        config = Config(
            gateway=GatewayConfig(shutdown_grace_s=0.05),
            scheduler=SchedulerConfig(policy="local"),
            ledger=LedgerConfig(fleet=self.fleet),
            **self.config,
        )
        async with AsyncExitStack() as stack:
            ledger = Ledger(self.valkey_url, fleet=self.fleet)
            stack.push_async_callback(ledger.close)
            failures = None if logs_url else ledger.connection.failures
            logs = TokenLogs(logs_url or self.valkey_url, fleet=self.fleet, failures=failures)
            stack.push_async_callback(logs.close)
            metrics = Metrics()
            replica = Replica(config, ledger, KEY, uuid.uuid4().hex, metrics)
            seen, store = _Seen(replica), SessionStore(ledger)
            tokenizers = TokenizerSource({ONLY: lambda: str(self.model_dir)})
            app = create_app(
                seen, tokenizers, config, replica, metrics, store=store,
                conversations=Conversations(logs, store, ledger), calls=Calls(ledger.connection),
                responses=ResponseStore(ledger, 60.0),
            )  # fmt: skip
            await stack.enter_async_context(replica.running())
            await until(lambda: replica.readiness().engines_alive > 0 and replica.readiness().ledger == "ok")
            url = await stack.enter_async_context(_serving(app))
            timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
            http = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
            yield Gateway(url, http, seen, logs, replica, ledger)


@asynccontextmanager
async def stack(
    valkey_url: str, model_dir: Path, script: Path | None, lines: Sequence[dict[str, Any]] = (), **config: Any
) -> AsyncIterator[Stack]:
    """`lines` are the engine's answers in order (`engines/scripts.py`), written to `script`."""
    made = Stack(valkey_url, model_dir, config=config)
    if script is not None:
        content = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        await asyncio.to_thread(script.write_bytes, content)
    options = SimulatedOptions(
        engine_id="d0", ledger=valkey_url, fleet=made.fleet, model_id=MODEL, model_path=str(model_dir),
        speed=50.0, script=script, context_tokens=262144, pool_tokens=524288,
    )  # fmt: skip
    async with SimulatedEngine(options, fleet_key=KEY):
        yield made


@asynccontextmanager
async def _serving(app: Any) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(settings)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.wait([serving])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def byte_by_byte(tokenizer: PromptTokenizer, text: str, *, ended: bool = True) -> list[int]:
    """The text as ids that no tokenizer gives for all of it."""
    ids = [i for char in text for i in tokenizer.encode_rendered(char)]
    return [*ids, *sorted(tokenizer.eos_ids)[:1]] if ended else ids


def line(tokenizer: PromptTokenizer, text: str, **more: Any) -> dict[str, Any]:
    """An answer of the engine in such ids."""
    return {"text": text, "token_ids": byte_by_byte(tokenizer, text), **more}
