"""OpenAI's Responses API in terms of chat: a request's items become messages. Pure.

response_events.py goes the other way: a chat's events become a response's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from antiphon.scheduler.errors import ApiError, invalid
from antiphon.scheduler.gateway.message_checks import media_refused, string_field
from antiphon.scheduler.gateway.requests import Int64, Positive, decode_body

RESPONSES_ROUTE = "/v1/responses"

Message = dict[str, Any]


class TextConfig(msgspec.Struct, frozen=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class ConversationId(msgspec.Struct, frozen=True):
    id: str


class ResponsesBody(msgspec.Struct, kw_only=True, frozen=True):
    """What is read of POST /v1/responses; other fields are ignored. None means "not given"."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    text: TextConfig | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    prompt: Any = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    # Of the chat route, passed on as they are.
    session: Any = None
    session_id: Any = None
    priority: Any = None
    nvext: Any = None
    cache_salt: Any = None
    chat_template_kwargs: Any = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    @property
    def stored(self) -> bool:
        return self.store is not False


_PASSED = (
    "model", "temperature", "top_p", "parallel_tool_calls", "metadata", "prompt_cache_key",
    "session", "session_id", "priority", "nvext", "cache_salt", "chat_template_kwargs", "seed", "stop",
    "top_k", "min_p", "min_tokens", "ignore_eos", "frequency_penalty", "presence_penalty",
    "repetition_penalty",
)  # fmt: skip

_decoder = msgspec.json.Decoder(ResponsesBody)

LOGPROBS = "message.output_text.logprobs"
"""An `include` that asks for log probabilities."""


def parse_response_request(raw: bytes) -> ResponsesBody:
    """A checked body; raises `ApiError` (400)."""
    body: ResponsesBody = decode_body(_decoder, raw)
    if body.previous_response_id is not None and body.conversation is not None:
        raise invalid(
            "`conversation` and `previous_response_id` both say what came before: send one of them.",
            param="conversation",
        )
    for name, wrong, instead in (
        ("background", body.background, "stream the response, or wait for it"),
        ("prompt", body.prompt is not None, "send the prompt's text as `instructions` and `input`"),
        ("truncation", body.truncation == "auto", "leave out old items yourself"),
    ):
        if wrong:
            raise invalid(f"`{name}` is not supported here: {instead}.", param=name)
    if not body.input:
        raise invalid("`input` is empty.", param="input")
    return body


def new_messages(body: ResponsesBody) -> list[Message]:
    """The messages that the request's own input stands for; raises `ApiError` (400)."""
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    messages: list[Message] = []
    for index, item in enumerate(body.input):
        _add_item(messages, item, f"input[{index}]")
    return messages


def chat_request(
    body: ResponsesBody, before: Sequence[msgspec.Raw], new: Sequence[Message], session: Any
) -> dict[str, Any]:
    """The chat that answers it: `before` are the messages that the server kept, `new` those of the input.

    `session` is the chat's `session` object. Raises `ApiError` (400).
    """
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    chat: dict[str, Any] = {name: value for name in _PASSED if (value := getattr(body, name)) is not None}
    chat |= {
        "messages": [*system, *before, *new],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if session is not None:
        chat["session"] = session
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    if body.reasoning is not None and body.reasoning.effort is not None:
        chat["reasoning_effort"] = body.reasoning.effort
    if body.top_logprobs is not None or LOGPROBS in (body.include or ()):
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if (form := _response_format(body.text)) is not None:
        chat["response_format"] = form
    return chat | _tools(body)


def _tools(body: ResponsesBody) -> dict[str, Any]:
    """`tools` and `tool_choice` of the chat."""
    found: dict[str, Any] = {}
    if body.tools:
        found["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        elif kind == "allowed_tools":
            choice, found["tools"] = _allowed(choice, found.get("tools", []))
        else:
            raise invalid("`tool_choice` must name a function.", param="tool_choice")
    return found if choice is None else found | {"tool_choice": choice}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise invalid(
            f"Only tools of type `function` are supported, not {tool.get('type')!r:.60}: the model calls "
            "them and you run them.",
            param=where,
            code="tool_not_supported",
        )
    if not isinstance(tool.get("name"), str):
        raise invalid("A function tool needs a `name`.", param=f"{where}.name")
    names = ("name", "description", "parameters", "strict")
    return {
        "type": "function",
        "function": {name: tool[name] for name in names if tool.get(name) is not None},
    }


def _allowed(choice: dict[str, Any], tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """`allowed_tools`: its mode, and of the tools those that it names."""
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required") or not isinstance(allowed, list):
        raise invalid("`allowed_tools` needs a `mode` (auto or required) and `tools`.", param="tool_choice")
    names = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
    return mode, [tool for tool in tools if tool["function"]["name"] in names]


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    form = text.format if text is not None else None
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return {"type": "json_object"}
    if form.get("type") == "json_schema" and isinstance(form.get("schema"), dict):
        names = ("name", "description", "schema", "strict")
        schema = {name: form[name] for name in names if form.get(name) is not None}
        return {"type": "json_schema", "json_schema": {"name": "response", **schema}}
    raise invalid(
        "`text.format` must be of type text, json_object, or json_schema with a `schema`.",
        param="text.format",
    )


# ---------------------------------------------------------------- items


def _add_item(messages: list[Message], item: dict[str, Any], where: str) -> None:
    """Append what an item stands for; what one answer held (thoughts, text, calls) becomes one message."""
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        _add_message(messages, item, where)
    elif kind == "function_call":
        call = {
            "id": string_field(item, "call_id", where),
            "type": "function",
            "function": {
                "name": string_field(item, "name", where),
                "arguments": string_field(item, "arguments", where),
            },
        }
        message = _assistant(messages, closed=())
        message.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _content(item.get("output"), f"{where}.output")
        messages.append(
            {"role": "tool", "tool_call_id": string_field(item, "call_id", where), "content": output}
        )
    elif kind == "reasoning":
        thoughts = "".join(
            part["text"]
            for part in item.get("content") or ()
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
        if thoughts:
            _assistant(messages, closed=("content", "tool_calls"))["reasoning_content"] = thoughts
    else:
        raise _unsupported(kind, where)


def _add_message(messages: list[Message], item: dict[str, Any], where: str) -> None:
    role = item.get("role")
    content = _content(item.get("content"), f"{where}.content")
    if role == "assistant":
        message = _assistant(messages, closed=("tool_calls",))
        if "content" in message and message["content"] is not None:
            messages.append({"role": "assistant", "content": content})
        else:
            message["content"] = content
    elif role in ("user", "system", "developer"):
        messages.append({"role": role, "content": content})
    else:
        raise invalid(
            f"`role` must be user, assistant, system or developer; got {role!r:.60}.", param=f"{where}.role"
        )


def _assistant(messages: list[Message], closed: tuple[str, ...]) -> Message:
    """The assistant's message that an item belongs to: the last, unless it holds one of `closed` already."""
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]
        if not any(last.get(name) for name in closed):
            return last
    messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text of a message, or its parts as a chat's."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("A string or a list of parts is needed.", param=where)
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        place = f"{where}[{index}]"
        if kind in ("input_text", "output_text", "text"):
            parts.append(string_field(part, "text", place))
        elif kind == "refusal":
            parts.append(string_field(part, "refusal", place))
        else:
            raise _unsupported(kind, place)
    if len(parts) == 1:
        return parts[0]
    return [{"type": "text", "text": text} for text in parts]


def _unsupported(kind: Any, where: str) -> ApiError:
    if (refused := media_refused(kind, where)) is not None:
        return refused
    known = "message, function_call, function_call_output and reasoning items, and text parts"
    return invalid(f"{kind!r:.60} is not supported: {known} are.", param=where, code="item_not_supported")
