"""A gateway for replay tests: real HTTP, the wire format of /v1/completions, faults on command."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

DEADLINE_S = 10.0
ARMS = ("local", "remote_pull")
STALL_S = 30.0
"""A stalled answer ends by itself, so that a test that fails does not hang."""


@dataclass(slots=True)
class Asked:
    """One completion request as it came in."""

    session_id: str
    body: dict[str, Any]
    began_s: float
    ended_s: float = 0.0


@dataclass(slots=True)
class FakeGateway:
    """Runs on a thread of its own inside `with`. Answers are a function of the prompt.

    `faults[n]` lists what goes wrong at the n-th request (from 0) of any session: a key of `_answer`.
    """

    faults: dict[int, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: {"id": "tiny", "max_model_len": 8192})
    receipts_status: int = 200
    receipts_late_by: int = 0
    """So many listings come before the receipts show up."""
    token_delay_s: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    stalled: list[int] = field(default_factory=list)
    """Requests whose answer stalls in the middle."""
    hung_up: list[int] = field(default_factory=list)
    """Requests whose client went away before the answer was whole."""
    url: str = ""
    _rounds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(ready),))
        self._thread.start()
        assert ready.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def wait_stalled(self, count: int) -> None:
        """Wait until so many answers have stalled."""
        self._wait(self.stalled, count)

    def wait_hung_up(self, count: int) -> None:
        """Wait until so many clients have gone away in the middle of an answer."""
        self._wait(self.hung_up, count)

    def _wait(self, happened: list[int], count: int) -> None:
        deadline = time.perf_counter() + DEADLINE_S
        while len(happened) < count:
            assert time.perf_counter() < deadline, f"{len(happened)} of {count} came"
            time.sleep(0.005)

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/receipts", self._receipts)
        app.router.add_get("/ready", self._ready)
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"ready": True, "policy": "ampd"})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self.model] if self.model else []})

    async def _receipts(self, request: web.Request) -> web.Response:
        self.receipts_late_by -= 1
        shown = self.receipts[-int(request.query["limit"]) :] if self.receipts_late_by < 0 else []
        return web.json_response({"data": shown}, status=self.receipts_status)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked = Asked(body["session_id"], body, time.perf_counter())
        number = len(self.asked)
        self.asked.append(asked)
        try:
            return await self._answer(request, body, number, self.faults.get(number, ""))
        except asyncio.CancelledError:
            self.hung_up.append(number)
            raise
        finally:
            asked.ended_s = time.perf_counter()

    async def _answer(
        self, request: web.Request, body: dict[str, Any], number: int, fault: str
    ) -> web.StreamResponse:
        if fault.isdecimal():
            shaped = {"error": {"message": f"scripted {fault}", "type": "x", "code": "y"}}
            return web.json_response(shaped, status=int(fault), headers={"Retry-After-Ms": "150"})
        session, arm = body["session_id"], ARMS[number % 2]
        self._rounds[session] += 1
        headers = {
            "Content-Type": "text/event-stream",
            "X-Request-ID": f"req_{number}",
            "X-Session-Round": str(self._rounds[session]),
            "X-Antiphon-Arm": arm,
        }
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        output = answer_ids(body["prompt"], body["max_tokens"])
        for index, token in enumerate(output):
            if fault and index == 2 and not await self._break(request, response, number, fault):
                return response
            choice: dict[str, Any] = {"index": 0, "text": "x", "token_ids": [token], "finish_reason": None}
            if fault == "no_tokens":
                del choice["token_ids"]
            if index == 0:
                choice["prompt_token_ids"] = body["prompt"]
            if index == len(output) - 1 and fault != "no_finish":
                choice["finish_reason"] = "length"
            await send(response, {"id": f"cmpl-r{number}", "choices": [choice]})
            await asyncio.sleep(self.token_delay_s)
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(output) + (fault == "lost_token"),
            "prompt_tokens_details": {"cached_tokens": len(body["prompt"]) // 2},
        }
        if fault != "no_usage":
            await send(response, {"id": f"cmpl-r{number}", "choices": [], "usage": usage})
        if fault != "no_done":
            await response.write(b"data: [DONE]\n\n")
        self.receipts.append(
            {
                "round_id": f"r{number}", "session_id": session, "arm": arm, "reason": "scripted",
                "bytes_decode_to_prefill": 10 if arm == "remote_pull" else 0, "bytes_prefill_to_decode": 5,
                "pulled_tokens": 3, "predicted_ttft_s": 0.25, "ttft_s": 0.5, "home": "d0",
                "prefill_engine": None, "degraded": False,
            }
        )  # fmt: skip
        return response

    async def _break(
        self, request: web.Request, response: web.StreamResponse, number: int, fault: str
    ) -> bool:
        """Go wrong in the middle of the stream; True = go on with it."""
        if fault == "disconnect":
            assert request.transport is not None
            request.transport.abort()
            return False
        if fault == "error_event":
            await send(response, {"error": {"message": "the engine died", "type": "server_error"}})
            return False
        if fault == "nonsense":
            await response.write(b"data: {nonsense\n\n")
            return False
        if fault == "stall":
            self.stalled.append(number)
            await asyncio.sleep(STALL_S)
            return False
        return True


async def send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b": comment\ndata: " + json.dumps(event).encode() + b"\n\n")


def answer_ids(prompt: list[int], count: int) -> list[int]:
    """What this gateway's engine says to a prompt: ids outside the filler's range, a hash of all of it."""
    digest = hashlib.shake_256(json.dumps(prompt).encode()).digest(count)
    return [1000 + byte for byte in digest]
