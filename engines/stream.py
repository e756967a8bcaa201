"""One streamed answer of SGLang's OpenAI routes: what we ask for beyond the client, and taking it out again.

Token ids come back per chunk from /v1/completions, in one event near the end from /v1/chat/completions.
"""

from __future__ import annotations

from typing import Any

import msgspec

from antiphon.engines.base import Chunk, EngineError, FailureKind, GenerateRequest, Usage
from antiphon.engines.prompt import MAX_ID, body_with
from antiphon.engines.sse import SseEvent

CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"
_IDS_FLAG = {CHAT_PATH: "return_output_ids_in_sglext", COMPLETIONS_PATH: "return_token_ids"}
_PLACEHOLDER = [{"role": "user", "content": ""}]
"""SGLang insists on messages although `input_ids` is the prompt. Of a history it would only count the tool
calls, to number Kimi K2's new ones: not worth sending it again every round."""

_CALLERS_FAULT = (400, 413, 422)
"""Other 4xx blame the moment (429) or the engine's set-up (401, 404): another engine may do better."""


class AnswerReader:
    """Builds the engine's request and reads its events; raises `EngineError` for those that are errors."""

    def __init__(self, request: GenerateRequest, name: str) -> None:
        if request.path not in _IDS_FLAG:
            raise EngineError(FailureKind.BAD_REQUEST, f"{name}: no such route: {request.path}")
        self.started = False
        """Something was passed on."""
        self.done = False
        self._request = request
        self._name = name
        self._unfinished = max(1, int(request.body.get("n") or 1))
        """Choices whose finish reason has not come."""
        self._client_wants_ids = bool(request.body.get(_IDS_FLAG[request.path]))

    def body(self) -> bytes:
        """The client's fields with ours over them."""
        request = self._request
        ours: dict[str, Any] = {
            "rid": request.rid,
            "session_id": request.session_id,
            "cache_salt": request.cache_salt,
            "stream": True,
            "stream_options": {**(request.body.get("stream_options") or {}), "include_usage": True},
            _IDS_FLAG[request.path]: True,
        }
        if request.path == CHAT_PATH:
            ours["messages"] = _PLACEHOLDER
        name = "input_ids" if request.path == CHAT_PATH else "prompt"
        fields = {**request.body, **ours}
        fields.pop(name, None)
        return body_with(fields, name, request.input_ids)

    def read(self, event: SseEvent) -> Chunk | None:
        """What one event means to the client's side; None for the end mark, which sets `done`."""
        if event.data == b"[DONE]":
            if self._unfinished > 0:
                raise self._error(FailureKind.BROKEN, "the stream ended without a finish reason")
            self.done = True
            return None
        try:
            data = msgspec.json.decode(event.data, type=dict[str, Any])
            if (error := data.get("error")) is not None:
                raise self._error_event(error, event.data)
            chunk = self._chunk(data)
        except (msgspec.MsgspecError, AttributeError, LookupError, ArithmeticError, RecursionError, TypeError,
                ValueError) as error:  # fmt: skip
            raise self._error(FailureKind.BROKEN, f"cannot read the event {event.data[:200]!r}") from error
        self.started = True
        return chunk

    def _chunk(self, data: dict[str, Any]) -> Chunk:
        choices = data["choices"]
        reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        if "abort" in reasons:
            raise self._error(FailureKind.REFUSED, "the engine aborted the answer")
        self._unfinished -= len(reasons)
        ids, only_ids = self._take_ids(data)
        if any(type(token) is not int or not 0 <= token <= MAX_ID for token in ids):
            raise ValueError("what should be a token id is none")
        return Chunk(
            data=None if only_ids else data,
            token_ids=ids,
            finish_reason=reasons[0] if reasons else None,
            usage=_usage(data.get("usage")),
        )

    def _take_ids(self, data: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
        """Output ids of the first choice, taken out unless the client asked; and whether nothing is left."""
        if self._request.path == COMPLETIONS_PATH:
            ids: tuple[int, ...] = ()
            for choice in data["choices"]:
                if choice.get("index", 0) == 0:
                    ids = tuple(choice.get("token_ids") or ())
                if not self._client_wants_ids:
                    choice.pop("token_ids", None)
                    choice.pop("prompt_token_ids", None)
            return ids, False
        extension = data.get("sglext")
        if not extension or "output_ids" not in extension:
            return (), False
        ids = tuple(extension["output_ids"][0])
        if self._client_wants_ids:
            return ids, False
        del extension["output_ids"]
        if not extension:
            del data["sglext"]
        return ids, not extension and not data["choices"] and not data.get("usage")

    def _error_event(self, error: Any, body: bytes) -> EngineError:
        """An error inside the stream: `code` is the HTTP status that it would have had."""
        status = int(error.get("code") or 500) if isinstance(error, dict) else 500
        message = error.get("message") if isinstance(error, dict) else error
        return self._error(kind_of_status(status), f"error event {status}: {message}", status, body)

    def _error(self, kind: FailureKind, message: str, status: int = 0, body: bytes = b"") -> EngineError:
        """Once something was passed on, no failure can be retried: all are BROKEN."""
        kind = FailureKind.BROKEN if self.started else kind
        return EngineError(kind, f"{self._name}: {self._request.path}: {message}", status=status, body=body)


def kind_of_status(status: int) -> FailureKind:
    """Whom an HTTP status blames."""
    if status in _CALLERS_FAULT:
        return FailureKind.BAD_REQUEST
    return FailureKind.REFUSED


def answer_error(name: str, path: str, status: int, body: bytes) -> EngineError:
    """The error for an answer that is not 200."""
    message = f"{name}: {path}: HTTP {status}: {body[:500].decode(errors='replace')}"
    return EngineError(kind_of_status(status), message, status=status, body=body)


def _usage(usage: Any) -> Usage | None:
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(usage["prompt_tokens"]),
        completion_tokens=int(usage["completion_tokens"]),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )
