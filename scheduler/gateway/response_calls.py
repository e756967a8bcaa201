"""Calls of `/v1/responses` that are made again: which response they make, where it begins, what it was.

A stored response is given again as it is stored. One that is not is made again from where its first try
began, with the same id; what a try stores after a later one has begun is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec

from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import key_reused, ledger_unavailable
from antiphon.scheduler.gateway.identity import AGENT_HEADER, AGENT_PARENT_HEADER
from antiphon.scheduler.gateway.responses import ResponsesBody
from antiphon.scheduler.gateway.retried import named_try
from antiphon.scheduler.ledger_connection import KeyReused
from antiphon.scheduler.response_store import (
    NOTHING,
    Begun,
    LedgerUnavailable,
    Past,
    ResponseCall,
    ResponseStore,
)
from antiphon.scheduler.retries import CALL_MEMORY_S, digest_of

log = logging.getLogger(__name__)

_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as one try of its call."""

    body: ResponsesBody
    tenant: str
    call: ResponseCall
    find_past: Callable[[], Awaitable[Past]]
    """What came before it, as it says itself; raises `ApiError`."""


@dataclass(frozen=True, slots=True)
class Making:
    """A response that is to be made."""

    response_id: str
    created: int
    past: Past
    call: ResponseCall | None
    """None = it is not written down: a retry will not be known."""
    is_first: bool = True
    """No try of its call is known."""


@dataclass(frozen=True, slots=True)
class Made:
    """One that is stored."""

    document: str


class ResponseCalls:
    """Without a `store` no call is known."""

    def __init__(self, store: ResponseStore | None, config: Config) -> None:
        self._store = store
        self._memory_s = config.scheduler.request_deadline_s + CALL_MEMORY_S
        session = config.session
        self._naming = (
            "x-session-id", "x-parent-session-id", *session.aliases, *session.parent_aliases,
            AGENT_HEADER, AGENT_PARENT_HEADER,
        )  # fmt: skip

    def call(
        self, body: ResponsesBody, headers: Mapping[str, str], tenant: str, round_id: str
    ) -> ResponseCall:
        """The call that a request is a try of. `headers` has lower-case names. Raises `ApiError` (400)."""
        key, counted = named_try(headers)
        named = {name: headers[name] for name in self._naming if name in headers}
        said = msgspec.structs.replace(body, stream=None)  # whole or streamed, it is the same response
        asks = digest_of([_encoder.encode(said), _encoder.encode(named)])
        goes_on = body.conversation_id is not None or body.previous_response_id is not None
        return ResponseCall(
            digest=digest_of(
                [b"response", tenant.encode(), (asks if key is None else f"key {key}").encode()]
            ),
            asks=asks,
            round_id=round_id,
            again=counted or key is not None,
            unnamed=not (goes_on or named or body.session or body.session_id),
            memory_s=self._memory_s,
        )

    async def find(self, asked: Asked) -> Making | Made:
        """The response that a call makes. Raises `ApiError`: 422 if its key was used for something else."""
        call = asked.call
        try:
            begun = None
            if self._store is not None and call.again:
                begun = await self._store.known(call)
            if begun is None:
                return await self._begin(asked)
            return await self._found(asked, begun)
        except KeyReused as error:
            raise key_reused() from error
        except LedgerUnavailable as error:
            past = await asked.find_past()
            if past != NOTHING:  # it can be read again: without the call it may be the first try's own
                raise ledger_unavailable(f"What came before cannot be told: {error}") from error
            log.info("whether a response is asked for again is not known: %s", error)
            return self._anew(asked, past, None)

    async def _begin(self, asked: Asked) -> Making | Made:
        past = await asked.find_past()
        if self._store is None:
            return self._anew(asked, past, None)
        making = self._anew(asked, past, asked.call)
        begun = await self._store.begin(asked.call, making.response_id, making.created, past)
        return await self._found(asked, begun) if begun.known else making

    async def _found(self, asked: Asked, begun: Begun) -> Making | Made:
        """What is to be done of a response that an earlier try has begun."""
        assert self._store is not None
        document = await self._store.get(asked.tenant, begun.response_id)
        if document is not None:
            return Made(document)
        conversation = asked.body.conversation_id
        past = None
        if (
            begun.stored
            or conversation is None
            or begun.start.previous == (await self._store.last_of(asked.tenant, conversation) or "")
        ):
            past = await self._store.past_at(asked.tenant, begun.start)
        if past is None:  # it has gone, or the conversation went on without this one
            past = await asked.find_past()
        return Making(begun.response_id, begun.created, past, asked.call, is_first=False)

    async def refused(self, making: Making) -> None:
        """No round was run for it: the next try begins anew, and its key may be used for something else."""
        if self._store is None or making.call is None or not making.is_first:
            return
        try:
            await self._store.forget(making.call)
        except LedgerUnavailable as error:
            log.info("a call that was refused is remembered: %s", error)

    def _anew(self, asked: Asked, past: Past, call: ResponseCall | None) -> Making:
        response_id = f"resp_{asked.call.round_id.removeprefix('r')}"
        return Making(response_id, int(time.time()), past, call)
