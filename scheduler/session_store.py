"""What the ledger knows of sessions beyond their rounds: which conversation is whose.

`find_chain`, `find_turn` and `remember_chain` tell conversations without an id by their hash chain
(gateway/message_chain.py); the keys say nothing of the messages. Every call ends within the ledger's deadline
or raises `LedgerUnavailable`.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.scheduler.ledger import Ledger, LedgerUnavailable

__all__ = ["LedgerUnavailable", "SessionStore"]

FIRST_LOOK = 16
"""Values that are looked up at once: a conversation that goes on is found a few messages back."""
LOOKED_UP = 512
"""At most, of one request."""
INNER_KEPT = 64
"""Earlier values that a round keeps alive: the latest ones, from which branches are made."""


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

    def _chain_key(self, scope: str, value: bytes) -> str:
        return f"{self._connection.tag}:chain:{scope}:{value.hex()}"

    def _turn_key(self, scope: str, turn: bytes) -> str:
        return f"{self._connection.tag}:turn:{scope}:{turn.hex()}"
