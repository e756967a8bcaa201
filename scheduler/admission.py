"""Whether a round is let in where it would be placed, or refused at once because it would only wait. Pure.

Two bounds: rounds that wait in one prefill engine's queue, and the predicted wait, as a multiple of the
round's TTFT target. The wait is what stands before the round, never its own work: on an idle fleet nothing is
refused, however long it is. Rounds of sessions under way are let in longer: who refuses one wastes all of its
session.
"""

from __future__ import annotations

from msgspec import Struct

from antiphon.policies.base import Placement, RoundView
from antiphon.scheduler.books import Books
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.receipts import is_remote
from antiphon.scheduler.states import Round

OVERLOADED = "overloaded"
"""A bound is hit."""
WOULD_WAIT = "would_wait"
LEAST_RETRY_S = 0.25
MOST_RETRY_S = 30.0


class Refusal(Struct, frozen=True, gc=False):
    code: str
    reason: str
    retry_after_s: float


def why_not_admitted(
    books: Books, config: CoreConfig, round: Round, placement: Placement, view: RoundView
) -> Refusal | None:
    """None = the round is let in, as every one is whose home drains: it has to go somewhere."""
    if view.leaving:
        return None
    queue = books.fleet.books[placement.prefill_engine].queue
    queued_rounds = queue.length if is_remote(placement.arm) else 0
    under_way = round.round_number > 1 or view.home is not None
    return why_refused(placement, queued_rounds, round.arrived.slo_ttft_s, under_way, config)


def why_refused(
    placement: Placement, queued_rounds: int, target_s: float, under_way: bool, config: CoreConfig
) -> Refusal | None:
    """None = it is let in. `queued_rounds`: those that wait in the queue that it would join."""
    wait_s, engine = placement.predicted.queue_s, placement.prefill_engine
    if 0 < config.max_queued_rounds <= queued_rounds:
        what = f"{queued_rounds} rounds wait for {engine} here, as many as may"
        return Refusal(OVERLOADED, what, _bounded(wait_s / 2))
    factor = config.admission_under_way if under_way else config.admission
    most_s = factor * target_s
    if factor <= 0 or wait_s <= most_s:
        return None
    over = f"over {factor:g} times its TTFT target of {target_s:g} s"
    what = f"it would wait {wait_s:.1f} s for {engine}, {over}"
    return Refusal(WOULD_WAIT, what, _bounded(wait_s - most_s))


def _bounded(seconds: float) -> float:
    return min(MOST_RETRY_S, max(LEAST_RETRY_S, seconds))
