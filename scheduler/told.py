"""Of which sessions the ledger knows all: what their rounds tell and ask is then little more than the news.

A long history has a checkpoint every 512 tokens. To tell the ledger of all of them every round, and to ask it
about each, would cost more the longer the history is. What it was told it keeps for the session's TTL: it is
told again after a part of that, or when another engine is the holder. For one thread.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_SESSIONS = 65_536

SessionKey = tuple[str, str]
"""(tenant, session id)."""


Holder = tuple[str, str, str]
"""(epoch of the ledger's data, engine id, its incarnation)."""


class Told:
    """Sessions of which all checkpoints were told, lately."""

    def __init__(self, keep_s: float) -> None:
        """`keep_s`: how long that counts."""
        self._keep_s = keep_s
        self._sessions: OrderedDict[SessionKey, tuple[Holder, float]] = OrderedDict()

    def holder(self, session: SessionKey, now: float) -> Holder | None:
        """Who was said to hold all of the session's conversation; None = it was not told, or too long ago."""
        found = self._sessions.get(session)
        return found[0] if found is not None and now - found[1] < self._keep_s else None

    def note(self, session: SessionKey, holder: Holder, now: float) -> None:
        """All of it was told."""
        self._sessions[session] = holder, now
        self._sessions.move_to_end(session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
