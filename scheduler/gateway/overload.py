"""What one replica takes on at once: rounds, and bytes of request bodies. Beyond that: 503, at once.

A refusal costs next to nothing: it comes before the body is read, before tokens are made of it and before any
claim. Pages about the process are always answered. A retry whose first try is here is not refused because of
it: it is known by its idempotency key, or by its body, which is then read first.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.scheduler.config import GatewayConfig
from antiphon.scheduler.errors import ApiError, overloaded
from antiphon.scheduler.gateway.caller import current_caller
from antiphon.scheduler.gateway.completions import LOG_FIELDS
from antiphon.scheduler.gateway.intake import ClientGone
from antiphon.scheduler.gateway.messages import MESSAGES_ROUTE
from antiphon.scheduler.gateway.requests import CHAT_ROUTE, COMPLETION_ROUTE
from antiphon.scheduler.gateway.responses import RESPONSES_ROUTE
from antiphon.scheduler.gateway.retried import COUNT_HEADER, KEY_HEADER
from antiphon.scheduler.gateway.seats import Seats
from antiphon.scheduler.gateway.tenants import refusal
from antiphon.scheduler.metrics import Metrics

ROUND_ROUTES = frozenset({CHAT_ROUTE, COMPLETION_ROUTE, RESPONSES_ROUTE, MESSAGES_ROUTE})
ROUNDS_RETRY_S = 1.0
BODIES_RETRY_S = 0.5


class OverloadGate:
    """ASGI middleware: counts what is under way. For one event loop."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, metrics: Metrics) -> None:
        self._app = app
        self._max_rounds = config.max_rounds
        self._max_bytes = config.bodies_memory_bytes
        self._body_limit_bytes = config.body_limit_bytes
        self._stall_s = config.reader_stall_s
        self._metrics = metrics
        self._body_s = config.body_deadline_s
        self._seats = Seats()
        self.body_bytes = 0
        metrics.watch_load(lambda: self.rounds, lambda: self.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = _Body(self, self._announced(scope), receive, scope["path"])
        except ApiError as error:
            await self._answer(error, scope, receive, send)
            return
        try:
            if is_round(scope["path"]):
                await self._round(scope, body, send)
            else:
                await self._app(scope, body.receive, self._bounded(send))
        finally:
            self.body_bytes -= body.reserved_bytes

    @property
    def rounds(self) -> int:
        """Under way."""
        return self._seats.taken

    async def _round(self, scope: Scope, body: _Body, send: Send) -> None:
        headers = Headers(scope=scope)
        key = _name_of_key(headers)
        name, again = key, bool(key)
        try:
            if self.rounds >= self._max_rounds and not key and headers.get(COUNT_HEADER, "0") != "0":
                await body.read(self._body_s)
                name, again = body.name, True
            seat = self._seats.take(self._max_rounds, name, again=again)
            if seat is None:
                raise self._refused("rounds")
        except ApiError as error:
            await self._answer(error, scope, body.receive, send)
            return
        if not name:
            body.when_read = lambda name: self._seats.call(seat, name)
        try:
            await self._app(scope, body.receive, self._bounded(send))
        finally:
            self._seats.leave(seat)

    async def _answer(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.errors.labels(error.code).inc()
        scope.setdefault(LOG_FIELDS, {})["code"] = error.code
        await refusal(scope["path"], error)(scope, receive, send)

    def reserve(self, more_bytes: int) -> None:
        """Raises `ApiError` (503)."""
        if more_bytes and self.body_bytes + more_bytes > self._max_bytes:
            raise self._refused("bodies")
        self.body_bytes += more_bytes

    def most(self, size_bytes: int) -> int:
        """What is kept of a body: the rest of one over the limit is dropped as it comes."""
        return min(size_bytes, self._body_limit_bytes)

    def _bounded(self, send: Send) -> Send:
        """A send that waits only so long for a client that takes nothing; then that one is gone."""

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall_s) as waiting:
                    await send(message)
            except TimeoutError:
                if not waiting.expired():  # the round's own deadline, or the operating system's
                    raise
                self._metrics.stalled_readers.inc()
                raise ClientGone from None

        return bounded

    def _announced(self, scope: Scope) -> int:
        announced = Headers(scope=scope).get("content-length", "")[:20]
        return self.most(int(announced)) if announced.isascii() and announced.isdecimal() else 0

    def _refused(self, bound: str) -> ApiError:
        self._metrics.overloaded.labels(bound).inc()
        if bound == "rounds":
            what = f"This gateway has {self.rounds} rounds under way, as many as it takes."
            return overloaded(what, ROUNDS_RETRY_S)
        what = f"This gateway has request bodies of {self.body_bytes} bytes at hand and no room for this one."
        return overloaded(what, BODIES_RETRY_S)


class _Body:
    """Of one request: reserved as announced, else as it comes; given back when the request is over."""

    def __init__(self, gate: OverloadGate, announced_bytes: int, receive: Receive, path: str) -> None:
        """Raises `ApiError` (503)."""
        self._gate = gate
        self._receive = receive
        self._read_bytes = 0
        self._digest = hashlib.blake2b(f"{current_caller().tenant}\0{path}\0".encode(), digest_size=16)
        self._waiting: list[Message] = []
        """Read ahead of whoever is to get it."""
        self.name = ""
        """Says whose and what it is, once it is whole."""
        self.when_read: Callable[[str], None] = lambda name: None
        self.reserved_bytes = 0
        self._reserve(announced_bytes)

    async def receive(self) -> Message:
        """The request's next message. Raises `ApiError` (503)."""
        return self._waiting.pop(0) if self._waiting else await self._next()

    async def read(self, deadline_s: float) -> None:
        """All of it, for `receive` to give; what does not come in time, or is too long, is left."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while not self.name and self._gate.most(self._read_bytes) == self._read_bytes:
                    message = await self._next()
                    self._waiting.append(message)
                    if message["type"] != "http.request":
                        return

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            piece: bytes = message.get("body", b"")
            self._read_bytes += len(piece)
            self._reserve(self._gate.most(self._read_bytes))
            self._digest.update(piece)
            if not message.get("more_body", False):
                self.name = f"body {self._digest.hexdigest()}"
                self.when_read(self.name)
        return message

    def _reserve(self, size_bytes: int) -> None:
        more_bytes = max(0, size_bytes - self.reserved_bytes)
        self._gate.reserve(more_bytes)
        self.reserved_bytes += more_bytes


def is_round(path: str) -> bool:
    """Whether a POST there asks for a round."""
    return path in ROUND_ROUTES or (path.startswith("/v1/sessions/") and path.endswith("/rounds"))


def _name_of_key(headers: Mapping[str, str]) -> str:
    """Of the call that a request's idempotency key names; "" if it has none."""
    key = headers.get(KEY_HEADER)
    return f"key {current_caller().tenant} {key}" if key else ""
