"""Stored responses (`/v1/responses` with `store`): what was answered, and the messages up to there.

The messages of one conversation stand in one list, so that a response adds only its own; one that goes on
from an earlier place gets a copy. Tenants are apart. Every call ends within the ledger's deadline or raises
`LedgerUnavailable`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.ledger_connection import escaped

__all__ = ["LedgerUnavailable", "Past", "ResponseStore"]


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


NOTHING = Past()


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
        return Past(list_id, tuple(messages[:end]), session_id, is_tip=len(messages) == end)

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
    ) -> bool:
        """Keep a response and its round's messages; False if its past has gone meanwhile."""
        self._ledger.not_if_it_failed()
        branch = secrets.token_hex(12)
        list_id = past.list_id or branch
        response_key = self._response_key(tenant, response_id)
        keys = [
            response_key,
            self._list_key(tenant, list_id),
            self._list_key(tenant, branch),
            response_key if conversation_id is None else self._conversation_key(tenant, conversation_id),
        ]
        arguments = [
            len(past.messages), self._ttl_ms, session_id, document, list_id, branch, conversation_id or "",
            response_id, *messages,
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

    def _response_key(self, tenant: str, response_id: str) -> str:
        return f"{self._connection.tag}:resp:{escaped(tenant)}:{escaped(response_id)}"

    def _list_key(self, tenant: str, list_id: str) -> str:
        return f"{self._connection.tag}:said:{escaped(tenant)}:{list_id}"

    def _conversation_key(self, tenant: str, conversation_id: str) -> str:
        return f"{self._connection.tag}:conv:{escaped(tenant)}:{escaped(conversation_id)}"
