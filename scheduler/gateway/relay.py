"""A round's chunks as the client sees them: events of a stream, or folded into one answer.

The engine is always asked to stream, and always for usage; what the client did not ask for is taken out here.
Usage goes last, after the stream has ended, because only the round's receipt knows the true `cached_tokens`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.rounds import RoundHandle

DONE = b"data: [DONE]\n\n"
RECORDED_DEADLINE_S = 0.5
"""Of an answer's last event, for the ledger to know that the round has ended."""

LOGPROBS_MISSING = (
    "log probabilities of {} tokens that brought no text are left out, as in the engine's streams"
)
"""SGLang without --tool-call-parser or --reasoning-parser: what ended the answer, halves of characters."""

Event = dict[str, Any]

Keep = Callable[[dict[str, Any]], Awaitable[tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How one client wants its answer."""

    chat: bool
    model: str
    """The name that the client used: the answer repeats it."""
    answer_id: str
    stream: bool
    include_usage: bool
    token_ids: bool
    """Our extension `return_token_ids`: output ids in `choices[0].token_ids`."""
    identified_by: str
    """How the session was found (`identity.Identity`)."""
    warnings: tuple[str, ...] = ()
    """What of the request's hints was not understood."""
    logprobs: bool = False
    """Of a chat: log probabilities were asked for."""
    echo: Echo | None = None


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that the answer repeats: an engine gets ids, and shows no special tokens of what they say."""

    shown: str
    """By the engine."""
    sent: str
    """By the client, as text: a plain engine repeats that."""

    def restored(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The first event of a choice."""
        text = choice.get("text") or ""
        if not text.startswith(self.shown):
            return choice
        return {**choice, "text": self.sent + text[len(self.shown) :]}


def frame(event: Event) -> bytes:
    """One server-sent event, without a name: OpenAI's clients take a named one for a chunk."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def error_frame(error: ApiError) -> bytes:
    """How a stream that has begun says that it failed; no [DONE] follows."""
    return frame(error.body())


async def _keep_nothing(message: dict[str, Any]) -> tuple[str, ...]:
    return ()


async def events(
    handle: RoundHandle, form: AnswerForm, keep: Keep = _keep_nothing
) -> AsyncGenerator[Event, None]:
    """The answer's events, each a new dict, the usage event last (with `session`); raises `RoundBroke`.

    What the client did not ask for (usage, token ids) is left out by `form`. `keep` gets the first choice's
    message when all of a chat has come, before the last event goes out; what it returns are warnings.
    """
    first = _Choice()
    created = int(time.time())
    engine_usage: dict[str, Any] = {}
    completion_tokens = told_logprobs = 0
    echoed: set[int] = set()
    async for chunk in handle:
        completion_tokens += len(chunk.token_ids)
        data = dict(chunk.data) if chunk.data is not None else {}
        created = data.get("created", created)
        engine_usage = data.pop("usage", None) or engine_usage
        choices = data.get("choices")
        if form.chat:
            for choice in choices or ():
                told_logprobs += len((choice.get("logprobs") or {}).get("content") or ())
                if not choice.get("index"):
                    first.add(choice, chat=True)
        elif form.echo is not None and choices:
            choices = _with_echo(choices, form.echo, echoed)
        if form.token_ids and chunk.token_ids:
            choices = _with_token_ids(choices, chunk.token_ids, form.chat)
        if choices:
            yield {**data, **_head(form, created), "choices": choices}
    warnings = form.warnings + (await keep(first.message()) if form.chat else ())
    await handle.recorded(RECORDED_DEADLINE_S)
    if form.include_usage:
        usage = _usage(handle, engine_usage, completion_tokens)
        if form.chat and form.logprobs and told_logprobs < usage["completion_tokens"]:
            warnings += (LOGPROBS_MISSING.format(usage["completion_tokens"] - told_logprobs),)
        session = session_object(handle, form, warnings)
        yield {**_head(form, created), "choices": [], "usage": usage, "session": session}


def session_object(handle: RoundHandle, form: AnswerForm, warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": handle.session_id,
        "parent_id": handle.parent_id,
        "round": handle.round_number,
        "arm": handle.arm,
        "identified_by": form.identified_by,
        "expires_in_s": handle.expires_in_s,
        "worker": handle.receipt.home if handle.receipt is not None else None,
    }
    if warnings:
        shown["warnings"] = warnings
    return shown


async def fold(answer: AsyncIterator[Event], form: AnswerForm) -> Event:
    """One OpenAI object from all events of an answer; `form.include_usage` must be set."""
    choices: dict[int, _Choice] = {}
    whole: Event = {}
    async for event in answer:
        for delta in event.pop("choices"):
            choices.setdefault(delta.get("index", 0), _Choice()).add(delta, form.chat)
        whole |= event
    whole["object"] = "chat.completion" if form.chat else "text_completion"
    whole["choices"] = [choices[index].whole(index, form) for index in sorted(choices)]
    return whole


@dataclass(slots=True)
class _Choice:
    """What has come of one choice so far."""

    role: str = "assistant"
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: dict[str, list[Any] | None] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    """finish_reason, matched_stop and what else an engine says of a choice: the last non-null value."""

    def add(self, choice: dict[str, Any], chat: bool) -> None:
        delta = choice.get("delta") or {} if chat else {"content": choice.get("text")}
        self.role = delta.get("role") or self.role
        self.text.append(delta.get("content") or "")
        self.reasoning.append(delta.get("reasoning_content") or "")
        self.token_ids += choice.get("token_ids") or ()
        for call in delta.get("tool_calls") or ():
            self._add_call(call)
        for name, values in (choice.get("logprobs") or {}).items():
            so_far = self.logprobs.get(name)
            if values is not None:  # an empty list is said as such
                so_far = [] if so_far is None else so_far
                so_far.extend(values)
            self.logprobs[name] = so_far
        known = ("index", "delta", "text", "token_ids", "logprobs")
        self.last |= {
            name: value for name, value in choice.items() if name not in known and value is not None
        }

    def _add_call(self, delta: dict[str, Any]) -> None:
        """A tool call comes as one delta with id and name, then deltas with pieces of its arguments."""
        index = delta.get("index") or 0
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = self.tool_calls.setdefault(index, empty)
        call["id"] = delta.get("id") or call["id"]
        function = delta.get("function") or {}
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        call["function"]["arguments"] += function.get("arguments") or ""

    def whole(self, index: int, form: AnswerForm) -> dict[str, Any]:
        text = "".join(self.text)
        logprobs = self.logprobs or None
        choice: dict[str, Any] = {"index": index}
        if form.chat:
            choice["message"] = self.message()
        else:
            choice["text"] = text
        choice |= {"logprobs": logprobs, "finish_reason": None, **self.last}
        if form.token_ids:
            choice["token_ids"] = self.token_ids
        return choice

    def message(self) -> dict[str, Any]:
        """Of a chat."""
        text = "".join(self.text)
        calls = [self.tool_calls[index] for index in sorted(self.tool_calls)]
        message: dict[str, Any] = {"role": self.role, "content": text if text or not calls else None}
        if reasoning := "".join(self.reasoning):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message


def _head(form: AnswerForm, created: int) -> dict[str, Any]:
    """The same in every event. The engine's own id is its abort handle, so clients get another."""
    return {
        "id": form.answer_id,
        "object": "chat.completion.chunk" if form.chat else "text_completion",
        "created": created,
        "model": form.model,
    }


def _with_token_ids(
    choices: list[dict[str, Any]] | None, token_ids: tuple[int, ...], chat: bool
) -> list[dict[str, Any]]:
    """Ids in the first choice; an event that the engine sent only for them becomes an empty delta."""
    if choices:
        return [{**choices[0], "token_ids": token_ids}, *choices[1:]]
    empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    return [{"index": 0, **empty, "logprobs": None, "finish_reason": None, "token_ids": token_ids}]


def _with_echo(choices: list[dict[str, Any]], echo: Echo, echoed: set[int]) -> list[dict[str, Any]]:
    """The prompt as the client sent it, in the first event of each choice."""
    shown = []
    for choice in choices:
        index = choice.get("index", 0)
        shown.append(choice if index in echoed else echo.restored(choice))
        echoed.add(index)
    return shown


def _usage(handle: RoundHandle, engine: dict[str, Any], completion_tokens: int) -> dict[str, Any]:
    """The engine's usage with our `cached_tokens`: prompt tokens that no engine computed for this round."""
    receipt = handle.receipt
    prompt = len(handle.request.prompt)
    completion = engine.get("completion_tokens", completion_tokens)
    cached = receipt.cached_tokens if receipt is not None else 0
    details = {**(engine.get("prompt_tokens_details") or {}), "cached_tokens": min(cached, prompt)}
    return {
        **engine,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }
