"""What a simulated engine says over HTTP: SGLang 0.5.23's bodies and events, field by field. No I/O.

Each form turns slices of an answer into server-sent events, and the whole into one JSON object. The quirks
are SGLang's: completions carry ids per event, chat only in one event after the finish, on request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from antiphon.engines.scripts import Piece, Rendering, detokenize
from antiphon.engines.simulated_logprobs import chat_logprobs, completion_logprobs
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


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What both OpenAI routes take. Sampling parameters are taken and change nothing."""

    model: str = "default"
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None
    rid: str | None = None
    session_id: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(Common, frozen=True, kw_only=True):
    """POST /v1/completions; `prompt` as ids, for there is no tokenizer here."""

    prompt: list[int]
    max_tokens: int | None = 16
    return_token_ids: bool = False
    echo: bool = False
    logprobs: int | None = None
    json_schema: str | None = None


class ChatBody(Common, frozen=True, kw_only=True):
    """POST /v1/chat/completions; the prompt is `input_ids`, for there is no chat template here."""

    messages: list[Any]
    input_ids: list[int]
    max_completion_tokens: int | None = None
    return_token_ids: bool = False
    return_output_ids_in_sglext: bool = False
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


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
        return {"type": "stop", "matched": request.matched_stop}
    return {
        "type": "abort",
        "message": finish.message,
        "status_code": finish.status or None,
        "err_type": None,
    }


def usage_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """As with --enable-cache-report: the prompt of the first choice, the output of all."""
    first = answers[0].request
    output = sum(answer.request.output_tokens for answer in answers)
    return {
        "prompt_tokens": first.prompt_tokens,
        "total_tokens": first.prompt_tokens + output,
        "completion_tokens": output,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "reasoning_tokens": sum(a.rendering.reasoning_tokens(a.request.output_tokens) for a in answers),
    }


class Form(Protocol):
    """The shape of one answer: `events` for slices [start, stop) of a choice in order, then `ending` once."""

    def events(self, choice: int, start: int, stop: int) -> list[bytes]: ...

    def ending(self) -> list[bytes]: ...

    def whole(self) -> dict[str, Any]: ...

    def stream_error(self, message: str, status: int) -> bytes: ...


class Answer:
    """One choice: its request, rendered."""

    def __init__(self, request: LoopRequest) -> None:
        self.request = request
        self.rendering = Rendering(request.script)

    def pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        return self.rendering.between(self.request.output_ids, start, stop)

    def text(self, start: int, stop: int) -> str:
        return "".join(piece.text for piece in self.pieces(start, stop))

    def reasoning(self, start: int, stop: int) -> str:
        return "".join(piece.reasoning for piece in self.pieces(start, stop))


class GenerateForm:
    """/generate: every event repeats the answer so far."""

    def __init__(self, request: LoopRequest) -> None:
        self._answer = Answer(request)

    def events(self, choice: int, start: int, stop: int) -> list[bytes]:
        return [sse(self._state(stop))]

    def ending(self) -> list[bytes]:
        return [DONE]

    def whole(self) -> dict[str, Any]:
        return self._state(self._answer.request.output_tokens)

    def stream_error(self, message: str, status: int) -> bytes:
        return sse(self.whole())

    def _state(self, stop: int) -> dict[str, Any]:
        request = self._answer.request
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
        text = self._answer.text(0, stop)
        return {"text": text, "output_ids": request.output_ids[:stop], "meta_info": meta}


class _OpenAIForm:
    """What the two OpenAI routes share."""

    kind = ""

    def __init__(self, body: Common, requests: Sequence[LoopRequest]) -> None:
        self.answers = [Answer(request) for request in requests]
        self._model = body.model
        options = body.stream_options
        self._include_usage = bool(options is not None and options.include_usage)
        self._created = int(time.time())

    def stream_error(self, message: str, status: int) -> bytes:
        return sse({"error": error_object(message, status)})

    def envelope(self, kind: str = "") -> dict[str, Any]:
        rid = self.answers[0].request.rid
        return {"id": rid, "object": kind or self.kind, "created": self._created, "model": self._model}


class CompletionForm(_OpenAIForm):
    """/v1/completions."""

    kind = "text_completion"

    def __init__(self, body: CompletionBody, requests: Sequence[LoopRequest]) -> None:
        super().__init__(body, requests)
        self._body = body

    def events(self, choice: int, start: int, stop: int) -> list[bytes]:
        return [sse({**self.envelope(), "choices": [self._choice(choice, start, stop)], "usage": None})]

    def ending(self) -> list[bytes]:
        if not self._include_usage:
            return [DONE]
        return [sse({**self.envelope(), "choices": [], "usage": usage_json(self.answers)}), DONE]

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(number, 0, answer.request.output_tokens)
            for number, answer in enumerate(self.answers)
        ]
        metadata = {"weight_version": "default"}
        usage = usage_json(self.answers)
        return {**self.envelope(), "choices": choices, "usage": usage, "metadata": metadata}

    def _choice(self, number: int, start: int, stop: int) -> dict[str, Any]:
        answer, body = self.answers[number], self._body
        request = answer.request
        prompt = request.tokens[: request.prompt_tokens] if start == 0 else []
        ended = request.finish is not None and stop == request.output_tokens
        logprobs = None
        if body.logprobs is not None:
            echoed = prompt if body.echo else []
            logprobs = completion_logprobs(echoed, request.output_ids[start:stop], body.logprobs)
        choice: dict[str, Any] = {
            "index": number,
            "text": (detokenize(prompt) if body.echo else "") + answer.text(start, stop),
            "logprobs": logprobs,
            "finish_reason": request.finish.kind if ended and request.finish is not None else None,
            "matched_stop": request.matched_stop if ended else None,
        }
        if body.return_token_ids:
            choice["token_ids"] = request.output_ids[start:stop]
            if start == 0:
                choice["prompt_token_ids"] = prompt
        return choice


class ChatForm(_OpenAIForm):
    """/v1/chat/completions."""

    kind = "chat.completion.chunk"

    def __init__(self, body: ChatBody, requests: Sequence[LoopRequest]) -> None:
        super().__init__(body, requests)
        self._body = body

    def events(self, choice: int, start: int, stop: int) -> list[bytes]:
        answer = self.answers[choice]
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}] if start == 0 else []
        first = len(deltas)
        for piece in answer.pieces(start, stop):
            if piece.call is not None:
                call = self._call_delta(answer, piece)
                deltas.append({"role": None, "content": None, "tool_calls": [call]})
                continue
            name = "reasoning_content" if piece.reasoning else "content"
            if len(deltas) > first and name in deltas[-1] and "tool_calls" not in deltas[-1]:
                deltas[-1][name] += piece.reasoning or piece.text
            else:
                deltas.append({name: piece.reasoning or piece.text})
        logprobs = self._logprobs(answer, start, stop)
        return [
            self._event(choice, delta, logprobs=logprobs if number == first else None)
            for number, delta in enumerate(deltas)
        ]

    def ending(self) -> list[bytes]:
        events = [self._event(number, {}, ended=True) for number in range(len(self.answers))]
        if self._body.return_output_ids_in_sglext:
            events.append(sse({**self.envelope(), "choices": [], "usage": None, "sglext": self._ids()}))
        if self._include_usage:
            events.append(sse({**self.envelope(), "choices": [], "usage": self._usage()}))
        return [*events, DONE]

    def whole(self) -> dict[str, Any]:
        choices = []
        for number, answer in enumerate(self.answers):
            tokens = answer.request.output_tokens
            message = {
                "role": "assistant",
                "content": answer.text(0, tokens),
                "reasoning_content": answer.reasoning(0, tokens) or None,
                "tool_calls": self._calls(answer) or None,
            }
            logprobs = self._logprobs(answer, 0, tokens)
            choices.append({"index": number, "message": message, "logprobs": logprobs, **_end(answer)})
        whole = {
            **self.envelope("chat.completion"),
            "choices": choices,
            "usage": self._usage(),
            "metadata": {"weight_version": "default"},
        }
        return whole | ({"sglext": self._ids()} if self._body.return_output_ids_in_sglext else {})

    def _usage(self) -> dict[str, Any]:
        return {**usage_json(self.answers), "completion_tokens_details": None}

    def _ids(self) -> dict[str, Any]:
        return {"output_ids": [answer.request.output_ids for answer in self.answers]}

    def _logprobs(self, answer: Answer, start: int, stop: int) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(answer.request.output_ids[start:stop], self._body.top_logprobs or 0)

    def _event(
        self, choice: int, delta: dict[str, Any], *, ended: bool = False, logprobs: Any = None
    ) -> bytes:
        end = _end(self.answers[choice]) if ended else {"finish_reason": None, "matched_stop": None}
        delta = {"reasoning_content": None, **delta}
        shown = {"index": choice, "delta": delta, "logprobs": logprobs, **end}
        return sse({**self.envelope(), "choices": [shown]})

    def _call_delta(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        return {
            "id": f"call_{answer.request.rid}_{piece.call}" if piece.name is not None else None,
            "index": piece.call,
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    def _calls(self, answer: Answer) -> list[dict[str, Any]]:
        """The calls as far as they were said."""
        calls: dict[int, dict[str, Any]] = {}
        for piece in answer.pieces(0, answer.request.output_tokens):
            if piece.call is not None and piece.name is not None:
                calls[piece.call] = self._call_delta(answer, piece)
            elif piece.call is not None:
                calls[piece.call]["function"]["arguments"] += piece.arguments
        return list(calls.values())


def _end(answer: Answer) -> dict[str, Any]:
    """Why a choice ended."""
    finish, script = answer.request.finish, answer.request.script
    reason: str | None = finish.kind if finish is not None else None
    if reason == "stop" and script is not None and script.tool_calls:
        reason = "tool_calls"
    return {"finish_reason": reason, "matched_stop": answer.request.matched_stop}


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
