"""What the core does with a round: decide, start, give up a try, end. Which event leads to what: core.py.

Every deed changes the round and the books in one step and adds what the driver must do to `_commands`.
"""

from __future__ import annotations

from msgspec.structs import replace

from antiphon.policies.base import MOVE, Ordering, Policy, Reject
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.admission import why_not_admitted
from antiphon.scheduler.books import Books
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.demand import Demand
from antiphon.scheduler.fleet import EngineBook
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Command,
    Complete,
    Generate,
    GoesOn,
    Prefetch,
    Prefill,
    Refuse,
    Rehome,
    RoundFinished,
)
from antiphon.scheduler.outcomes import Outcome, Try
from antiphon.scheduler.receipts import history_source, is_remote, make_receipt
from antiphon.scheduler.standing import Standings, decide
from antiphon.scheduler.states import (
    ENDED,
    GENERATING,
    PREFILLING,
    PULLING,
    PUSHING,
    QUEUED,
    Round,
)

INFINITY = float("inf")
LEAST_S = 0.001
"""A deadline that has passed already is told so."""


class Attempts:
    """The rounds in flight and the books that they are entered in: the lower half of the core."""

    def __init__(self, policy: Policy, ordering: Ordering, latency: LatencyModel, config: CoreConfig) -> None:
        self.policy = policy
        self.ordering = ordering
        self.config = config
        self.books = Books(latency, config.session_ttl_s, config.max_sessions)
        self.standings = Standings(config)
        self.rounds: dict[str, Round] = {}
        self.demand: Demand | None = None
        """Set by whoever re-plans the pools: work is counted there."""
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._commands: list[Command] = []
        """Of the present event."""

    # ---------------------------------------------------------------- deciding

    def _place(self, round: Round, now: float) -> None:
        """Decide, reserve, and start or queue."""
        cluster = self.books.cluster(now)
        self.standings.refresh(now)
        retry = round.first_token_s is None  # better the same engine again than no answer
        view = self.books.view(round, now)
        answer, view = decide(self.policy, self.standings, view, cluster, now, retry=retry)
        round.excluded &= view.excluded
        if isinstance(answer, Reject):
            self._refuse(round, "no_engine_available", answer.reason, now, answer.retry_after_s)
            return
        if not round.tries:
            refusal = why_not_admitted(self.books, self.config, round, answer, view)
            if refusal is not None:
                self._refuse(round, refusal.code, refusal.reason, now, refusal.retry_after_s)
                return
        round.placement, round.history = answer, view.history_tokens
        round.source = history_source(answer, view.home)
        round.tried_s = now if round.tries else round.arrived_s
        round.tries.append(Try(answer))
        round.history_tokens = view.held(answer.home)
        self.books.reserve(round, answer, view, now)
        self.standings.placed(answer, round.round_id, now)
        round.pools = self.books.fleet.pools
        if self.demand is not None:
            self.demand.placed(round, answer, view, self.books.fleet.books)
        if is_remote(answer.arm):
            self._enqueue(round, answer.prefill_engine, now)
            return
        round.dispatched_s = now if round.first_token_s is None else round.dispatched_s
        if answer.arm is MOVE:
            self._move(round, now)
        else:
            self._generate(round, now)

    def _enqueue(self, round: Round, engine_id: str, now: float) -> None:
        round.enter(QUEUED, now)
        book = self.books.fleet.books[engine_id]
        if not book.queue.length and len(book.in_flight) < self.config.prefill_in_flight:
            self._start_prefill(round, book, now)  # there is nobody to order it among
        else:
            round.queue_key = self.ordering.key(self.books.view(round, now, round.history))
            book.queue.add(round.queue_key, round.round_id)

    def _dispatch(self, book: EngineBook, now: float) -> None:
        """Start waiting rounds while the prefill engine has room, in the ordering's order."""
        while book.queue.length and len(book.in_flight) < self.config.prefill_in_flight:
            head = book.queue.head(self.ordering.window)
            first = head[0]
            if len(head) > 1:
                rounds = map(self.rounds.__getitem__, head)
                waiting = [self.books.view(round, now, round.history) for round in rounds]
                first = self.ordering.order(waiting, self.books.lazy_cluster(now))[0].round_id
                for passed in head[: head.index(first)]:
                    self.rounds[passed].postponed += 1
            chosen = self.rounds[first]
            book.queue.remove(chosen.queue_key, first)
            self._start_prefill(chosen, book, now)

    def _start_prefill(self, round: Round, book: EngineBook, now: float) -> None:
        assert round.placement is not None
        placement = round.placement
        round.dispatched_s = now if round.first_token_s is None else round.dispatched_s
        book.in_flight.add(round.round_id)
        if round.source is not None:
            pages = self.books.held_by(round, round.source) // round.arrived.page_size_tokens
            if pages > 0 and self._may_read(round, placement.prefill_engine, round.source, now):
                round.enter(PULLING, now)
                self._prefetch(round, placement.prefill_engine, round.source, pages, now)
                return
            self.books.transfer_over(round.round_id, placement.prefill_engine, round.source)
        self._prefill(round, now)

    def _move(self, round: Round, now: float) -> None:
        """Have the new home fetch what the source holds beyond it, if anything."""
        assert round.placement is not None
        home, source, held = round.placement.home, round.source, round.history.get
        more = source is not None and held(source, 0) > held(home, 0)
        if more and source is not None and self._may_read(round, home, source, now):
            round.enter(PUSHING, now)
            self._prefetch(round, home, source, held(source, 0) // round.arrived.page_size_tokens, now)
        else:
            self.books.transfer_over(round.round_id, home, source)
            self._moved(round, now)

    def _moved(self, round: Round, now: float) -> None:
        """The new home has what it gets of the session's KV: from now on the session is there."""
        assert round.placement is not None
        home, before = round.placement.home, self.books.home(round)
        if before is not None and before != home:
            self._commands.append(Rehome(round.round_id, before, home))
        self.books.settle(round, home, round.arrived.prompt_tokens, now)
        self._generate(round, now)

    def _may_read(
        self, round: Round, puller: str, source: str, now: float, *, just_spoke: bool = False
    ) -> bool:
        """Whether pages are to be fetched from there now; else they are recomputed and the receipt tells."""
        why = self.standings.why_unread(puller, source, now, just_spoke=just_spoke)
        if why:
            round.notes.append(f"not fetched by {puller} from {source}: {why}")
        return not why

    # ---------------------------------------------------------------- acting

    def _prefetch(self, round: Round, puller: str, source: str, pages: int, now: float) -> None:
        """Fetch from the first page on: the puller skips what its store has, and only prefixes count."""
        tokens = pages * round.arrived.page_size_tokens
        deadline_s = max(self.config.transfer_floor_s, 4 * self.books.transfer_s(puller, source, tokens))
        book = self.books.fleet.books.get(source)
        incarnation = book.up.incarnation if book else ""
        round.rid = ""
        self.standings.links.trying((puller, source), round.round_id, now)
        self._commands.append(Prefetch(round.round_id, puller, source, incarnation, 0, pages, deadline_s))

    def _prefill(self, round: Round, now: float) -> None:
        assert round.placement is not None
        round.enter(PREFILLING, now)
        round.rid = f"{round.round_id}-{len(round.tries):02d}p"
        engine_id = round.placement.prefill_engine
        deadline_s = self._call_s(round, engine_id, now)
        self._commands.append(Prefill(round.round_id, engine_id, round.rid, deadline_s))

    def _generate(self, round: Round, now: float) -> None:
        assert round.placement is not None
        round.enter(GENERATING, now)
        round.rid = f"{round.round_id}-{len(round.tries):02d}g"
        home = round.placement.home
        deadline_s = self._call_s(round, home, now)
        self._commands.append(Generate(round.round_id, home, round.rid, deadline_s))

    def _call_s(self, round: Round, engine_id: str, now: float) -> float:
        """How long a call for the first token may take, so that each try that is left has its share."""
        left_s = max(0.0, round.deadline_s - now)
        tries = self.config.max_tries - len(round.tries)
        if tries <= 0:
            return max(LEAST_S, left_s)
        patience_s = self._patience_s(engine_id, round.arrived.slo_ttft_s)
        return max(LEAST_S, min(patience_s, left_s / (tries + 1)))

    def _patience_s(self, engine_id: str, target_s: float) -> float:
        """How long the engine may bring nothing: by its target, and all prefills that it may do before.

        Whoever has more to decode than it has room for lets rounds wait for the end of others: no prediction
        covers that, so it is not to be hurried.
        """
        book, config = self.books.fleet.books[engine_id], self.config
        if book.context_tokens + book.others.context_tokens > book.up.pool_tokens:
            return INFINITY
        booked_s = book.prefill_sum_s + book.others.prefill_s
        return max(config.call_floor_s, config.call_slack * max(target_s, booked_s))

    def _abort(self, round: Round) -> None:
        """Stop the call under way. A queued round has none."""
        if round.phase is not QUEUED:
            self._commands.append(Abort(round.round_id, round.engine_id or "", round.rid))

    def _give_up_try(self, round: Round, engine_id: str, failure: str, now: float) -> None:
        """Undo the present try; the caller then tries again or refuses."""
        elapsed_s = now - round.tried_s
        round.tries[-1] = replace(round.tries[-1], failure=f"{engine_id}: {failure}", elapsed_s=elapsed_s)
        self.standings.round_left(round.round_id)
        round.excluded |= {engine_id}
        self.books.release(round, now)
        round.placement = round.source = None
        round.rid = ""
        round.pull_s = round.prefilled_s = round.push_s = 0.0
        round.pulled_tokens = 0

    def _carry(self, round: Round, goes_on: GoesOn, engine_id: str, failure: str, now: float) -> None:
        """Undo a try whose answer broke, and keep what is kept of it; the caller then tries again.

        What that engine took from its cache it had no time to say: what was believed of it counts.
        """
        placement, kept = round.placement, goes_on.prompt_tokens - round.prompt_tokens
        assert placement is not None
        if not is_remote(placement.arm):
            cached = min(round.history_tokens + round.pulled_tokens, round.prompt_tokens)
            earlier = round.prefill_cached_tokens
            round.prefill_cached_tokens = cached if earlier is None else min(earlier, cached)
        self._give_up_try(round, engine_id, f"{failure} (after {goes_on.said_tokens} tokens)", now)
        round.excluded |= goes_on.excluded
        expected = round.arrived.expected_output_tokens
        round.arrived = replace(
            round.arrived,
            prompt_tokens=goes_on.prompt_tokens,
            hashes=goes_on.hashes,
            max_output_tokens=goes_on.max_output_tokens,
            expected_output_tokens=max(1, expected + round.carried_tokens - kept) if expected else expected,
        )
        round.carried_tokens = kept

    def _try_again(self, round: Round, now: float) -> None:
        if len(round.tries) < self.config.max_tries:
            self._place(round, now)
            return
        code = "no_engine_available" if round.all_unreachable else "upstream_failed"
        self._refuse(round, code, f"{len(round.tries)} tries failed: {failures_of(round)}", now)

    def _refuse(
        self, round: Round, code: str, message: str, now: float, retry_after_s: float | None = None
    ) -> None:
        if round.first_token_s is not None:  # its client has seen a part of the answer
            self._break(round, f"the answer could not go on elsewhere: {message}", now)
            return
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
        if self.demand is not None:
            self.demand.ended(round, receipt)
        self.books.release(round, now)
        self.standings.round_left(round.round_id)
        if round.ends and outcome is Outcome.COMPLETED:
            self.books.session_over(round.session_key)
        round.enter(ENDED, now)
        del self.rounds[round.round_id]
        self.ended[outcome] += 1
        self._commands.append(Complete(round.round_id, outcome, receipt, receipt.home, holdings))


def failures_of(round: Round) -> str:
    """What was tried, in words: arm, engine and failure of each try, and how long it took."""
    return "; ".join(
        f"{t.placement.arm.value} on {t.failure} ({t.elapsed_s:.1f} s)" for t in round.tries if t.failure
    )
