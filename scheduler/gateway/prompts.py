"""Prompts to token ids: the model's own tokenizer and chat template, without torch or transformers.

`PromptTokenizer` gives the ids that `transformers`' `apply_chat_template` gives, so that the scheduler can
name KV pages before an engine has seen the prompt. It only reads files of the model's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from antiphon.scheduler.errors import UserError, invalid, no_engine
from antiphon.scheduler.gateway.templates import ChatTemplate, Pieces
from antiphon.scheduler.models import ONLY

INLINE_CHARS = 4096
"""A longer prompt is tokenised in a thread: the event loop must not stall for one client's history."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What besides the messages goes into a chat template."""

    tools: Sequence[Mapping[str, Any]] | None = None
    kwargs: Mapping[str, Any] | None = None
    """Template variables of the client (`chat_template_kwargs`, `reasoning_effort`)."""
    continue_final_message: bool = False
    """The last message is the beginning of the answer."""


class PromptTokenizer:
    """One model's tokenizer, chat template and window; safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        """Read `tokenizer.json` and what stands beside it; raises `UserError` naming the file at fault."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{model_dir}: no tokenizer.json there; set [model] path to a model directory")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _read_json(model_dir / "tokenizer_config.json")
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._special = _special_tokens(_read_json(model_dir / "special_tokens_map.json") | settings)
        sources = _template_sources(model_dir, settings)
        self._templates = _compile_templates(model_dir, sources)
        shaping = json.dumps([self._special, sources], sort_keys=True).encode()
        self.fingerprint = hashlib.blake2b(path.read_bytes() + shaping, digest_size=16).digest()
        """Of all that makes ids of messages: ids of another tokenizer mean something else, and a conversation
        that another template began cannot be added to."""
        model = _read_json(model_dir / "config.json")
        text = model.get("text_config") or model
        self.vocabulary_tokens = int(text.get("vocab_size") or self._tokenizer.get_vocab_size())
        self.context_tokens = int(text.get("max_position_embeddings") or 0)
        """The model's window by its own files; 0 = not said there."""
        generation = _read_json(model_dir / "generation_config.json")
        self.eos_ids = _eos_ids(model, generation, self._tokenizer, self._special.get("eos_token"))
        """Any of them ends an answer."""

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Ids of a bare prompt, with the special tokens that the model puts around it."""
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, messages: Sequence[Message], options: TemplateOptions) -> tuple[int, ...]:
        """Ids of a conversation up to where the answer begins; `ApiError` (400) if the template refuses."""
        return self.encode_rendered(self.render(messages, options))

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Ids of a conversation's text: it has its special tokens already."""
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @property
    def eos_text(self) -> str:
        """What ends an answer, as text; "" if the model's files do not say."""
        return self._special.get("eos_token", "")

    def decode_after(self, before: int, token_ids: Sequence[int]) -> str | None:
        """Text of ids as they stand behind another one: some tokenizers drop a space that comes first. None
        if they have none by themselves."""
        lead, whole = self.decode([before]), self.decode([before, *token_ids])
        return whole[len(lead) :] if whole.startswith(lead) else None

    def encode_more(self, text: str, before: int) -> tuple[int, ...] | None:
        """Ids of text that is to stand behind other ids, `before` the last of these; None if they would not
        mean just this text there.

        An added token parts the text: what is behind it has the ids that it has in the whole. Elsewhere a
        tokenizer may show the beginning of a text by what would be a space in its midst.
        """
        if before in self._added:
            first, *ids = self._encode(self.decode([before]) + text, add_special_tokens=False)
            if first == before:
                return tuple(ids)
        more = self._encode(text, add_special_tokens=False)
        parted = bool(more) and more[0] in self._added
        return more if parted or self.decode_after(before, more) == text else None

    def why_whole(self, options: TemplateOptions) -> str:
        """Why conversations must be rendered whole each time; "" if they need not be."""
        return self._template(bool(options.tools)).why_whole

    def render_pieces(
        self, first: Sequence[Message], window: Sequence[Message], options: TemplateOptions
    ) -> Pieces | None:
        """Texts of the last messages of a conversation, by themselves (`ChatTemplate.pieces`).

        `first` are the conversation's first FIRST_MESSAGES messages. None = render it whole.
        """
        if options.continue_final_message:
            return None
        chat = [_for_template(message) for message in window]
        variables = self._variables([_for_template(message) for message in first], options)
        with _refusals():
            return self._template(bool(options.tools)).pieces(variables, chat)

    def render(self, messages: Sequence[Message], options: TemplateOptions, *, ask: bool = True) -> str:
        """The conversation as text; with what begins the answer, if `ask`."""
        chat = [_for_template(message) for message in messages]
        prefix = ""
        if options.continue_final_message:
            if chat[-1]["role"] != "assistant":
                raise invalid(
                    "`continue_final_message` needs a last message of the assistant.", param="messages"
                )
            prefix = chat.pop()["content"]
        variables = self._variables(chat, options) | {"add_generation_prompt": ask}
        with _refusals():
            return self._template(bool(options.tools)).render(variables) + prefix

    def _variables(self, chat: list[dict[str, Any]], options: TemplateOptions) -> dict[str, Any]:
        return {
            **self._special,
            **(options.kwargs or {}),
            "messages": chat,
            "tools": list(options.tools) if options.tools else None,
            "documents": None,
            "add_generation_prompt": True,
        }

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # `encode` would hold the GIL all the time and take four times as long (it works out offsets).
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def _template(self, with_tools: bool) -> ChatTemplate:
        template = self._templates.get("tool_use") if with_tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise invalid("This model has no chat template: use /v1/completions.", code="no_chat_template")
        return template


Locate = Callable[[], str | None]
"""Names a model (directory or hub id), or None while no engine has told it."""


class TokenizerSource:
    """The tokenizers of the fleet's models, each loaded when its model is first known. For one event loop."""

    def __init__(self, locate: Locate | Mapping[str, Locate]) -> None:
        """`locate`: of the only model, or of several by `Model.key`."""
        self._locate = {ONLY: locate} if callable(locate) else dict(locate)
        self._lock = asyncio.Lock()
        self._tokenizers: dict[str, PromptTokenizer] = {}

    async def get(self, model: str = ONLY) -> PromptTokenizer:
        """Of the model with that key; a wrong one, or none where there are several, raises KeyError.

        Raises `ApiError` (503) while the model is not known, `UserError` if its files are unusable.
        """
        if model in self._tokenizers:
            return self._tokenizers[model]
        locate = self._locate[model]
        async with self._lock:
            if model not in self._tokenizers:
                path = locate()
                if path is None:
                    raise no_engine("No engine has told its model yet, and [model] path is not set.")
                self._tokenizers[model] = await asyncio.to_thread(
                    lambda: PromptTokenizer(model_directory(path))
                )
        return self._tokenizers[model]


def model_directory(model: str) -> Path:
    """A directory as it is; a hub id by its local cache (nothing is downloaded). Raises `UserError`."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "tokenizer.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    raise UserError(
        f"model {model!r} is no directory and not in the local hub cache; set [model] path to its directory"
    )


async def encode_off_loop(encode: Callable[[], tuple[int, ...]], chars: int) -> tuple[int, ...]:
    """Run a tokenisation here if it is short, else in a thread."""
    return encode() if chars <= INLINE_CHARS else await asyncio.to_thread(encode)


def content_chars(messages: Sequence[Message]) -> int:
    """About how much text the messages hold; parts and tool calls are guessed by count."""
    return sum(
        len(content) if isinstance(content := message.get("content"), str) else INLINE_CHARS
        for message in messages
    )


def content_text(content: Any) -> str:
    """Of a message, as templates are given it."""
    return content or "" if isinstance(content, str | None) else " ".join(part["text"] for part in content)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A template is foreign code that the client's messages drive: what it raises is the client's 400."""
    try:
        yield
    except Exception as error:
        raise invalid(
            f"The model's chat template refuses these messages: {error}",
            param="messages",
            code="chat_template_error",
        ) from error


def _eos_ids(
    model: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer, named: str | None
) -> frozenset[int]:
    """By all files that name one: a number, a list of them, or the token's text."""
    found: set[int] = set()
    for value in (model.get("eos_token_id"), generation.get("eos_token_id")):
        found.update(item for item in (value if isinstance(value, list) else [value]) if type(item) is int)
    if named is not None and (named_id := tokenizer.token_to_id(named)) is not None:
        found.add(named_id)
    return frozenset(found)


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text content, no nulls, tool arguments parsed (as SGLang does)."""
    plain = {name: value for name, value in message.items() if value is not None}
    plain["content"] = content_text(plain.get("content"))
    if "tool_calls" in plain:
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in plain["tool_calls"]]
    return plain


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            parsed = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            parsed = None  # what a model wrote wrongly stays text: refusing it would end the conversation
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object")
    return content


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... as text; the files hold a string or an object with `content`."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _template_sources(model_dir: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name."""
    file = model_dir / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):
        return {item["name"]: item["template"] for item in source if item["template"]}
    return {"default": source} if source else {}


def _compile_templates(model_dir: Path, sources: Mapping[str, str]) -> dict[str, ChatTemplate]:
    environment = _environment()
    try:
        return {name: ChatTemplate(environment, text) for name, text in sources.items()}
    except jinja2.TemplateError as error:
        raise UserError(f"{model_dir}: the chat template does not compile: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only passes it on."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Jinja as transformers sets it up: sandboxed, blocks trimmed, plain JSON, two helper functions."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
