"""Token logs: what was said in each session, in Redis, so that any replica can go on with it.

    {antiphon:F:TENANT:ID}:log    list   header, then an entry per round (`conversation.Entry`), msgpack; TTL
    {antiphon:F:TENANT:ID}:fence  string   the newest claim that writes there; TTL

Each session has a hash tag of its own. A fork's header says whose log it begins with, and how much of it:
nothing is copied. The conversations used last are kept in memory, within a bound; of those only what other
replicas have added is read. The header's stamp is new for every list, so that a log that was lost and begun
anew is not taken for the old one.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from antiphon.scheduler.conversation import Conversation, Entry, Said
from antiphon.scheduler.ledger_connection import Failures, LedgerConnection, LedgerUnavailable, escaped

__all__ = ["FencedOff", "HistoryLost", "LedgerUnavailable", "TokenLogs"]

STAMP_BYTES = 12
MAX_ANCESTORS = 64
"""A fork of a fork of ...: of more than so many, the conversation is copied."""
REWRITE_BYTES = 4 * 1024 * 1024
REWRITE_FACTOR = 4
"""A list that is so many times larger than what is still valid of it is begun anew."""


class HistoryLost(Exception):
    """The session was there, and what was said in it is not any more."""


class FencedOff(Exception):
    """A newer claim of the session writes its log now."""


class _Header(msgspec.Struct, frozen=True, array_like=True):
    stamp: bytes
    parent: str = ""
    """Session whose log this one begins with; "" = none."""
    parent_stamp: bytes = b""
    parent_entries: int = 0


_header_decoder = msgspec.msgpack.Decoder(_Header)
_entry_decoder = msgspec.msgpack.Decoder(Entry)
_encoder = msgspec.msgpack.Encoder()

Key = tuple[str, str]
"""(tenant, session id)."""


class TokenLogs:
    """One replica's view. Each exchange ends within `deadline_s` or raises `LedgerUnavailable`.

    Used from one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        fleet: str = "default",
        deadline_s: float = 0.5,
        memory_bytes: int = 256 * 1024 * 1024,
        failures: Failures | None = None,
    ) -> None:
        """`failures`: of the ledger's connection, where both are in one Redis: it is waited for only once."""
        self._connection = LedgerConnection(url, fleet, deadline_s, 16, binary=True, failures=failures)
        self._fleet = fleet
        self._memory_bytes = memory_bytes
        self._known: OrderedDict[Key, tuple[Conversation, int]] = OrderedDict()
        self._known_bytes = 0

    @property
    def known_bytes(self) -> int:
        """What the conversations in memory take, about."""
        return self._known_bytes

    async def load(self, tenant: str, session_id: str) -> Conversation:
        """All that was said; without entries if nothing was. Raises `HistoryLost` when it was and is gone."""
        self._connection.not_if_it_failed()
        known, _ = self._known.get((tenant, session_id), (Conversation(tenant, session_id), 0))
        header, entries = await self._read(tenant, session_id, known.entries + 1)
        if header is None:
            self._forget((tenant, session_id))
            if known.header:
                raise HistoryLost("the ledger has lost this session's history")
            return known
        if known.header != header:
            if known.entries:  # the list was begun anew: what there is of it was not all read
                return await self._load_anew(tenant, session_id)
            known = await self._beginning(tenant, session_id, header)
        elif not entries:
            self._known.move_to_end((tenant, session_id))
            return known
        return self._remember(_replayed(known, entries))

    async def add(
        self,
        base: Conversation,
        session_id: str,
        said: Said,
        ttl_s: float,
        *,
        replaces: bool = True,
        fence: int = 0,
    ) -> Conversation:
        """Store a round of `session_id` that went on from `base`, which may be another session's: then this
        one becomes its fork. Raises `LedgerUnavailable`.

        When another round was added meanwhile, this one's conversation takes the place of both if it
        `replaces`; else nothing is stored (`HistoryLost`): whoever only adds must not undo what others said.
        Nor is anything stored for a round whose claim, named by its `fence`, is not the newest (`FencedOff`).
        """
        self._connection.not_if_it_failed()
        tenant, ttl_ms = base.tenant, max(1, round(ttl_s * 1000))
        anew = Conversation(tenant, session_id, header=_encoder.encode(_Header(_stamp())))
        target, expected, ours = base, 1 + base.entries, said
        if session_id != base.session_id:
            target, expected = _forked(base, session_id), 0
        if not target.header or _mostly_gone(target, said):
            target, expected, ours = anew, -1 if target.header else 0, said.alone(base)
        if not await self._append(target, expected, ours, ttl_ms, fence):
            if not replaces:
                self._forget((tenant, session_id))
                raise HistoryLost("another round of the session was added meanwhile")
            target, ours = anew, said.alone(base)
            await self._append(target, -1, ours, ttl_ms, fence)
        for ancestor in target.ancestors:
            await self._connection.script("log_keep", [self._key(tenant, ancestor)], [ttl_ms])
        return self._remember(target.add(ours.entry(target), ours))

    async def _append(self, target: Conversation, expected: int, said: Said, ttl_ms: int, fence: int) -> bool:
        where = target.tenant, target.session_id
        arguments: list[Any] = [target.header, expected, _encoder.encode(said.entry(target)), ttl_ms, fence]
        keys = [self._key(*where), self._fence_key(*where)]
        answer = await self._connection.script("log_append", keys, arguments)
        if answer < 0:
            self._forget(where)
            raise FencedOff("a retry of this round has its place")
        return bool(answer)

    async def fence_off(self, tenant: str, session_id: str, fence: int, ttl_s: float) -> None:
        """Let no round with an older claim write any more. Raises `LedgerUnavailable`."""
        self._connection.not_if_it_failed()
        arguments = [fence, max(1, round(ttl_s * 1000))]
        await self._connection.script("log_fence", [self._fence_key(tenant, session_id)], arguments)

    async def fork(self, tenant: str, parent: str, child: str, ttl_s: float) -> bool:
        """Let `child` begin with all that was said in `parent`; False if nothing was (or it is a fork of
        too many). `child` must be new.

        Raises `LedgerUnavailable` and `HistoryLost`.
        """
        base = await self.load(tenant, parent)
        if not base.entries:
            return False
        forked, key = _forked(base, child), self._key(tenant, child)
        if not forked.header:
            return False
        await self._connection.commands(
            [("DEL", key), ("RPUSH", key, forked.header), ("PEXPIRE", key, max(1, round(ttl_s * 1000)))]
        )
        self._forget((tenant, child))
        return True

    async def delete(self, tenant: str, session_id: str) -> None:
        """Forget what was said; forks of it lose what they shared. Raises `LedgerUnavailable`."""
        self._forget((tenant, session_id))
        await self._connection.command("DEL", self._key(tenant, session_id))

    async def close(self) -> None:
        await self._connection.close()

    # ---------------------------------------------------------------- reading

    async def _read(
        self, tenant: str, session_id: str, start: int, stop: int = -1
    ) -> tuple[bytes | None, list[bytes]]:
        """The header, None if there is no list, and the elements from `start` to `stop`."""
        key = self._key(tenant, session_id)
        header, entries = await self._connection.script("log_read", [key], [start, stop])
        return header or None, entries

    async def _beginning(self, tenant: str, session_id: str, raw: bytes) -> Conversation:
        """What a log with this header begins with: nothing, or what its ancestors said."""
        chain: list[tuple[str, _Header]] = [(session_id, _decoded(_header_decoder, raw))]
        lists: list[list[bytes]] = []
        while (header := chain[-1][1]).parent:
            if len(chain) > 2 * MAX_ANCESTORS:
                raise HistoryLost("the session is a fork of too many")
            above, entries = await self._read(tenant, header.parent, 1, header.parent_entries)
            parent = _decoded(_header_decoder, above) if above is not None else None
            if parent is None or parent.stamp != header.parent_stamp or len(entries) != header.parent_entries:
                raise HistoryLost(f"it is a fork of session {header.parent}, whose history is gone")
            chain.append((header.parent, parent))
            lists.append(entries)
        oldest, root = chain.pop()
        conversation = Conversation(tenant, oldest, _encoder.encode(root))
        while chain:
            conversation = _replayed(conversation, lists.pop())
            name, header = chain.pop()
            conversation = _as_fork(conversation, name, header)
        return conversation

    async def _load_anew(self, tenant: str, session_id: str) -> Conversation:
        self._forget((tenant, session_id))
        return await self.load(tenant, session_id)

    def _key(self, tenant: str, session_id: str) -> str:
        return f"{{antiphon:{self._fleet}:{escaped(tenant)}:{escaped(session_id)}}}:log"

    def _fence_key(self, tenant: str, session_id: str) -> str:
        return self._key(tenant, session_id).removesuffix("log") + "fence"

    # ---------------------------------------------------------------- memory

    def _remember(self, conversation: Conversation) -> Conversation:
        key = (conversation.tenant, conversation.session_id)
        self._forget(key)
        size_bytes = conversation.size_bytes
        self._known[key] = conversation, size_bytes
        self._known_bytes += size_bytes
        while self._known_bytes > self._memory_bytes and len(self._known) > 1:
            self._known_bytes -= self._known.popitem(last=False)[1][1]
        return conversation

    def _forget(self, key: Key) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._known_bytes -= known[1]


def _stamp() -> bytes:
    return secrets.token_bytes(STAMP_BYTES)


def _forked(base: Conversation, session_id: str) -> Conversation:
    """The beginning of a fork; without a header if the base is stored nowhere, or is a fork of too many."""
    if not base.header or len(base.ancestors) >= MAX_ANCESTORS:
        return Conversation(base.tenant, session_id)
    parent = _decoded(_header_decoder, base.header)
    return _as_fork(base, session_id, _Header(_stamp(), base.session_id, parent.stamp, base.entries))


def _as_fork(base: Conversation, session_id: str, header: _Header) -> Conversation:
    return replace(
        base,
        session_id=session_id,
        header=_encoder.encode(header),
        entries=0,
        ancestors=(base.session_id, *base.ancestors),
        round=0,
        stored_bytes=0,
    )


def _mostly_gone(base: Conversation, said: Said) -> bool:
    """Most of the stored list is not valid any more, and this round keeps nothing of it."""
    valid_bytes = 4 * len(said.answered)
    return said.kept_tokens == 0 and base.stored_bytes > max(REWRITE_BYTES, REWRITE_FACTOR * valid_bytes)


def _replayed(conversation: Conversation, entries: Sequence[bytes]) -> Conversation:
    for raw in entries:
        try:
            conversation = conversation.add(_decoded(_entry_decoder, raw))
        except (ValueError, RecursionError) as error:
            raise HistoryLost(f"its history cannot be read: {error}") from error
    return conversation


def _decoded(decoder: msgspec.msgpack.Decoder[Any], raw: bytes) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.MsgspecError as error:
        raise HistoryLost(f"its history cannot be read: {error}") from error
