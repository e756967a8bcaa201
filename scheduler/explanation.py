"""What the scheduler would do with a round, without doing it: what `POST /v1/explain` answers.

Nothing is reserved, leased, written or sent to an engine. It is what a round that came now would be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from antiphon.policies.base import Candidate, Placement, Reject
from antiphon.scheduler.books import claimed_holdings
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.ledger import Look
from antiphon.scheduler.messages import Claimed, RoundArrived
from antiphon.scheduler.receipt_log import candidate_json
from antiphon.scheduler.recorder import Recorder
from antiphon.scheduler.rounds import RoundRequest
from antiphon.scheduler.states import Round, new_round


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision that was not carried out, and what it was made from."""

    arrived: RoundArrived
    answer: Placement | Reject
    history_tokens: dict[str, int]
    """H(e) of every engine that holds some of the prompt."""
    look: Look | None
    """What the ledger knows of the session; None = it is away: decided by what this replica knows."""
    why_degraded: str = ""

    def json(self) -> dict[str, Any]:
        """JSON-ready. Whose session it is, and what named the targets, is the gateway's to add."""
        placed = self.answer if isinstance(self.answer, Placement) else None
        refused = self.answer if isinstance(self.answer, Reject) else None
        return {
            "arm": placed.arm.value if placed else None,
            "home": placed.home if placed else None,
            "prefill_engine": placed.prefill_engine if placed else None,
            "source": placed.source if placed else None,
            "reason": self.answer.reason,
            "retry_after_s": refused.retry_after_s if refused else None,
            "predicted": _shown(placed.predicted, placed.home) if placed else None,
            "considered": [_shown(c, placed.home) for c in placed.considered] if placed else [],
            "prompt_tokens": self.arrived.prompt_tokens,
            "max_output_tokens": self.arrived.max_output_tokens,
            "history_tokens": self.history_tokens,
            "session": self._session(),
            "degraded": self.why_degraded or None,
        }

    def _session(self) -> dict[str, Any]:
        look = self.look
        return {
            "id": self.arrived.session_id,
            "known": look.known if look else None,
            "busy": look.busy if look else None,
            "home": look.claimed.home if look else None,
            "round": look.claimed.round_number if look else None,
            "parent_id": look.claimed.parent_id if look else None,
        }


async def explain(
    core: Scheduler,
    recorder: Recorder,
    request: RoundRequest,
    arrived: RoundArrived,
    clock: Callable[[], float],
) -> Explanation:
    """Ask the ledger, which leases nothing, and the core, which remembers nothing."""
    places = core.checkpoints(arrived.hashes, arrived.page_size_tokens)
    look = await recorder.look(request, places)
    known, now = look if isinstance(look, Look) else None, clock()
    claimed = replace(known.claimed, round_id=arrived.round_id) if known else None
    answer = core.explain(arrived, claimed, now)
    history = _history(core, new_round(arrived, now, now), claimed)
    return Explanation(arrived, answer, history, known, "" if known else str(look))


def _history(core: Scheduler, round: Round, claimed: Claimed | None) -> dict[str, int]:
    """What this replica believes of the prompt, and what the ledger adds to it."""
    held = core.books.held(round)
    for holding in claimed_holdings(round, claimed) if claimed else ():
        book = core.books.fleet.books.get(holding.engine_id)
        if book is not None and book.up.incarnation == holding.incarnation:
            held[holding.engine_id] = max(held.get(holding.engine_id, 0), holding.tokens)
    return dict(sorted(held.items()))


def _shown(candidate: Candidate, home: str) -> dict[str, Any]:
    return candidate_json(candidate) | {"home": candidate.home or home}
