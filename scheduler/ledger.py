"""The ledger: what must outlive a replica, in Redis. Leases, sessions, residency, totals, receipts.

One script per claim, move and completion (data/*.lua), each atomic and safe to repeat; never one per token.
A fence is max(last + 1, the server's clock in microseconds): strictly increasing, and above all that an
emptied or rolled-back Redis ever gave, because the clock went on meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from antiphon.engines.base import EngineRecord
from antiphon.engines.registry import RecordReader
from antiphon.scheduler import ledger_views
from antiphon.scheduler.ledger_answers import Look, Moved, Recorded, read_claim, read_look, tip_text
from antiphon.scheduler.ledger_connection import (
    RETRY_AFTER_S,
    KeyReused,
    LedgerConnection,
    LedgerUnavailable,
    RoundTaken,
    escaped,
)
from antiphon.scheduler.ledger_views import SessionRecord
from antiphon.scheduler.messages import (
    Claimed,
    Holding,
    Totals,
)
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.retries import CALL_MEMORY_S, Call
from antiphon.scheduler.settling import Settling

__all__ = [
    "KeyReused", "Ledger", "LedgerUnavailable", "Look", "Moved", "Recorded", "RoundTaken", "SessionRecord",
    "thin",
]  # fmt: skip

DENSE_CANDIDATES = 24
RECEIPTS_KEPT = 10_000
ROUND_MEMORY_S = CALL_MEMORY_S
"""How long a recorded round is remembered, so that a repeated completion is known as such."""
MAX_ID_CHARS = 255
FORK_SUFFIX_CHARS = 17
WRITTEN_LIMIT = 65_536

HoldingEntry = tuple[bytes, int, str, str]
"""(page hash, tokens up to its end, engine id, incarnation), as in `messages.Complete`."""


class Ledger:
    """One process's ledger. Every call ends within `deadline_s` or raises `LedgerUnavailable`.

    After a failed call, claims, looks and moves fail at once for `retry_after_s`: a ledger that hangs then
    costs one round its deadline, and not every round.
    """

    def __init__(
        self,
        url: str,
        *,
        fleet: str = "default",
        deadline_s: float = 0.5,
        lease_ttl_s: float = 900.0,
        retry_after_s: float = RETRY_AFTER_S,
        max_connections: int = 16,
        fleet_key: bytes | None = None,
    ) -> None:
        """`lease_ttl_s` bounds a lease whose replica lives on without it; longer than any round may take.

        Without `fleet_key`, `engines` answers records that nobody has signed too: for showing them only.
        """
        self.records = RecordReader(fleet, fleet_key)
        self.connection = LedgerConnection(url, fleet, deadline_s, max_connections)
        self._lease_ms = _milliseconds(lease_ttl_s)
        self._retry_after_s = retry_after_s
        self._epoch = ""
        """Names the ledger's data: another one means that it was lost, with all that we wrote."""
        self._written: OrderedDict[tuple[str, HoldingEntry], float] = OrderedDict()
        """(tenant, entry) -> when it was written: not again before its TTL wears down."""
        self._settling = Settling(self.release)
        self._claimed: set[tuple[str, str]] = set()
        """(replica, round) of claims that were answered and have not been completed or given back."""
        self._totals: dict[str, bytes] = {}
        self._lost_s: float | None = None
        self.doubles = Counter[str]()
        """Rounds that ran twice and were recorded once: how -> how many of ours were the other one."""

    @property
    def epoch(self) -> str:
        """Names the ledger's data, as last seen; "" before the first answer."""
        return self._epoch

    def lost_within(self, seconds: float) -> bool:
        """We saw it lose its data, less than `seconds` ago."""
        return self._lost_s is not None and time.monotonic() - self._lost_s < seconds

    # ---------------------------------------------------------------- rounds

    async def claim(
        self,
        *,
        replica: str,
        round_id: str,
        session_id: str,
        tenant: str,
        candidates: Sequence[tuple[int, bytes]],
        ttl_s: float,
        slo_ttft_s: float = 0.0,
        slo_itl_s: float = 0.0,
        parent_id: str | None = None,
        own_ttl_s: float | None = None,
        final: bool = False,
        call: Call | None = None,
    ) -> Claimed:
        """Lease the session for this round; never waits for a busy session, never refuses one.

        When a live round of a live replica holds the session, the answer names a new one, forked from it.
        `candidates` are (tokens, page hash), longest first; a long list is thinned. A new session with a
        `parent_id` starts with that one's home and tip. `own_ttl_s` is kept as the session's own, over
        `ttl_s`; `final` closes the session when this round has completed. Repeating a claim gives the same
        answer. A `call` that was tried before goes on in that try's session as the same round, and takes the
        lease from it. Raises `LedgerUnavailable`, `RoundTaken` if the round has ended, or another one has its
        place, or it runs on another live replica, or `KeyReused`.
        """
        self.not_if_it_failed()
        c = self.connection
        fork_of = session_id[: MAX_ID_CHARS - FORK_SUFFIX_CHARS]
        keys = [
            *c.keys("fence", "replicas", "sessions"),
            c.round_key(round_id),
            c.session_key(tenant, session_id),
            self._call_key(round_id, call),
            *c.residency_keys(tenant, [page_hash for _, page_hash in thin(candidates)]),
        ]
        arguments = [
            c.tag, escaped(replica), round_id, session_id, tenant, _milliseconds(ttl_s), self._lease_ms,
            fork_of, c.session_key(tenant, fork_of), secrets.token_hex(8), slo_ttft_s, slo_itl_s,
            parent_id or "", c.session_key(tenant, parent_id) if parent_id else "",
            _milliseconds(own_ttl_s) if own_ttl_s is not None else "", int(final),
            call.word if call is not None else "", call.asks if call is not None else "",
            int(call is not None and call.unnamed), _milliseconds(CALL_MEMORY_S),
        ]  # fmt: skip
        try:
            answer = await c.script("claim", keys, arguments)
        except (LedgerUnavailable, asyncio.CancelledError):
            self._settling.begin(replica, round_id)
            raise
        self._claimed.add((replica, round_id))
        self._see_epoch(answer[1])
        return read_claim(round_id, answer)

    async def look(
        self,
        *,
        replica: str,
        session_id: str,
        tenant: str,
        candidates: Sequence[tuple[int, bytes]],
        parent_id: str | None = None,
    ) -> Look:
        """What a claim would be told now. Reads only: no lease, no fence, no TTL is touched.

        `candidates` and `parent_id` as for `claim`. Raises `LedgerUnavailable`.
        """
        self.not_if_it_failed()
        c = self.connection
        keys = [
            *c.keys("replicas"),
            c.session_key(tenant, session_id),
            *c.residency_keys(tenant, [page_hash for _, page_hash in thin(candidates)]),
        ]
        parent_key = c.session_key(tenant, parent_id) if parent_id else ""
        arguments = [c.tag, escaped(replica), parent_key, parent_id or ""]
        return read_look(session_id, await c.script("look", keys, arguments))

    async def rounds_answered(self, tenant: str, session_id: str) -> int:
        """Number of the session's last round that completed; 0 = none did. Raises `LedgerUnavailable`."""
        self.not_if_it_failed()
        key = self.connection.session_key(tenant, session_id)
        return int(await self.connection.command("HGET", key, "answered") or 0)

    async def rehome(
        self, *, fence: int, session_id: str, tenant: str, from_home: str, to_home: str
    ) -> Moved:
        """Compare-and-set the home of the session that `fence` claimed; `Moved` says what came of it.

        Repeating it changes nothing and answers the same. Raises `LedgerUnavailable`.
        """
        self.not_if_it_failed()
        key = self.connection.session_key(tenant, session_id)
        return Moved(
            await self.connection.script(
                "rehome", [key], [self.connection.tag, "", fence, from_home, to_home]
            )
        )

    async def complete(
        self,
        *,
        replica: str,
        fence: int,
        session_id: str,
        tenant: str,
        receipt: Receipt,
        holdings: Sequence[HoldingEntry] = (),
        ttl_s: float,
        call: Call | None = None,
    ) -> Recorded:
        """Record how a round ended and free its lease; `session_id` is the one that the claim answered.

        `fence` is the claim's, 0 for a round that ran without one (degraded). FENCED: a newer claim has the
        session, and nothing was recorded but a count. Repeating a completion changes nothing and answers
        the same; so does that of a `call` that was answered before, but for the counter `repeated` and for
        where the KV is. Raises `LedgerUnavailable`.
        """
        c = self.connection
        now = time.monotonic()
        # A long history would be written anew by every round: the cost must not grow with its length.
        written, stale_s = self._written, now - ttl_s / 4
        fresh = [entry for entry in holdings if written.get((tenant, entry), stale_s) <= stale_s]
        keys = [
            *c.keys("fence"),
            c.round_key(receipt.round_id),
            c.session_key(tenant, session_id),
            *c.keys("sessions", "receipts", "counters"),
            self._call_key(receipt.round_id, call),
            *c.residency_keys(tenant, [page_hash for page_hash, _, _, _ in fresh]),
        ]
        arguments: list[str | int | bytes] = [
            c.tag, escaped(replica), receipt.round_id, fence, session_id, tenant, receipt.home or "",
            receipt.outcome.value, _milliseconds(ttl_s), receipt.prompt_tokens, receipt.completion_tokens,
            receipt.cached_tokens, msgspec.json.encode(receipt), RECEIPTS_KEPT, _milliseconds(ROUND_MEMORY_S),
            _tip(receipt.home, holdings), call.word if call is not None else "",
            call.asks if call is not None else "",
        ]  # fmt: skip
        for _, tokens, engine_id, incarnation in fresh:
            arguments += (engine_id, f"{incarnation}|{tokens}")
        self._settling.forget(replica, receipt.round_id)
        self._claimed.discard((replica, receipt.round_id))
        answer, epoch = await c.script("complete", keys, arguments)
        recorded = Recorded(answer)
        self._see_epoch(epoch)
        if recorded:
            self._remember(tenant, fresh, now)
        if recorded is not Recorded.YES:
            self.doubles[recorded.name.lower()] += 1
        return recorded

    async def release(self, replica: str, round_id: str) -> bool:
        """Give back a claim that will not run, even one that is still on its way; True if there was one.

        Raises `LedgerUnavailable`.
        """
        c = self.connection
        self._claimed.discard((replica, round_id))
        arguments = [c.tag, escaped(replica), round_id, _milliseconds(ROUND_MEMORY_S)]
        return bool(await c.script("release", [c.round_key(round_id), *c.keys("sessions")], arguments))

    def _call_key(self, round_id: str, call: Call | None) -> str:
        """A script's keys must all be names: without a call, that of the round stands there."""
        c = self.connection
        return c.call_keys(call.digest)[0] if call is not None else c.round_key(round_id)

    # ---------------------------------------------------------------- replicas

    async def publish_totals(self, replica: str, totals: Mapping[str, Totals]) -> None:
        """All that this replica has reserved, by engine id. Raises `LedgerUnavailable`.

        Written only where a heartbeat keeps it alive; else the next heartbeat brings it.
        """
        encoded = self.keep_totals(replica, totals)
        _, key = self.connection.replica_keys(replica)
        await self.connection.command("SET", key, encoded, "XX", "KEEPTTL")

    def keep_totals(self, replica: str, totals: Mapping[str, Totals]) -> bytes:
        """Have the next heartbeat write these; returns them encoded."""
        encoded = self._totals[replica] = msgspec.json.encode(totals)
        return encoded

    async def heartbeat(self, replica: str, ttl_s: float) -> tuple[str, ...]:
        """The replica, its leases and its totals live for `ttl_s` more. Raises `LedgerUnavailable`.

        Answers those of its rounds that are to end: a retry of the same call has taken their place. Also
        gives back the leases of claims whose answers never came.
        """
        c = self.connection
        running = [round_id for owner, round_id in self._claimed if owner == replica]
        keys = [*c.replica_keys(replica), *c.keys("replicas"), *map(c.round_key, running)]
        totals = self._totals.get(replica, b"{}")
        places = await c.script("heartbeat", keys, [c.tag, escaped(replica), _milliseconds(ttl_s), totals])
        await self._settling.now()
        return tuple(running[place - 1] for place in places)

    async def retire(self, replica: str) -> None:
        """A clean end: leases and totals of the replica are void at once. Raises `LedgerUnavailable`."""
        keys = self.connection.replica_keys(replica)
        await self.connection.command("DEL", *keys)

    # ---------------------------------------------------------------- views; all raise `LedgerUnavailable`

    async def check(self) -> None:
        """The ledger answers and takes our scripts."""
        await self.connection.load_scripts()

    async def engines(self) -> tuple[EngineRecord, ...]:
        """Records of the fleet's live engines, by id."""
        return await self.connection.call(lambda: self.records.read(self.connection.redis))

    async def sessions(
        self, limit: int = 100, cursor: int = 0, tenant: str | None = None
    ) -> tuple[tuple[SessionRecord, ...], int | None]:
        """A page of sessions, latest use first, and the next page's cursor (None at the end)."""
        return await ledger_views.sessions(self.connection, limit, cursor, tenant)

    async def receipts(self, limit: int = 100, session_id: str | None = None) -> tuple[dict[str, Any], ...]:
        """Latest first: JSON objects with the fields of `outcomes.Receipt`, and `tenant`, `recorded_s`."""
        return await ledger_views.receipts(self.connection, limit, session_id)

    async def counters(self) -> dict[str, int]:
        """Recorded rounds by outcome, and `fenced`: completions that came too late to be recorded."""
        return await ledger_views.counters(self.connection)

    async def close(self) -> None:
        await self._settling.close()
        await self.connection.close()

    def not_if_it_failed(self) -> None:
        """Raises `LedgerUnavailable` for a while after a failed call: nobody waits for it again."""
        self.connection.not_if_it_failed(self._retry_after_s)

    # ---------------------------------------------------------------- what need not be written again

    def _remember(self, tenant: str, entries: Sequence[HoldingEntry], now: float) -> None:
        for entry in entries:
            self._written[tenant, entry] = now
            self._written.move_to_end((tenant, entry))
        while len(self._written) > WRITTEN_LIMIT:
            self._written.popitem(last=False)

    def _see_epoch(self, epoch: str) -> None:
        if epoch != self._epoch:
            if self._epoch:
                self._lost_s = time.monotonic()
            self._epoch = epoch
            self._written.clear()


def thin(candidates: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """A list, longest first, that grows with the logarithm of a history's length.

    All of the longest DENSE_CANDIDATES stay; of the rest, counted from the shortest, the first 15 and then
    every 2nd, 4th, 8th, ... of each doubling. So a prefix is understated by less than an eighth.
    """
    count = len(candidates)
    return [
        candidate
        for at, candidate in enumerate(candidates)
        if at < DENSE_CANDIDATES or (count - at) % (1 << max(0, (count - at).bit_length() - 4)) == 0
    ]


def _tip(home: str | None, holdings: Sequence[tuple[bytes, int, str, str]]) -> str:
    """Where the round ended, of what its home holds; "" if it holds nothing."""
    ends = [(tokens, page_hash, inc) for page_hash, tokens, engine_id, inc in holdings if engine_id == home]
    if home is None or not ends:
        return ""
    tokens, page_hash, incarnation = max(ends)
    return tip_text(page_hash, Holding(home, incarnation, tokens))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
