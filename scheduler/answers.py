"""What the ledger remembers of calls with idempotency keys: their session, and what they were answered."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from antiphon.scheduler.ledger_connection import LedgerConnection
from antiphon.scheduler.retries import CALL_MEMORY_S

KEPT_ANSWER_BYTES = 256 * 1024
"""A longer answer is not kept: a retry runs again."""


class KeptAnswer(msgspec.Struct, frozen=True):
    """What a call was answered: the relay's events, and the headers that went with them."""

    exactly: str
    headers: dict[str, str]
    events: list[msgspec.Raw]
    """As JSON, the one with `session` last."""


@dataclass(frozen=True, slots=True)
class KnownCall:
    """What the ledger knows of a call with an idempotency key."""

    asks: str
    session_id: str
    answer: KeptAnswer | None
    number: int = 0
    """Of its round, once a try of it has ended; 0 = none has."""


class Calls:
    """The ledger's memory of calls with idempotency keys. Every call raises `LedgerUnavailable`."""

    def __init__(self, connection: LedgerConnection) -> None:
        self._connection = connection

    async def known(self, digest: str) -> KnownCall | None:
        """None if no try of it is known."""
        self._connection.not_if_it_failed()
        call_key, answer_key = self._connection.call_keys(digest)
        (asks, session_id, number), kept = await self._connection.commands(
            [("HMGET", call_key, "digest", "session_id", "number"), ("GET", answer_key)]
        )
        if session_id is None:
            return None
        try:
            answer = msgspec.json.decode(kept, type=KeptAnswer) if kept is not None else None
        except msgspec.MsgspecError:  # of another version: it is answered anew
            answer = None
        return KnownCall(asks or "", session_id, answer, int(number or 0))

    async def keep(self, digest: str, round_id: str, answer: KeptAnswer) -> bool:
        """For CALL_MEMORY_S, if the round is the call's latest try."""
        self._connection.not_if_it_failed()
        keys = self._connection.call_keys(digest)
        arguments = [round_id, msgspec.json.encode(answer), round(CALL_MEMORY_S * 1000)]
        return bool(await self._connection.script("answer_keep", keys, arguments))
