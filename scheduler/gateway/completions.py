"""The completion routes: one request in, one round submitted, its answer streamed or folded; or explained.

Status and headers go out with the round's first event, so a refused round has a real status. A client that
goes away at any moment cancels its request, which leaves the round's `async with` and so stops the decode.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from antiphon.scheduler.answers import KeptAnswer
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import ApiError, deadline_exceeded, from_refusal, stream_broke
from antiphon.scheduler.gateway import relay
from antiphon.scheduler.gateway.intake import Checked, ClientGone, Intake, endpoint_of
from antiphon.scheduler.gateway.retried import REPLAYED_HEADER, replayed
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.rounds import RoundBroke, RoundHandle, RoundRefused, RoundRunner

log = logging.getLogger(__name__)

ROUND_ID = "antiphon.round_id"
"""Key in the ASGI scope: the id for this request's round. It is the request id too, unless the client gave
one: a client's id may come twice, a round's must not."""
LOG_FIELDS = "antiphon.log"
"""Key in the ASGI scope: a dict whose entries end up in the request's log line."""
BOUNDS = {"overloaded": "queue", "would_wait": "wait"}
"""Code of a refusal by the core -> the bound that was hit."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
CLOSING_DEADLINE_S = 5.0
"""For telling a client that its stream failed."""


Events = AsyncGenerator[relay.Event, None]
Headings = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class _Progress:
    """How far an answer has come; decides what a failure can still say."""

    phase: str = "waiting"
    """waiting | answering"""
    started: bool = False
    """Status and headers are out."""


class CompletionRoute:
    """ASGI application of /v1/chat/completions or /v1/completions."""

    def __init__(
        self, route: str, runner: RoundRunner, intake: Intake, config: Config, metrics: Metrics
    ) -> None:
        self._route = route
        self._runner = runner
        self._intake = intake
        self._deadline_s = config.scheduler.request_deadline_s
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await self._intake.body(receive, Headers(scope=scope))
        await self.answer(raw, scope, receive, send)

    async def answer(
        self, raw: bytes, scope: Scope, receive: Receive, send: Send, append_to: str | None = None
    ) -> None:
        """The same for a body that has been read: another API's routes translate theirs into one.

        `append_to`: the messages are only what is new in that session.
        """
        progress = _Progress()
        try:
            await while_connected(receive, self._answer(raw, scope, send, progress, append_to))
        except ClientGone:
            self._metrics.disconnects.labels(progress.phase).inc()

    async def _answer(
        self, raw: bytes, scope: Scope, send: Send, progress: _Progress, append_to: str | None
    ) -> None:
        headers, round_id = Headers(scope=scope), scope[ROUND_ID]
        checked = await self._intake.check(self._route, raw, headers, round_id, append_to)
        request = checked.request
        if checked.kept is not None:
            scope[LOG_FIELDS]["replayed"] = True
            await self._send(replayed(checked.kept), checked, send, progress, _kept_headers(checked.kept))
            return
        fields: dict[str, Any] = scope[LOG_FIELDS]
        fields |= {"session": request.session_id, "round_id": request.round_id}
        deadline_s = self._deadline_s
        try:
            async with asyncio.timeout(deadline_s), self._runner.submit(request) as handle:
                await handle.start()
                progress.phase = "answering"
                fields |= {"session": handle.session_id, "round": handle.round_number, "arm": handle.arm}
                await self._intake.conversations.took_over(handle)
                events, about = self._events(handle, checked), _round_headers(handle)
                await self._send(events, checked, send, progress, about)
        except RoundRefused as refusal:
            if refusal.code in BOUNDS:
                self._metrics.overloaded.labels(BOUNDS[refusal.code]).inc()
            raise from_refusal(refusal) from refusal
        except RoundBroke as broke:
            await self._fail(stream_broke(str(broke)), send, progress)
        except TimeoutError:
            await self._fail(deadline_exceeded(deadline_s), send, progress)

    def _events(self, handle: RoundHandle, checked: Checked) -> Events:
        events = relay.events(handle, checked.form, partial(self._intake.keep, checked, handle))
        call = checked.request.call
        if call is None or not call.exactly:
            return events
        told = {name.decode(): value.decode() for name, value in _round_headers(handle)}
        return self._intake.retries.keeping(events, call, checked.request.round_id, told)

    async def _send(
        self,
        events: Events,
        checked: Checked,
        send: Send,
        progress: _Progress,
        headers: Headings,
    ) -> None:
        async with contextlib.aclosing(events):
            await (self._stream if checked.form.stream else self._whole)(
                events, checked, send, progress, headers
            )

    async def _stream(
        self, events: Events, checked: Checked, send: Send, progress: _Progress, about: Headings
    ) -> None:
        headers = [*STREAM_HEADERS, *about]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        progress.started = True
        async for event in events:
            await send({"type": "http.response.body", "body": relay.frame(event), "more_body": True})
        await send({"type": "http.response.body", "body": relay.DONE, "more_body": False})

    async def _whole(
        self, events: Events, checked: Checked, send: Send, progress: _Progress, about: Headings
    ) -> None:
        content = msgspec.json.encode(await relay.fold(events, checked.form))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            *about,
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


class ExplainRoute:
    """ASGI application of /v1/explain: the body of a completion, checked alike, decided and not run."""

    def __init__(self, runner: RoundRunner, intake: Intake, config: Config) -> None:
        self._runner = runner
        self._intake = intake
        self._scheduler = config.scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        raw = await self._intake.body(receive, headers)
        route = endpoint_of(raw)
        checked = await self._intake.check(route, raw, headers, scope[ROUND_ID])
        found = await self._runner.explain(checked.request)
        found["session"]["identified_by"] = checked.form.identified_by
        shown = {
            "object": "antiphon.explanation",
            "endpoint": route,
            "model": checked.form.model,
            "policy": self._scheduler.policy,
            "ordering": self._scheduler.ordering,
            **found,
            "slo": dataclasses.asdict(checked.targets),
        }
        await Response(msgspec.json.encode(shown), media_type="application/json")(scope, receive, send)


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


def _kept_headers(answer: KeptAnswer) -> Headings:
    told = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    return [*told, REPLAYED_HEADER]


def _round_headers(handle: RoundHandle) -> Headings:
    return [
        (b"x-session-id", handle.session_id.encode()),
        (b"x-session-round", str(handle.round_number).encode()),
        (b"x-antiphon-arm", handle.arm.encode()),
    ]
