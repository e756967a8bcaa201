"""A completion request on its way in: read whole, checked, made a round. Nothing else happens here.

Every check is here or in requests.py; a failed one raises `ApiError` and leaves no trace.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive

from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import (
    ApiError,
    UserError,
    body_too_large,
    invalid,
    model_not_found,
    no_engine,
)
from antiphon.scheduler.gateway import relay, requests
from antiphon.scheduler.gateway.identity import identify
from antiphon.scheduler.gateway.prompts import (
    PromptTokenizer,
    TemplateOptions,
    TokenizerSource,
    content_chars,
    encode_off_loop,
)
from antiphon.scheduler.gateway.requests import CHAT_ROUTE, COMPLETION_ROUTE, Body, ChatBody
from antiphon.scheduler.rounds import RoundRequest

log = logging.getLogger(__name__)

DRAIN_FACTOR = 4
"""Of a body over the limit this many limits are read and dropped, so that the client gets to see the 413."""


class FleetModel(Protocol):
    """What the fleet says of the model that it serves."""

    def model_ids(self) -> tuple[str, ...]:
        """Model ids by the engines' hellos; empty while none is known."""

    def context_tokens(self) -> int:
        """The smallest window of the live engines; 0 = unknown."""


class ClientGone(Exception):
    """The client closed its connection."""


def served_names(config: Config, fleet: FleetModel) -> tuple[str, ...]:
    """Names by which clients may call the model; empty while none is known."""
    if config.model.names:
        return config.model.names
    ids = fleet.model_ids()
    if not ids and config.model.path:
        return (Path(config.model.path).name,)
    short = [model_id.rstrip("/").rpartition("/")[2] for model_id in ids]
    return tuple(dict.fromkeys([*short, *ids]))


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
    targets: requests.Slos


class Intake:
    """Makes rounds of requests, for the model that the fleet serves."""

    def __init__(self, tokenizers: TokenizerSource, config: Config, fleet: FleetModel) -> None:
        self._tokenizers = tokenizers
        self._config = config
        self._fleet = fleet

    async def body(self, receive: Receive, headers: Headers) -> bytes:
        """The whole body; raises as `read_body`."""
        limits = self._config.gateway
        return await read_body(receive, headers, limits.body_limit_bytes, limits.body_deadline_s)

    async def check(self, route: str, raw: bytes, headers: Headers, round_id: str) -> Checked:
        """All checks of a body for `route` (CHAT_ROUTE or COMPLETION_ROUTE); raises `ApiError`."""
        body: Body
        if route == CHAT_ROUTE:
            body, prompt = requests.parse_chat(raw), None
        else:
            body, prompt = requests.parse_completion(raw)
        identity = identify(headers, body.session.id if body.session else None, body.session_id)
        self._check_model(body.model)
        try:
            tokenizer = await self._tokenizers.get()
        except UserError as error:
            raise _unusable_model(str(error)) from error
        input_ids = await _input_ids(tokenizer, body, prompt)
        limit = requests.output_limit(body, len(input_ids), self._window_tokens(tokenizer))
        scheduler = self._config.scheduler
        default = requests.Slos(scheduler.slo_ttft_s, scheduler.slo_itl_s)
        targets = requests.slos(body.session, default, ",".join(headers.getlist("x-session-hints")))
        request = RoundRequest(
            round_id=round_id,
            session_id=identity.session_id,
            tenant=identity.tenant,
            path=route,
            input_ids=input_ids,
            body=requests.engine_fields(body, limit),
            max_output_tokens=limit,
            slo_ttft_s=targets.ttft_s,
            slo_itl_s=targets.itl_s,
            cache_salt=body.cache_salt,
            tool=requests.tool_answered(body),
        )
        return Checked(request, _form(body, round_id, identity.identified_by), targets)

    def _check_model(self, model: str) -> None:
        served = served_names(self._config, self._fleet)
        if not served:
            raise no_engine("No engine has told its model yet; try again when one is up.")
        if model not in served:
            raise model_not_found(model, served)

    def _window_tokens(self, tokenizer: PromptTokenizer) -> int:
        known = [tokens for tokens in (self._fleet.context_tokens(), tokenizer.context_tokens) if tokens > 0]
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


async def _input_ids(
    tokenizer: PromptTokenizer, body: Body, prompt: str | tuple[int, ...] | None
) -> tuple[int, ...]:
    if isinstance(body, ChatBody):
        messages = body.messages
        options = TemplateOptions(
            requests.template_tools(body),
            requests.template_kwargs(body),
            continue_final_message=bool(body.continue_final_message),
        )
        ids = await encode_off_loop(lambda: tokenizer.encode_chat(messages, options), content_chars(messages))
    elif isinstance(prompt, str):
        text = prompt
        ids = await encode_off_loop(lambda: tokenizer.encode_text(text), len(text))
    else:
        ids = prompt or ()
    if not ids:
        raise invalid("The prompt has no tokens.", param="messages" if prompt is None else "prompt")
    requests.check_token_ids(ids, tokenizer.vocabulary_tokens)
    return ids


def _form(body: Body, round_id: str, identified_by: str) -> relay.AnswerForm:
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
    )


def _unusable_model(message: str) -> ApiError:
    log.error("model unusable", extra={"reason": message})
    return ApiError(503, "model_unavailable", message, kind="server_error", retry_after_s=5.0)
