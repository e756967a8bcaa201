"""The core: events in, commands out. No clock, no I/O, no chance.

`Scheduler.receive(event, now)` decides and reserves in one step and returns what the driver must do. One call
per round is under way at any time; the driver reports how it ended. Life of a round: states.py.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from msgspec.structs import replace

from antiphon.policies.base import Arm, Ordering, Policy, Reject
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.books import Books, session_key
from antiphon.scheduler.checks import check_scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.fleet import EngineBook
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Claim,
    Claimed,
    ClaimLost,
    ClientGone,
    Command,
    Complete,
    EngineDown,
    EngineFailed,
    EngineUp,
    Event,
    FirstToken,
    Generate,
    LoadReported,
    Outcome,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Refuse,
    RoundArrived,
    RoundFinished,
    Tick,
    Try,
)
from antiphon.scheduler.receipts import is_remote, make_receipt
from antiphon.scheduler.states import IllegalEvent, Phase, Round


class Scheduler:
    """One replica's mind. Not thread-safe: one driver calls it."""

    def __init__(
        self, policy: Policy, ordering: Ordering, latency: LatencyModel, config: CoreConfig | None = None
    ) -> None:
        self.policy = policy
        self.ordering = ordering
        self.config = config or CoreConfig()
        self.books = Books(latency, self.config.session_ttl_s, self.config.max_sessions)
        self.rounds: dict[str, Round] = {}
        self.accepted = 0
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._deadlines: list[tuple[float, str]] = []
        self._commands: list[Command] = []

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
                if engine_id in books and books[engine_id].queue:
                    self._dispatch(books[engine_id], now)
            if self.config.publish:
                self._commands.extend(self.books.publish())
            dirty.clear()
        return self._commands

    def next_deadline(self) -> float | None:
        """When a Tick is due; None while nothing waits."""
        while self._deadlines and self._has_token(self._deadlines[0][1]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def checkpoints(self, hashes: Sequence[bytes], page_size_tokens: int) -> list[tuple[int, bytes]]:
        """(tokens, hash) at which a ledger is told of a chain, or asked about it; longest first.

        Pure. For the driver that has a ledger: it walks the whole chain.
        """
        return self.books.residency.checkpoints(hashes, page_size_tokens)

    def check_invariants(self) -> None:
        """Raise AssertionError when the books contradict each other. Tests call it after every event."""
        check_scheduler(self)

    # ---------------------------------------------------------------- rounds

    def _on_arrived(self, event: RoundArrived, now: float) -> None:
        if event.round_id in self.rounds:
            raise IllegalEvent(f"round {event.round_id} has arrived already")
        digest = hashlib.sha256(f"{event.session_id}\0{event.round_id}".encode()).digest()
        deadline_s = now + self.config.first_token_deadline_s
        round = Round(event, now, deadline_s, int.from_bytes(digest[:8], "little"), event.session_id)
        self.rounds[event.round_id] = round
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
        round.session_id = event.session_id
        round.round_number = event.round_number
        self.books.count_others(event)
        self.books.hold_claimed(round, event)
        if event.home is not None:
            self.books.sessions.adopt(session_key(round), event.home, event.round_number, now)
        self._place(round, now)

    def _on_claim_lost(self, round: Round, event: ClaimLost, now: float) -> None:
        """The ledger is away: go on with what the core knows."""
        round.degraded = True
        round.notes.append(f"ledger: {event.reason}")
        session = self.books.sessions.get(session_key(round))
        round.round_number = session.round_number + 1 if session else 1
        self._place(round, now)

    def _on_prefetch_done(self, round: Round, event: PrefetchDone, now: float) -> None:
        """What came is not recorded here: the call that follows leaves more of it there, and that is."""
        elapsed_s = now - round.entered_s
        if event.reason:
            round.notes.append(f"{round.phase.value} on {event.engine_id}: {event.reason}")
        if round.phase is Phase.PULLING:
            round.pull_s = elapsed_s
            round.bytes_decode_to_prefill += event.pulled_bytes
            round.pulled_tokens = event.pulled_pages * round.arrived.page_size_tokens
            self._prefill(round, now)
        else:
            round.push_s = elapsed_s
            round.bytes_prefill_to_decode += event.pulled_bytes
            self._generate(round, now)

    def _on_prefill_done(self, round: Round, event: PrefillDone, now: float) -> None:
        assert round.placement is not None
        engine_id, pages = round.placement.prefill_engine, len(round.arrived.hashes)
        round.prefilled_s = now - round.entered_s
        earlier = round.prefill_cached_tokens  # what a failed try computed was computed for this round too
        least = event.cached_tokens if earlier is None else min(earlier, event.cached_tokens)
        round.prefill_cached_tokens = least
        self.books.prefill_over(round, engine_id)
        self.books.hold(round, engine_id, pages)
        if pages:
            round.enter(Phase.PUSHING, now)
            self._prefetch(round, round.placement.home, engine_id, pages)
        else:
            self._generate(round, now)

    def _on_client_gone(self, round: Round, event: ClientGone, now: float) -> None:
        self._abort(round)
        self._end(round, Outcome.CANCELLED, now)

    def _on_first_token(self, round: Round, event: FirstToken, now: float) -> None:
        assert round.placement is not None
        round.enter(Phase.DECODING, now)
        round.first_token_s = now
        placement, books = round.placement, self.books.fleet.books
        books[placement.home].drop_prefill(round.round_id)
        self.books.touch(placement.home)
        if placement.prefill_engine in books:
            books[placement.prefill_engine].ttft.add(now, now - round.tried_s)
            self.books.touch(placement.prefill_engine)

    def _on_finished(self, round: Round, event: RoundFinished, now: float) -> None:
        assert round.placement is not None and round.first_token_s is not None
        home = self.books.fleet.books[round.placement.home]
        if event.completion_tokens > 1 and not event.reader_lagged:
            home.itl.add(now, (now - round.first_token_s) / (event.completion_tokens - 1))
        tokens = round.arrived.prompt_tokens + event.completion_tokens
        self.books.settle(round, round.placement.home, tokens, now)
        size = round.arrived.page_size_tokens
        self.books.residency.record(home.up.engine_id, home.up.incarnation, event.hashes, size)
        self._end(round, Outcome.COMPLETED, now, event)

    def _on_failed(self, round: Round, event: EngineFailed, now: float) -> None:
        if event.kind == "deadline":
            self._abort(round)
        if round.phase is Phase.DECODING:
            self._break(round, event.message, now)
            return
        round.all_unreachable = round.all_unreachable and event.kind == "unreachable"
        self._give_up_try(round, event.engine_id, f"{event.kind}: {event.message}")
        if event.kind == "bad_request":
            self._refuse(round, "bad_upstream_request", event.message, now)
        else:
            self._try_again(round, now)

    def _on_tick(self, event: Tick, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, round_id = heapq.heappop(self._deadlines)
            if not self._has_token(round_id):
                round = self.rounds[round_id]
                self._abort(round)
                limit_s = self.config.first_token_deadline_s
                message = f"no token within {limit_s:g} s (the round was {round.phase.value})"
                if round.placement is not None:
                    self._give_up_try(round, round.engine_id or round.placement.prefill_engine, message)
                self._refuse(round, "upstream_failed", message, now)

    # ---------------------------------------------------------------- engines

    def _on_engine_up(self, up: EngineUp, now: float) -> None:
        known = self.books.fleet.books.get(up.engine_id)
        if known is not None and known.up.incarnation == up.incarnation:
            known.renew(up)
            self.books.touch(up.engine_id)
            return
        if known is not None:
            reason = "replaced by a new incarnation"
            self._on_engine_down(EngineDown(up.engine_id, known.up.incarnation, reason), now)
        self.books.engine_up(up)

    def _on_load_reported(self, event: LoadReported, now: float) -> None:
        self.books.load_reported(event)

    def _on_engine_down(self, event: EngineDown, now: float) -> None:
        engine_id, reason = event.engine_id, f"engine {event.engine_id} is gone: {event.reason}"
        book = self.books.fleet.books.get(engine_id)
        if book is None or book.up.incarnation != event.incarnation:
            return
        touched = [r for r in self.rounds.values() if r.depends_on(engine_id)]
        for round in touched:
            self._abort(round)
            if round.phase is not Phase.DECODING:
                self._give_up_try(round, engine_id, f"gone: {event.reason}")
        for round in touched:
            if round.phase is Phase.DECODING:
                self._break(round, reason, now)
        self.books.engine_gone(engine_id, event.incarnation)
        for round in touched:
            if round.phase is not Phase.ENDED:
                self._try_again(round, now)

    # ---------------------------------------------------------------- deciding

    def _place(self, round: Round, now: float) -> None:
        """Decide, reserve, and start or queue."""
        cluster = self.books.cluster(now)
        view = self.books.view(round, now)
        answer = self.policy.place(view, cluster)
        if isinstance(answer, Reject) and round.excluded:
            round.excluded = frozenset()  # better the same engine again than no answer
            answer = self.policy.place(replace(view, excluded=round.excluded), cluster)
        if isinstance(answer, Reject):
            self._refuse(round, "no_engine_available", answer.reason, now, answer.retry_after_s)
            return
        round.placement, round.history = answer, view.history_tokens
        round.tried_s = now if round.tries else round.arrived_s
        round.tries.append(Try(answer))
        round.history_tokens = view.held(answer.home)
        self.books.reserve(round, answer, now)
        if is_remote(answer.arm):
            round.enter(Phase.QUEUED, now)
            self.books.fleet.books[answer.prefill_engine].queue.append(round.round_id)
        else:
            round.dispatched_s = now
            self._generate(round, now)

    def _dispatch(self, book: EngineBook, now: float) -> None:
        """Start waiting rounds while the prefill engine has room, in the ordering's order."""
        while book.queue and len(book.in_flight) < self.config.prefill_in_flight:
            first = book.queue[0]
            if len(book.queue) > 1:
                rounds = map(self.rounds.__getitem__, book.queue)
                waiting = [self.books.view(round, now, round.history) for round in rounds]
                first = self.ordering.order(waiting, self.books.cluster(now))[0].round_id
            book.queue.remove(first)
            book.in_flight.add(first)
            self._start_prefill(self.rounds[first], now)

    def _start_prefill(self, round: Round, now: float) -> None:
        assert round.placement is not None
        placement, round.dispatched_s = round.placement, now
        pages = self.books.held_by(round, placement.home) // round.arrived.page_size_tokens
        if placement.arm is Arm.REMOTE_PULL and pages > 0:
            round.enter(Phase.PULLING, now)
            self._prefetch(round, placement.prefill_engine, placement.home, pages)
        else:
            self._prefill(round, now)

    # ---------------------------------------------------------------- acting

    def _prefetch(self, round: Round, puller: str, source: str, pages: int) -> None:
        """Fetch from the first page on: the puller skips what its store has, and only prefixes count."""
        tokens = pages * round.arrived.page_size_tokens
        deadline_s = max(self.config.transfer_floor_s, 4 * self.books.transfer_s((puller, source), tokens))
        book = self.books.fleet.books.get(source)
        incarnation = book.up.incarnation if book else ""
        round.rid = ""
        self._commands.append(Prefetch(round.round_id, puller, source, incarnation, 0, pages, deadline_s))

    def _prefill(self, round: Round, now: float) -> None:
        assert round.placement is not None
        round.enter(Phase.PREFILLING, now)
        round.rid = f"{round.round_id}-{len(round.tries):02d}p"
        self._commands.append(Prefill(round.round_id, round.placement.prefill_engine, round.rid))

    def _generate(self, round: Round, now: float) -> None:
        assert round.placement is not None
        round.enter(Phase.GENERATING, now)
        round.rid = f"{round.round_id}-{len(round.tries):02d}g"
        self._commands.append(Generate(round.round_id, round.placement.home, round.rid))

    def _abort(self, round: Round) -> None:
        """Stop the call under way. A queued round has none."""
        if round.phase is not Phase.QUEUED:
            self._commands.append(Abort(round.round_id, round.engine_id or "", round.rid))

    def _give_up_try(self, round: Round, engine_id: str, failure: str) -> None:
        """Undo the present try; the caller then tries again or refuses."""
        round.tries[-1] = replace(round.tries[-1], failure=f"{engine_id}: {failure}")
        round.excluded |= {engine_id}
        self.books.release(round)
        round.placement = None
        round.rid = ""
        round.pull_s = round.prefilled_s = round.push_s = 0.0
        round.pulled_tokens = 0

    def _try_again(self, round: Round, now: float) -> None:
        if len(round.tries) < self.config.max_tries:
            self._place(round, now)
            return
        failures = "; ".join(t.failure for t in round.tries)
        code = "no_engine_available" if round.all_unreachable else "upstream_failed"
        self._refuse(round, code, f"{len(round.tries)} tries failed: {failures}", now)

    def _refuse(
        self, round: Round, code: str, message: str, now: float, retry_after_s: float | None = None
    ) -> None:
        retry_s = self.config.retry_after_s if retry_after_s is None else retry_after_s
        self._commands.append(Refuse(round.round_id, code, message, retry_s))
        ours = round.tries and code != "bad_upstream_request"  # the caller's fault leaves no trace
        self._end(round, Outcome.FAILED if ours else Outcome.REFUSED, now)

    def _break(self, round: Round, message: str, now: float) -> None:
        self._commands.append(Broke(round.round_id, message))
        self._end(round, Outcome.FAILED, now)

    def _end(self, round: Round, outcome: Outcome, now: float, finished: RoundFinished | None = None) -> None:
        receipt = make_receipt(round, outcome, now, finished)
        holdings = self.books.new_holdings(round, finished) if finished else ()
        self.books.release(round)
        round.enter(Phase.ENDED, now)
        del self.rounds[round.round_id]
        self.ended[outcome] += 1
        self._commands.append(Complete(round.round_id, outcome, receipt, receipt.home, holdings))

    def _has_token(self, round_id: str) -> bool:
        """The round's deadline has no meaning any more."""
        round = self.rounds.get(round_id)
        return round is None or round.phase is Phase.DECODING

    _fleet_events: ClassVar[dict[type, Callable[[Scheduler, Any, float], None]]] = {
        RoundArrived: _on_arrived,
        EngineUp: _on_engine_up,
        EngineDown: _on_engine_down,
        LoadReported: _on_load_reported,
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
