"""Anthropic's Messages API in terms of chat: blocks become a chat's messages. Pure.

message_events.py goes the other way. What an engine has no use for (`cache_control`, thoughts of earlier
answers, beta flags) is taken and left out.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from antiphon.scheduler.errors import ApiError, invalid
from antiphon.scheduler.gateway.message_checks import media_refused, string_field
from antiphon.scheduler.gateway.requests import Int64, Positive, decode_body

MESSAGES_ROUTE = "/v1/messages"
COUNT_ROUTE = "/v1/messages/count_tokens"

Message = dict[str, Any]
Block = dict[str, Any]

_IGNORED = ("thinking", "redacted_thinking")
"""Blocks of an assistant's message that its successor does not get to see."""


class CountBody(msgspec.Struct, kw_only=True, frozen=True):
    """What is read of both routes; other fields are ignored. None means "not given"."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    # Of the chat route, passed on as they are.
    session: Any = None
    session_id: Any = None
    priority: Any = None
    nvext: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesBody(CountBody, kw_only=True, frozen=True):
    """POST /v1/messages."""

    max_tokens: Positive
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Int64 | None = None
    metadata: dict[str, Any] | None = None
    seed: Int64 | None = None
    ignore_eos: bool | None = None


_messages_decoder = msgspec.json.Decoder(MessagesBody)
_count_decoder = msgspec.json.Decoder(CountBody)
_PASSED = (
    "model", "session", "session_id", "priority", "nvext", "temperature", "top_p", "top_k", "metadata",
    "seed", "ignore_eos",
)  # fmt: skip


def parse_messages_request(raw: bytes) -> MessagesBody:
    """A body of proper types; raises `ApiError` (400)."""
    body: MessagesBody = decode_body(_messages_decoder, raw)
    if isinstance(body.session, dict) and body.session.get("append"):
        raise invalid(
            "`session.append` is of chats: a `system` would be said again in each round.",
            param="session.append",
        )
    return body


def parse_count_request(raw: bytes) -> CountBody:
    """The same of /v1/messages/count_tokens."""
    body: CountBody = decode_body(_count_decoder, raw)
    return body


def chat_request(body: CountBody) -> dict[str, Any]:
    """The chat that answers it; raises `ApiError` (400)."""
    messages = _system(body.system)
    for index, message in enumerate(body.messages):
        _add_message(messages, message, f"messages[{index}]")
    chat: dict[str, Any] = {
        name: value for name in _PASSED if (value := getattr(body, name, None)) is not None
    }
    chat |= {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    if isinstance(body, MessagesBody):
        chat["max_completion_tokens"] = body.max_tokens
        if body.stop_sequences:
            chat["stop"] = body.stop_sequences
    if messages and messages[-1]["role"] == "assistant":
        if messages[-1].get("tool_calls"):
            raise invalid("A `tool_use` needs its `tool_result` in a message after it.", param="messages")
        chat["continue_final_message"] = True
    variables = _thinking(body.thinking) | (body.chat_template_kwargs or {})
    if variables:
        chat["chat_template_kwargs"] = variables
    return chat | _output(body.output_config) | _tools(body)


def _system(system: str | list[Block] | None) -> list[Message]:
    text = _text_of(system, "system") if system else ""
    return [{"role": "system", "content": text}] if text else []


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    """Variables of the template, as SGLang sets them; a budget of tokens cannot be kept."""
    if thinking is None:
        return {}
    wanted = thinking.get("type") != "disabled"
    return {"thinking": wanted, "enable_thinking": wanted}


def _output(config: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    config = config or {}
    if config.get("effort") is not None:
        found["reasoning_effort"] = config["effort"]
    form = config.get("format")
    if form is not None:
        if not isinstance(form, dict) or not isinstance(form.get("schema"), dict):
            raise invalid("`output_config.format` needs a `schema`.", param="output_config.format")
        schema = {"name": "response", "schema": form["schema"], "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


def _tools(body: CountBody) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if body.tools:
        found["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if choice is None:
        return found
    kind = choice.get("type")
    if kind == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in ("auto", "any", "none"):
        found["tool_choice"] = "required" if kind == "any" else kind
    else:
        raise invalid("`tool_choice.type` must be auto, any, tool or none.", param="tool_choice.type")
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _tool(tool: Block, where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise invalid(
            f"Only tools of your own are supported, not {tool['type']!r:.60}: nothing here would run it.",
            param=where,
            code="tool_not_supported",
        )
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
        raise invalid("A tool needs a `name` and an `input_schema`.", param=where)
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function}


# ---------------------------------------------------------------- messages


def _add_message(messages: list[Message], message: Block, where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"`role` must be user, assistant or system; got {role!r:.60}.", param=f"{where}.role")
    if role == "assistant":
        messages.append(_assistant(content, f"{where}.content"))
    elif role == "system":
        messages.append({"role": "system", "content": _text_of(content, f"{where}.content")})
    else:
        _add_user(messages, content, f"{where}.content")


def _assistant(content: Any, where: str) -> Message:
    """One message of text and calls; text after a call cannot keep its place."""
    texts, calls = [], []
    for block, place in _blocks(content, where):
        kind = block.get("type")
        if kind == "text":
            texts.append(string_field(block, "text", place))
        elif kind == "tool_use":
            arguments = msgspec.json.encode(block.get("input") or {}).decode()
            function = {"name": string_field(block, "name", place), "arguments": arguments}
            calls.append({"id": string_field(block, "id", place), "type": "function", "function": function})
        elif kind not in _IGNORED:
            raise _unsupported(kind, place)
    text = "".join(texts)
    message: Message = {"role": "assistant", "content": text if text or not calls else None}
    return message | ({"tool_calls": calls} if calls else {})


def _add_user(messages: list[Message], content: Any, where: str) -> None:
    """Results of tools are messages of their own; the order of blocks stays."""
    texts: list[str] = []
    results = 0
    for block, place in _blocks(content, where):
        kind = block.get("type")
        if kind == "text":
            texts.append(string_field(block, "text", place))
        elif kind == "tool_result":
            results += 1
            _flush(messages, texts)
            text = _text_of(block.get("content") or "", f"{place}.content")
            call_id = string_field(block, "tool_use_id", place)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            raise _unsupported(kind, place)
    if texts or not results:
        _flush(messages, texts or [""])


def _flush(messages: list[Message], texts: list[str]) -> None:
    if texts:
        parts = [{"type": "text", "text": text} for text in texts]
        messages.append({"role": "user", "content": texts[0] if len(texts) == 1 else parts})
        texts.clear()


def _text_of(content: Any, where: str) -> str:
    """Text, or text blocks joined by line ends."""
    if isinstance(content, str):
        return content
    texts = []
    for block, place in _blocks(content, where):
        if block.get("type") != "text":
            raise _unsupported(block.get("type"), place)
        texts.append(string_field(block, "text", place))
    return "\n".join(texts)


def _blocks(content: Any, where: str) -> list[tuple[Block, str]]:
    """Blocks of a content with their places; a string is one of text."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid("A string or a list of blocks is needed.", param=where)
    return [(block, f"{where}[{index}]") for index, block in enumerate(content)]


def _unsupported(kind: Any, where: str) -> ApiError:
    if (refused := media_refused(kind, where)) is not None:
        return refused
    known = "text, tool_use and tool_result blocks"
    return invalid(
        f"{kind!r:.60} is not supported here: {known} are.", param=where, code="block_not_supported"
    )
