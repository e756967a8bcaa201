"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API, for Claude Code and its clients."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway import messages
from antiphon.scheduler.gateway.completions import ROUND_ID, CompletionRoute
from antiphon.scheduler.gateway.intake import Intake
from antiphon.scheduler.gateway.message_events import MessageEvents
from antiphon.scheduler.gateway.tokenize import Tokenizing
from antiphon.scheduler.gateway.translated import answer, frame


class MessagesRoute:
    """ASGI application of POST /v1/messages."""

    def __init__(self, chat: CompletionRoute, intake: Intake) -> None:
        self._chat = chat
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await self._intake.body(receive, Headers(scope=scope))
        body = messages.parse_messages_request(raw)
        events = MessageEvents(body, f"msg_{scope[ROUND_ID].removeprefix('r')}")
        await answer(self._chat, _Translated(body, events), scope, receive, send)


class CountRoute:
    """ASGI application of POST /v1/messages/count_tokens."""

    def __init__(self, tokenizing: Tokenizing, intake: Intake) -> None:
        self._tokenizing = tokenizing
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await self._intake.body(receive, Headers(scope=scope))
        chat = msgspec.json.encode(messages.chat_request(messages.parse_count_request(raw)))
        shown = {"input_tokens": len(await self._tokenizing.chat_ids(chat))}
        await Response(msgspec.json.encode(shown), media_type="application/json")(scope, receive, send)


class _Translated:
    """One message, as `translated.answer` wants it."""

    def __init__(self, body: messages.MessagesBody, events: MessageEvents) -> None:
        self.stream = bool(body.stream)
        self._chat = msgspec.json.encode(messages.chat_request(body))
        self._events = events

    def chat(self) -> bytes:
        return self._chat

    def begin(self) -> bytes:
        return b"".join(map(frame, self._events.begin()))

    def feed(self, event: dict[str, Any]) -> bytes:
        return b"".join(map(frame, self._events.feed(event)))

    async def finish(self) -> bytes:
        return b"".join(map(frame, self._events.end()))

    def broke(self, error: ApiError) -> bytes:
        return frame(self._events.failed(error))

    def whole(self) -> bytes:
        return msgspec.json.encode(self._events.whole())
