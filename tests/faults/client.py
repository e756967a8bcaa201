"""A client that wants an answer within its deadline: one retry, at another replica, as the same round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.faults.history import Attempt, LogicalRound

REFUSALS = (429, 503)
HISTORY_LOST = (404, 410)
NOT_KEPT = "the next one must bring the whole history"
MIN_ATTEMPT_S = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends; `whole` is sent instead when the server has lost what an append builds on."""

    session: str
    """What the client calls its session now: the fork, where an answer said that it became one."""
    path: str
    body: Mapping[str, Any]
    whole: Request | None = None


@dataclass(slots=True)
class Outcome:
    """Of one attempt."""

    attempt: Attempt
    token_ids: tuple[int, ...] | None = None
    home: str = ""
    session: str = ""
    """As the answer names it."""
    prompt_tokens: int = 0
    kept: bool = True
    """The answer does not say that the server has not kept this round."""
    retry_after_s: float = 0.0


class RetryingClient:
    """Speaks to replicas by their URLs."""

    def __init__(self, urls: Sequence[str], deadline_s: float, attempt_s: float) -> None:
        """`deadline_s` for all of a logical round, `attempt_s` until the first attempt is given up."""
        self._urls = urls
        self.deadline_s = deadline_s
        self.attempt_s = attempt_s
        self.progress: dict[str, int] = {}
        """Session -> tokens of the answer that is coming in a stream."""
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=None, limits=limits)

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, each: LogicalRound, request: Request, replica: int) -> Outcome:
        """Fill in what came of a logical round; the last attempt's outcome."""
        started = time.monotonic()

        def left_s() -> float:
            return each.deadline_s - (time.monotonic() - started)

        outcome = await self._attempt(each, request, replica, 0, min(self.attempt_s, left_s()))
        each.attempts.append(outcome.attempt)
        if outcome.token_ids is None:
            await asyncio.sleep(min(outcome.retry_after_s, max(0.0, left_s() - MIN_ATTEMPT_S)))
            other = (replica + 1) % len(self._urls)
            outcome = await self._attempt(each, request, other, 1, left_s())
            each.attempts.append(outcome.attempt)
        each.answer, each.prompt_tokens = outcome.token_ids, outcome.prompt_tokens
        each.elapsed_s = time.monotonic() - started
        return outcome

    async def _attempt(
        self, each: LogicalRound, request: Request, replica: int, number: int, limit_s: float
    ) -> Outcome:
        """One request, and the whole conversation if the server says that it has lost it."""
        started = time.monotonic()
        headers = {
            "X-Session-ID": request.session,
            "Idempotency-Key": each.name,
            "X-Request-ID": f"{each.name}-{number}",
            "x-stainless-retry-count": str(number),
        }
        try:
            async with asyncio.timeout(limit_s):
                outcome = await self._send(request, replica, headers)
                if outcome.attempt.status in HISTORY_LOST and request.whole is not None:
                    whole = headers | {"Idempotency-Key": f"{each.name}-whole"}
                    outcome = await self._send(request.whole, replica, whole)
        except TimeoutError:
            outcome = Outcome(Attempt(replica, "deadline", 0.0))
        except httpx.HTTPError as error:
            outcome = Outcome(Attempt(replica, "broken", 0.0, detail=type(error).__name__))
        done = outcome.attempt
        elapsed_s = time.monotonic() - started
        outcome.attempt = Attempt(replica, done.end, elapsed_s, done.status, done.detail)
        return outcome

    async def _send(self, request: Request, replica: int, headers: Mapping[str, str]) -> Outcome:
        url = self._urls[replica] + request.path
        async with self._http.stream("POST", url, json=dict(request.body), headers=dict(headers)) as answer:
            if answer.status_code != 200:
                return _error(replica, answer.status_code, answer.headers, await answer.aread())
            if not request.body.get("stream"):
                return _answered(replica, [json.loads(await answer.aread())], whole=True)
            events: list[Any] = []
            session = headers["X-Session-ID"]
            self.progress[session] = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return _answered(replica, events, whole=False)
                events.append(json.loads(line[6:]))
                self.progress[session] += any(each.get("token_ids") for each in events[-1].get("choices", ()))
            last = events[-1] if events else {}
            code = str((last.get("error") or {}).get("code", "no [DONE]"))
            return Outcome(Attempt(replica, "broken", 0.0, 200, code))


def _answered(replica: int, events: Sequence[Any], *, whole: bool) -> Outcome:
    """The ids of all events, and the home."""
    ids: list[int] = []
    home, name, kept, prompt_tokens = "", "", True, 0
    for event in events:
        for choice in event.get("choices", ()):
            ids += choice.get("token_ids") or ()
        session = event.get("session") or {}
        home = session.get("worker") or home
        name = session.get("id") or name
        prompt_tokens = (event.get("usage") or {}).get("prompt_tokens") or prompt_tokens
        kept = kept and not any(NOT_KEPT in warning for warning in session.get("warnings", ()))
    attempt = Attempt(replica, "answered", 0.0, 200)
    return Outcome(attempt, tuple(ids), home, name, prompt_tokens, kept)


def _error(replica: int, status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
    """A refusal says when to come back."""
    with contextlib.suppress(ValueError):
        retry_ms = float(headers.get("retry-after-ms") or 1000 * float(headers.get("retry-after", "nan")))
        if status in REFUSALS and retry_ms == retry_ms:
            return Outcome(
                Attempt(replica, "refused", 0.0, status, _code(body)), retry_after_s=retry_ms / 1000
            )
    return Outcome(Attempt(replica, "error", 0.0, status, _code(body)))


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return body[:80].decode(errors="replace")
