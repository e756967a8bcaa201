"""The core's bookkeeping for rounds: views for the policy, reservations, beliefs on residency. No decisions.

Reservations of a round (made in the step that decides, given back by `release`):
    decode[round]     at the home, from the decision to the end
    prefill_s[round]  at the prefill engine, from the decision until the prefill is done (local: first token)
    queue / in_flight at the prefill engine of a remote round
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.policies.base import ClusterView, Placement, RoundView
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.fleet import NO_TOTALS, DecodeSlot, Fleet, SessionKey
from antiphon.scheduler.messages import (
    Claimed,
    EngineUp,
    HeldChain,
    LoadReported,
    Reserved,
    RoundFinished,
    Totals,
)
from antiphon.scheduler.receipts import is_remote
from antiphon.scheduler.residency import ResidencyIndex
from antiphon.scheduler.sessions import SessionTable
from antiphon.scheduler.states import Round


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

    def view(self, round: Round, now: float, history: Mapping[str, int] | None = None) -> RoundView:
        """`history`: H(e) as known from before; None = look it up now."""
        arrived = round.arrived
        return RoundView(  # by position, as once per decision: keywords cost five times as much
            round.round_id,
            round.session_id,
            round.seed,
            arrived.prompt_tokens,
            arrived.max_output_tokens,
            arrived.slo_ttft_s,
            arrived.slo_itl_s,
            self.sessions.live_home(session_key(round)),
            now - round.arrived_s,
            self.held(round) if history is None else history,
            round.excluded,
            round.arrived_s,
        )

    # ---- reservations

    def reserve(self, round: Round, placement: Placement, now: float) -> None:
        """Book the round's work on its engines and settle the session at its home."""
        arrived = round.arrived
        slot = DecodeSlot(arrived.prompt_tokens + arrived.max_output_tokens, arrived.slo_itl_s)
        self.fleet.books[placement.home].add_decode(arrived.round_id, slot)
        work_s = placement.predicted.prefill_s + placement.predicted.pull_s
        self.fleet.books[placement.prefill_engine].add_prefill(arrived.round_id, work_s)
        self.settle(round, placement.home, arrived.prompt_tokens, now)
        self.touch(placement.home)
        self.touch(placement.prefill_engine)

    def prefill_over(self, round: Round, engine_id: str) -> None:
        """The prefill engine has done its part."""
        book = self.fleet.books[engine_id]
        book.in_flight.discard(round.round_id)
        book.drop_prefill(round.round_id)
        self.touch(engine_id)

    def release(self, round: Round) -> None:
        """Give back everything that the round still holds."""
        if round.placement is None:
            return
        home, prefill_engine = round.placement.home, round.placement.prefill_engine
        for engine_id in (home,) if home == prefill_engine else (home, prefill_engine):
            book = self.fleet.books.get(engine_id)
            if book is None:
                continue
            book.drop_decode(round.round_id)
            book.drop_prefill(round.round_id)
            book.in_flight.discard(round.round_id)
            if round.round_id in book.queue:
                book.queue.remove(round.round_id)
            self.touch(engine_id)

    def settle(self, round: Round, home: str, tokens: int, now: float) -> None:
        self.sessions.settle(session_key(round), home, tokens, round.round_number, now)

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
        one, other = self.fleet.books.get(puller), self.fleet.books.get(source)
        seconds = one.latency.transfer_s(tokens) if one else 0.0
        if other is None or (one is not None and other.latency is one.latency):
            return seconds
        return max(seconds, other.latency.transfer_s(tokens))

    def touch(self, engine_id: str) -> None:
        """This engine's view must be rebuilt and its totals published."""
        self.fleet.books[engine_id].touch()
        self.dirty.add(engine_id)

    def publish(self) -> list[Reserved]:
        """Our reservations on engines in `dirty` that changed since the last call, by engine id."""
        changed = []
        for engine_id in sorted(self.dirty):
            book = self.fleet.books.get(engine_id)
            totals = book.totals() if book is not None else Totals()
            if self._published.get(engine_id, Totals()) != totals:
                self._published[engine_id] = totals
                changed.append(Reserved(engine_id, totals))
        return changed

    def engine_up(self, up: EngineUp) -> None:
        self.fleet.add(up)
        self.residency.admit(up.engine_id, up.incarnation)
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
        hashes, size = round.arrived.hashes, round.arrived.page_size_tokens
        self.residency.merge(hashes, size, claimed.holdings)
        if claimed.tip is not None:
            # The end of a round that another replica served lies between our checkpoints.
            page_hash, holding = claimed.tip
            pages = holding.tokens // size
            if 0 < pages <= len(hashes) and hashes[pages - 1] == page_hash:
                self.residency.merge(hashes, size, [holding])

    def new_holdings(self, round: Round, finished: RoundFinished) -> tuple[HeldChain, ...]:
        """What the ledger learns: the home holds prompt and output, a remote prefill engine the prompt."""
        assert round.placement is not None
        books, placement = self.fleet.books, round.placement
        home = HeldChain(placement.home, books[placement.home].up.incarnation, finished.hashes)
        prefill_engine, prompt = books.get(placement.prefill_engine), round.arrived
        if prefill_engine is None or not is_remote(placement.arm):
            return (home,)
        up, size = prefill_engine.up, prompt.page_size_tokens
        if self.residency.held_by(up.engine_id, prompt.hashes, size) < len(prompt.hashes) * size:
            return (home,)  # it was replaced since: what it held went with it
        return home, HeldChain(up.engine_id, up.incarnation, prompt.hashes)


def session_key(round: Round) -> SessionKey:
    return (round.arrived.tenant, round.session_id)
