"""Calls and answers of the HTTP API as data: nothing here sends anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from antiphon.client.errors import ApiError, ServerFault, Unreachable, error_of
from antiphon.client.results import Reply, SessionInfo, SessionRecord, Usage

CHAT = "/v1/chat/completions"
SESSIONS = "/v1/sessions"
RETRY_COUNT = "x-stainless-retry-count"
"""OpenAI's clients say by it that a request is the same once more; so do we."""
IDEMPOTENCY_KEY = "Idempotency-Key"
"""The same for every try of a round, however it is sent: it counts once, and its answer may come again."""


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: bool = False
    deadline_s: float | None = None
    """None = the client's."""

    def content(self) -> bytes | None:
        return msgspec.json.encode(self.body) if self.method == "POST" else None


@dataclass(frozen=True, slots=True)
class Answer:
    """`stream` is the transport's open answer of a call that asked for one; `content` is then empty."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""
    stream: Any = None

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def error(self) -> ApiError:
        return error_of(self.status, self.headers, self.content)

    def object(self) -> dict[str, Any]:
        """The JSON object; raises the error that it is, or `ServerFault` if it is neither."""
        if not self.ok:
            raise self.error()
        try:
            return msgspec.json.decode(self.content, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _unreadable(self.status, f"it is not JSON: {error}") from error


Outcome = Answer | Unreachable
"""What became of a call."""


def session_path(session_id: str, *rest: str) -> str:
    """An id may hold slashes."""
    return "/".join([SESSIONS, quote(session_id, safe=""), *rest])


def checked_base_url(url: str) -> str:
    """Without the `/v1` that OpenAI's clients want; raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must be http://HOST:PORT or https://.., got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def reply_of(answer: Answer) -> Reply:
    """The reply of a whole answer; raises as `Answer.object`."""
    found = answer.object()
    try:
        choice = found["choices"][0]
        message = {key: value for key, value in choice["message"].items() if value is not None}
        return Reply(
            {"role": "assistant", "content": message.get("content"), **message},
            choice.get("finish_reason"),
            *usage_and_session(found),
        )
    except (KeyError, IndexError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise _unreadable(answer.status, repr(error)) from error


def usage_and_session(found: Mapping[str, Any]) -> tuple[Usage | None, SessionInfo | None]:
    usage, session = found.get("usage"), found.get("session")
    return (
        None if usage is None else msgspec.convert(usage, Usage),
        None if session is None else msgspec.convert(session, SessionInfo),
    )


def record_of(found: Mapping[str, Any]) -> SessionRecord:
    """A session document; raises `ServerFault`."""
    try:
        return msgspec.convert({**found, "more": found}, SessionRecord)
    except msgspec.ValidationError as error:
        raise _unreadable(200, str(error)) from error


def _unreadable(status: int, what: str) -> ServerFault:
    return ServerFault(status, f"an answer that cannot be read: {what}", code="unreadable_answer")
