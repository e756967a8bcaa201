"""The core: events in, commands out. No clock, no I/O, no chance.

`Scheduler.receive(event, now)` decides and reserves in one step and returns what the driver must do. One call
per round is under way at any time; the driver reports how it ended. Life of a round: states.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from antiphon.policies.base import MOVE, Ordering, Placement, Policy, Reject
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.attempts import Attempts, failures_of
from antiphon.scheduler.checks import check_scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.corrections import CorrectionConfig
from antiphon.scheduler.messages import (
    Claim,
    Claimed,
    ClaimLost,
    ClientGone,
    Command,
    EngineDown,
    EngineDraining,
    EngineFailed,
    EngineSuspect,
    EngineUp,
    Event,
    FirstToken,
    GoesOn,
    LoadReported,
    PrefetchDone,
    PrefillDone,
    RoundArrived,
    RoundFinished,
    SessionEnded,
    SessionMoved,
    SessionsAged,
    Tick,
)
from antiphon.scheduler.observer import Observer
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.states import (
    DECODING,
    ENDED,
    PULLING,
    PUSHING,
    IllegalEvent,
    Round,
    new_round,
    with_session,
)
from antiphon.scheduler.what_if import explain, guess_home


class Scheduler(Attempts):
    """One replica's mind. Not thread-safe: one driver calls it."""

    def __init__(
        self, policy: Policy, ordering: Ordering, latency: LatencyModel, config: CoreConfig | None = None
    ) -> None:
        super().__init__(policy, ordering, latency, config or CoreConfig())
        self.accepted = 0
        self._deadlines: list[tuple[float, str]] = []
        self.observer: Observer | None = None
        if self.config.corrections:
            self.observer = Observer(self.books.fleet, self.rounds, CorrectionConfig())

    # ---------------------------------------------------------------- the port

    def receive(self, event: Event, now: float) -> list[Command]:
        """Take one event and return what to do, in order. An illegal event raises and changes nothing."""
        self._commands = []
        on_fleet = self._fleet_events.get(type(event))
        if on_fleet is not None:
            on_fleet(self, event, now)
        else:
            self._on_round_event(event, now)
        dirty = self.books.dirty
        if dirty:
            books = self.books.fleet.books
            for engine_id in sorted(dirty):
                book = books.get(engine_id)
                if book is not None and book.queue.length:
                    self._dispatch(book, now)
            if self.config.publish:
                self._commands.extend(self.books.publish())
            dirty.clear()
        if self.observer is not None:
            self.observer.observe(event, self._commands, now)
        return self._commands

    def next_deadline(self) -> float | None:
        """When a Tick is due; None while nothing waits."""
        while self._deadlines and self._has_token(*self._deadlines[0]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def checkpoints(
        self, hashes: Sequence[bytes], page_size_tokens: int, since: int = 0
    ) -> list[tuple[int, bytes]]:
        """(tokens, hash) at which a ledger is told of a chain, or asked about it; longest first.

        Pure. For the driver that has a ledger: it walks the whole chain, but for its first `since` pages.
        """
        return self.books.residency.checkpoints(hashes, page_size_tokens, since)

    def explain(self, arrived: RoundArrived, claimed: Claimed | None, now: float) -> Placement | Reject:
        """What `receive` would decide now for such a round and claim. Pure: nothing is begun or believed.

        `claimed` None: as without a ledger. The round must not have arrived.
        """
        return explain(self.policy, self.books, self.standings, self.config, arrived, claimed, now)

    def silence_s(self, round_id: str) -> float:
        """How long the round's answer may bring nothing between two tokens, as things are now. Pure.

        It waits for all prefills that its home does meanwhile, other rounds' too: ask again before giving up.
        """
        round = self.rounds.get(round_id)
        if round is None or round.placement is None:
            return self.config.call_floor_s
        return self._patience_s(round.placement.home, round.arrived.slo_itl_s)

    def check_invariants(self) -> None:
        """Raise AssertionError when the books contradict each other. Tests call it after every event."""
        check_scheduler(self)

    # ---------------------------------------------------------------- rounds

    def _on_arrived(self, event: RoundArrived, now: float) -> None:
        if event.round_id in self.rounds:
            raise IllegalEvent(f"round {event.round_id} has arrived already")
        deadline_s = now + self.config.first_token_deadline_s
        self.rounds[event.round_id] = new_round(event, now, deadline_s)
        self.accepted += 1
        heapq.heappush(self._deadlines, (deadline_s, event.round_id))
        self._commands.append(Claim(event.round_id))

    def _on_round_event(self, event: Event, now: float) -> None:
        round = self.rounds.get(event.round_id)  # type: ignore[union-attr]
        if round is None:
            raise IllegalEvent(f"no such round: {event!r}")
        round.check(event)
        self._round_events[type(event)](self, round, event, now)

    def _on_claimed(self, round: Round, event: Claimed, now: float) -> None:
        with_session(round, event)
        self.books.count_others(event)
        self.books.hold_claimed(round, event)
        home = event.home
        if home is not None and event.parent_id is not None:
            home = self.books.claimed_home(round, event, self.books.held(round))
        if home is not None:
            self.books.sessions.adopt(round.session_key, home, event.round_number, now)
        self._place(round, now)

    def _on_claim_lost(self, round: Round, event: ClaimLost, now: float) -> None:
        """The ledger is away: go on with what the core knows."""
        round.degraded = True
        round.notes.append(f"ledger: {event.reason}")
        arrived = round.arrived
        self.books.residency.merge(arrived.hashes, arrived.page_size_tokens, event.holdings)
        session = self.books.sessions.get(round.session_key)
        round.round_number = session.round_number + 1 if session else 1
        self.standings.refresh(now)
        round.notes += guess_home(self.books, self.standings, round, now)
        self._place(round, now)

    def _on_prefetch_done(self, round: Round, event: PrefetchDone, now: float) -> None:
        elapsed_s = now - round.entered_s
        self.books.hold(round, event.engine_id, event.pages)
        self._learn_of_link(round, event, now)
        if event.reason:
            round.notes.append(f"{round.phase.value} on {event.engine_id}: {event.reason}")
        placement = round.placement
        assert placement is not None
        if round.source is not None and (round.phase is PULLING or placement.arm is MOVE):
            round.pull_s = elapsed_s
            round.pulled_tokens = event.pulled_pages * round.arrived.page_size_tokens
            self.books.transfer_over(round.round_id, placement.prefill_engine, round.source)
            if placement.arm is MOVE:
                round.bytes_home_to_home += event.pulled_bytes
                self._moved(round, now)
            else:
                round.bytes_decode_to_prefill += event.pulled_bytes
                self._prefill(round, now)
        else:
            round.push_s = elapsed_s
            round.bytes_prefill_to_decode += event.pulled_bytes
            self.books.transfer_over(round.round_id, placement.home, placement.prefill_engine)
            self._generate(round, now)

    def _learn_of_link(self, round: Round, event: PrefetchDone, now: float) -> None:
        placement = round.placement
        assert placement is not None
        pulls = round.phase is PULLING or placement.arm is MOVE
        source = (round.source or "") if pulls else placement.prefill_engine
        failed = event.link_failed and source in self.books.fleet.books
        came = event.pulled_pages > 0
        self.standings.link_told((event.engine_id, source), round.round_id, failed=failed, came=came, now=now)

    def _on_prefill_done(self, round: Round, event: PrefillDone, now: float) -> None:
        assert round.placement is not None
        engine_id, pages = round.placement.prefill_engine, len(round.arrived.hashes)
        round.prefilled_s = now - round.entered_s
        earlier = round.prefill_cached_tokens  # what a failed try computed was computed for this round too
        least = event.cached_tokens if earlier is None else min(earlier, event.cached_tokens)
        round.prefill_cached_tokens = least
        self.books.prefill_over(round, engine_id)
        self.books.hold(round, engine_id, pages)
        self.standings.progressed(engine_id, now)
        home = round.placement.home
        if pages and self._may_read(round, home, engine_id, now, just_spoke=True):
            round.enter(PUSHING, now)
            self._prefetch(round, home, engine_id, pages, now)
            return
        if pages:
            self.books.transfer_over(round.round_id, home, engine_id)
        self._generate(round, now)

    def _on_client_gone(self, round: Round, event: ClientGone, now: float) -> None:
        self._abort(round)
        self._end(round, Outcome.CANCELLED, now)

    def _on_first_token(self, round: Round, event: FirstToken, now: float) -> None:
        assert round.placement is not None
        round.enter(DECODING, now)
        goes_on = round.first_token_s is not None
        if not goes_on:
            round.first_token_s, round.answered_by = now, len(round.tries) - 1
        placement, books = round.placement, self.books.fleet.books
        home = books[placement.home]
        self.standings.progressed(placement.home, now)
        home.drop_prefill(round.round_id)
        home.slacks.begin(round.round_id, home.prefill_sum_s)
        self.books.touch(placement.home)
        if placement.prefill_engine in books and not goes_on:
            books[placement.prefill_engine].ttft.add(now, now - round.tried_s)
            self.books.touch(placement.prefill_engine)

    def _on_finished(self, round: Round, event: RoundFinished, now: float) -> None:
        assert round.placement is not None and round.first_token_s is not None
        home = self.books.fleet.books[round.placement.home]
        broke = round.answered_by < len(round.tries) - 1  # an answer of two engines is no measure of one
        if event.completion_tokens > 1 and not event.reader_lagged and not broke:
            home.itl.add(now, (now - round.first_token_s) / (event.completion_tokens - 1))
        self.standings.progressed(round.placement.home, now)
        tokens = round.prompt_tokens + event.completion_tokens
        self.books.settle(round, round.placement.home, tokens, now)
        self.books.answered(round, event.completion_tokens)
        home.store.use(round.session_key, tokens)
        size = round.arrived.page_size_tokens
        self.books.residency.record(home.up.engine_id, home.up.incarnation, event.hashes, size)
        self._end(round, Outcome.COMPLETED, now, event)

    def _on_failed(self, round: Round, event: EngineFailed, now: float) -> None:
        if event.kind == "deadline":
            self._abort(round)
        since_s = now - self.config.call_floor_s if round.phase is DECODING else round.entered_s
        self.standings.engine_failed(event.engine_id, round.round_id, event.kind, since_s, now)
        if round.phase is DECODING:
            if isinstance(event.goes_on, GoesOn):
                self._carry(round, event.goes_on, event.engine_id, f"{event.kind}: {event.message}", now)
                self._go_on(round, now)
            else:
                self._break_off(round, event.message, event.goes_on, now)
            return
        round.all_unreachable = round.all_unreachable and event.kind == "unreachable"
        self._give_up_try(round, event.engine_id, f"{event.kind}: {event.message}", now)
        if event.kind == "bad_request":
            self._refuse(round, "bad_upstream_request", event.message, now)
        else:
            self._try_again(round, now)

    def _go_on(self, round: Round, now: float) -> None:
        """Have a broken answer go on elsewhere; its next token has a deadline of its own."""
        round.deadline_s = now + self.config.first_token_deadline_s
        heapq.heappush(self._deadlines, (round.deadline_s, round.round_id))
        self._try_again(round, now)

    def _break_off(self, round: Round, message: str, why: str, now: float) -> None:
        if why:
            round.notes.append(f"the answer could not go on elsewhere: {why}")
        self._break(round, message, now)

    def _on_tick(self, event: Tick, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            due_s, round_id = heapq.heappop(self._deadlines)
            if not self._has_token(due_s, round_id):
                round = self.rounds[round_id]
                self._abort(round)
                limit_s = self.config.first_token_deadline_s
                message = f"no token within {limit_s:g} s (the round was {round.phase.value})"
                if round.engine_id is not None and round.rid:
                    since_s = round.entered_s
                    self.standings.engine_failed(round.engine_id, round_id, "deadline", since_s, now)
                if round.placement is not None:
                    self._give_up_try(round, round.engine_id or round.placement.prefill_engine, message, now)
                if len(round.tries) > 1:
                    message += f"; tried: {failures_of(round)}"
                self._refuse(round, "upstream_failed", message, now)

    def _has_token(self, due_s: float, round_id: str) -> bool:
        """This deadline of the round has no meaning any more."""
        round = self.rounds.get(round_id)
        return round is None or round.phase is DECODING or due_s != round.deadline_s

    # ---------------------------------------------------------------- engines

    def _on_engine_up(self, up: EngineUp, now: float) -> None:
        known = self.books.fleet.books.get(up.engine_id)
        if known is not None and known.up.incarnation == up.incarnation:
            self.books.fleet.renew(up)
            self.books.touch(up.engine_id)
            return
        if known is not None:
            reason = "replaced by a new incarnation"
            self._on_engine_down(EngineDown(up.engine_id, known.up.incarnation, reason), now)
        self.books.engine_up(up)

    def _on_session_ended(self, event: SessionEnded, now: float) -> None:
        key = (event.tenant, event.session_id)
        for round in self.rounds.values():
            if round.session_key == key:
                round.ends = True
        self.books.session_over(key)

    def _on_session_moved(self, event: SessionMoved, now: float) -> None:
        key = (event.tenant, event.session_id)
        busy = any(round.session_key == key for round in self.rounds.values())
        self.books.session_moved(event, now, in_flight=busy)

    def _on_sessions_aged(self, event: SessionsAged, now: float) -> None:
        self.books.sessions_aged(now)

    def _on_engine_suspect(self, event: EngineSuspect, now: float) -> None:
        book = self.books.fleet.books.get(event.engine_id)
        if book is not None and book.up.incarnation == event.incarnation:
            self.standings.set_suspect(event.engine_id, event.suspect)

    def _on_engine_draining(self, event: EngineDraining, now: float) -> None:
        self.standings.set_draining(event.engine_id, event.draining)

    def _on_load_reported(self, event: LoadReported, now: float) -> None:
        self.books.load_reported(event)

    def _on_engine_down(self, event: EngineDown, now: float) -> None:
        engine_id, reason = event.engine_id, f"engine {event.engine_id} is gone: {event.reason}"
        book = self.books.fleet.books.get(engine_id)
        if book is None or book.up.incarnation != event.incarnation:
            return
        touched = [r for r in self.rounds.values() if r.depends_on(engine_id)]
        failure = f"gone: {event.reason}"
        for round in touched:
            self._abort(round)
            goes_on = event.goes_on.get(round.round_id, "")
            if round.phase is not DECODING:
                self._give_up_try(round, engine_id, failure, now)
            elif isinstance(goes_on, GoesOn):
                self._carry(round, goes_on, engine_id, failure, now)
            else:
                self._break_off(round, reason, goes_on, now)
        self.books.engine_gone(engine_id, event.incarnation)
        self.standings.engine_gone(engine_id)
        for round in touched:
            if round.phase is DECODING:
                self._go_on(round, now)
            elif round.phase is not ENDED:
                self._try_again(round, now)

    # ---------------------------------------------------------------- tables

    _fleet_events: ClassVar[dict[type, Callable[[Scheduler, Any, float], None]]] = {
        RoundArrived: _on_arrived,
        EngineUp: _on_engine_up,
        EngineDown: _on_engine_down,
        EngineSuspect: _on_engine_suspect,
        EngineDraining: _on_engine_draining,
        LoadReported: _on_load_reported,
        SessionEnded: _on_session_ended,
        SessionMoved: _on_session_moved,
        SessionsAged: _on_sessions_aged,
        Tick: _on_tick,
    }
    _round_events: ClassVar[dict[type, Callable[[Scheduler, Round, Any, float], None]]] = {
        Claimed: _on_claimed,
        ClaimLost: _on_claim_lost,
        PrefetchDone: _on_prefetch_done,
        PrefillDone: _on_prefill_done,
        FirstToken: _on_first_token,
        RoundFinished: _on_finished,
        EngineFailed: _on_failed,
        ClientGone: _on_client_gone,
    }
