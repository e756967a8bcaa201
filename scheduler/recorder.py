"""The runtime's calls to the ledger: claim, move a home, record with patience, publish reservations."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from msgspec import structs

from antiphon.scheduler.ledger import Ledger, LedgerUnavailable, Look, Moved, Recorded
from antiphon.scheduler.ledger_connection import RETRY_AFTER_S
from antiphon.scheduler.messages import (
    Claimed,
    ClaimLost,
    Rehome,
    Reserved,
    Totals,
)
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.rounds import RoundRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecorderConfig:
    session_ttl_s: float = 3600.0
    retry_s: float = 0.2
    tries: int = 300
    """A completion is offered to a ledger that is away this often before it is given up.

    In quick order: the others' claims must not come before it when the ledger is back.
    """
    pending_s: float = 1.0
    """A claim waits so long for the end of the session's last round to be recorded."""


class Reservations:
    """What a replica has reserved, published without anyone waiting for it: one write at a time."""

    def __init__(self, ledger: Ledger, replica: str) -> None:
        self._ledger = ledger
        self._replica = replica
        self._totals: dict[str, Totals] = {}
        self._publishing = False

    def note(self, reserved: Reserved) -> bool:
        """Remember a changed reservation; True if `publish` must be started."""
        self._totals[reserved.engine_id] = reserved.totals
        started, self._publishing = self._publishing, True
        return not started

    async def publish(self) -> None:
        """Write our reservations; what changes meanwhile goes with the next write."""
        sent: dict[str, Totals] | None = None
        try:
            while sent != self._totals:
                sent = dict(self._totals)
                await self._ledger.publish_totals(self._replica, sent)
        except LedgerUnavailable as error:
            self._ledger.keep_totals(self._replica, self._totals)  # the next heartbeat brings the newest
            log.debug("reservations are not published: %s", error)
        finally:
            self._publishing = False


class Recorder:
    """One replica's side of the ledger, for one model.

    Raises nothing but what `claim` says: without a ledger rounds are degraded, not failed.
    """

    def __init__(
        self,
        ledger: Ledger,
        replica: str,
        config: RecorderConfig | None = None,
        *,
        on_move: Callable[[str], None] = lambda result: None,
        on_recorded: Callable[[str, Recorded | None], None] = lambda round_id, recorded: None,
        reservations: Reservations | None = None,
        is_foreign: Callable[[str], bool] = lambda engine_id: False,
    ) -> None:
        """`on_move` gets the result of every `rehome`: a `Moved`, "away" or "unclaimed"; `on_recorded` is
        told what became of a round's completion, None if the ledger never took it.

        Recorders of one replica share their `reservations`. `is_foreign`: an engine id is another model's; a
        session that uses several models has a home in each, and the ledger knows the last one.
        """
        self._on_move = on_move
        self._on_recorded = on_recorded
        self._ledger = ledger
        self._replica = replica
        self._config = config or RecorderConfig()
        self._is_foreign = is_foreign
        self._reservations = reservations or Reservations(ledger, replica)
        self.note = self._reservations.note
        self.publish = self._reservations.publish
        self._pending: dict[tuple[str, str], asyncio.Event] = {}
        """Sessions whose last round has ended here and is not recorded -> set when it is, or given up."""

    @property
    def epoch(self) -> str:
        """Names the ledger's data: another one means that it was lost."""
        return self._ledger.epoch

    @property
    def lost_data(self) -> bool:
        """The ledger did so while sessions that live now may have been in it."""
        return self._ledger.lost_within(self._config.session_ttl_s)

    @property
    def session_ttl_s(self) -> float:
        return self._config.session_ttl_s

    async def claim(
        self, request: RoundRequest, candidates: Sequence[tuple[int, bytes]]
    ) -> Claimed | ClaimLost:
        """`candidates`: (tokens, hash) of the places in the prompt at which residency is asked for.

        Raises `RoundTaken` and `KeyReused`: the round must not run, with or without the ledger.
        """
        await self._last_one_recorded((request.tenant, request.session_id))
        try:
            claimed = await self._ledger.claim(
                replica=self._replica,
                round_id=request.round_id,
                session_id=request.session_id,
                tenant=request.tenant,
                candidates=candidates,
                ttl_s=self._config.session_ttl_s,
                slo_ttft_s=request.slo_ttft_s,
                slo_itl_s=request.slo_itl_s,
                parent_id=request.parent_id,
                own_ttl_s=request.hints.ttl_s,
                final=request.final,
                call=request.call,
            )
        except LedgerUnavailable as error:
            return ClaimLost(request.round_id, str(error))
        return _asked(request, self._own(claimed))

    async def _last_one_recorded(self, session: tuple[str, str]) -> None:
        """Its lease is still there before that: the next round would find it held, and be a fork."""
        over = self._pending.get(session)
        if over is not None and not self._ledger.connection.failed_within(RETRY_AFTER_S):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.pending_s):
                    await over.wait()

    async def look(
        self, request: RoundRequest, candidates: Sequence[tuple[int, bytes]]
    ) -> Look | LedgerUnavailable:
        """What a claim would be told, without claiming; the error if the ledger is away."""
        try:
            look = await self._ledger.look(
                replica=self._replica,
                session_id=request.session_id,
                tenant=request.tenant,
                candidates=candidates,
                parent_id=request.parent_id,
            )
        except LedgerUnavailable as error:
            return error
        return dataclasses.replace(look, claimed=_asked(request, self._own(look.claimed)))

    def _own(self, claimed: Claimed) -> Claimed:
        """Without a home and an end that are another model's."""
        if claimed.home is None or not self._is_foreign(claimed.home):
            return claimed
        return structs.replace(claimed, home=None, tip=None)

    async def rehome(self, tenant: str, session_id: str, fence: int, command: Rehome) -> None:
        """Tell the ledger of a session's new home, once: the round's completion says it again.

        `fence` is the claim's, 0 for a round that runs degraded: it holds nothing that it could change.
        """
        result = "unclaimed"
        why = "the round runs without the ledger"
        if fence:
            try:
                moved = await self._ledger.rehome(
                    fence=fence,
                    session_id=session_id,
                    tenant=tenant,
                    from_home=command.from_home,
                    to_home=command.to_home,
                )
                result = why = moved.value
            except LedgerUnavailable as error:
                result, why = "away", str(error)
        self._on_move(result)
        if result != Moved.MOVED.value:
            route = f"from {command.from_home} to {command.to_home}"
            log.warning("round %s: the home is not moved %s: %s", command.round_id, route, why)

    async def record(
        self,
        request: RoundRequest,
        receipt: Receipt,
        holdings: Sequence[tuple[bytes, int, str, str]],
        fence: int,
    ) -> None:
        """Offer the completion until it is taken: a lease that stayed would fork the session's next round.

        `holdings`: (page hash, tokens up to its end, engine id, incarnation). `fence` is the claim's, 0 for a
        round that ran degraded.
        """
        key, over = (request.tenant, receipt.session_id), asyncio.Event()
        self._pending[key] = over
        try:
            await self._record(request, receipt, holdings, fence)
        finally:
            over.set()
            if self._pending.get(key) is over:
                del self._pending[key]

    async def _record(
        self,
        request: RoundRequest,
        receipt: Receipt,
        holdings: Sequence[tuple[bytes, int, str, str]],
        fence: int,
    ) -> None:
        for attempt in range(self._config.tries):
            if attempt:
                await asyncio.sleep(self._config.retry_s)
            try:
                recorded = await self._ledger.complete(
                    replica=self._replica,
                    fence=fence,
                    session_id=receipt.session_id,
                    tenant=request.tenant,
                    receipt=receipt,
                    holdings=holdings,
                    ttl_s=self._config.session_ttl_s,
                    call=request.call,
                )
            except LedgerUnavailable as error:
                if not attempt:
                    log.warning("round %s is not recorded yet: %s", receipt.round_id, error)
                continue
            self._on_recorded(receipt.round_id, recorded)
            if not recorded:
                log.warning("round %s was fenced off: a newer claim has its session", receipt.round_id)
            return
        self._on_recorded(receipt.round_id, None)
        log.error("round %s was never recorded: the ledger stayed away", receipt.round_id)


def _asked(request: RoundRequest, claimed: Claimed) -> Claimed:
    """With the session's own targets only where the request names none."""
    ttft_s = claimed.slo_ttft_s if request.hints.ttft_s is None else 0.0
    itl_s = claimed.slo_itl_s if request.hints.itl_s is None else 0.0
    if (ttft_s, itl_s) == (claimed.slo_ttft_s, claimed.slo_itl_s):
        return claimed
    return structs.replace(claimed, slo_ttft_s=ttft_s, slo_itl_s=itl_s)
