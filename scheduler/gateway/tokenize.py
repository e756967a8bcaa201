"""`/tokenize` and `/detokenize`, with and without /v1: what prompts become, in SGLang's and vLLM's shape."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from antiphon.scheduler.errors import invalid
from antiphon.scheduler.gateway import requests
from antiphon.scheduler.gateway.intake import Intake
from antiphon.scheduler.gateway.prompts import (
    PromptTokenizer,
    TemplateOptions,
    content_chars,
    encode_off_loop,
)

MAX_TEXTS = 256
"""Of one request."""


class TokenizeBody(msgspec.Struct, kw_only=True, frozen=True):
    """Either `prompt` or `messages`; the rest as on the routes that take them."""

    model: str
    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(msgspec.Struct, kw_only=True, frozen=True):
    model: str
    tokens: list[requests.Count | list[requests.Count]]
    """Ids of one text, or a list of them for each of several."""
    skip_special_tokens: bool = True


_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


class Tokenizing:
    """The routes; also counts a chat's tokens for others."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def tokenize(self, request: Request) -> Response:
        raw = await self._intake.body(request.receive, request.headers)
        body: TokenizeBody = requests.decode_body(_tokenize_decoder, raw)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Either `prompt` or `messages` is needed.", param="prompt")
        model = self._intake.model(body.model)
        tokenizer = await self._intake.tokenizer(model)
        tokens: Any
        if body.messages is not None:
            if not body.add_generation_prompt:
                raise invalid(
                    "`add_generation_prompt` cannot be switched off: a chat ends where its answer begins.",
                    param="add_generation_prompt",
                )
            tokens = await self.chat_ids(raw)
        elif isinstance(body.prompt, str):
            tokens = await _encoded(tokenizer, body.prompt, body.add_special_tokens)
        else:
            texts = body.prompt or []
            if len(texts) > MAX_TEXTS:
                raise invalid(f"At most {MAX_TEXTS} texts at once.", param="prompt")
            tokens = [await _encoded(tokenizer, text, body.add_special_tokens) for text in texts]
        several = isinstance(body.prompt, list)
        count = [len(ids) for ids in tokens] if several else len(tokens)
        window_tokens = self._intake.window_tokens(tokenizer, model)
        return _json({"tokens": tokens, "count": count, "max_model_len": window_tokens})

    async def detokenize(self, request: Request) -> Response:
        raw = await self._intake.body(request.receive, request.headers)
        body: DetokenizeBody = requests.decode_body(_detokenize_decoder, raw)
        tokenizer = await self._intake.tokenizer(self._intake.model(body.model))
        groups = [ids for ids in body.tokens if isinstance(ids, list)]
        several = bool(groups)
        if several and len(groups) < len(body.tokens):
            raise invalid("`tokens` must be ids, or lists of ids: not both.", param="tokens")
        groups = groups or [[token for token in body.tokens if isinstance(token, int)]]
        if len(groups) > MAX_TEXTS:
            raise invalid(f"At most {MAX_TEXTS} texts at once.", param="tokens")
        for ids in groups:
            if ids:
                requests.check_token_ids(ids, tokenizer.vocabulary_tokens, param="tokens")
        texts = [tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in groups]
        text = texts if several else texts[0]
        return _json({"text": text, "prompt": text})

    async def chat_ids(self, raw: bytes) -> tuple[int, ...]:
        """Token ids of a chat's prompt; `raw` is a body as for the chat route. Raises `ApiError`."""
        body = requests.parse_chat(raw)
        tokenizer = await self._intake.tokenizer(self._intake.model(body.model))
        options = TemplateOptions(
            requests.template_tools(body),
            requests.template_kwargs(body),
            continue_final_message=bool(body.continue_final_message),
        )
        return await encode_off_loop(
            lambda: tokenizer.encode_chat(body.messages, options), content_chars(body.messages)
        )


async def _encoded(tokenizer: PromptTokenizer, text: str, special: bool) -> tuple[int, ...]:
    return await encode_off_loop(lambda: tokenizer.encode_text(text, add_special_tokens=special), len(text))


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
