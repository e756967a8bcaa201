"""Routes of other APIs: their request becomes a chat, the chat's events become their answer.

The chat route does all the rest: sessions, deadlines, disconnects, headers. It is always asked to stream, so
that there is one translation of answers; what a client wants whole is sent when the stream has ended.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from starlette.types import Message, Receive, Scope, Send

from antiphon.engines.sse import SseParser
from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway.completions import CompletionRoute

_STATUSES = {"deadline_exceeded": 504}
"""Of errors in a stream; all others are a broken answer."""


class Translation(Protocol):
    """One request on its way. All bytes are as they go to the client."""

    stream: bool
    """The client wants events."""

    def chat(self) -> bytes:
        """The body of the chat."""

    def begin(self) -> bytes: ...

    def feed(self, event: dict[str, Any]) -> bytes:
        """An event of the chat."""

    async def finish(self) -> bytes:
        """The chat has ended well."""

    def broke(self, error: ApiError) -> bytes:
        """It has not: the end of a stream that has begun."""

    def whole(self) -> bytes:
        """All of the answer as one JSON object, after `finish`."""


async def answer(
    chat: CompletionRoute, translation: Translation, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run the chat and send its answer translated; raises `ApiError` while a status can still be sent."""
    await chat.answer(translation.chat(), scope, receive, _Translator(translation, send))


class _Translator:
    """The `send` that the chat route is given."""

    def __init__(self, translation: Translation, send: Send) -> None:
        self._translation = translation
        self._send = send
        self._parser = SseParser()
        self._start: Message = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if self._translation.stream:
                await self._send(message)
                await self._body(self._translation.begin(), more=True)
            return
        body: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        if body.startswith(b":"):  # a heartbeat
            frames = body
        else:
            frames = b"".join([await self._frames(event.data) for event in self._parser.feed(body)])
        if self._translation.stream:
            await self._body(frames, more=more)
        elif not more:
            await self._send_whole(self._translation.whole())

    async def _frames(self, data: bytes) -> bytes:
        translation = self._translation
        if data == b"[DONE]":
            return await translation.finish()
        event = msgspec.json.decode(data, type=dict[str, Any])
        failed = event.get("error")
        if not failed:
            return translation.feed(event)
        status = _STATUSES.get(failed["code"], 502)
        error = ApiError(status, failed["code"], failed["message"], kind=failed["type"])
        if not translation.stream:
            raise error
        return translation.broke(error)

    async def _body(self, content: bytes, *, more: bool) -> None:
        if content or not more:
            await self._send({"type": "http.response.body", "body": content, "more_body": more})

    async def _send_whole(self, content: bytes) -> None:
        """With the chat's own headers, but for those that tell of its form."""
        form = (b"content-type", b"content-length", b"cache-control", b"x-accel-buffering")
        headers = [(name, value) for name, value in self._start["headers"] if name not in form]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": False})


def frame(event: dict[str, Any]) -> bytes:
    """A server-sent event that is named by its type."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))
