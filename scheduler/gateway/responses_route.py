"""`/v1/responses`: create, streamed or whole; get and delete what was stored.

A response that goes on from a stored one has its messages put before its own, and runs in its session; one
that branches off from an earlier place runs in a child of that session. One that is asked for again is the
same response (`response_calls.py`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import ApiError, invalid, ledger_unavailable
from antiphon.scheduler.gateway import responses
from antiphon.scheduler.gateway.caller import current_caller
from antiphon.scheduler.gateway.completions import LOG_FIELDS, ROUND_ID, STREAM_HEADERS, CompletionRoute
from antiphon.scheduler.gateway.intake import Intake
from antiphon.scheduler.gateway.response_calls import Asked, Made, Making, ResponseCalls
from antiphon.scheduler.gateway.response_events import ResponseEvents, document, told_again
from antiphon.scheduler.gateway.retried import REPLAYED_HEADER
from antiphon.scheduler.gateway.session_fields import joined
from antiphon.scheduler.gateway.translated import answer, frame
from antiphon.scheduler.response_store import NOTHING, LedgerUnavailable, Past, ResponseStore

log = logging.getLogger(__name__)


class ResponsesRoute:
    """ASGI application of POST /v1/responses."""

    def __init__(
        self,
        chat: CompletionRoute,
        intake: Intake,
        config: Config,
        store: ResponseStore | None,
    ) -> None:
        """Without a `store` nothing is kept, and there is nothing to go on from."""
        self._chat = chat
        self._intake = intake
        self._limit_bytes = config.gateway.body_limit_bytes
        self._store = store
        self._calls = ResponseCalls(store, config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        raw = await self._intake.body(receive, headers)
        body = responses.parse_response_request(raw)
        new, tenant = responses.new_messages(body), current_caller().tenant
        call = self._calls.call(body, joined(headers), tenant, scope[ROUND_ID])
        found = await self._calls.find(Asked(body, tenant, call, partial(self._past, body, tenant)))
        if isinstance(found, Made):
            scope[LOG_FIELDS]["replayed"] = True
            await _give_again(body, found.document)(scope, receive, send)
            return
        try:
            translated = self._translated(body, found, new, tenant)
            await answer(self._chat, translated, scope, receive, send)
        except ApiError:
            await self._calls.refused(found)
            raise

    def _translated(
        self, body: responses.ResponsesBody, making: Making, new: list[responses.Message], tenant: str
    ) -> _Translated:
        """Raises `ApiError` (400, 413)."""
        past = making.past
        before = [msgspec.Raw(message.encode()) for message in past.messages]
        chat = msgspec.json.encode(responses.chat_request(body, before, new, _session(body, past)))
        if len(chat) > self._limit_bytes and past.messages:
            raise ApiError(
                413,
                "conversation_too_large",
                f"With what came before it the request is over the limit of {self._limit_bytes} bytes.",
                param="previous_response_id",
            )
        events = ResponseEvents(body, making.response_id, making.created)
        keep = _Keep(self._store if body.stored else None, tenant, making, new, body.conversation_id)
        return _Translated(body, chat, events, keep)

    async def _past(self, body: responses.ResponsesBody, tenant: str) -> Past:
        """What the request says came before it; raises `ApiError` (404, or 503 while the ledger is away)."""
        previous, conversation = body.previous_response_id, body.conversation_id
        if previous is None and conversation is None:
            return NOTHING
        found: Past | None = None
        try:
            if self._store is not None and conversation is not None:
                previous = await self._store.last_of(tenant, conversation)
                if previous is None:
                    return NOTHING  # a conversation begins with its first response
            if self._store is not None and previous is not None:
                found = await self._store.past(tenant, previous)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"What came before cannot be read: {error}") from error
        if found is None:
            raise _not_found(previous or conversation or "", "previous_response_id")
        return found


class StoredResponses:
    """GET and DELETE /v1/responses/{response_id}."""

    def __init__(self, store: ResponseStore | None) -> None:
        self._store = store

    async def get(self, request: Request) -> Response:
        response_id, tenant = request.path_params["response_id"], current_caller().tenant
        try:
            found = await self._store.get(tenant, response_id) if self._store is not None else None
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"The response cannot be read: {error}") from error
        if found is None:
            raise _not_found(response_id, "response_id")
        return Response(found, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        response_id, tenant = request.path_params["response_id"], current_caller().tenant
        try:
            there = self._store is not None and await self._store.delete(tenant, response_id)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"The response cannot be deleted: {error}") from error
        if not there:
            raise _not_found(response_id, "response_id")
        shown = {"id": response_id, "object": "response", "deleted": True}
        return Response(msgspec.json.encode(shown), media_type="application/json")


class _Keep:
    """Stores a response at its end. A ledger that is away costs the storing, never the answer."""

    def __init__(
        self,
        store: ResponseStore | None,
        tenant: str,
        making: Making,
        new: list[responses.Message],
        conversation_id: str | None,
    ) -> None:
        self._store = store
        self._tenant = tenant
        self._making = making
        self._new = new
        self._conversation_id = conversation_id

    async def __call__(self, events: ResponseEvents, response: dict[str, Any]) -> bool:
        """Whether it is kept."""
        if self._store is None:
            return False
        messages = [msgspec.json.encode(message) for message in (*self._new, events.reply())]
        try:
            return await self._store.put(
                self._tenant,
                events.response_id,
                document(response),
                past=self._making.past,
                messages=messages,
                session_id=events.session_id,
                conversation_id=self._conversation_id,
                call=self._making.call,
            )
        except LedgerUnavailable as error:
            log.warning("response not stored", extra={"reason": str(error)})
            return False


class _Translated:
    """One response, as `translated.answer` wants it."""

    def __init__(
        self, body: responses.ResponsesBody, chat: bytes, events: ResponseEvents, keep: _Keep
    ) -> None:
        self.stream = bool(body.stream)
        self._chat = chat
        self._events = events
        self._keep = keep
        self._whole = b""

    def chat(self) -> bytes:
        return self._chat

    def begin(self) -> bytes:
        return b"".join(map(frame, self._events.begin()))

    def feed(self, event: dict[str, Any]) -> bytes:
        return b"".join(map(frame, self._events.feed(event)))

    async def finish(self) -> bytes:
        """Stored first: a client that has the answer can go on from it."""
        closing = b"".join(map(frame, self._events.end()))
        last = self._events.last()
        response = last["response"]
        response["store"] = await self._keep(self._events, response)
        self._whole = document(response)
        return closing + frame(last)

    def broke(self, error: ApiError) -> bytes:
        return frame(self._events.failed(error.message))

    def whole(self) -> bytes:
        return self._whole


def _give_again(body: responses.ResponsesBody, stored: str) -> Response:
    """A response that was made, in the form that is asked for now."""
    response = msgspec.json.decode(stored, type=dict[str, Any])
    about = response.get("session") or {}
    names = (("id", b"x-session-id"), ("round", b"x-session-round"), ("arm", b"x-antiphon-arm"))
    told = [(header, str(about[name]).encode()) for name, header in names if about.get(name) is not None]
    told.append(REPLAYED_HEADER)
    if not body.stream:
        given = Response(stored, media_type="application/json")
    else:
        given = Response(b"".join(map(frame, told_again(body, response))))
        told += STREAM_HEADERS
    given.raw_headers += told
    return given


def _session(body: responses.ResponsesBody, past: Past) -> Any:
    """The chat's `session`: what the client says, else where the past ran; a branch is a child of that."""
    if isinstance(body.session, dict) and body.session.get("append"):
        raise invalid(
            "`session.append` is of chats: a response goes on by `previous_response_id`.",
            param="session.append",
        )
    if not past.session_id or body.session_id is not None or not isinstance(body.session or {}, dict):
        return body.session
    known = {"id": past.session_id} if past.is_tip else {"parent_id": past.session_id}
    return known | (body.session or {})


def _not_found(name: str, param: str) -> ApiError:
    return ApiError(
        404, "response_not_found", f"The response {name[:80]!r} is not stored here, or no more.", param=param
    )
