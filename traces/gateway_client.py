"""What `replay` says to a gateway over HTTP: models, receipts, one round. Knows no trace."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import aiohttp
import msgspec

from antiphon.traces.answers import Answer, RoundFailed, checked_answer, describe, error_message, read_answer

CONNECT_DEADLINE_S = 10.0
CONTROL_DEADLINE_S = 30.0
"""For the small questions: models, receipts, health."""
MAX_RECEIPTS = 10_000
"""What a gateway gives at most in one answer."""


class ReplayError(Exception):
    """The replay cannot start or go on at all (gateway away, no model): what, where, what to do."""


class GatewayClient:
    """Speaks to one gateway over one connection pool; owned by whoever opened it with `async with`."""

    def __init__(self, url: str, round_deadline_s: float) -> None:
        self.url = url.rstrip("/")
        self._round_deadline_s = round_deadline_s
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GatewayClient:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE_S)
        key = os.environ.get("ANTIPHON_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else None
        connector = aiohttp.TCPConnector(limit=0)
        self._http = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def get(self, path: str) -> Any:
        """The decoded JSON of a GET. Raises `ReplayError`."""
        assert self._http is not None
        where = f"{self.url}{path}"
        try:
            async with asyncio.timeout(CONTROL_DEADLINE_S), self._http.get(where) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ReplayError(f"GET {where}: {describe(error)}; is the gateway up?") from error
        if response.status != 200:
            raise ReplayError(f"GET {where}: status {response.status}: {error_message(body)}")
        try:
            return msgspec.json.decode(body)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ReplayError(f"GET {where}: not JSON: {error}") from error

    async def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists; at least one. Raises `ReplayError`."""
        answer = await self.get("/v1/models")
        listed = answer.get("data") if isinstance(answer, dict) else None
        models = [model for model in listed or () if isinstance(model, dict) and model.get("id")]
        if not models:
            raise ReplayError(f"GET {self.url}/v1/models lists no model: is an engine up?")
        return models

    async def policy(self) -> str | None:
        """The policy that decides there, if the gateway tells."""
        try:
            answer = await self.get("/ready")
        except ReplayError:
            return None
        policy = answer.get("policy") if isinstance(answer, dict) else None
        return policy if isinstance(policy, str) else None

    async def receipts(self, limit: int) -> list[dict[str, Any]]:
        """The latest receipts of the gateway, at most `MAX_RECEIPTS`. Raises `ReplayError`."""
        answer = await self.get(f"/v1/receipts?limit={min(limit, MAX_RECEIPTS)}")
        listed = answer.get("data") if isinstance(answer, dict) else answer
        return [receipt for receipt in listed or () if isinstance(receipt, dict)]

    async def complete(self, model: str, session_id: str, prompt: list[int], output_tokens: int) -> Answer:
        """One round: greedy, exactly `output_tokens` long, streamed. Raises `RoundFailed`."""
        assert self._http is not None
        body = msgspec.json.encode(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
                "session_id": session_id,
            }
        )
        sent_at = time.perf_counter()
        request_id = arm = ""
        try:
            async with (
                asyncio.timeout(self._round_deadline_s),
                self._http.post(
                    f"{self.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
                ) as response,
            ):
                request_id = response.headers.get("X-Request-ID", "")
                arm = response.headers.get("X-Antiphon-Arm", "")
                stream = await read_answer(response)
                return checked_answer(stream, response, len(prompt), sent_at)
        except aiohttp.ClientError as error:
            raise RoundFailed(0, describe(error), request_id=request_id, arm=arm) from error
        except TimeoutError as error:
            words = f"no whole answer within {self._round_deadline_s:g} s"
            raise RoundFailed(0, words, request_id=request_id, arm=arm) from error
        except OSError as error:
            raise RoundFailed(0, describe(error), request_id=request_id, arm=arm) from error
        except RoundFailed as failure:
            failure.request_id, failure.arm = request_id, arm
            raise
