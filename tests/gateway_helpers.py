"""A gateway over real HTTP with scripted rounds behind it: the round port's own double."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvicorn

from antiphon.engines.base import Chunk, Usage
from antiphon.policies.base import Arm, Candidate, Placement
from antiphon.scheduler.config import Config
from antiphon.scheduler.gateway.app import Readiness, create_app
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.gateway.tenants import Access
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.outcomes import Outcome, Receipt, Try
from antiphon.scheduler.response_store import ResponseStore
from antiphon.scheduler.rounds import RoundHandle, RoundRequest

Script = Callable[[RoundHandle], Awaitable[None]]

Start = Callable[..., contextlib.AbstractAsyncContextManager["Gateway"]]

MODEL = "tiny"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": [1, 2, 3]}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
DEADLINE_S = 10.0


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition; fails at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


class ScriptedRunner:
    """Runs one script per round and remembers what was submitted and who went away."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[RoundRequest] = []
        self.gone: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def submit(self, request: RoundRequest) -> RoundHandle:
        self.requests.append(request)
        handle = RoundHandle(request, lambda: self._gone(request, task))
        handle.round_number = 1
        handle.arm = "local"
        task = asyncio.get_running_loop().create_task(self._run(handle))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return handle

    async def explain(self, request: RoundRequest) -> dict[str, Any]:
        self.requests.append(request)
        return {"arm": "local", "session": {"id": request.session_id}}

    async def _run(self, handle: RoundHandle) -> None:
        await self.script(handle)

    def _gone(self, request: RoundRequest, task: asyncio.Task[None]) -> None:
        self.gone.append(request.round_id)
        task.cancel()


@dataclass(slots=True)
class FakeState:
    """What the gateway is told of its replica."""

    engines_alive: int = 1
    ledger: str = "ok"
    models: tuple[str, ...] = (MODEL,)
    window_tokens: int = 0
    receipt_items: list[dict[str, Any]] = field(default_factory=list)

    def readiness(self) -> Readiness:
        return Readiness(self.engines_alive, self.ledger)

    def model_ids(self, model: str = "") -> tuple[str, ...]:
        return self.models

    def context_tokens(self, model: str = "") -> int:
        return self.window_tokens

    async def receipts(
        self, limit: int, session_id: str | None, tenant: str | None
    ) -> Sequence[Mapping[str, Any]]:
        chosen = [item for item in self.receipt_items if session_id in (None, item["session_id"])]
        return chosen[:limit]

    async def engines(self) -> Sequence[Mapping[str, Any]]:
        return [{"engine_id": "e0", "pool": "decode", "used_tokens": 7}]

    async def sessions(self, limit: int, tenant: str | None) -> Sequence[Mapping[str, Any]]:
        return [{"session_id": f"s{index}", "home": "e0", "rounds": 3} for index in range(5)][:limit]


@dataclass(slots=True)
class Gateway:
    """A running gateway and a client of it."""

    url: str
    http: aiohttp.ClientSession
    runner: ScriptedRunner
    state: FakeState
    metrics: Metrics

    async def post(self, path: str, body: object, **headers: str) -> tuple[aiohttp.ClientResponse, Any]:
        """POST a JSON body (bytes as they are); the answer, read whole and decoded if it is JSON."""
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.post(self.url + path, data=io.BytesIO(raw), headers=named) as response:
            content = await response.read()
        return response, _decoded(response, content)

    async def get(self, path: str) -> tuple[aiohttp.ClientResponse, Any]:
        async with self.http.get(self.url + path) as response:
            content = await response.read()
        return response, _decoded(response, content)


def _decoded(response: aiohttp.ClientResponse, content: bytes) -> Any:
    return msgspec.json.decode(content) if response.content_type == "application/json" else content


@contextlib.asynccontextmanager
async def running_gateway(
    script: Script,
    model_dir: Path,
    config: Config | None = None,
    state: FakeState | None = None,
    access: Access | None = None,
    responses: ResponseStore | None = None,
) -> AsyncIterator[Gateway]:
    """The real app in uvicorn on a free port of 127.0.0.1."""
    runner, metrics = ScriptedRunner(script), Metrics()
    state = state or FakeState()
    tokenizers = TokenizerSource(lambda: str(model_dir))
    app = create_app(runner, tokenizers, config or Config(), state, metrics, access, responses=responses)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    settings = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(settings)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(sockets=[listener]))
        try:
            timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
            async with aiohttp.ClientSession(timeout=timeout) as http:
                yield Gateway(f"http://127.0.0.1:{port}", http, runner, state, metrics)
        finally:
            server.should_exit = True
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.wait([serving])


def starter(model_dir: Path) -> Start:
    """`running_gateway` on one model; the first argument is the script of its rounds."""

    def start(
        script: Script = three_words, **options: Any
    ) -> contextlib.AbstractAsyncContextManager[Gateway]:
        return running_gateway(script, model_dir, **options)

    return start


def sse_events(content: bytes) -> list[Any]:
    """The events of a whole stream; [DONE] as the string."""
    lines = [line[6:] for line in content.split(b"\n\n") if line.startswith(b"data: ")]
    return ["[DONE]" if line == b"[DONE]" else msgspec.json.decode(line) for line in lines]


# ---------------------------------------------------------------- scripts


def text_chunk(text: str, ids: tuple[int, ...] = (), finish: str | None = None) -> Chunk:
    """A chunk of /v1/completions as an engine sends it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    data = {
        "id": "engine-rid", "object": "text_completion", "created": 5, "model": "default",
        "choices": [choice], "usage": None,
    }  # fmt: skip
    return Chunk(data, ids, finish)


def chat_chunk(delta: dict[str, Any], ids: tuple[int, ...] = (), finish: str | None = None) -> Chunk:
    """A chunk of /v1/chat/completions as an engine sends it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    data = {
        "id": "engine-rid", "object": "chat.completion.chunk", "created": 5, "model": "default",
        "choices": [choice], "usage": None,
    }  # fmt: skip
    return Chunk(data, ids, finish)


def usage_chunk(prompt: int, completion: int, cached: int) -> Chunk:
    """The engine's last chunk; its `cached_tokens` are its own view."""
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "reasoning_tokens": 0,
    }
    return Chunk(
        {"id": "engine-rid", "object": "x", "created": 5, "model": "default", "choices": [], "usage": usage},
        usage=Usage(prompt, completion, cached),
    )


async def three_words(handle: RoundHandle) -> None:
    """An answer of three tokens on either route; the engine says 1 cached token, the receipt says 2."""
    chat = handle.request.path.endswith("chat/completions")
    if chat:
        await handle.push(chat_chunk({"role": "assistant", "content": ""}))
    for index, word in enumerate((" one", " two", " three")):
        finish = "stop" if index == 2 else None
        if chat:
            await handle.push(chat_chunk({"content": word}, (), finish))
        else:
            await handle.push(text_chunk(word, (10 + index,), finish))
    if chat:
        await handle.push(Chunk(None, (10, 11, 12)))
    prompt = len(handle.request.input_ids)
    handle.receipt = make_receipt(handle.request, cached_tokens=2)
    await handle.push(usage_chunk(prompt, 3, 1))
    handle.finish()


def make_receipt(request: RoundRequest, **changes: Any) -> Receipt:
    candidate = Candidate(Arm.LOCAL, "e0", 0.01, 0.02, 0.0, 0.0)
    placement = Placement(Arm.LOCAL, "e0", "e0", "the home is idle", candidate, (candidate,))
    values: dict[str, Any] = {
        "round_id": request.round_id,
        "session_id": request.session_id,
        "round_number": 1,
        "outcome": Outcome.COMPLETED,
        "arm": Arm.LOCAL,
        "home": "e0",
        "prefill_engine": "e0",
        "reason": "the home is idle",
        "tries": (Try(placement),),
        "degraded": False,
        "prompt_tokens": len(request.input_ids),
        "history_tokens": 0,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "bytes_decode_to_prefill": 0,
        "bytes_prefill_to_decode": 0,
        "pulled_tokens": 0,
        "predicted_ttft_s": 0.03,
        "ttft_s": 0.06,
        "queue_s": 0.01,
        "pull_s": 0.0,
        "prefill_s": 0.05,
        "push_s": 0.0,
        "itl_s": 0.004,
    }
    return Receipt(**(values | changes))
