"""Reading one streamed answer: SSE events to token ids, times and a checked usage.

Whatever is wrong with an answer is a `RoundFailed`: status, words, and whether another try makes sense.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from antiphon.engines.sse import SseError, SseParser

MAX_RETRY_AFTER_S = 10.0
DEFAULT_RETRY_AFTER_S = 0.2
RETRYABLE = frozenset({0, 408, 425, 429, 500, 502, 503, 504})
"""0 = no status: connection lost, deadline, broken stream."""


class RoundFailed(Exception):
    """One try of one round failed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retryable: bool | None = None,
        retry_after_s: float = DEFAULT_RETRY_AFTER_S,
        request_id: str = "",
        arm: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retryable = status in RETRYABLE if retryable is None else retryable
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.arm = arm


@dataclass(slots=True)
class Answer:
    """A round that was answered whole. Times are seconds from sending the request."""

    request_id: str
    """X-Request-ID: finds the round in the gateway's log."""
    round_id: str
    """The end of the answer's id ("cmpl-<round id>"): finds its receipt."""
    session_round: int | None
    arm: str
    ttft_s: float
    last_token_s: float
    e2e_s: float
    output_ids: list[int]
    prompt_tokens: int
    cached_tokens: int

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between tokens; None for a single token."""
        later = len(self.output_ids) - 1
        return (self.last_token_s - self.ttft_s) / later if later > 0 else None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct, frozen=True):
    id: str = ""
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: Any = None


@dataclass(slots=True)
class _Stream:
    """What has come of one answer so far."""

    answer_id: str = ""
    output_ids: list[int] = field(default_factory=list)
    usage: _Usage | None = None
    finish_reason: str | None = None
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    done_at: float | None = None

    def take(self, event: _Event, now: float) -> None:
        for choice in event.choices:
            if choice.token_ids or choice.text:
                self.first_token_at = self.first_token_at or now
                self.last_token_at = now
                self.output_ids += choice.token_ids or ()
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.usage = event.usage or self.usage
        self.answer_id = event.id or self.answer_id


async def read_answer(response: aiohttp.ClientResponse) -> _Stream:
    """The whole stream of a 200; anything else is a `RoundFailed`.

    Reads on to the end of the body after [DONE], so that the connection can be used again.
    """
    if response.status != 200:
        message = error_message(await response.read())
        raise RoundFailed(response.status, message, retry_after_s=_retry_after_s(response))
    stream, parser = _Stream(), SseParser()
    try:
        async for piece in response.content.iter_any():
            now = time.perf_counter()
            for event in parser.feed(piece):
                _take(stream, event.data, now)
    except SseError as error:
        raise RoundFailed(0, str(error)) from error
    if stream.done_at is None or stream.finish_reason is None:
        missing = "[DONE]" if stream.done_at is None else "a finish reason"
        raise RoundFailed(0, f"the stream ended before {missing}")
    return stream


def _take(stream: _Stream, data: bytes, now: float) -> None:
    """One event's data into the stream; an error event is a `RoundFailed`."""
    if data == b"[DONE]":
        stream.done_at = now
        return
    try:
        event = msgspec.json.decode(data, type=_Event)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RoundFailed(0, f"an event that is no completion chunk: {error}") from error
    if event.error:
        raise RoundFailed(0, f"error event: {error_message(data)}")
    stream.take(event, now)


def checked_answer(
    stream: _Stream, response: aiohttp.ClientResponse, prompt_tokens: int, sent_at: float
) -> Answer:
    """Checks the books of a finished stream: what it says it used is what was sent and what came."""
    usage, done_at = stream.usage, stream.done_at
    assert done_at is not None
    if usage is None:
        raise RoundFailed(200, "the stream brought no usage", retryable=False)
    if not stream.output_ids:
        raise RoundFailed(200, "the stream brought no token ids (return_token_ids)", retryable=False)
    if usage.completion_tokens != len(stream.output_ids) or usage.prompt_tokens != prompt_tokens:
        raise RoundFailed(
            200,
            f"usage says {usage.prompt_tokens} + {usage.completion_tokens} tokens; "
            f"{prompt_tokens} were sent and {len(stream.output_ids)} ids came",
            retryable=False,
        )
    details = usage.prompt_tokens_details
    number = response.headers.get("X-Session-Round", "")
    return Answer(
        request_id=response.headers.get("X-Request-ID", ""),
        round_id=stream.answer_id.removeprefix("cmpl-"),
        session_round=int(number) if number.isdecimal() else None,
        arm=response.headers.get("X-Antiphon-Arm", ""),
        ttft_s=stream.first_token_at - sent_at,
        last_token_s=stream.last_token_at - sent_at,
        e2e_s=done_at - sent_at,
        output_ids=stream.output_ids,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else None) or 0,
    )


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    """What the gateway asks for, as OpenAI clients read it, bounded."""
    for name, unit_s in (("Retry-After-Ms", 0.001), ("Retry-After", 1.0)):
        try:
            asked_s = float(response.headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if asked_s >= 0:
            return min(asked_s, MAX_RETRY_AFTER_S)
    return DEFAULT_RETRY_AFTER_S


def error_message(body: bytes) -> str:
    """The message of an OpenAI-shaped error, else the beginning of the body."""
    try:
        answer = msgspec.json.decode(body)
        error = answer["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.MsgspecError, RecursionError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "empty answer"


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
