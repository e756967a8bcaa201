"""Timing one live engine from outside, over its own HTTP: what a calibration is made of.

Every prompt is of fresh random tokens, so that no cache helps but where a prefix was put there on purpose.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from antiphon.engines.base import EngineError, EngineRecord, GenerateRequest
from antiphon.engines.fleet_secrets import engine_http_key
from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import ROOT, page_hashes

CALL_DEADLINE_S = 120.0
INFO_DEADLINE_S = 10.0
LEAST_STEPS = 8
TOKEN_IDS = (32, 500)
"""Words or bytes in common vocabularies."""


class ProbeError(Exception):
    """The engine cannot be measured: what it said, or what it lacks."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine says of itself."""

    model: str
    page_tokens: int
    chunk_tokens: int
    """0 = whole prompts."""
    decode_interval: int
    max_running_requests: int
    device_tokens: int
    window_tokens: int


@dataclass(frozen=True, slots=True)
class Prefill:
    seconds: float
    cached_tokens: int


class Probe:
    """One engine under measurement; nobody else should use it meanwhile."""

    def __init__(self, record: EngineRecord, fleet_key: bytes = b"", seed: int | None = None) -> None:
        """Directories are used only if the record names them, and then the key must be the fleet's.

        With no key the engine's HTTP is asked without one.
        """
        self.record = record
        key = engine_http_key(fleet_key) if fleet_key else ""
        self.engine = HttpEngine(record, fleet_key, peer="calibration", http_key=key)
        self.info: EngineInfo
        self._random = random.Random(seed)
        self._http = aiohttp.ClientSession(
            record.url,
            timeout=aiohttp.ClientTimeout(total=INFO_DEADLINE_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def __aenter__(self) -> Self:
        try:
            await self.engine.connect(INFO_DEADLINE_S)
            self.info = await self._read_info()
        except EngineError as error:
            await self._close()
            raise ProbeError(f"{self.record.url}: {error}") from error
        except ProbeError:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await self.engine.close()
        await self._http.close()

    def fresh(self, tokens: int) -> list[int]:
        """Ids that no earlier prompt began with."""
        return [self._random.randrange(*TOKEN_IDS) for _ in range(tokens)]

    # ---------------------------------------------------------------- measuring

    async def ping_s(self, times: int = 9) -> float:
        """A request that reaches the engine's HTTP server and nothing behind it: the median."""
        taken = []
        for _ in range(times):
            began = _now_s()
            await self._get("/model_info")
            taken.append(_now_s() - began)
        return statistics.median(taken)

    async def prefill(self, ids: Sequence[int]) -> Prefill:
        """One prompt, nothing generated."""
        rid = uuid.uuid4().hex
        began = _now_s()
        done = await self.engine.prefill(
            ids, rid, session_id=rid, cache_salt=None, deadline_s=CALL_DEADLINE_S
        )
        return Prefill(_now_s() - began, done.cached_tokens)

    async def decode_step_s(
        self, prompts: Sequence[Sequence[int]], output_tokens: int
    ) -> tuple[float, float]:
        """(seconds of a step while all `prompts` decode together, tokens of context in all, in the middle).

        Only the time between the last of their first tokens and the first of their ends counts; answers that
        hardly overlapped are asked for again, longer.
        """
        for longer in (1, 2, 4):
            times = await asyncio.gather(*(self.answer(prompt, longer * output_tokens) for prompt in prompts))
            began, ended = max(stamps[0] for stamps in times), min(stamps[-1] for stamps in times)
            within = [stamp for stamp in times[0] if began <= stamp <= ended]
            if len(within) >= LEAST_STEPS:
                break
        else:
            raise ProbeError(f"{len(prompts)} answers of {longer * output_tokens} tokens hardly overlapped")
        step_s = (within[-1] - within[0]) / (len(within) - 1)
        middle = (began + ended) / 2
        context = sum(
            len(prompt) + sum(stamp <= middle for stamp in stamps)
            for prompt, stamps in zip(prompts, times, strict=True)
        )
        return step_s, float(context)

    async def answer(self, prompt: Sequence[int], output_tokens: int) -> list[float]:
        """When each token of an answer came, by the loop's clock."""
        rid = uuid.uuid4().hex
        body = {
            "model": self.info.model,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
        }
        request = GenerateRequest("/v1/completions", prompt, rid, rid, body)
        stamps: list[float] = []
        async with aclosing(self.engine.generate(request, deadline_s=CALL_DEADLINE_S)) as chunks:
            async for chunk in chunks:
                stamps += [_now_s()] * len(chunk.token_ids)
        return stamps

    async def pull_s(self, source: EngineRecord, ids: Sequence[int]) -> tuple[float, int]:
        """(seconds, bytes) of fetching the KV of `ids` from `source` into this engine's page store."""
        hashes = page_hashes(ids, self.info.page_tokens)
        done = await self.engine.prefetch(
            source.kv_addresses, source.incarnation, ROOT, hashes, deadline_s=CALL_DEADLINE_S
        )
        if done.pulled_pages < len(hashes):
            raise ProbeError(f"{done.pulled_pages} of {len(hashes)} pages were pulled: {done.reason}")
        return done.elapsed_s, done.pulled_bytes

    async def flush(self) -> bool:
        """Empty the device's cache; the page store keeps its own."""
        async with self._http.post("/flush_cache") as answer:
            return answer.status == 200

    # ---------------------------------------------------------------- what it says

    async def _read_info(self) -> EngineInfo:
        said = await self._get("/server_info")
        hello = self.engine.hello
        models = (await self._get("/v1/models")).get("data") or [{}]
        window = said.get("context_length") or models[0].get("max_model_len") or 0
        chunk = _number(said, "chunked_prefill_size")
        return EngineInfo(
            model=str(models[0].get("id") or said.get("served_model_name") or "default"),
            page_tokens=_number(said, "page_size", 1),
            chunk_tokens=max(0, chunk),
            decode_interval=_number(said, "prefill_decode_interval"),
            max_running_requests=_number(said, "max_running_requests", 16),
            device_tokens=_pool_tokens(said) or (hello.pool_tokens if hello else 0),
            window_tokens=int(window) or (hello.context_tokens if hello else 0),
        )

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            async with self._http.get(path) as answer:
                body = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ProbeError(f"{self.record.url}{path}: {error or type(error).__name__}") from error
        if not isinstance(body, dict) or answer.status != 200:
            raise ProbeError(f"{self.record.url}{path}: not SGLang's answer (status {answer.status})")
        return body


def _number(said: dict[str, Any], name: str, default: int = 0) -> int:
    value = said.get(name)
    return int(value) if isinstance(value, int | float) else default


def _pool_tokens(said: dict[str, Any]) -> int:
    states = said.get("internal_states") or [{}]
    memory = states[0].get("memory_usage") or {} if isinstance(states[0], dict) else {}
    return int(
        said.get("max_total_num_tokens") or memory.get("token_capacity") or said.get("max_total_tokens") or 0
    )


def _now_s() -> float:
    """By the clock that the engine's answers are waited for on."""
    return asyncio.get_running_loop().time()
