"""How full an engine's page store is with KV that will be asked for again: an estimate for policies.

A store evicts what was used longest ago: what matters is how much of it is of sessions that will be back.
Whose KV was used on which engine, and when, the core sees; how long a session can be away and come back,
the rounds of the whole fleet tell. Pages that sessions share are counted for each of them.
"""

from __future__ import annotations

from collections import OrderedDict

SessionKey = tuple[str, str]
"""(tenant, session id)."""

BUCKETS = 16
"""Gaps of up to 1, 2, 4, ... 2^15 seconds; the last one has all that are longer."""

FORGET_AT = 20_000
"""Rounds after which the earlier ones count half."""

LOOK_EVERY = 64
"""Rounds between two estimates of the horizon, once there were as many."""


class Returns:
    """How long sessions are away before they come back."""

    __slots__ = ("_began", "_gaps", "_rounds", "horizon_s")

    def __init__(self) -> None:
        self.horizon_s = 2.0**BUCKETS
        """Who has been idle for longer has more likely ended than not; at first, nobody has."""
        self._gaps = [0] * BUCKETS
        self._began = 0
        """Sessions: about as many end, and do not come back from their last gap."""
        self._rounds = 0

    def began(self) -> None:
        """A session's first round."""
        self._began += 1

    def said_so(self) -> None:
        """A session that has told that it ends: no idle one is taken for it."""
        self._began = max(0, self._began - 1)

    def came_back(self, gap_s: float) -> bool:
        """A later one, so long after the one before was last heard of; True when the horizon changed."""
        bucket, limit_s = 0, 1.0
        while gap_s > limit_s and bucket < BUCKETS - 1:
            bucket, limit_s = bucket + 1, 2 * limit_s
        self._gaps[bucket] += 1
        self._rounds += 1
        if self._rounds >= FORGET_AT:
            self._gaps = [count // 2 for count in self._gaps]
            self._began, self._rounds = self._began // 2, sum(self._gaps)
        before_s = self.horizon_s
        if self._rounds < LOOK_EVERY or self._rounds % LOOK_EVERY == 0:
            self._look()
        return self.horizon_s != before_s

    def _look(self) -> None:
        """Of those idle for so long, as many came back later as have ended; twice that, to be sure."""
        later, horizon_s = 0, 2.0 ** (BUCKETS - 1)
        for count in reversed(self._gaps):
            later += count
            if later >= self._began:
                break
            horizon_s /= 2
        self.horizon_s = max(1.0, 2 * horizon_s)


class StoreUse:
    """Whose KV is in use in one engine's store, or was lately. Asking changes nothing."""

    __slots__ = ("_idle", "_returns", "_tokens", "_working")

    def __init__(self, returns: Returns) -> None:
        self._returns = returns
        self._idle: OrderedDict[SessionKey, tuple[int, float]] = OrderedDict()
        """Session -> (tokens, last use), the longest unused first."""
        self._working: dict[SessionKey, int] = {}
        """Sessions with a round that uses it now -> tokens."""
        self._tokens = 0
        """Of both."""

    def use(self, session: SessionKey, tokens: int) -> None:
        """A round of the session has the first `tokens` of its KV there, or will have."""
        self._working[session] = tokens = max(tokens, self._take_out(session))
        self._tokens += tokens

    def leave(self, session: SessionKey, now: float) -> None:
        """The round is over; its session may come back. Nothing happens if it was not at work there."""
        if session in self._working:
            tokens = self._take_out(session)
            self._idle[session] = tokens, now
            self._tokens += tokens
            self._forget(now)

    def drop(self, session: SessionKey) -> bool:
        """The session is not expected back; one that is at work stays. True if it was there."""
        return session in self._idle and self._take_out(session) > 0

    def _take_out(self, session: SessionKey) -> int:
        tokens = self._working.pop(session, 0)
        if not tokens and session in self._idle:
            tokens = self._idle.pop(session)[0]
        self._tokens -= tokens
        return tokens

    def _forget(self, now: float) -> None:
        """Those who are not expected back any more."""
        horizon_s = self._returns.horizon_s
        while self._idle:
            session, (tokens, last_s) = next(iter(self._idle.items()))
            if last_s + horizon_s >= now:
                break
            del self._idle[session]
            self._tokens -= tokens

    def live_tokens(self, now: float) -> int:
        """Tokens of sessions at work, or idle for no longer than the horizon."""
        horizon_s, live_tokens = self._returns.horizon_s, self._tokens
        for tokens, last_s in self._idle.values():
            if last_s + horizon_s >= now:
                break
            live_tokens -= tokens
        return live_tokens

    def expires_s(self, now: float) -> float:
        """When `live_tokens` gets less by itself; infinity while nobody is idle."""
        horizon_s = self._returns.horizon_s
        for _, last_s in self._idle.values():
            if last_s + horizon_s >= now:
                return last_s + horizon_s
        return float("inf")

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict themselves. For tests."""
        assert not self._working.keys() & self._idle.keys(), "a session is at work and idle"
        total = sum(self._working.values()) + sum(tokens for tokens, _ in self._idle.values())
        assert total == self._tokens, "tokens differ"
        times = [last_s for _, last_s in self._idle.values()]
        assert times == sorted(times), "the longest unused does not come first"
