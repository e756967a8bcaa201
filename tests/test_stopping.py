"""SIGTERM and kill -9 of a gateway with rounds in flight, and what another replica makes of their retries."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.faults.fleet import Fleet

SETTINGS = """
[gateway]
shutdown_grace_s = 2.0
lame_duck_s = 0.7

[scheduler]
slo_ttft_s = 5.0
slo_itl_s = 0.5

[model]
names = ["model"]
"""
LONG_TOKENS, SHORT_TOKENS = 1500, 150
DEADLINE_S = 20.0


class Answer:
    """One stream, read as it comes."""

    def __init__(self, response: httpx.Response) -> None:
        self.headers = response.headers
        self.events: list[Any] = []
        self.first = asyncio.Event()
        self._response = response

    async def read(self) -> list[Any]:
        async for line in self._response.aiter_lines():
            if line.startswith("data: "):
                text = line[6:]
                self.events.append(text if text == "[DONE]" else msgspec.json.decode(text))
                self.first.set()
        return self.events


@asynccontextmanager
async def streaming(
    http: httpx.AsyncClient, url: str, session: str, prompt: list[int], tokens: int, key: str = ""
) -> AsyncIterator[tuple[Answer, asyncio.Task[list[Any]]]]:
    """A stream whose first event is there."""
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    headers = {"X-Session-ID": session} | ({"Idempotency-Key": key} if key else {})
    async with http.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        answer = Answer(response)
        reading = asyncio.create_task(answer.read())
        try:
            await asyncio.wait_for(answer.first.wait(), DEADLINE_S)
            yield answer, reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def a_prompt() -> list[int]:
    return [8 + secrets.randbelow(256) for _ in range(40)]


def test_a_gateway_that_ends_loses_no_round_and_forks_no_session(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """kill -9, then SIGTERM: retries at the other replica are the same rounds, at once."""

    async def scenario() -> None:
        fleet = Fleet(tmp_path / "fleet", tiny_model_dir, engine_ids=("d0", "d1"), settings=SETTINGS)
        async with fleet.running(), httpx.AsyncClient(timeout=DEADLINE_S) as http:
            await a_killed_gateways_round_goes_on_at_once(fleet, http)
            await fleet.ready()
            await a_stopped_gateway_hands_over(fleet, http)

    asyncio.run(scenario())


async def a_killed_gateways_round_goes_on_at_once(fleet: Fleet, http: httpx.AsyncClient) -> None:
    prompt = a_prompt()
    async with streaming(http, fleet.gateway_url(1), "killed", prompt, LONG_TOKENS, "k1") as (first, reading):
        await asyncio.to_thread(fleet.processes["gw1"].kill)
        outcome = (await asyncio.wait_for(asyncio.gather(reading, return_exceptions=True), DEADLINE_S))[0]
        assert isinstance(outcome, BaseException) or "[DONE]" not in outcome
        # Its heartbeat lives for 5 s more: the retry does not wait for that.
        async with asyncio.timeout(4.0):
            async with streaming(http, fleet.gateway_url(0), "killed", prompt, LONG_TOKENS, "k1") as (
                again,
                _,
            ):
                for name in ("x-session-id", "x-session-round"):
                    assert again.headers[name] == first.headers[name]
    fleet.processes["gw1"].start()


async def a_stopped_gateway_hands_over(fleet: Fleet, http: httpx.AsyncClient) -> None:
    url, other, prompt = fleet.gateway_url(0), fleet.gateway_url(1), a_prompt()
    process = fleet.processes["gw0"].process
    assert process is not None
    async with (
        streaming(http, url, "short", a_prompt(), SHORT_TOKENS) as (_, finishing),
        streaming(http, url, "long", prompt, 20 * LONG_TOKENS) as (first, cut),
        streaming(http, url, "keyed", prompt, 20 * LONG_TOKENS, "k2") as (keyed, keyed_cut),
    ):
        process.send_signal(signal.SIGTERM)
        await until_ready_says_no(http, url)
        refused = await http.post(f"{url}/v1/completions", json={"model": "model", "prompt": "hi"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "gateway_stopping"
        assert refused.headers["connection"] == "close" and int(refused.headers["retry-after-ms"]) > 0

        assert (await asyncio.wait_for(finishing, DEADLINE_S))[-1] == "[DONE]"
        for reading in (cut, keyed_cut):
            last = (await asyncio.wait_for(reading, DEADLINE_S))[-1]
            assert (
                last["error"]["code"] == "stream_broke"
                and "send the request again" in last["error"]["message"]
            )
        # Even a retry that nobody can recognise finds the session free.
        async with streaming(http, other, "long", prompt, SHORT_TOKENS) as (again, _):
            assert again.headers["x-session-id"] == first.headers["x-session-id"] == "long"
        async with streaming(http, other, "keyed", prompt, 20 * LONG_TOKENS, "k2") as (again, _):
            for name in ("x-session-id", "x-session-round"):
                assert again.headers[name] == keyed.headers[name]
    assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0


async def until_ready_says_no(http: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (answer := await http.get(f"{url}/ready")).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert answer.json()["detail"] == "the gateway is stopping"


def test_the_second_signal_cuts_off_at_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    """However long the grace is."""

    async def scenario() -> None:
        settings = SETTINGS.replace("shutdown_grace_s = 2.0", "shutdown_grace_s = 600.0")
        fleet = Fleet(tmp_path / "fleet", tiny_model_dir, engine_ids=("d0",), settings=settings)
        async with fleet.running(), httpx.AsyncClient(timeout=DEADLINE_S) as http:
            process, url = fleet.processes["gw0"].process, fleet.gateway_url(0)
            assert process is not None
            async with streaming(http, url, "s", a_prompt(), 20 * LONG_TOKENS):
                process.send_signal(signal.SIGTERM)
                await until_ready_says_no(http, url)
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0

    asyncio.run(scenario())
