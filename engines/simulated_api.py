"""What a simulated engine says over HTTP: SGLang 0.5.23's bodies and events, field by field. No I/O.

Each form turns slices of an answer into server-sent events, and the whole into one JSON object. The quirks
are SGLang's: completions carry ids per event, chat only in one event after the finish, on request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from antiphon.engines.scripts import Piece, Rendering
from antiphon.engines.simulated_request import LoopRequest

DONE = b"data: [DONE]\n\n"


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = False


class SamplingParams(msgspec.Struct, frozen=True):
    max_new_tokens: int | None = 128


class GenerateBody(msgspec.Struct, frozen=True):
    """POST /generate."""

    input_ids: list[int]
    sampling_params: SamplingParams | None = None
    stream: bool = False
    rid: str | None = None
    session_id: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None


class CompletionBody(msgspec.Struct, frozen=True):
    """POST /v1/completions; `prompt` as ids, for there is no tokenizer here."""

    prompt: list[int]
    model: str = "default"
    max_tokens: int | None = 16
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    n: int | None = 1
    rid: str | None = None
    session_id: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None


class ChatBody(msgspec.Struct, frozen=True):
    """POST /v1/chat/completions; the prompt is `input_ids`, for there is no chat template here."""

    messages: list[Any]
    input_ids: list[int]
    model: str = "default"
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_output_ids_in_sglext: bool = False
    n: int | None = 1
    rid: str | None = None
    session_id: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None


def sse(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def error_object(message: str, status: int, kind: str = "") -> dict[str, Any]:
    """SGLang's ErrorResponse."""
    names = {400: "BadRequestError", 503: "SERVICE_UNAVAILABLE"}
    kind = kind or names.get(status, str(status))
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def finish_json(request: LoopRequest) -> dict[str, Any] | None:
    """meta_info.finish_reason."""
    finish = request.finish
    if finish is None:
        return None
    if finish.kind == "length":
        return {"type": "length", "length": request.output_tokens}
    if finish.kind == "stop":
        return {"type": "stop", "matched": None}
    return {
        "type": "abort",
        "message": finish.message,
        "status_code": finish.status or None,
        "err_type": None,
    }


def usage_json(request: LoopRequest) -> dict[str, Any]:
    """As with --enable-cache-report."""
    return {
        "prompt_tokens": request.prompt_tokens,
        "total_tokens": request.prompt_tokens + request.output_tokens,
        "completion_tokens": request.output_tokens,
        "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
        "reasoning_tokens": 0,
    }


class Form(Protocol):
    """The shape of one answer: `events` for slices [start, stop) in order, then `ending` once."""

    def events(self, start: int, stop: int) -> list[bytes]: ...

    def ending(self) -> list[bytes]: ...

    def whole(self) -> dict[str, Any]: ...

    def stream_error(self, message: str, status: int) -> bytes: ...


@dataclass(slots=True)
class _Answer:
    """What all forms know."""

    request: LoopRequest
    model: str = "default"
    include_usage: bool = False
    with_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    rendering: Rendering = field(init=False)

    def __post_init__(self) -> None:
        self.rendering = Rendering(self.request.script)

    def pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        return self.rendering.between(self.request.output_ids, start, stop)

    def text(self, start: int, stop: int) -> str:
        return "".join(piece.text for piece in self.pieces(start, stop))

    def stream_error(self, message: str, status: int) -> bytes:
        return sse({"error": error_object(message, status)})


class GenerateForm(_Answer):
    """/generate: every event repeats the answer so far."""

    def events(self, start: int, stop: int) -> list[bytes]:
        return [sse(self._state(stop))]

    def ending(self) -> list[bytes]:
        return [DONE]

    def whole(self) -> dict[str, Any]:
        return self._state(self.request.output_tokens)

    def stream_error(self, message: str, status: int) -> bytes:
        return sse(self._state(self.request.output_tokens))

    def _state(self, stop: int) -> dict[str, Any]:
        request = self.request
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish_json(request) if stop == request.output_tokens else None,
            "prompt_tokens": request.prompt_tokens,
            "weight_version": "default",
            "num_retractions": request.retractions,
            "completion_tokens": stop,
            "cached_tokens": request.cached_tokens,
            "cached_tokens_details": {
                "device": request.cached_device_tokens,
                "host": request.cached_host_tokens,
            },
        }
        return {"text": self.text(0, stop), "output_ids": request.output_ids[:stop], "meta_info": meta}


class CompletionForm(_Answer):
    """/v1/completions."""

    def events(self, start: int, stop: int) -> list[bytes]:
        choice = self._choice(start, stop)
        if self.with_ids:
            choice["token_ids"] = self.request.output_ids[start:stop]
            if start == 0:
                choice["prompt_token_ids"] = self.request.tokens[: self.request.prompt_tokens]
        return [sse({**self._envelope(), "choices": [choice], "usage": None})]

    def ending(self) -> list[bytes]:
        if not self.include_usage:
            return [DONE]
        return [sse({**self._envelope(), "choices": [], "usage": usage_json(self.request)}), DONE]

    def whole(self) -> dict[str, Any]:
        choice = self._choice(0, self.request.output_tokens)
        if self.with_ids:
            choice["token_ids"] = self.request.output_ids
            choice["prompt_token_ids"] = self.request.tokens[: self.request.prompt_tokens]
        metadata = {"weight_version": "default"}
        return {
            **self._envelope(), "choices": [choice], "usage": usage_json(self.request), "metadata": metadata,
        }  # fmt: skip

    def _choice(self, start: int, stop: int) -> dict[str, Any]:
        finish = self.request.finish if stop == self.request.output_tokens else None
        return {
            "index": 0,
            "text": self.text(start, stop),
            "logprobs": None,
            "finish_reason": finish.kind if finish is not None else None,
            "matched_stop": None,
        }

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self.request.rid,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


class ChatForm(_Answer):
    """/v1/chat/completions."""

    def events(self, start: int, stop: int) -> list[bytes]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}] if start == 0 else []
        text = ""
        for piece in self.pieces(start, stop):
            if piece.call is None:
                text += piece.text
                continue
            if text:
                deltas.append({"content": text})
                text = ""
            deltas.append({"role": None, "content": None, "tool_calls": [self._call_delta(piece)]})
        if text:
            deltas.append({"content": text})
        return [self._event(delta) for delta in deltas]

    def ending(self) -> list[bytes]:
        events = [self._event({}, self._finish_reason())]
        if self.with_ids:
            ids = {"output_ids": [self.request.output_ids]}
            events.append(sse({**self._envelope(), "choices": [], "usage": None, "sglext": ids}))
        if self.include_usage:
            usage = {**usage_json(self.request), "completion_tokens_details": None}
            events.append(sse({**self._envelope(), "choices": [], "usage": usage}))
        return [*events, DONE]

    def whole(self) -> dict[str, Any]:
        text = self.text(0, self.request.output_tokens)
        choice = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": text,
                "reasoning_content": None,
                "tool_calls": self._calls() or None,
            },
            "logprobs": None,
            "finish_reason": self._finish_reason(),
            "matched_stop": None,
        }
        answer = {
            **self._envelope("chat.completion"),
            "choices": [choice],
            "usage": {**usage_json(self.request), "completion_tokens_details": None},
            "metadata": {"weight_version": "default"},
        }
        if self.with_ids:
            answer["sglext"] = {"output_ids": [self.request.output_ids]}
        return answer

    def _event(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {
            "index": 0,
            "delta": {"reasoning_content": None, **delta},
            "logprobs": None,
            "finish_reason": finish_reason,
            "matched_stop": None,
        }
        return sse({**self._envelope(), "choices": [choice]})

    def _finish_reason(self) -> str | None:
        finish, script = self.request.finish, self.request.script
        if finish is not None and finish.kind == "stop" and script is not None and script.tool_calls:
            return "tool_calls"
        return finish.kind if finish is not None else None

    def _call_delta(self, piece: Piece) -> dict[str, Any]:
        assert piece.call is not None
        return {
            "id": self._call_id(piece.call) if piece.name is not None else None,
            "index": piece.call,
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    def _calls(self) -> list[dict[str, Any]]:
        """The calls as far as they were said."""
        calls: dict[int, dict[str, Any]] = {}
        for piece in self.pieces(0, self.request.output_tokens):
            if piece.call is not None and piece.name is not None:
                calls[piece.call] = self._call_delta(piece)
            elif piece.call is not None:
                calls[piece.call]["function"]["arguments"] += piece.arguments
        return list(calls.values())

    def _call_id(self, call: int) -> str:
        return f"call_{self.request.rid}_{call}"

    def _envelope(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        return {"id": self.request.rid, "object": kind, "created": self.created, "model": self.model}


def loads_json(loads: Sequence[dict[str, Any]], version: str) -> dict[str, Any]:
    """GET /v1/loads."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {
        "timestamp": stamp,
        "version": version,
        "accelerator": None,
        "num_accelerators": 1,
        "loads": list(loads),
    }
