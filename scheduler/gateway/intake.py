"""A completion request on its way in: read whole, checked, made a round. Nothing else happens here.

Every check is here or in requests.py; a failed one raises `ApiError` and leaves no trace.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.answers import Calls, KeptAnswer
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import (
    ApiError,
    UserError,
    body_too_large,
    invalid,
    no_engine,
)
from antiphon.scheduler.gateway import relay, requests
from antiphon.scheduler.gateway.caller import current_caller
from antiphon.scheduler.gateway.conversations import Asked, Conversations, Spoken
from antiphon.scheduler.gateway.history import tools_of
from antiphon.scheduler.gateway.identity import Identifier, Identity, conversation_scope
from antiphon.scheduler.gateway.message_chain import Links, links
from antiphon.scheduler.gateway.prompts import (
    INLINE_CHARS,
    PromptTokenizer,
    TemplateOptions,
    TokenizerSource,
    encode_off_loop,
)
from antiphon.scheduler.gateway.requests import (
    CHAT_ROUTE,
    COMPLETION_ROUTE,
    Body,
    ChatBody,
    CompletionBody,
)
from antiphon.scheduler.gateway.retried import Retries, Tried
from antiphon.scheduler.gateway.salts import CacheSalts
from antiphon.scheduler.gateway.session_fields import read_said
from antiphon.scheduler.hints import Hints, Slos, targets
from antiphon.scheduler.models import ONLY, Model, Models
from antiphon.scheduler.rounds import RoundHandle, RoundRequest

log = logging.getLogger(__name__)

DRAIN_FACTOR = 4
"""Of a body over the limit this many limits are read and dropped, so that the client gets to see the 413."""


class FleetModel(Protocol):
    """What the fleet says of the models that it serves; `model` is a `Model.key`."""

    def model_ids(self, model: str = ONLY) -> tuple[str, ...]:
        """Model ids by the engines' hellos; empty while none is known."""

    def context_tokens(self, model: str = ONLY) -> int:
        """The smallest window of the live engines; 0 = unknown."""


class ClientGone(Exception):
    """The client closed its connection."""


def served_models(models: Models, fleet: FleetModel) -> dict[str, Model]:
    """Models by the names that clients may call them; empty while none is known."""
    return {name: model for model in models for name in models.names(model, fleet.model_ids(model.key))}


class _Shape(msgspec.Struct, frozen=True):
    """Of a body for either route: what tells them apart."""

    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_shape_decoder = msgspec.json.Decoder(_Shape)


def endpoint_of(raw: bytes) -> str:
    """The route that a body is for, by its shape; raises `ApiError` (400) if it has none or both of them."""
    try:
        shape = _shape_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"The body is not a JSON object: {error}", code="invalid_json") from error
    chat, text = shape.messages is not msgspec.UNSET, shape.prompt is not msgspec.UNSET
    if chat == text:
        both = "The body has `messages` and `prompt`: it must be for one of both."
        neither = f"`messages` (as for {CHAT_ROUTE}) or `prompt` (as for {COMPLETION_ROUTE}) is required."
        raise invalid(both if chat else neither, param="prompt" if chat else "messages")
    return CHAT_ROUTE if chat else COMPLETION_ROUTE


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that may run: its round, how the client wants the answer, and where its targets come from."""

    request: RoundRequest
    form: relay.AnswerForm
    targets: Slos
    spoken: Spoken | None = None
    """Of a chat: what its prompt was made of."""
    kept: KeptAnswer | None = None
    """It was asked before, and this was the answer."""


class Intake:
    """Makes rounds of requests, for the model that the fleet serves."""

    def __init__(
        self,
        tokenizers: TokenizerSource,
        config: Config,
        fleet: FleetModel,
        salts: CacheSalts,
        identifier: Identifier,
        conversations: Conversations | None = None,
        calls: Calls | None = None,
    ) -> None:
        self.retries = Retries(calls)
        self.conversations = conversations or Conversations()
        self._salts = salts
        self._identifier = identifier
        self._tokenizers = tokenizers
        self._config = config
        self._fleet = fleet
        self._models = Models(config)

    async def body(self, receive: Receive, headers: Headers) -> bytes:
        """The whole body; raises as `read_body`."""
        limits = self._config.gateway
        own_bytes = current_caller().limits.body_bytes or limits.body_limit_bytes
        limit_bytes = min(own_bytes, limits.body_limit_bytes)
        return await read_body(receive, headers, limit_bytes, limits.body_deadline_s)

    async def check(
        self, route: str, raw: bytes, headers: Headers, round_id: str, append_to: str | None = None
    ) -> Checked:
        """All checks of a body for `route` (CHAT_ROUTE or COMPLETION_ROUTE); raises `ApiError`.

        `append_to`: the session to which the messages are added, as the path names it.
        """
        body, prompt = _parsed(route, raw, append=append_to is not None)
        said, tenant = read_said(headers, body), current_caller().tenant
        hints = said.hints
        model = self.model(body.model)
        append = append_to is not None or hints.append
        conversation = None  # some new messages tell nothing of a conversation
        if isinstance(body, ChatBody) and not append:
            conversation = partial(_conversation, tenant, model.key, body)
        identity = await self._identifier.identify(
            said.headers, said.signals, tenant, hints.final, conversation, path_id=append_to
        )
        tried = await self.retries.tried(said.headers, tenant)
        identity = tried.identity(identity)
        if hints.must_exist and not append and tried.known is None:
            await self._identifier.must_be_open(identity)
        tokenizer = await self.tokenizer(model)
        spoken = None
        if isinstance(body, ChatBody):
            body, spoken = await self._speak(
                tokenizer, body, identity, hints, model, append=append, tried=tried
            )
            ids = spoken.prompt
        else:
            ids = await _text_prompt(tokenizer, prompt)
        limit = requests.output_limit(body, len(ids), self.window_tokens(tokenizer, model))
        scheduler = self._config.scheduler
        slos = targets(hints, Slos(scheduler.slo_ttft_s, scheduler.slo_itl_s))
        fields = requests.engine_fields(body, limit)
        form = _form(body, round_id, identity.identified_by, hints.warnings)
        call = tried.call(route, model.key, identity, body, ids, form, fields, append=append)
        answer = tried.answer(call, spoken.base if append and spoken is not None else None)
        request = RoundRequest(
            round_id=round_id,
            session_id=identity.session_id,
            tenant=tenant,
            path=route,
            prompt=ids,
            served_tokens=spoken.served_tokens if spoken is not None else 0,
            body=fields,
            max_output_tokens=limit,
            slo_ttft_s=slos.ttft_s,
            slo_itl_s=slos.itl_s,
            cache_salt=self._salts.of(tenant, body.cache_salt),
            tool=requests.tool_answered(body),
            parent_id=identity.parent_id,
            final=identity.final,
            model=model.key,
            hints=hints,
            call=call,
        )
        if isinstance(body, CompletionBody) and body.echo and isinstance(prompt, str):
            form = replace(form, echo=await _echo(tokenizer, ids, prompt))
        return Checked(request, form, slos, spoken, answer)

    async def keep(self, checked: Checked, handle: RoundHandle, message: dict[str, Any]) -> tuple[str, ...]:
        """Remember a chat's round that ended with this message; warnings for the client."""
        if checked.spoken is None:
            return ()
        return await self.conversations.keep(checked.spoken, handle, message, handle.expires_in_s)

    async def _speak(
        self,
        tokenizer: PromptTokenizer,
        body: ChatBody,
        identity: Identity,
        hints: Hints,
        model: Model,
        *,
        append: bool,
        tried: Tried,
    ) -> tuple[ChatBody, Spoken]:
        """The prompt of a chat; an append's body gets the tools of the round before, if it brings none.

        `tried`: what is known of tries before this one.
        """
        base = None
        if append:
            base = await self.conversations.base(
                identity.tenant,
                identity.session_id,
                must_exist=hints.must_exist,
                after_round=hints.after_round,
                before=partial(tried.base, messages=body.messages, after_round=hints.after_round),
                opens=body.messages[0]["role"] not in ("assistant", "tool", "function"),
            )
            if body.tools is None and (tools := tools_of(base.options)):
                body = msgspec.structs.replace(body, tools=tools)
            requests.check_tool_choice(body)
        options = TemplateOptions(
            requests.template_tools(body),
            requests.template_kwargs(body),
            continue_final_message=bool(body.continue_final_message),
        )
        asked = Asked(
            tenant=identity.tenant,
            identity=identity,
            messages=body.messages,
            tools=body.tools,
            options=options,
            model=body.model,
            scope=conversation_scope(identity.tenant, model.key, body.prompt_cache_key),
        )
        spoken = await self.conversations.prompt(tokenizer, asked, base)
        if not spoken.prompt:
            raise invalid("The prompt has no tokens.", param="messages")
        requests.check_token_ids(spoken.plan.ids, tokenizer.vocabulary_tokens)
        return body, spoken

    def model(self, name: str) -> Model:
        """The model that a client calls so; raises `ApiError` (404, or 503 while none is known)."""
        served = served_models(self._models, self._fleet)
        if not served:
            raise no_engine("No engine has told its model yet; try again when one is up.")
        if name not in served:
            raise requests.unknown_model(name, tuple(served))
        return served[name]

    def only_model(self) -> str | None:
        """A name of the model, if there is but one; raises `ApiError` (503) while none is known."""
        served = served_models(self._models, self._fleet)
        if not served:
            raise no_engine("No engine has told its model yet; try again when one is up.")
        return next(iter(served)) if len({model.key for model in served.values()}) == 1 else None

    async def tokenizer(self, model: Model) -> PromptTokenizer:
        """Raises `ApiError` (503) while no engine has told of the model, or if its files are unusable."""
        try:
            return await self._tokenizers.get(model.key)
        except UserError as error:
            raise _unusable_model(str(error)) from error

    def window_tokens(self, tokenizer: PromptTokenizer, model: Model) -> int:
        """How long prompt and answer may be together; raises `ApiError` (503) if nothing says it."""
        said = self._fleet.context_tokens(model.key), tokenizer.context_tokens
        known = [tokens for tokens in said if tokens > 0]
        if not known:
            raise _unusable_model("The model's window is unknown: its config.json does not say it.")
        return min(known)


async def read_body(receive: Receive, headers: Headers, limit_bytes: int, deadline_s: float) -> bytes:
    """The whole body; raises `ApiError` (413 over the limit, 408 past the deadline) or `ClientGone`."""
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes * DRAIN_FACTOR:
        raise body_too_large(limit_bytes)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece: bytes = message.get("body", b"")
                size += len(piece)
                if size <= limit_bytes:
                    pieces.append(piece)
                if not message.get("more_body", False) or size > limit_bytes * DRAIN_FACTOR:
                    break
    except TimeoutError as error:
        raise ApiError(408, "body_timeout", f"The body did not come within {deadline_s:g} s.") from error
    if size > limit_bytes:
        raise body_too_large(limit_bytes)
    return b"".join(pieces)


def _parsed(route: str, raw: bytes, *, append: bool) -> tuple[Body, str | tuple[int, ...] | None]:
    """The body, and a completion's prompt."""
    if route == CHAT_ROUTE:
        return requests.parse_chat(raw, append=append), None
    return requests.parse_completion(raw)


async def _text_prompt(tokenizer: PromptTokenizer, prompt: str | tuple[int, ...] | None) -> Prompt:
    """Of a completion."""
    if isinstance(prompt, str):
        text = prompt
        ids = await encode_off_loop(lambda: tokenizer.encode_text(text), len(text))
    else:
        ids = prompt or ()
    if not ids:
        raise invalid("The prompt has no tokens.", param="prompt")
    requests.check_token_ids(ids, tokenizer.vocabulary_tokens)
    return Prompt(ids)


async def _echo(tokenizer: PromptTokenizer, ids: Prompt, sent: str) -> relay.Echo | None:
    """Of a prompt that came as text; None if the engine repeats it as it is."""
    decode = partial(tokenizer.decode, ids, skip_special_tokens=True)
    shown = decode() if len(sent) <= INLINE_CHARS else await asyncio.to_thread(decode)
    return relay.Echo(shown, sent) if shown != sent else None


def _conversation(tenant: str, model: str, body: ChatBody) -> tuple[str, Links]:
    """Within what the conversation is one of many, and what is to be known of it."""
    return conversation_scope(tenant, model, body.prompt_cache_key), links(body.messages, body.tools)


def _form(body: Body, round_id: str, identified_by: str, warnings: tuple[str, ...] = ()) -> relay.AnswerForm:
    chat, stream = isinstance(body, ChatBody), bool(body.stream)
    asked_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return relay.AnswerForm(
        chat=chat,
        model=body.model,
        answer_id=f"{'chatcmpl' if chat else 'cmpl'}-{round_id}",
        stream=stream,
        include_usage=asked_usage or not stream,
        token_ids=bool(body.return_token_ids),
        identified_by=identified_by,
        warnings=warnings,
        logprobs=isinstance(body, ChatBody) and bool(body.logprobs),
    )


def _unusable_model(message: str) -> ApiError:
    log.error("model unusable", extra={"reason": message})
    return ApiError(503, "model_unavailable", message, kind="server_error", retry_after_s=5.0)
