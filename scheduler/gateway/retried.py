"""Requests that are made again: of which call they are a try, and answers that are given again.

A call is named by the client's `Idempotency-Key`; a request without one by what it asks, so that a client
that counts its retries (`x-stainless-retry-count`) is known by that.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.answers import KEPT_ANSWER_BYTES, Calls, KeptAnswer, KnownCall
from antiphon.scheduler.conversation import Conversation, Message
from antiphon.scheduler.errors import history_lost, invalid, key_reused
from antiphon.scheduler.gateway.identity import Identity
from antiphon.scheduler.gateway.relay import AnswerForm
from antiphon.scheduler.gateway.requests import Body, ChatBody
from antiphon.scheduler.ledger_connection import LedgerUnavailable
from antiphon.scheduler.retries import Call, digest_of, prompt_digest

log = logging.getLogger(__name__)

KEY_HEADER, COUNT_HEADER = "idempotency-key", "x-stainless-retry-count"
REPLAYED_HEADER = (b"x-antiphon-replayed", b"true")
MAX_KEY_CHARS = 255

Events = AsyncGenerator[dict[str, Any], None]

_OF_THE_PROMPT = ("messages", "tools", "max_tokens")
"""Fields for the engine that the prompt tells, or that depend on its length."""

_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True)
class Tried:
    """What a request says of the tries before it, and what is known of them."""

    tenant: str
    key: str = ""
    """Digest of its idempotency key; "" = it has none."""
    counted: bool = False
    """The client says that it has asked this before."""
    known: KnownCall | None = None

    @property
    def again(self) -> bool:
        return self.counted or self.known is not None

    @property
    def number(self) -> int:
        """Of its round, where a try of it has ended; 0 = none has, as far as is known."""
        return self.known.number if self.known is not None else 0

    def identity(self, identity: Identity) -> Identity:
        """That of a request that names no session is the first try's."""
        if self.known is None or not _is_unnamed(identity):
            return identity
        return Identity(self.known.session_id, "retry", self.tenant, final=identity.final)

    def base(
        self, found: Conversation, answered: int, messages: Sequence[Message], after_round: int
    ) -> Conversation:
        """What an append goes on with: before the round that a try of this call has put there, if it has.

        Equal messages alone say little: "go on" may be said twice. `answered`: rounds that the ledger knows
        to have ended; `after_round`: where the client says that it goes on, 0 = it does not.
        """
        if not self.again:
            ours = False
        elif after_round:
            ours = found.round == after_round + 1
        elif self.key:
            ours = found.round == self.number if self.number else found.round > answered
        else:
            ours = True
        return found.before(messages) if ours else found

    def call(self, route: str, model: str, identity: Identity, body: Body, prompt: Prompt, form: AnswerForm,
             engine_fields: Mapping[str, Any], *, append: bool = False) -> Call:  # fmt: skip
        """Raises `ApiError` (422) if the key was used for something else."""
        unnamed = _is_unnamed(identity) or identity.identified_by == "retry"
        fields = {name: value for name, value in engine_fields.items() if name not in _OF_THE_PROMPT}
        wanted = getattr(body, "max_completion_tokens", None), body.max_tokens
        asks = [route, "" if unnamed else identity.session_id, model, fields, wanted]
        if not self.key:
            named = [b"chain", self.tenant.encode(), _encoder.encode(asks), prompt_digest(prompt)]
            return Call(digest_of(named), again=self.counted, unnamed=unnamed)
        chat = body if isinstance(body, ChatBody) else None
        # An append is the same whatever its session has come to since.
        said = _encoder.encode(chat.messages) if append and chat is not None else prompt_digest(prompt)
        last = _encoder.encode(chat.messages[-1]) if chat is not None else said
        loosely = digest_of([_encoder.encode(asks), last])
        if self.known is not None and self.known.asks != loosely:
            raise key_reused()
        shape = [form.stream, form.include_usage, form.token_ids, engine_fields.get("tools")]
        exactly = digest_of([loosely.encode(), said, _encoder.encode(shape)])
        # Every request with the key is a try of the same call, whatever the client counts.
        return Call(self.key, loosely, again=True, unnamed=unnamed, exactly=exactly, number=self.number)

    def answer(self, call: Call, base: Conversation | None) -> KeptAnswer | None:
        """What the same request was answered before. `base`: what an append goes on with.

        Raises `ApiError` (410) where it is not kept, and the session of an append has had rounds since.
        """
        if self.known is None:
            return None
        kept = self.known.answer
        if kept is not None and kept.exactly == call.exactly:
            return kept
        if base is not None and 0 < self.number < base.round:
            raise history_lost(self.known.session_id, "it has gone on since this call was answered")
        return None


class Retries:
    """Without `calls` no key is known from before."""

    def __init__(self, calls: Calls | None) -> None:
        self._calls = calls

    async def tried(self, headers: Mapping[str, str], tenant: str) -> Tried:
        """Raises `ApiError` (400) for a key that is none."""
        key, counted = named_try(headers)
        if key is None:
            return Tried(tenant, counted=counted)
        digest = digest_of([b"key", tenant.encode(), key.encode()])
        try:
            known = await self._calls.known(digest) if self._calls is not None else None
        except LedgerUnavailable as error:
            log.info("whether a request is a retry is not known: %s", error)
            known = None
        return Tried(tenant, digest, counted, known)

    async def keeping(self, events: Events, call: Call, round_id: str, headers: Mapping[str, str]) -> Events:
        """The events, which are kept when all of them have come: for the next try."""
        kept: list[msgspec.Raw] = []
        size_bytes = 0
        async with aclosing(events):
            async for event in events:
                raw = msgspec.json.encode(event)
                size_bytes += len(raw)
                if size_bytes <= KEPT_ANSWER_BYTES:
                    kept.append(msgspec.Raw(raw))
                else:
                    kept.clear()
                yield event
        if self._calls is None or size_bytes > KEPT_ANSWER_BYTES:
            return
        try:
            await self._calls.keep(call.digest, round_id, KeptAnswer(call.exactly, dict(headers), kept))
        except LedgerUnavailable as error:
            log.info("an answer is not kept for a retry: %s", error)


def named_try(headers: Mapping[str, str]) -> tuple[str | None, bool]:
    """The request's idempotency key, and whether its client says that it has asked this before.

    Raises `ApiError` (400) for a key that is none.
    """
    key = headers.get(KEY_HEADER)
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and all("!" <= char <= "~" for char in key)):
        raise invalid(
            f"An Idempotency-Key is 1 to {MAX_KEY_CHARS} visible ASCII characters without spaces.",
            param="Idempotency-Key",
            code="invalid_idempotency_key",
        )
    return key, headers.get(COUNT_HEADER, "0") != "0"


async def replayed(answer: KeptAnswer) -> Events:
    """Its events, as they were."""
    for raw in answer.events:
        yield msgspec.json.decode(raw)


def _is_unnamed(identity: Identity) -> bool:
    return identity.identified_by.partition(":")[0] in ("new", "prefix")
