"""Stored responses (`/v1/responses` with `store`): what was answered, and the messages up to there.

The messages of one conversation stand in one list, so that a response adds only its own; one that goes on
from an earlier place gets a copy. Of each call that makes one it is kept where it began, so that a retry
begins there too. Tenants are apart. Every call ends within the ledger's deadline or raises
`LedgerUnavailable`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.ledger_connection import escaped

__all__ = ["LedgerUnavailable", "Past", "ResponseCall", "ResponseStore", "Start"]


@dataclass(frozen=True, slots=True)
class Past:
    """What came before a response that is about to be made."""

    list_id: str = ""
    """Of its messages; "" = nothing came before."""
    messages: tuple[str, ...] = ()
    """JSON of each."""
    session_id: str = ""
    is_tip: bool = True
    """Nothing has gone on from there yet."""
    previous: str = ""
    """The response that it ends with."""


NOTHING = Past()


class Start(msgspec.Struct, frozen=True, array_like=True):
    """Where a response begins, without what was said up to there."""

    previous: str
    """The response before it."""
    list_id: str
    messages: int
    session_id: str
    is_tip: bool


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """One try of a call that makes a response."""

    digest: str
    """Names the call, within all tenants."""
    asks: str
    """Digest of all that it asks: another one by the same name is refused."""
    round_id: str
    again: bool
    """A try of it may have been made before."""
    unnamed: bool
    """Nothing but its words names it, so that two clients may ask the same."""
    memory_s: float
    """How long it is remembered from now: until after its answer."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A response that is to be made, or was."""

    response_id: str
    created: int
    """Unix time."""
    start: Start
    known: bool
    """By a try before this one."""
    stored: bool
    """By one of them."""


class ResponseStore:
    """Beside the ledger, on its connection. Used from one event loop."""

    def __init__(self, ledger: Ledger, ttl_s: float) -> None:
        self._ledger = ledger
        self._connection = ledger.connection
        self._ttl_ms = round(ttl_s * 1000)

    async def past(self, tenant: str, response_id: str) -> Past | None:
        """What a response that follows this one has to begin with; None if it is not known (any more)."""
        self._ledger.not_if_it_failed()
        key = self._response_key(tenant, response_id)
        list_id, length, session_id = await self._connection.command(
            "HMGET", key, "list", "length", "session"
        )
        if list_id is None:
            return None
        end = int(length)
        # One more than its own: whether anything follows.
        messages = await self._connection.command("LRANGE", self._list_key(tenant, list_id), 0, end)
        if len(messages) < end:
            return None
        is_tip = len(messages) == end
        return Past(list_id, tuple(messages[:end]), session_id, is_tip, previous=response_id)

    async def past_at(self, tenant: str, start: Start) -> Past | None:
        """What was said up to there, whatever has followed; None if that is not known any more."""
        if not start.messages:
            return NOTHING
        self._ledger.not_if_it_failed()
        key = self._list_key(tenant, start.list_id)
        messages = await self._connection.command("LRANGE", key, 0, start.messages - 1)
        if len(messages) < start.messages:
            return None
        return Past(start.list_id, tuple(messages), start.session_id, start.is_tip, start.previous)

    async def known(self, call: ResponseCall) -> Begun | None:
        """The response of the call, if a try of it is known; this is then its latest. Raises `KeyReused`."""
        return await self._begun(call, "", 0, None)

    async def begin(self, call: ResponseCall, response_id: str, created: int, past: Past) -> Begun:
        """The same; if none is known, the response that this try makes. Raises `KeyReused`."""
        start = Start(past.previous, past.list_id, len(past.messages), past.session_id, past.is_tip)
        begun = await self._begun(call, response_id, created, start)
        assert begun is not None
        return begun

    async def _begun(
        self, call: ResponseCall, response_id: str, created: int, start: Start | None
    ) -> Begun | None:
        self._ledger.not_if_it_failed()
        arguments = [
            call.round_id, call.asks, "again" if call.again else "first", "1" if call.unnamed else "",
            round(call.memory_s * 1000), response_id, created, msgspec.json.encode(start),
        ]  # fmt: skip
        answer = await self._connection.script("respond_call", [self._call_key(call)], arguments)
        if not answer:
            return None
        found_id, found_created, found_start, known, stored = answer
        place = msgspec.json.decode(found_start, type=Start)
        return Begun(found_id, int(found_created), place, bool(known), bool(stored))

    async def forget(self, call: ResponseCall) -> None:
        """The call was refused: its key may be used for another. Not if a later try of it has come."""
        self._ledger.not_if_it_failed()
        await self._connection.script("respond_forget", [self._call_key(call)], [call.round_id])

    async def last_of(self, tenant: str, conversation_id: str) -> str | None:
        """The latest response of a conversation."""
        self._ledger.not_if_it_failed()
        found: str | None = await self._connection.command(
            "GET", self._conversation_key(tenant, conversation_id)
        )
        return found

    async def put(
        self,
        tenant: str,
        response_id: str,
        document: bytes,
        *,
        past: Past,
        messages: Sequence[bytes],
        session_id: str,
        conversation_id: str | None,
        call: ResponseCall | None = None,
    ) -> bool:
        """Keep a response and its round's messages; False if its past has gone meanwhile, or a later try of
        its `call` has come."""
        self._ledger.not_if_it_failed()
        branch = secrets.token_hex(12)
        list_id = past.list_id or branch
        response_key = self._response_key(tenant, response_id)
        keys = [
            response_key,
            self._list_key(tenant, list_id),
            self._list_key(tenant, branch),
            response_key if conversation_id is None else self._conversation_key(tenant, conversation_id),
            response_key if call is None else self._call_key(call),
        ]
        arguments = [
            len(past.messages), self._ttl_ms, session_id, document, list_id, branch, conversation_id or "",
            response_id, "" if call is None else call.round_id, *messages,
        ]  # fmt: skip
        return bool(await self._connection.script("respond", keys, arguments))

    async def get(self, tenant: str, response_id: str) -> str | None:
        """The document of a response."""
        self._ledger.not_if_it_failed()
        key = self._response_key(tenant, response_id)
        found: str | None = await self._connection.command("HGET", key, "document")
        return found

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a response; what went on from it stays. False if there was none."""
        self._ledger.not_if_it_failed()
        return bool(await self._connection.command("DEL", self._response_key(tenant, response_id)))

    def _call_key(self, call: ResponseCall) -> str:
        return f"{self._connection.tag}:respcall:{call.digest}"

    def _response_key(self, tenant: str, response_id: str) -> str:
        return f"{self._connection.tag}:resp:{escaped(tenant)}:{escaped(response_id)}"

    def _list_key(self, tenant: str, list_id: str) -> str:
        return f"{self._connection.tag}:said:{escaped(tenant)}:{list_id}"

    def _conversation_key(self, tenant: str, conversation_id: str) -> str:
        return f"{self._connection.tag}:conv:{escaped(tenant)}:{escaped(conversation_id)}"
