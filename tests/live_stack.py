"""A whole stack as processes, on simulated engines that answer by a script: for clients of the gateway.

Simulated, since random weights call no tools; everything else is the product: `antiphon engine`,
`antiphon serve`, the ledger, HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from antiphon.eval.stack import EngineSpec, Stack
from tests.engine_processes import free_port, wait_for

START_DEADLINE_S = 120.0
ANSWER_DEADLINE_S = 10.0

Line = Mapping[str, Any]
"""One answer, as in engines/scripts.py."""


class LiveStack:
    """What a test needs of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=ANSWER_DEADLINE_S)

    def receipts(self, session_id: str) -> list[dict[str, Any]]:
        """Of one session, oldest first."""
        answer = self.http.get("/v1/receipts", params={"session_id": session_id, "limit": 1000})
        answer.raise_for_status()
        items: list[dict[str, Any]] = answer.json()["data"]
        return items[::-1]

    def rounds(self, session_id: str, expected: int) -> list[dict[str, Any]]:
        """Its receipts, as soon as there are so many; a round is recorded after its answer."""
        return wait_for(
            f"{expected} rounds of {session_id}",
            lambda: found if len(found := self.receipts(session_id)) >= expected else None,
        )

    def session(self, session_id: str) -> dict[str, Any]:
        """`GET /v1/sessions/{id}`."""
        answer = self.http.get(f"/v1/sessions/{session_id}")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


def tool_call(name: str, **arguments: Any) -> dict[str, Any]:
    """A `tool_calls` entry of a script's line."""
    return {"name": name, "arguments": msgspec.json.encode(arguments).decode()}


@contextlib.contextmanager
def live_stack(
    directory: Path,
    valkey_url: str,
    model: Path,
    script: Sequence[Line] = (),
    *,
    config: str = "",
) -> Iterator[LiveStack]:
    """One decode engine and a gateway on it, in a fleet of their own; ended by pid on the way out.

    `config` is the gateway's antiphon.toml.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = directory / "antiphon.toml"
    settings.write_text(config)
    lines = directory / "script.jsonl"
    lines.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in script))
    urls: list[str] = []
    failures: list[BaseException] = []
    up = threading.Event()
    stop: list[asyncio.Event] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def hold() -> None:
        stop.append(asyncio.Event())
        loops.append(asyncio.get_running_loop())
        async with Stack(directory, valkey_url, fleet=f"live-{directory.parent.name}-{free_port()}") as stack:
            options = ("--simulated", "--script", str(lines))
            engine = EngineSpec("d0", "decode", free_port(), options, sglang=("--context-length", "32768"))
            await stack.start_engines(model, [engine], START_DEADLINE_S)
            urls.append(
                await stack.start_gateway("--model", str(model), "--config", str(settings), port=free_port())
            )
            up.set()
            await stop[0].wait()

    def run() -> None:
        try:
            asyncio.run(hold())
        except BaseException as error:
            failures.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="live stack")
    thread.start()
    try:
        assert up.wait(2 * START_DEADLINE_S), "the stack did not start"
        if failures:
            raise failures[0]
        stack = LiveStack(urls[0])
        with stack.http:
            yield stack
    finally:
        with contextlib.suppress(RuntimeError):  # its loop has ended by a failure
            loops[0].call_soon_threadsafe(stop[0].set)
        thread.join(START_DEADLINE_S)
