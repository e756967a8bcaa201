"""What clients may send to the completion routes: parsing and checks, before anything else happens.

The structs list every field that we read or pass on; what is not listed is ignored, as SGLang ignores it. So
a client can never reach an engine's own routing fields (`rid`, `bootstrap_host`, `extra_key`, ...).
A failed check raises `ApiError` with the field in `param` and leaves no trace.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from antiphon.scheduler.errors import ApiError, context_length_exceeded, invalid, model_not_found
from antiphon.scheduler.gateway.message_checks import check_messages

CHAT_ROUTE = "/v1/chat/completions"
COMPLETION_ROUTE = "/v1/completions"

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` on /v1/completions; on the chat route it is what the window leaves."""

MAX_CHOICES = 128
"""Of `n`: OpenAI's own limit."""

MAX_TOOL_CHARS = 64
"""Of a tool's name, where one is written down: OpenAI's own limit."""

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Body(msgspec.Struct, kw_only=True, frozen=True):
    """Fields of both routes. None means "not given": clients send null for that."""

    model: str
    max_tokens: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    session: dict[str, Any] | None = None
    session_id: str | None = None
    litellm_session_id: Any = None
    program_id: Any = None
    metadata: Any = None
    nvext: Any = None
    prompt_cache_key: Any = None
    priority: Int64 | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    extra_key: Any = None
    lora_path: Any = None
    # Passed to the engine as they are.
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Int64 | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_tokens: Count | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    stop_regex: str | list[str] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    custom_params: dict[str, Any] | None = None


class ChatBody(Body, kw_only=True, frozen=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Positive | None = None
    modalities: list[str] | None = None
    audio: Any = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | float | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None


class CompletionBody(Body, kw_only=True, frozen=True):
    prompt: Any
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    json_schema: str | None = None


# Ours alone: read here, never sent to an engine. `model` too: an engine would take "a:b" for an adapter.
_OURS = frozenset({
    "model", "prompt", "max_tokens", "max_completion_tokens", "stream", "stream_options", "best_of",
    "session", "session_id", "litellm_session_id", "program_id", "metadata", "nvext", "prompt_cache_key",
    "priority", "return_token_ids", "cache_salt", "extra_key", "lora_path", "suffix", "modalities", "audio",
    "continue_final_message",
})  # fmt: skip

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_AT_PATH = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>\w+)`")


def parse_chat(raw: bytes, *, append: bool = False) -> ChatBody:
    """A checked chat body; raises `ApiError` (400). An append may choose among tools that it does not bring:
    then `check_tool_choice` is left to do."""
    body: ChatBody = decode_body(_chat_decoder, raw)
    _check_common(body)
    check_messages(body.messages)
    for name, asked in (
        ("audio", body.audio is not None),
        ("modalities", set(body.modalities or ()) - {"text"}),
    ):
        if asked:
            raise invalid(
                f"`{name}`: answers are text only. Leave it out.", param=name, code="media_not_supported"
            )
    for index, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid("A tool needs a `function` with a `name`.", param=f"tools[{index}]")
    if body.tools is not None or not (append or (body.session or {}).get("append")):
        check_tool_choice(body)
    return body


def parse_completion(raw: bytes) -> tuple[CompletionBody, str | tuple[int, ...]]:
    """A checked completion body and its one prompt, text or token ids; raises `ApiError` (400)."""
    body: CompletionBody = decode_body(_completion_decoder, raw)
    _check_common(body)
    if body.suffix is not None:
        raise invalid("`suffix` is not supported.", param="suffix")
    return body, _one_prompt(body.prompt)


def unknown_model(model: str, served: tuple[str, ...]) -> ApiError:
    """Why `model` cannot be had: 404, or 400 for "model:adapter" on a model that is served."""
    base, colon, _ = model.rpartition(":")
    if colon and base in served:
        return invalid(
            f"{model!r} names an adapter, and adapters are not served: use {base!r}, or merge the adapter "
            "into a checkpoint and start an engine on that.",
            param="model",
            code="adapters_not_supported",
        )
    return model_not_found(model, served)


def output_limit(body: Body, prompt_tokens: int, window_tokens: int) -> int:
    """How many tokens may be generated: what was asked for, but never more than the window leaves.

    Raises `ApiError` (400, context_length_exceeded) when the prompt leaves nothing; a `max_tokens` that is
    too large is cut, not refused: agents send the same one in every round.
    """
    chat = isinstance(body, ChatBody)
    left = window_tokens - prompt_tokens
    if left < 1:
        raise context_length_exceeded(prompt_tokens, window_tokens, "messages" if chat else "prompt")
    asked = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        asked = body.max_completion_tokens
    if asked is None:
        asked = left if chat else DEFAULT_COMPLETION_TOKENS
    if body.min_tokens is not None and body.min_tokens > asked:
        raise invalid(
            f"`min_tokens` is {body.min_tokens}, over the {asked} tokens that may be generated.",
            param="min_tokens",
        )
    return min(asked, left)


def engine_fields(body: Body, max_output_tokens: int) -> dict[str, Any]:
    """The fields that go to the engine: what the client gave, less what is ours, with the limit resolved."""
    fields = {
        name: value
        for name in body.__struct_fields__
        if name not in _OURS and (value := getattr(body, name)) is not None
    }
    fields["max_tokens"] = max_output_tokens
    if "min_tokens" in fields:
        fields["min_tokens"] = min(fields["min_tokens"], max_output_tokens)
    return fields


def tool_answered(body: Body) -> str:
    """Name of the tool whose result the last message brings; "" if it brings none, or does not say."""
    if not isinstance(body, ChatBody) or body.messages[-1]["role"] not in ("tool", "function"):
        return ""
    last = body.messages[-1]
    names = [last.get("name")] + [
        call["function"].get("name")
        for message in body.messages
        for call in message.get("tool_calls") or ()
        if call.get("id") is not None and call.get("id") == last.get("tool_call_id")
    ]
    return next((name[:MAX_TOOL_CHARS] for name in names if isinstance(name, str)), "")


def template_tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """The tools that the prompt shows: none for `tool_choice` "none", one for a named choice."""
    if not body.tools or body.tool_choice == "none":
        return None
    if isinstance(body.tool_choice, dict):
        name = body.tool_choice["function"]["name"]
        return [tool for tool in body.tools if tool["function"]["name"] == name]
    return body.tools


def template_kwargs(body: ChatBody) -> dict[str, Any]:
    """Template variables: the client's own, and what `reasoning_effort` stands for (as SGLang has it)."""
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        thinks = body.reasoning_effort != "none"
        variables = {"reasoning_effort": body.reasoning_effort, "thinking": thinks, "enable_thinking": thinks}
    return variables | (body.chat_template_kwargs or {})


def check_token_ids(ids: Sequence[int], vocabulary_tokens: int, param: str = "prompt") -> None:
    """Raises `ApiError` (400) for an id that the model has no embedding for."""
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0 or highest >= vocabulary_tokens:
        wrong = lowest if lowest < 0 else highest
        raise invalid(
            f"Token id {wrong} at position {ids.index(wrong)}: the vocabulary has {vocabulary_tokens}.",
            param=param,
            code="invalid_token_id",
        )


def decode_body(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise invalid("The body is nested too deeply.", code="invalid_json") from error


def _validation_error(text: str) -> ApiError:
    found = _AT_PATH.match(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    if missing := _MISSING.search(what):
        path = f"{path}.{missing['field']}" if path else missing["field"]
        return invalid(f"The field `{path}` is required.", param=path)
    where = f"`{path}`" if path else "the body"
    return invalid(f"Wrong value for {where}: {what[:1].lower()}{what[1:]}.", param=path or None)


def _check_common(body: Body) -> None:
    choices = body.n or 1
    if body.best_of not in (None, choices):
        raise invalid(f"`best_of` must be {choices}, as `n` is, or left out.", param="best_of")
    if choices > 1 and body.return_token_ids:
        raise invalid("`return_token_ids` tells of one choice: leave out `n`.", param="return_token_ids")
    if body.lora_path is not None:
        raise invalid(
            "`lora_path` is not supported: adapters are not served. Merge the adapter into a checkpoint and "
            "start an engine on that.",
            param="lora_path",
            code="adapters_not_supported",
        )
    if body.extra_key is not None:
        raise invalid(
            "`extra_key` is not supported: use `cache_salt` to keep caches apart.", param="extra_key"
        )
    if body.cache_salt == "":
        raise invalid("`cache_salt` must not be empty: leave it out instead.", param="cache_salt")
    patterns = [body.stop_regex] if isinstance(body.stop_regex, str) else body.stop_regex or []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise invalid(f"`stop_regex` is not a regular expression: {error}", param="stop_regex") from error


def check_tool_choice(body: ChatBody) -> None:
    """Raises `ApiError` (400) for a choice that is not among the tools."""
    choice = body.tool_choice
    if choice is None or choice in ("auto", "none"):
        return
    names = [tool["function"]["name"] for tool in body.tools or ()]
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in names:
            raise invalid(f"`tool_choice` names {name!r:.60}, which is not in `tools`.", param="tool_choice")
    elif choice != "required":
        raise invalid("`tool_choice` must be auto, none, required or a function.", param="tool_choice")
    elif not names:
        raise invalid("`tool_choice` is required, but there are no `tools`.", param="tool_choice")


def _one_prompt(prompt: Any) -> str | tuple[int, ...]:
    """Text or ids, bare or as the only element of a list; raises `ApiError`."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise invalid(
                f"`prompt` holds {len(prompt)} prompts: send one per request.",
                param="prompt",
                code="several_prompts",
            )
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token_id) is int for token_id in prompt):
        return tuple(prompt)
    if prompt in ("", []):
        raise invalid("`prompt` is empty.", param="prompt")
    raise invalid("`prompt` must be a string or a list of token ids.", param="prompt")
