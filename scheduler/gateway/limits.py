"""Limits of API keys: sessions that live, rounds in flight, tokens per minute. Body size: intake.py.

Sessions and tokens are counted over the fleet, by one script in the ledger per round, before its claim; what
a round has generated is told with the key's next round. While the ledger is away each replica counts for
itself. Rounds in flight are counted per replica; a retry is not refused because of its first try.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from antiphon.scheduler.access_config import LimitsConfig
from antiphon.scheduler.errors import from_refusal
from antiphon.scheduler.gateway import token_bucket
from antiphon.scheduler.gateway.caller import Caller, current_caller
from antiphon.scheduler.gateway.seats import Seats
from antiphon.scheduler.gateway.token_bucket import MINUTE_S, Bucket
from antiphon.scheduler.ledger_connection import LedgerConnection, LedgerUnavailable, escaped
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.rounds import RoundHandle, RoundRefused, RoundRequest, RoundRunner

MAX_COUNTS = 10_000
"""Keys whose counts are kept here; of others only those with rounds in flight."""
IN_FLIGHT_RETRY_S = 1.0
SESSIONS_RETRY_S = 10.0


@dataclass(slots=True, eq=False)
class _Counts:
    """What one key uses, as far as this replica knows."""

    seats: Seats = field(default_factory=Seats)
    """Of its rounds in flight."""
    bucket: Bucket | None = None
    """As the ledger last said; our own while it is away."""
    owed_tokens: float = 0.0
    """Generated since, and not told yet; below 0: taken for rounds that then were refused."""
    owed_at_s: float = 0.0
    sessions: OrderedDict[tuple[str, str], float] = field(default_factory=OrderedDict)
    """(tenant, session) -> last use: for when the ledger is away."""


class Limits:
    """Counts what keys use. For one event loop."""

    def __init__(
        self,
        connection: LedgerConnection | None,
        *,
        session_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a `connection` every count is this replica's own."""
        self._connection = connection
        self._session_ttl_s = session_ttl_s
        self._clock = clock
        self._counts: OrderedDict[str, _Counts] = OrderedDict()

    @asynccontextmanager
    async def admitted(self, caller: Caller, request: RoundRequest) -> AsyncIterator[_Round]:
        """Let a round in, for as long as it is entered; raises `RoundRefused`."""
        counts, limits = self._of(caller.key), caller.limits
        call = request.call
        name, again = (call.digest, call.again) if call is not None else ("", False)
        seat = counts.seats.take(limits.rounds_in_flight, name, again=again)
        if seat is None:
            what = f"This key has {counts.seats.taken} rounds in flight here, as many as it may."
            raise RoundRefused("rate_limit_exceeded", what, IN_FLIGHT_RETRY_S)
        round = _Round(len(request.prompt))
        try:
            if limits.tokens_per_minute or limits.sessions:
                await self._admit(caller, counts, request, round)
            yield round
        except RoundRefused:
            round.refused = True
            raise
        finally:
            counts.seats.leave(seat)
            if limits.tokens_per_minute and round.let_in:
                counts.owed_tokens += round.uncounted()
                counts.owed_at_s = self._clock()

    async def opened(self, session_id: str) -> None:
        """Let the caller make a session without a round; raises `ApiError` (429)."""
        caller = current_caller()
        if caller.limits.sessions:
            limits = LimitsConfig(sessions=caller.limits.sessions)
            session = caller.tenant, session_id
            try:
                await self._let_in(caller.key, self._of(caller.key), _Asked(limits, session))
            except RoundRefused as refusal:
                raise from_refusal(refusal) from refusal

    async def _admit(self, caller: Caller, counts: _Counts, request: RoundRequest, round: _Round) -> None:
        limits, session = caller.limits, (request.tenant, request.session_id)
        asked = _Asked(limits, session, round.prompt_tokens, self._owed(counts, limits.tokens_per_minute))
        try:
            await self._let_in(caller.key, counts, asked)
            round.let_in = True
        finally:
            caller.headers[:] = _headers(limits, counts.bucket)

    async def _let_in(self, key: str, counts: _Counts, asked: _Asked) -> None:
        """Raises `RoundRefused`."""
        limits = asked.limits
        try:
            full, wait_s = await self._ask(key, counts, asked)
        except LedgerUnavailable:
            full, wait_s = self._ask_ourselves(counts, asked)
        if full:
            what = f"This key has {limits.sessions} live sessions, as many as it may."
            raise RoundRefused("session_limit_exceeded", what, SESSIONS_RETRY_S)
        if wait_s > 0:
            what = (
                f"This key may use {limits.tokens_per_minute} tokens per minute; this prompt has "
                f"{asked.tokens}. Try again in {wait_s:.1f} s."
            )
            raise RoundRefused("rate_limit_exceeded", what, wait_s)
        counts.sessions[asked.session] = self._clock()
        counts.sessions.move_to_end(asked.session)
        if len(counts.sessions) > MAX_COUNTS:
            counts.sessions.popitem(last=False)

    async def _ask(self, key: str, counts: _Counts, asked: _Asked) -> tuple[bool, float]:
        """(too many sessions, seconds to wait), by the ledger."""
        c, limits, name = self._connection, asked.limits, escaped(key)
        if c is None:
            raise LedgerUnavailable("no ledger")
        c.not_if_it_failed()
        arguments: list[Any] = [
            limits.tokens_per_minute, asked.tokens, repr(asked.owed), limits.sessions,
            c.session_key(*asked.session), round(2000 * self._session_ttl_s),
        ]  # fmt: skip
        keys = c.keys(f"limit:{name}", f"limit_sessions:{name}")
        let_in, full, left, wait_ms, _, _ = await c.script("limit", keys, arguments)
        if limits.tokens_per_minute:
            counts.bucket = Bucket(float(left), self._clock())
        return bool(full), 0.0 if let_in else wait_ms / 1000

    def _ask_ourselves(self, counts: _Counts, asked: _Asked) -> tuple[bool, float]:
        now, limits, known = self._clock(), asked.limits, counts.sessions
        while known and next(iter(known.values())) < now - self._session_ttl_s:
            known.popitem(last=False)
        full = 0 < limits.sessions <= len(known) and asked.session not in known
        if not limits.tokens_per_minute:
            return full, 0.0
        tokens = 0 if full else asked.tokens
        taken = token_bucket.take(counts.bucket, limits.tokens_per_minute, tokens, asked.owed, now)
        counts.bucket = taken.bucket
        return full, taken.wait_s

    def _owed(self, counts: _Counts, per_minute: int) -> float:
        """What is to be told now. The bucket has filled meanwhile: after long enough nothing is owed."""
        owed, counts.owed_tokens = counts.owed_tokens, 0.0
        idle_s = self._clock() - counts.owed_at_s
        return owed if idle_s * per_minute < (owed + per_minute) * MINUTE_S else 0.0

    def _of(self, key: str) -> _Counts:
        counts = self._counts.setdefault(key, _Counts())
        self._counts.move_to_end(key)
        if len(self._counts) > MAX_COUNTS:
            oldest = next(iter(self._counts))
            if not self._counts[oldest].seats.taken:
                del self._counts[oldest]
        return counts


@dataclass(frozen=True, slots=True)
class _Asked:
    limits: LimitsConfig
    session: tuple[str, str]
    """(tenant, session id)."""
    tokens: int = 0
    owed: float = 0.0


@dataclass(slots=True, eq=False)
class _Round:
    """What one admitted round uses."""

    prompt_tokens: int
    let_in: bool = False
    refused: bool = False
    handle: RoundHandle | None = None

    def uncounted(self) -> int:
        """Tokens that its admission did not count: its output; less than 0 when it was refused afterwards."""
        if self.refused:
            return -self.prompt_tokens
        if self.handle is None:
            return 0
        receipt = self.handle.receipt
        if receipt is not None and receipt.outcome is Outcome.COMPLETED:
            return receipt.completion_tokens
        return self.handle.pushed_chunks  # nobody counted its tokens: a chunk has about one


class LimitedRunner:
    """A `RoundRunner` whose rounds are first let in by the limits of the caller's key."""

    def __init__(self, runner: RoundRunner, limits: Limits) -> None:
        self._runner = runner
        self._limits = limits

    def submit(self, request: RoundRequest) -> AbstractAsyncContextManager[RoundHandle]:
        """Entering it may raise `RoundRefused`."""
        caller = current_caller()
        return self._runner.submit(request) if _unlimited(caller.limits) else self._submit(caller, request)

    async def explain(self, request: RoundRequest) -> dict[str, Any]:
        return await self._runner.explain(request)

    @asynccontextmanager
    async def _submit(self, caller: Caller, request: RoundRequest) -> AsyncIterator[RoundHandle]:
        async with self._limits.admitted(caller, request) as round, self._runner.submit(request) as handle:
            round.handle = handle
            yield handle


def _unlimited(limits: LimitsConfig) -> bool:
    return not (limits.rounds_in_flight or limits.tokens_per_minute or limits.sessions)


def _headers(limits: LimitsConfig, bucket: Bucket | None) -> list[tuple[bytes, bytes]]:
    """As OpenAI has them, of the tokens."""
    if not limits.tokens_per_minute or bucket is None:
        return []
    left = max(0, math.floor(bucket.level))
    reset_s = max(0.0, limits.tokens_per_minute - bucket.level) * MINUTE_S / limits.tokens_per_minute
    shown = {"limit": str(limits.tokens_per_minute), "remaining": str(left), "reset": duration(reset_s)}
    return [(f"x-ratelimit-{name}-tokens".encode(), value.encode()) for name, value in shown.items()]


def duration(seconds: float) -> str:
    """As OpenAI writes it: "20ms", "1.5s", "6m0s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{rest:.0f}s" if minutes else f"{rest:.3g}s"
