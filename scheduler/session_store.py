"""What the ledger knows of sessions beyond their rounds: whose a conversation is, what was said of each.

A session's document is in the same record as its rounds (`ledger.py`), so that both begin and end together.
`find_chain`, `find_turn` and `remember_chain` tell conversations without an id by their hash chain
(gateway/message_chain.py); the keys say nothing of the messages. Every call ends within the ledger's deadline
or raises `LedgerUnavailable`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.session_documents import SessionDocument, read_document

__all__ = ["LedgerUnavailable", "SessionStore"]

FIRST_LOOK = 16
"""Values that are looked up at once: a conversation that goes on is found a few messages back."""
LOOKED_UP = 512
"""At most, of one request."""
INNER_KEPT = 64
"""Earlier values that a round keeps alive: the latest ones, from which branches are made."""
LISTED_AT_ONCE = 500
CLOSED_AT_ONCE = 10_000
"""Descendants that one call closes, at most."""

FIELDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ttl_s": ("ttl_ms", lambda seconds: str(round(seconds * 1000))),
    "slo_ttft_s": ("want_ttft_s", repr),
    "slo_itl_s": ("want_itl_s", repr),
    "priority": ("priority", str),
    "expected_rounds": ("expected_rounds", str),
    "expected_gap_s": ("expected_gap_s", repr),
    "forked_at": ("forked_at", str),
    "model": ("model", str),
    "event": ("event", str),
    "tool": ("tool", str),
    "metadata": ("metadata", lambda metadata: msgspec.json.encode(metadata).decode()),
}
"""What may be said of a session -> its field in the record, and how it is written."""


class SessionStore:
    """Beside the ledger, on its connection. Used from one event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._connection = ledger.connection

    # ---------------------------------------------------------------- conversations

    async def find_chain(self, scope: str, values: Sequence[bytes]) -> tuple[int, str, bool] | None:
        """(index of the first value that is known, whose it is, whether that session ends there).

        `values` are the longest first; `scope` as `message_chain.scope_of` makes it.
        """
        self._ledger.not_if_it_failed()
        for start, end in ((0, FIRST_LOOK), (FIRST_LOOK, LOOKED_UP)):
            keys = [self._chain_key(scope, value) for value in values[start:end]]
            owners = await self._connection.command("MGET", *keys) if keys else []
            for at, owner in enumerate(owners):
                if owner:
                    return start + at, owner[1:], owner[0] == "t"
        return None

    async def find_turn(self, scope: str, turns: Sequence[bytes]) -> str | None:
        """The one session whose latest answer was one of these turns; None if there is none, or several."""
        self._ledger.not_if_it_failed()
        if not turns:
            return None
        keys = [self._turn_key(scope, turn) for turn in turns[:FIRST_LOOK]]
        for found in await self._connection.command("MGET", *keys):
            if found == "?":
                return None
            if found:
                tip, session_id = bytes.fromhex(found[:32]), found[32:]
                owner = await self._connection.command("GET", self._chain_key(scope, tip))
                return session_id if owner == f"t{session_id}" else None
        return None

    async def remember_chain(
        self,
        scope: str,
        tip: bytes,
        inner: Sequence[bytes],
        session_id: str,
        ttl_s: float,
        turn: bytes | None = None,
    ) -> None:
        """The session's conversation has come to `tip`, past `inner` (the latest first).

        `turn` is the answer's (`Links.turns[0]` of the messages with it).
        """
        self._ledger.not_if_it_failed()
        tip_key = self._chain_key(scope, tip)
        keys = [
            tip_key,
            tip_key if turn is None else self._turn_key(scope, turn),
            *(self._chain_key(scope, value) for value in inner[:INNER_KEPT]),
        ]
        await self._connection.script("remember", keys, [session_id, round(ttl_s * 1000), tip.hex()])

    # ---------------------------------------------------------------- documents

    async def create(
        self,
        tenant: str,
        session_id: str,
        default_ttl_s: float,
        parent_id: str | None = None,
        **fields: Any,
    ) -> SessionDocument:
        """The session, made if it is not there, opened if it was closed; `fields` as in FIELDS."""
        await self._put(tenant, session_id, default_ttl_s, "create", parent_id, fields)
        document = await self.get(tenant, session_id, default_ttl_s)
        if document is None:
            raise LedgerUnavailable(f"session {session_id!r} was made and is not there")
        return document

    async def update(
        self, tenant: str, session_id: str, default_ttl_s: float, **fields: Any
    ) -> SessionDocument | None:
        """With these `fields` changed (None takes one away); None if it is not there."""
        if not await self._put(tenant, session_id, default_ttl_s, "update", None, fields):
            return None
        return await self.get(tenant, session_id, default_ttl_s)

    async def get(
        self, tenant: str, session_id: str, default_ttl_s: float = 3600.0
    ) -> SessionDocument | None:
        """What is known of it; None if nothing is."""
        key = self._connection.session_key(tenant, session_id)
        documents = await self._read([key], default_ttl_s)
        return documents[0] if documents else None

    async def fork(
        self,
        tenant: str,
        parent_id: str,
        ids: Sequence[str],
        default_ttl_s: float,
        at_round: int | None = None,
        expected_start_s: float | None = None,
    ) -> list[SessionDocument]:
        """Children of a session that is there; they start with its home. Those that exist already stay."""
        fields = {"forked_at": at_round, "expected_gap_s": expected_start_s}
        given = {name: value for name, value in fields.items() if value is not None}
        return [await self.create(tenant, child, default_ttl_s, parent_id, **given) for child in ids]

    async def page(
        self,
        tenant: str | None,
        limit: int,
        default_ttl_s: float = 3600.0,
        *,
        after: tuple[str, str] | None = None,
        status: str | None = None,
        parent_id: str | None = None,
    ) -> tuple[list[SessionDocument], bool]:
        """(sessions, whether there are more): a tenant's, the newest first; of all tenants (None), those that
        live longest first. `after` is the (tenant, id) of the last one seen.

        Raises `KeyError` if that one is not there.
        """
        c = self._connection
        index = c.keys("sessions")[0] if tenant is None else c.own_key(tenant)
        start = 0
        if after is not None:
            rank = await c.command("ZREVRANK", index, c.session_key(*after))
            if rank is None:
                raise KeyError(after[1])
            start = rank + 1
        found: list[SessionDocument] = []
        while len(found) <= limit:
            keys = await c.command("ZREVRANGE", index, start, start + LISTED_AT_ONCE - 1)
            found += [
                document
                for document in await self._read(keys, default_ttl_s)
                if status in (None, document.status) and parent_id in (None, document.record.parent_id)
            ]
            start += len(keys)
            if len(keys) < LISTED_AT_ONCE:
                break
        return found[:limit], len(found) > limit

    async def close(self, tenant: str, session_id: str, *, children: bool = False) -> list[str] | None:
        """Close it, at once or with the round in flight, and all that come from it if `children`.

        The ids that are closed or closing now; None if the session is unknown. Closing again changes nothing.
        """
        if await self._close(tenant, session_id) == "unknown":
            return None
        closed, todo = [session_id], [session_id] if children else []
        seen = {session_id}
        while todo and len(seen) < CLOSED_AT_ONCE:
            key = self._connection.children_key(tenant, todo.pop())
            for child in sorted(set(await self._connection.command("SMEMBERS", key)) - seen):
                seen.add(child)
                todo.append(child)
                if await self._close(tenant, child) != "unknown":
                    closed.append(child)
        return closed

    async def _close(self, tenant: str, session_id: str) -> str:
        self._ledger.not_if_it_failed()
        c = self._connection
        answer = await c.script("session_close", [c.session_key(tenant, session_id)], [c.tag, ""])
        return str(answer[0])

    async def _put(
        self,
        tenant: str,
        session_id: str,
        default_ttl_s: float,
        mode: str,
        parent_id: str | None,
        fields: Mapping[str, Any],
    ) -> bool:
        self._ledger.not_if_it_failed()
        c = self._connection
        arguments: list[str | int] = [
            session_id, tenant, round(default_ttl_s * 1000), mode, parent_id or "",
            c.session_key(tenant, parent_id) if parent_id else "",
        ]  # fmt: skip
        for name, value in fields.items():
            key, write = FIELDS[name]
            arguments += [key, "" if value is None else write(value)]
        keys = [c.session_key(tenant, session_id), *c.keys("sessions")]
        return bool(await c.script("session_put", keys, arguments))

    async def _read(self, keys: Sequence[str], default_ttl_s: float) -> list[SessionDocument]:
        """Of those that are there."""
        self._ledger.not_if_it_failed()
        commands = [(word, key) for key in keys for word in ("HGETALL", "PTTL")]
        answers = await self._connection.commands(commands)
        now_s = time.time()
        return [
            read_document(fields, pttl_ms, default_ttl_s, now_s)
            for fields, pttl_ms in zip(answers[::2], answers[1::2], strict=True)
            if "session_id" in fields
        ]

    # ---------------------------------------------------------------- names of keys

    def _chain_key(self, scope: str, value: bytes) -> str:
        return f"{self._connection.tag}:chain:{scope}:{value.hex()}"

    def _turn_key(self, scope: str, turn: bytes) -> str:
        return f"{self._connection.tag}:turn:{scope}:{turn.hex()}"
