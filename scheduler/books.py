"""The core's bookkeeping for rounds: views for the policy, reservations, beliefs on residency. No decisions.

Reservations of a round (made in the step that decides, given back by `release`):
    decode[round]     at the home, from the decision to the end
    slacks            at the home, from the decision to the end: the stall that its ITL target leaves
    prefill_s[round]  at the prefill engine, from the decision until the prefill is done (local: first token)
    queue / in_flight at the prefill engine of a remote round
    incoming/outgoing at both ends of a transfer, from the decision until it is over
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.policies.base import MOVE, REMOTE_PULL, ClusterView, Placement, RoundView
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.fleet import NO_TOTALS, DecodeSlot, EngineBook, Fleet, LazyViews
from antiphon.scheduler.messages import (
    Claimed,
    EngineUp,
    HeldChain,
    Holding,
    LoadReported,
    Reserved,
    RoundFinished,
    SessionMoved,
    Totals,
)
from antiphon.scheduler.receipts import is_remote
from antiphon.scheduler.residency import ResidencyIndex, checkpoint_limit
from antiphon.scheduler.sessions import SessionTable
from antiphon.scheduler.states import Round
from antiphon.scheduler.store_use import SessionKey

UNKNOWN_OUTPUT_TOKENS = 256
"""What a round is taken to generate, if it may, before any round has ended."""


class Books:
    """Fleet, sessions and residency as one place to look at and to write."""

    def __init__(self, latency: LatencyModel, session_ttl_s: float, max_sessions: int) -> None:
        self.fleet = Fleet(latency)
        self._cluster = ClusterView(self.fleet.views(0.0))
        self.residency = ResidencyIndex()
        self.sessions = SessionTable(self.fleet, session_ttl_s, max_sessions)
        self.dirty: set[str] = set()
        """Engines whose reservations the present event changed; the core clears it."""
        self._published: dict[str, Totals] = {}
        self._with_others = False
        """Other replicas had reserved something, as last told."""

    # ---- views

    def cluster(self, now: float) -> ClusterView:
        engines = self.fleet.views(now)
        if engines is not self._cluster.engines:
            self._cluster = ClusterView(engines)
        return self._cluster

    def lazy_cluster(self, now: float) -> ClusterView:
        """For whoever may not look at it, and does not keep it."""
        return ClusterView(LazyViews(self.fleet, now))

    def view(self, round: Round, now: float, history: Mapping[str, int] | None = None) -> RoundView:
        """`history`: H(e) as known from before; None = look it up now."""
        arrived, placement = round.arrived, round.placement
        session, books = self.sessions.get(round.session_key), self.fleet.books
        home = session.home if session is not None else None
        predicted = placement.predicted if placement is not None else None
        return RoundView(  # by position, as once per decision: keywords cost five times as much
            round.round_id,
            round.session_id,
            round.seed,
            arrived.prompt_tokens,
            arrived.max_output_tokens,
            arrived.slo_ttft_s,
            arrived.slo_itl_s,
            home if home in books else round.likely_home if round.likely_home in books else None,
            now - round.arrived_s,
            self.held(round) if history is None else history,
            round.excluded,
            round.arrived_s,
            min(
                arrived.expected_output_tokens or self.sessions.expected_output(session),
                arrived.max_output_tokens,
            ),
            predicted.pull_s + predicted.prefill_s if predicted is not None else 0.0,
            predicted.push_s if predicted is not None else 0.0,
            round.postponed,
        )

    # ---- reservations

    def reserve(self, round: Round, placement: Placement, view: RoundView, now: float) -> None:
        """Book the round's work on its engines and settle the session at its home.

        A session that moves is settled when its KV has come: a move that fails leaves it where it was.
        """
        arrived, round_id, predicted = round.arrived, round.round_id, placement.predicted
        home, engine = self.fleet.books[placement.home], self.fleet.books[placement.prefill_engine]
        held = view.history_tokens.get
        cached = held(placement.prefill_engine, 0)
        if round.source is not None:
            cached = max(cached, held(round.source, 0))
        self._work(round, (home, engine), now)
        in_time = view.waited_s + predicted.ttft_s <= arrived.slo_ttft_s
        engine.stall(now, predicted.prefill_s, max(1, arrived.prompt_tokens - cached), in_time)
        pulled_in_turn = placement.arm is REMOTE_PULL
        engine.add_prefill(round_id, predicted.prefill_s + (predicted.pull_s if pulled_in_turn else 0.0))
        slot = DecodeSlot(arrived.prompt_tokens + arrived.max_output_tokens, arrived.slo_itl_s)
        expected = view.expected_output_tokens or min(arrived.max_output_tokens, UNKNOWN_OUTPUT_TOKENS)
        home.add_decode(round_id, slot, expected)
        for puller, source, tokens in round.transfers():
            self._owe(round_id, puller, source, tokens)
        if placement.arm is not MOVE:
            self.settle(round, placement.home, arrived.prompt_tokens, now)
        home.touch()
        engine.touch()
        self.dirty.update((placement.home, placement.prefill_engine))

    def _work(self, round: Round, engines: tuple[EngineBook, EngineBook], now: float) -> None:
        """The session is back, and its KV is at work in the stores of both engines."""
        key, prompt_tokens = round.session_key, round.arrived.prompt_tokens
        if len(round.tries) == 1:
            session = self.sessions.get(key)
            if session is None:
                self.fleet.returns.began()
            elif self.fleet.returns.came_back(now - session.seen_s):
                for book in self.fleet.books.values():
                    book.touch()  # what counts as expected back has changed everywhere
        for book in engines:
            book.store.use(key, prompt_tokens)

    def _owe(self, round_id: str, puller: str, source: str, tokens: int) -> None:
        into, out_of = self.fleet.books[puller], self.fleet.books.get(source)
        owed_bytes = into.kv_bytes(tokens)
        into.incoming.add(round_id, owed_bytes)
        into.touch()
        if out_of is not None:
            out_of.outgoing.add(round_id, owed_bytes)
            out_of.touch()

    def transfer_over(self, round_id: str, puller: str, source: str | None) -> None:
        """Nothing is owed any more of what `puller` was to fetch from `source`."""
        into = self.fleet.books.get(puller)
        if into is not None:
            into.incoming.drop(round_id)
            into.touch()
        out_of = self.fleet.books.get(source or "")
        if out_of is not None:
            out_of.outgoing.drop(round_id)
            out_of.touch()

    def prefill_over(self, round: Round, engine_id: str) -> None:
        """The prefill engine has done its part."""
        book = self.fleet.books[engine_id]
        book.in_flight.discard(round.round_id)
        book.drop_prefill(round.round_id)
        self.touch(engine_id)

    def release(self, round: Round, now: float) -> None:
        """Give back everything that the round still holds."""
        if round.placement is None:
            return
        home, prefill_engine = round.placement.home, round.placement.prefill_engine
        books, key = self.fleet.books, round.session_key
        for engine_id in (home,) if home == prefill_engine else (home, prefill_engine):
            book = books.get(engine_id)
            if book is not None:
                book.release(round.round_id, round.queue_key)
                book.store.leave(key, now)
                book.touch()
                self.dirty.add(engine_id)
        source = books.get(round.source or "")
        if source is not None:
            source.drop_transfers(round.round_id)
            source.touch()

    def home(self, round: Round) -> str | None:
        """The home of the round's session, if that engine is alive."""
        return self.sessions.live_home(round.session_key)

    def settle(self, round: Round, home: str, tokens: int, now: float) -> None:
        self.sessions.settle(round.session_key, home, tokens, round.round_number, now)

    def answered(self, round: Round, tokens: int) -> None:
        """The round has ended with so many tokens of output: later ones are expected to resemble it."""
        self.sessions.answered(round.session_key, tokens, round.arrived.next_output_tokens or 0)

    def session_over(self, key: SessionKey) -> None:
        """Its client says that it will not be back: nobody keeps room for its KV. Its pages stay until they
        are evicted, and a session that comes back all the same finds what is left of them."""
        known = self.sessions.end(key)
        for book in self.fleet.books.values():
            if book.store.drop(key):
                known = True
                book.touch()
        if known:
            self.fleet.returns.said_so()

    def session_moved(self, event: SessionMoved, now: float, *, in_flight: bool) -> None:
        """The new home holds its KV. A round in flight has its own say on where the session is."""
        book, key = self.fleet.books.get(event.to_home), (event.tenant, event.session_id)
        if book is None:
            return
        size = event.page_size_tokens
        self.residency.record(event.to_home, book.up.incarnation, event.hashes, size)
        tokens = len(event.hashes) * size
        if not in_flight and self.sessions.move(key, event.from_home, event.to_home, tokens, now):
            book.store.use(key, tokens)
            book.store.leave(key, now)
        self.touch(event.to_home)

    def sessions_aged(self, now: float) -> None:
        """Whoever has been idle for longer than sessions are before they come back counts nowhere."""
        self.sessions.forget_idle(now - self.fleet.returns.horizon_s)

    def count_others(self, claimed: Claimed) -> None:
        """Take over what the other replicas have reserved."""
        if not claimed.others and not self._with_others:
            return
        self._with_others = bool(claimed.others)
        for engine_id, book in self.fleet.books.items():
            others = claimed.others.get(engine_id, NO_TOTALS)
            if others is not book.others and others != book.others:
                book.others = others
                book.touch()

    def load_reported(self, report: LoadReported) -> None:
        """Others may use the engine too: its own figure counts where it is above ours."""
        book = self.fleet.books.get(report.engine_id)
        if book is not None and book.reported_tokens != report.used_tokens:
            book.reported_tokens = report.used_tokens
            book.touch()

    def transfer_s(self, puller: str, source: str, tokens: int) -> float:
        """Seconds to move the KV of `tokens` between two engines; those that are gone do not count."""
        seconds = 0.0
        for engine_id in (puller, source):
            book = self.fleet.books.get(engine_id)
            if book is not None:
                seconds = max(seconds, book.transfer_s(tokens))
        return seconds

    def touch(self, engine_id: str) -> None:
        """This engine's view must be rebuilt and its totals published."""
        self.fleet.books[engine_id].touch()
        self.dirty.add(engine_id)

    def publish(self) -> list[Reserved]:
        """Our reservations on engines in `dirty` that changed since the last call, by engine id."""
        changed = []
        for engine_id in sorted(self.dirty):
            book = self.fleet.books.get(engine_id)
            totals = book.totals() if book is not None else NO_TOTALS
            if self._published.get(engine_id, NO_TOTALS) != totals:
                self._published[engine_id] = totals
                changed.append(Reserved(engine_id, totals))
        return changed

    def engine_up(self, up: EngineUp) -> None:
        self.fleet.add(up)
        limit = checkpoint_limit(up.store_tokens, up.pool_tokens)
        self.residency.admit(up.engine_id, up.incarnation, limit)
        self.sessions.engine_returned(up.engine_id)

    def engine_gone(self, engine_id: str, incarnation: str) -> None:
        self.fleet.remove(engine_id)
        self.residency.void(engine_id, incarnation)
        self.dirty.add(engine_id)  # others must not go on counting what we had reserved there

    # ---- residency

    def held(self, round: Round) -> dict[str, int]:
        """H(e) for every engine that holds some of the round's prompt."""
        return self.residency.held(round.arrived.hashes, round.arrived.page_size_tokens)

    def held_by(self, round: Round, engine_id: str) -> int:
        """H(e) for one engine."""
        return self.residency.held_by(engine_id, round.arrived.hashes, round.arrived.page_size_tokens)

    def hold(self, round: Round, engine_id: str, pages: int) -> None:
        """Believe that a live engine holds the first `pages` pages of the round's prompt."""
        book = self.fleet.books.get(engine_id)
        if book is not None and pages > 0:
            arrived = round.arrived
            self.residency.record(
                engine_id, book.up.incarnation, arrived.hashes, arrived.page_size_tokens, pages
            )

    def hold_claimed(self, round: Round, claimed: Claimed) -> None:
        """Take over what the ledger knows; holdings of an old incarnation are void."""
        holdings = claimed_holdings(round, claimed)
        if holdings:
            self.residency.merge(round.arrived.hashes, round.arrived.page_size_tokens, holdings)

    def claimed_home(self, round: Round, claimed: Claimed, held: Mapping[str, int]) -> str | None:
        """The home that a claim tells, as far as it counts; `held` is H(e).

        A child's first round is told its parent's: that counts where it holds more of the prompt than any
        other engine that could be home. A sub-agent that shares nothing with its parent may start anywhere.
        """
        home, book = claimed.home, self.fleet.books.get(claimed.home or "")
        first = claimed.parent_id is not None and claimed.round_number == 1
        if book is None or not first or not round.arrived.hashes:
            return home
        others = (
            tokens
            for engine_id, tokens in held.items()
            if engine_id != home and self.fleet.books[engine_id].pool is book.pool
        )
        return home if held.get(book.up.engine_id, 0) > max(others, default=0) else None

    def new_holdings(self, round: Round, finished: RoundFinished) -> tuple[HeldChain, ...]:
        """What the ledger learns: the home holds prompt and output, a remote prefill engine the prompt."""
        assert round.placement is not None
        books, placement = self.fleet.books, round.placement
        home = HeldChain(placement.home, books[placement.home].up.incarnation, finished.hashes)
        prefill_engine, prompt = books.get(placement.prefill_engine), round.arrived
        if prefill_engine is None or not is_remote(placement.arm):
            return (home,)
        up = prefill_engine.up
        if not self.residency.holds(up.engine_id, prompt.hashes):
            return (home,)  # it was replaced since: what it held went with it
        return home, HeldChain(up.engine_id, up.incarnation, prompt.hashes)


def claimed_holdings(round: Round, claimed: Claimed) -> tuple[Holding, ...]:
    """Who holds how much of the round's prompt, as the ledger knows it."""
    if claimed.tip is None:
        return claimed.holdings
    # The end of a round that another replica served lies between our checkpoints.
    page_hash, holding = claimed.tip
    hashes, pages = round.arrived.hashes, holding.tokens // round.arrived.page_size_tokens
    ours = 0 < pages <= len(hashes) and hashes[pages - 1] == page_hash
    return (*claimed.holdings, holding) if ours else claimed.holdings
