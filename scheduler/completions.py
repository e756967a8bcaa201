"""The completion routes: one request in, one round submitted, its answer streamed or folded.

Status and headers go out with the round's first event, so a refused round has a real status. A client that
goes away at any moment cancels its request, which leaves the round's `async with` and so stops the decode.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from antiphon.scheduler import relay, requests
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import (
    ApiError,
    UserError,
    body_too_large,
    deadline_exceeded,
    from_refusal,
    invalid,
    model_not_found,
    no_engine,
    stream_broke,
)
from antiphon.scheduler.identity import identify
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.prompts import (
    PromptTokenizer,
    TemplateOptions,
    TokenizerSource,
    content_chars,
    encode_off_loop,
)
from antiphon.scheduler.requests import CHAT_ROUTE, Body, ChatBody
from antiphon.scheduler.rounds import RoundBroke, RoundHandle, RoundRefused, RoundRequest, RoundRunner

log = logging.getLogger(__name__)

ROUND_ID = "antiphon.round_id"
"""Key in the ASGI scope: the id for this request's round. It is the request id too, unless the client gave
one: a client's id may come twice, a round's must not."""
LOG_FIELDS = "antiphon.log"
"""Key in the ASGI scope: a dict whose entries end up in the request's log line."""
CLOSING_DEADLINE_S = 5.0
"""For telling a client that its stream failed."""
DRAIN_FACTOR = 4
"""Of a body over the limit this many limits are read and dropped, so that the client gets to see the 413."""


class FleetModel(Protocol):
    """What the fleet says of the model that it serves."""

    def model_ids(self) -> tuple[str, ...]:
        """Model ids by the engines' hellos; empty while none is known."""

    def context_tokens(self) -> int:
        """The smallest window of the live engines; 0 = unknown."""


class ClientGone(Exception):
    """The client closed its connection."""


@dataclass(slots=True)
class _Progress:
    """How far an answer has come; decides what a failure can still say."""

    phase: str = "body"
    """body | waiting | answering"""
    started: bool = False
    """Status and headers are out."""


def served_names(config: Config, fleet: FleetModel) -> tuple[str, ...]:
    """Names by which clients may call the model; empty while none is known."""
    if config.model.names:
        return config.model.names
    ids = fleet.model_ids()
    if not ids and config.model.path:
        return (Path(config.model.path).name,)
    short = [model_id.rstrip("/").rpartition("/")[2] for model_id in ids]
    return tuple(dict.fromkeys([*short, *ids]))


class CompletionRoute:
    """ASGI application of /v1/chat/completions or /v1/completions."""

    def __init__(
        self,
        route: str,
        runner: RoundRunner,
        tokenizers: TokenizerSource,
        config: Config,
        fleet: FleetModel,
        metrics: Metrics,
    ) -> None:
        self._route = route
        self._chat = route == CHAT_ROUTE
        self._runner = runner
        self._tokenizers = tokenizers
        self._config = config
        self._fleet = fleet
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        progress = _Progress()
        limits = self._config.gateway
        try:
            raw = await read_body(receive, headers, limits.body_limit_bytes, limits.body_deadline_s)
            progress.phase = "waiting"
            await while_connected(receive, self._answer(raw, scope, send, progress))
        except ClientGone:
            self._metrics.disconnects.labels(progress.phase).inc()

    async def _answer(self, raw: bytes, scope: Scope, send: Send, progress: _Progress) -> None:
        request, form = await self._prepare(raw, Headers(scope=scope), scope[ROUND_ID])
        fields: dict[str, Any] = scope[LOG_FIELDS]
        fields |= {"session": request.session_id, "round_id": request.round_id}
        deadline_s = self._config.scheduler.request_deadline_s
        try:
            async with asyncio.timeout(deadline_s), self._runner.submit(request) as handle:
                await handle.start()
                progress.phase = "answering"
                fields |= {"session": handle.session_id, "round": handle.round_number, "arm": handle.arm}
                await (self._stream if form.stream else self._whole)(handle, form, send, progress)
        except RoundRefused as refusal:
            raise from_refusal(refusal) from refusal
        except RoundBroke as broke:
            await self._fail(stream_broke(str(broke)), send, progress)
        except TimeoutError:
            await self._fail(deadline_exceeded(deadline_s), send, progress)

    async def _prepare(
        self, raw: bytes, headers: Headers, round_id: str
    ) -> tuple[RoundRequest, relay.AnswerForm]:
        """All checks, then the round and how to answer it; raises `ApiError` before anything has happened."""
        body: Body
        if self._chat:
            body, prompt = requests.parse_chat(raw), None
        else:
            body, prompt = requests.parse_completion(raw)
        identity = identify(headers, body.session.id if body.session else None, body.session_id)
        self._check_model(body.model)
        try:
            tokenizer = await self._tokenizers.get()
        except UserError as error:
            raise _unusable_model(str(error)) from error
        input_ids = await _input_ids(tokenizer, body, prompt)
        limit = requests.output_limit(body, len(input_ids), self._window_tokens(tokenizer))
        scheduler = self._config.scheduler
        targets = requests.slos(body.session, requests.Slos(scheduler.slo_ttft_s, scheduler.slo_itl_s))
        request = RoundRequest(
            round_id=round_id,
            session_id=identity.session_id,
            tenant=identity.tenant,
            path=self._route,
            input_ids=input_ids,
            body=requests.engine_fields(body, limit),
            max_output_tokens=limit,
            slo_ttft_s=targets.ttft_s,
            slo_itl_s=targets.itl_s,
            cache_salt=body.cache_salt,
            tool=requests.tool_answered(body),
        )
        stream = bool(body.stream)
        asked_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        form = relay.AnswerForm(
            chat=self._chat,
            model=body.model,
            answer_id=f"{'chatcmpl' if self._chat else 'cmpl'}-{round_id}",
            stream=stream,
            include_usage=asked_usage or not stream,
            token_ids=bool(body.return_token_ids),
            identified_by=identity.identified_by,
        )
        return request, form

    def _check_model(self, model: str) -> None:
        served = served_names(self._config, self._fleet)
        if not served:
            raise no_engine("No engine has told its model yet; try again when one is up.")
        if model not in served:
            raise model_not_found(model, served)

    def _window_tokens(self, tokenizer: PromptTokenizer) -> int:
        known = [tokens for tokens in (self._fleet.context_tokens(), tokenizer.context_tokens) if tokens > 0]
        if not known:
            raise _unusable_model("The model's window is unknown: its config.json does not say it.")
        return min(known)

    async def _stream(
        self, handle: RoundHandle, form: relay.AnswerForm, send: Send, progress: _Progress
    ) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *_round_headers(handle),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        progress.started = True
        async with contextlib.aclosing(relay.events(handle, form)) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": relay.frame(event), "more_body": True})
        await send({"type": "http.response.body", "body": relay.DONE, "more_body": False})

    async def _whole(
        self, handle: RoundHandle, form: relay.AnswerForm, send: Send, progress: _Progress
    ) -> None:
        async with contextlib.aclosing(relay.events(handle, form)) as events:
            content = msgspec.json.encode(await relay.fold(events, form))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            *_round_headers(handle),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        progress.started = True
        await send({"type": "http.response.body", "body": content})

    async def _fail(self, error: ApiError, send: Send, progress: _Progress) -> None:
        """An error answer while that is possible (raised), else an error event that ends the stream."""
        if not progress.started:
            raise error
        self._metrics.errors.labels(error.code).inc()
        log.warning("stream failed", extra={"code": error.code, "reason": error.message})
        with contextlib.suppress(TimeoutError):  # a client that stopped reading gets the closed connection
            async with asyncio.timeout(CLOSING_DEADLINE_S):
                await send({"type": "http.response.body", "body": relay.error_frame(error)})


async def read_body(receive: Receive, headers: Headers, limit_bytes: int, deadline_s: float) -> bytes:
    """The whole body; raises `ApiError` (413 over the limit, 408 past the deadline) or `ClientGone`."""
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes * DRAIN_FACTOR:
        raise body_too_large(limit_bytes)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece: bytes = message.get("body", b"")
                size += len(piece)
                if size <= limit_bytes:
                    pieces.append(piece)
                if not message.get("more_body", False) or size > limit_bytes * DRAIN_FACTOR:
                    break
    except TimeoutError as error:
        raise ApiError(408, "body_timeout", f"The body did not come within {deadline_s:g} s.") from error
    if size > limit_bytes:
        raise body_too_large(limit_bytes)
    return b"".join(pieces)


async def while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`; cancel it and raise `ClientGone` when the client goes away. Its own exception passes."""
    failure: Exception | None = None
    gone = False
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_raise_when_gone(receive))
            try:
                await work
            except Exception as error:  # kept out of the group, which would wrap it
                failure = error
            watcher.cancel()
    except* ClientGone:
        gone = True
    if failure is not None:
        raise failure
    if gone:
        raise ClientGone


async def _raise_when_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


async def _input_ids(
    tokenizer: PromptTokenizer, body: Body, prompt: str | tuple[int, ...] | None
) -> tuple[int, ...]:
    if isinstance(body, ChatBody):
        messages = body.messages
        options = TemplateOptions(
            requests.template_tools(body),
            requests.template_kwargs(body),
            continue_final_message=bool(body.continue_final_message),
        )
        ids = await encode_off_loop(lambda: tokenizer.encode_chat(messages, options), content_chars(messages))
    elif isinstance(prompt, str):
        text = prompt
        ids = await encode_off_loop(lambda: tokenizer.encode_text(text), len(text))
    else:
        ids = prompt or ()
    if not ids:
        raise invalid("The prompt has no tokens.", param="messages" if prompt is None else "prompt")
    requests.check_token_ids(ids, tokenizer.vocabulary_tokens)
    return ids


def _round_headers(handle: RoundHandle) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-session-id", handle.session_id.encode()),
        (b"x-session-round", str(handle.round_number).encode()),
        (b"x-antiphon-arm", handle.arm.encode()),
    ]


def _unusable_model(message: str) -> ApiError:
    log.error("model unusable", extra={"reason": message})
    return ApiError(503, "model_unavailable", message, kind="server_error", retry_after_s=5.0)
