"""What the core remembers of sessions between rounds: home, context, last round. Bounded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from antiphon.scheduler.fleet import Fleet
from antiphon.scheduler.store_use import SessionKey


@dataclass(slots=True)
class Session:
    home: str
    tokens: int
    seen_s: float
    round_number: int
    output_tokens: float = 0.0
    """Mean length of its answers, later ones counting more; 0 before the first has ended."""
    next_output_tokens: int = 0
    """Of its next answer, as its client has said; 0 = it has not."""


OUTPUT_WEIGHT = 0.1
"""Of the latest answer in the mean length of answers."""


class SessionTable:
    """Sessions by key, least recently used first; keeps each home's idle context in the fleet's books."""

    def __init__(self, fleet: Fleet, ttl_s: float, limit: int) -> None:
        self._fleet = fleet
        self._ttl_s = ttl_s
        self._limit = limit
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self.output_tokens = 0.0
        """Mean length of all answers; 0 before the first has ended."""

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: SessionKey) -> Session | None:
        return self._sessions.get(key)

    def live_home(self, key: SessionKey) -> str | None:
        """The session's home, if that engine is alive."""
        session = self._sessions.get(key)
        return session.home if session is not None and session.home in self._fleet.books else None

    def adopt(self, key: SessionKey, home: str, round_number: int, now: float) -> None:
        """The ledger's home wins over ours: another replica may have moved the session."""
        session = self._sessions.get(key)
        if session is None:
            self._sessions[key] = Session(home, 0, now, round_number)
        elif session.home != home:
            self._leave_home(key, session)
            session.home, session.tokens = home, 0

    def settle(self, key: SessionKey, home: str, tokens: int, round_number: int, now: float) -> None:
        """The session's KV, `tokens` long, is (or will be) at `home`."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(home, tokens, now, round_number)
        elif session.home != home:
            self._leave_home(key, session)
        session.home, session.tokens, session.seen_s = home, tokens, now
        if round_number > session.round_number:
            session.round_number = round_number
        self._sessions.move_to_end(key)
        self._fleet.books[home].set_session(key, tokens)
        self._trim(now)

    def move(self, key: SessionKey, from_home: str, to_home: str, tokens: int, now: float) -> bool:
        """Its KV went from one to the other between rounds; False if it is known to be at a third."""
        session = self._sessions.get(key)
        if session is None:
            self.settle(key, to_home, tokens, 0, now)
            return True
        if session.home != from_home:
            return False
        self._leave_home(key, session)
        session.home = to_home
        self._fleet.books[to_home].set_session(key, session.tokens)
        return True

    def answered(self, key: SessionKey, tokens: int, next_tokens: int = 0) -> None:
        """A round of the session has ended with so many tokens of output; the next, it says, will have
        `next_tokens` (0: it says nothing)."""
        tokens = max(1, tokens)
        self.output_tokens = _mean(self.output_tokens, tokens)
        session = self._sessions.get(key)
        if session is not None:
            session.output_tokens = _mean(session.output_tokens, tokens)
            session.next_output_tokens = next_tokens

    def end(self, key: SessionKey) -> bool:
        """The session is over; False if it was unknown."""
        session = self._sessions.pop(key, None)
        if session is not None:
            self._leave_home(key, session)
        return session is not None

    def expected_output(self, session: Session | None) -> int:
        """Tokens that the session's next answer is expected to have; 0 = nothing is known."""
        if session is None:
            return round(self.output_tokens)
        return session.next_output_tokens or round(session.output_tokens or self.output_tokens)

    def engine_returned(self, engine_id: str) -> None:
        """A new incarnation took over the name: its sessions still have their home there, with no KV."""
        for key, session in self._sessions.items():
            if session.home == engine_id:
                self._fleet.books[engine_id].set_session(key, 0)

    def forget_idle(self, since_s: float) -> None:
        """Those last heard of before count at their homes no more. They still are at home there."""
        for book in self._fleet.books.values():
            for key in [k for k in book.session_tokens if self._seen_before(k, since_s)]:
                book.drop_session(key)

    def _seen_before(self, key: SessionKey, since_s: float) -> bool:
        session = self._sessions.get(key)
        return session is not None and session.seen_s < since_s

    def _trim(self, now: float) -> None:
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if len(self._sessions) <= self._limit and session.seen_s > now - self._ttl_s:
                return
            self._leave_home(key, session)
            del self._sessions[key]

    def _leave_home(self, key: SessionKey, session: Session) -> None:
        book = self._fleet.books.get(session.home)
        if book is not None:
            book.drop_session(key)


def _mean(before: float, latest: int) -> float:
    return before + OUTPUT_WEIGHT * (latest - before) if before else float(latest)
