"""What must always be true of the core's books. Called after every event in tests, never in production."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from antiphon.scheduler.fleet import EngineBook, pools_in_words
from antiphon.scheduler.receipts import is_remote
from antiphon.scheduler.states import PREFILL_PHASES, PREFILL_RESERVED, TRANSFER_PHASES, Phase, Round

if TYPE_CHECKING:
    from antiphon.scheduler.core import Scheduler


def check_scheduler(core: Scheduler) -> None:
    """Nothing reserved twice, no round in two places, no queue that starves, every round ends once."""
    assert core.accepted == len(core.rounds) + sum(core.ended.values()), "a round was lost or ended twice"
    for round in core.rounds.values():
        _check_round(core, round)
    for engine_id, book in core.books.fleet.books.items():
        known = set(core.rounds)
        assert set(book.decode) <= known, f"{engine_id}: decode slots of ended rounds"
        assert set(book.prefill_s) <= known, f"{engine_id}: prefill reservations of ended rounds"
        waiting = [(core.rounds[round_id].queue_key, round_id) for round_id in book.queue]
        assert len(book.queue) == len(waiting) == len(set(waiting)), f"{engine_id}: a round queued twice"
        assert waiting == sorted(waiting), f"{engine_id}: its queue is out of order"
        assert book.queue.head(2) == [round_id for _, round_id in waiting[:2]], f"{engine_id}: another head"
        limit = core.config.prefill_in_flight
        assert len(book.in_flight) <= limit, f"{engine_id}: {len(book.in_flight)} in flight, limit {limit}"
        assert not book.queue or len(book.in_flight) == limit, f"{engine_id}: its queue starves"
        _check_sums(engine_id, book)
        assert book.idle_tokens == sum(book.session_tokens.values()), f"{engine_id}: session tokens differ"
    assert core.books.fleet.pools == pools_in_words(core.books.fleet.books.values()), "pools differ"
    core.standings.check(core.rounds)
    if core.demand is not None:
        core.demand.check(core.rounds)
    if core.observer is not None:
        core.observer.check()


def _check_sums(engine_id: str, book: EngineBook) -> None:
    """What is kept as it changes is what adding up says."""
    prefill_s = math.fsum(book.prefill_s.values())
    assert math.isclose(book.prefill_sum_s, prefill_s, abs_tol=1e-9), f"{engine_id}: prefill seconds differ"
    assert book.prefill_s or book.prefill_sum_s == 0.0, f"{engine_id}: an empty sum is not 0"
    book.store.check_invariants()
    stalled = list(book.slacks)
    assert len(stalled) == len(set(stalled)) == len(book.slacks), f"{engine_id}: a stall budget twice"
    assert set(stalled) <= set(book.decode), f"{engine_id}: stall budgets of rounds that do not decode here"
    slacks = book.slacks.least(len(stalled))
    assert list(slacks) == sorted(slacks), f"{engine_id}: stall budgets out of order"
    for owed in (book.incoming, book.outgoing):
        assert owed.total == sum(owed.parts.values()), f"{engine_id}: bytes owed differ"
        assert all(count > 0 for count in owed.parts.values()), f"{engine_id}: nothing owed is an entry"
    slots = book.decode.values()
    assert book.context_tokens == sum(slot.context_tokens for slot in slots), f"{engine_id}: context differs"
    assert book.itl_slos == Counter(slot.itl_slo_s for slot in slots), f"{engine_id}: ITL targets differ"


def _check_round(core: Scheduler, round: Round) -> None:
    books, round_id, placement = core.books.fleet.books, round.round_id, round.placement
    queued = [e for e, b in books.items() if round_id in b.queue]
    in_flight = [e for e, b in books.items() if round_id in b.in_flight]
    decode = [e for e, b in books.items() if round_id in b.decode]
    prefill = [e for e, b in books.items() if round_id in b.prefill_s]
    assert round.phase is not Phase.ENDED, f"{round_id}: ended but kept"
    if round.phase is Phase.CLAIMING:
        assert not (queued or in_flight or decode or prefill), f"{round_id}: reserved before it was placed"
        return
    assert placement is not None, f"{round_id}: {round.phase.value} without a placement"
    where, home = placement.prefill_engine, placement.home
    remote = is_remote(placement.arm)
    assert queued == ([where] if round.phase is Phase.QUEUED else []), f"{round_id}: queued at {queued}"
    expected = [where] if round.phase in PREFILL_PHASES else []
    assert in_flight == expected, f"{round_id}: in flight at {in_flight}, expected {expected}"
    assert decode == [home], f"{round_id}: decode slots at {decode}, home {home}"
    working = PREFILL_RESERVED if remote else {Phase.PUSHING, Phase.GENERATING}
    expected = [where] if round.phase in working else []
    assert prefill == expected, f"{round_id}: prefill reserved at {prefill}, expected {expected}"
    _check_transfers(core, round)


def _check_transfers(core: Scheduler, round: Round) -> None:
    """What a round still has to move is owed at both ends, and nothing else is."""
    assert round.placement is not None
    books, round_id = core.books.fleet.books, round.round_id
    of_history, homewards = TRANSFER_PHASES[round.placement.arm]
    incoming, outgoing = {}, {}
    for puller, source, tokens in round.transfers():
        if round.phase in (of_history if source == round.source else homewards):
            incoming[puller] = outgoing[source] = books[puller].kv_bytes(tokens)
    into = {e: b.incoming.parts[round_id] for e, b in books.items() if round_id in b.incoming.parts}
    assert into == incoming, f"{round_id}: owed into {into}, expected {incoming}"
    out_of = {e: b.outgoing.parts[round_id] for e, b in books.items() if round_id in b.outgoing.parts}
    # a source may have gone since, and come back with nothing
    assert out_of.items() <= outgoing.items(), f"{round_id}: owed out of {out_of}, expected {outgoing}"
