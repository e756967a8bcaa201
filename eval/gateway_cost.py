"""What an idle gateway costs a request: what client and receipt differ by, and the claim."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import uuid
from typing import Any, NamedTuple

import aiohttp

from antiphon.eval.probe import TOKEN_IDS, ProbeError

SAMPLES = 12
DEADLINE_S = 30.0
RECEIPT_POLL_S = 0.05
RECEIPT_DEADLINE_S = 5.0


class GatewayCost(NamedTuple):
    """Medians, in seconds, without load."""

    http_s: float
    """TTFT as the client sees it, less that of the receipt: both ends of HTTP, parsing, relaying."""
    claim_s: float
    """From arrival to the first call on an engine: the ledger's answer and the decision."""

    @property
    def seconds(self) -> float:
        return self.http_s + self.claim_s


async def measure_gateway(gateway_url: str, model: str, prompt_tokens: int) -> GatewayCost:
    """A dozen rounds of sessions of their own, one at a time. Raises `ProbeError`."""
    chance = random.Random()
    seen: dict[str, float] = {}
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(gateway_url, timeout=timeout) as session:
        try:
            for _ in range(SAMPLES):
                name = f"gateway-cost-{uuid.uuid4().hex}"
                prompt = [chance.randrange(*TOKEN_IDS) for _ in range(prompt_tokens)]
                seen[name] = await _ttft_s(session, name, model, prompt)
            receipts = await _receipts(session, seen)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            raise ProbeError(f"{gateway_url}: {error or type(error).__name__}") from error
    # The first request opens connections.
    warm = [(taken, receipts[name]) for name, taken in list(seen.items())[1:]]
    return GatewayCost(
        http_s=max(0.0, statistics.median(taken - receipt["ttft_s"] for taken, receipt in warm)),
        claim_s=statistics.median(receipt["queue_s"] for _, receipt in warm),
    )


async def _ttft_s(session: aiohttp.ClientSession, name: str, model: str, prompt: list[int]) -> float:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    began = time.perf_counter()
    async with session.post("/v1/completions", json=body, headers={"X-Session-ID": name}) as answer:
        if answer.status != 200:
            raise ProbeError(f"the gateway answered {answer.status}: {(await answer.text())[:300]}")
        await answer.content.readline()
        taken = time.perf_counter() - began
        await answer.read()
        return taken


async def _receipts(session: aiohttp.ClientSession, names: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The receipt of each session's one round."""
    deadline = time.monotonic() + RECEIPT_DEADLINE_S
    while True:
        async with session.get("/v1/receipts", params={"limit": 10 * SAMPLES}) as answer:
            listed = (await answer.json())["data"]
        found = {item["session_id"]: item for item in listed if item["session_id"] in names}
        if len(found) == len(names):
            return found
        if time.monotonic() > deadline:
            raise ProbeError(f"only {len(found)} of {len(names)} receipts came")
        await asyncio.sleep(RECEIPT_POLL_S)
