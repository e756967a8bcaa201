"""Ten times more than the fleet can take, slow readers and big bodies too: nothing grows, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from antiphon.scheduler.config import Config, GatewayConfig, ModelConfig
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.rounds import STREAM_BUFFER_CHUNKS
from tests.replica_helpers import Cluster, cluster, until

PATH, MODEL = "/v1/completions", "tiny"
ROUNDS, QUEUED, BODIES, ANSWERS = 40, 3, 400_000, 300_000
"""The bounds."""
ONCE, SESSIONS, SLOW, BIG = 400, 6, 4, 6


def body(tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": list(range(64)), "max_tokens": tokens, "ignore_eos": True, **more}


@contextlib.asynccontextmanager
async def served(c: Cluster, model_dir: Path, metrics: Metrics) -> AsyncIterator[str]:
    gateway = GatewayConfig(
        max_rounds=ROUNDS, body_limit_bytes=200_000, bodies_memory_bytes=BODIES, reader_stall_s=1.0
    )
    config = Config(gateway=gateway, model=ModelConfig(str(model_dir), (MODEL,)))
    app = create_app(c.replica, TokenizerSource(lambda: str(model_dir)), config, c.replica, metrics)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        settings = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def sent(http: aiohttp.ClientSession, url: str, asked: dict[str, Any]) -> tuple[int, float]:
    """Status, and when to come again; every refusal is a clear one."""
    async with http.post(url + PATH, json=asked) as answer:
        said = await answer.json()
        if answer.status == 200:
            assert said["usage"]["completion_tokens"] == asked["max_tokens"]
            return 200, 0.0
        assert answer.status in (429, 503) and said["error"]["code"] == "overloaded", said
        assert int(answer.headers["retry-after"]) >= 1
        return answer.status, int(answer.headers["retry-after-ms"]) / 1000


async def session(http: aiohttp.ClientSession, url: str, name: str) -> int:
    """A run of three rounds by a client that comes again when it is told to; how often it was refused."""
    refused = 0
    for number in range(3):
        while True:
            asked = body(session_id=name, prompt=list(range(64 + 16 * number)))
            status, retry_s = await sent(http, url, asked)
            if status == 200:
                break
            refused += 1
            await asyncio.sleep(min(retry_s, 0.3))
    return refused


async def raw(url: str, content: bytes, announced: int) -> Any:
    """A request on a socket that takes next to nothing of its answer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    host, port = url.removeprefix("http://").split(":")
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {announced}\r\n\r\n".encode()
    return await asyncio.open_connection(sock=sock, limit=1024), (head + content)


def test_overload_is_refused_clearly_and_leaves_nothing_behind(valkey_url: str, tiny_model_dir: Path) -> None:
    async def scenario() -> None:
        metrics, most = Metrics(), Counter[str]()
        before = len(asyncio.all_tasks())
        bounds = {"max_queued_rounds": QUEUED}
        async with cluster(
            valkey_url, "isl_bounding", scheduler=bounds, answers_memory_bytes=ANSWERS, max_running_requests=8
        ) as c:
            books = c.replica.core.books.fleet.books

            def value(name: str) -> float:
                return metrics.registry.get_sample_value(f"antiphon_{name}") or 0.0

            async def watch() -> None:
                while True:
                    most["rounds"] = max(most["rounds"], int(value("gateway_rounds")))
                    most["bodies"] = max(most["bodies"], int(value("request_bodies_bytes")))
                    most["answers"] = max(most["answers"], c.replica._answers.used_bytes)
                    most["queue"] = max(most["queue"], *(book.queue.length for book in books.values()))
                    await asyncio.sleep(0.002)

            async with served(c, tiny_model_dir, metrics) as url:
                watching = asyncio.create_task(watch())
                connector = aiohttp.TCPConnector(limit=0)
                timeout = aiohttp.ClientTimeout(total=30)
                async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
                    long = json.dumps(body(8 * STREAM_BUFFER_CHUNKS, stream=True)).encode()
                    kept = []
                    for content, size in [(long, len(long))] * SLOW + [(b" " * 1000, 150_000)] * BIG:
                        (reader, writer), request = await raw(url, content, size)
                        writer.write(request)
                        kept.append((reader, writer))
                    runs = [session(http, url, f"run-{index}") for index in range(SESSIONS)]
                    once = [sent(http, url, body()) for _ in range(ONCE)]
                    async with asyncio.timeout(30):
                        async with http.get(url + "/health") as answer:
                            assert answer.status == 200
                        refusals, statuses = await asyncio.gather(
                            asyncio.gather(*runs), asyncio.gather(*once)
                        )
                    told = Counter(status for status, _ in statuses)
                    assert told[200] and told[503] > ONCE / 2, told
                    for bound in ("rounds", "bodies"):  # whether the queue fills is a matter of speed
                        assert metrics.registry.get_sample_value(
                            "antiphon_overloaded_total", {"bound": bound}
                        ), bound
                    assert len(refusals) == SESSIONS  # each came to its end
                    await until(lambda: value("stalled_readers_total") == SLOW, 15)
                    for _, writer in kept:
                        writer.transport.abort()
                    await until(lambda: value("gateway_rounds") == 0 == value("request_bodies_bytes"))
                watching.cancel()
            assert not c.replica.core.rounds and not c.replica._answers.used_bytes
            for engine in c.engines.values():
                await until(lambda e=engine: not e.loop.live)  # type: ignore[misc]
        assert most["rounds"] <= ROUNDS and most["bodies"] <= BODIES, most
        assert most["answers"] <= ANSWERS and most["queue"] <= QUEUED, most  # seen or not: a matter of speed
        await until(lambda: len(asyncio.all_tasks()) <= before)

    asyncio.run(scenario())
