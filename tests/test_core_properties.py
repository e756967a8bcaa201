"""A Hypothesis state machine drives the core as a driver may: any order of answers, failures and deaths."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Claim,
    ClaimLost,
    ClientGone,
    Command,
    Complete,
    EngineDown,
    EngineFailed,
    Event,
    FirstToken,
    Generate,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Refuse,
    RoundFinished,
    Tick,
)
from tests.core_helpers import Drawn, arrived, claimed, engine_up, scheduler

ENGINES = {"d0": "decode", "d1": "decode", "p0": "prefill", "p1": "prefill"}


class Machine(RuleBasedStateMachine):
    """Keeps, as a driver does, the one call under way of each round; checks that commands make sense."""

    def __init__(self) -> None:
        super().__init__()
        self.core = scheduler(Drawn(), first_token_deadline_s=30.0, max_sessions=3)
        self.now = 0.0
        self.calls: dict[str, Command] = {}
        self.streaming: set[str] = set()
        self.ended: dict[str, int] = {}
        self.number = 0
        self.incarnations: dict[str, str] = {}
        self.rids: set[str] = set()

    def send(self, event: Event) -> None:
        self.now += 0.05
        for command in self.core.receive(event, self.now):
            self.follow(command)

    def follow(self, command: Command) -> None:
        match command:
            case Claim(round_id=r) | Prefetch(round_id=r) | Prefill(round_id=r) | Generate(round_id=r):
                assert r not in self.calls, f"two calls of {r} at once: {self.calls[r]} and {command}"
                self.calls[r] = command
                if not isinstance(command, Claim):
                    assert command.engine_id in self.incarnations, f"{command} on a dead engine"
                if isinstance(command, (Prefill, Generate)):
                    assert command.rid not in self.rids, "a rid was used twice"
                    self.rids.add(command.rid)
            case Abort(round_id=r):
                self.calls.pop(r, None)
                self.streaming.discard(r)
            case Refuse(round_id=r):
                assert r not in self.streaming, "refused after its first token"
            case Broke(round_id=r):
                self.calls.pop(r, None)
                self.streaming.discard(r)
            case Complete(round_id=r):
                assert r not in self.calls, f"{r} ended with {self.calls[r]} under way"
                self.ended[r] = self.ended.get(r, 0) + 1
                assert self.ended[r] == 1, f"{r} ended twice"

    def done(self, round_id: str, event: Event) -> None:
        del self.calls[round_id]
        self.send(event)

    # ---- rules

    @rule(engine=st.sampled_from(sorted(ENGINES)))
    def an_engine_comes(self, engine: str) -> None:
        self.number += 1
        incarnation = f"i{self.number}"
        self.incarnations[engine] = incarnation
        self.send(engine_up(engine, ENGINES[engine], incarnation))

    @precondition(lambda self: self.incarnations)
    @rule(data=st.data(), stale=st.booleans())
    def an_engine_dies(self, data: st.DataObject, stale: bool) -> None:
        engine = data.draw(st.sampled_from(sorted(self.incarnations)))
        if stale:
            self.send(EngineDown(engine, "long ago", "stale"))
        else:
            self.send(EngineDown(engine, self.incarnations.pop(engine), "killed"))

    @rule(session=st.integers(0, 5), pages=st.integers(0, 80))
    def a_round_arrives(self, session: int, pages: int) -> None:
        self.number += 1
        tokens = pages * 16 + self.number % 16 + 1
        self.send(arrived(f"{self.number:06d}", f"s{session}", tokens, first=1000 * session))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), good=st.booleans(), pages=st.integers(0, 90))
    def a_call_ends(self, data: st.DataObject, good: bool, pages: int) -> None:
        round_id = data.draw(st.sampled_from(sorted(self.calls)))
        command = self.calls[round_id]
        session = self.core.rounds[round_id].session_id
        match command:
            case Claim():
                event: Event = (
                    claimed(round_id, session, 2, f"d{pages % 3}") if good else ClaimLost(round_id, "away")
                )
                self.done(round_id, event)
            case Prefetch(engine_id=engine, pages=asked):
                self.done(round_id, PrefetchDone(round_id, engine, min(pages, asked), 0, pages, 0.1, "x"))
            case Prefill(engine_id=engine):
                failed = EngineFailed(round_id, engine, ["refused", "deadline"][pages % 2], "x")
                self.done(round_id, PrefillDone(round_id, pages) if good else failed)
            case Generate(engine_id=engine) if round_id in self.streaming:
                self.streaming.discard(round_id)
                hashes = self.core.rounds[round_id].arrived.hashes
                finished = RoundFinished(round_id, pages, 0, hashes)
                self.done(round_id, finished if good else EngineFailed(round_id, engine, "broken", "x"))
            case Generate(engine_id=engine):
                if good:
                    self.streaming.add(round_id)
                    self.send(FirstToken(round_id))
                else:
                    kind = ["bad_request", "refused", "unreachable", "deadline"][pages % 4]
                    self.done(round_id, EngineFailed(round_id, engine, kind, "x"))

    @precondition(lambda self: self.core.rounds)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        self.send(ClientGone(data.draw(st.sampled_from(sorted(self.core.rounds)))))

    @precondition(lambda self: self.core.next_deadline() is not None)
    @rule()
    def time_runs_out(self) -> None:
        deadline_s = self.core.next_deadline()
        assert deadline_s is not None
        self.now = max(self.now, deadline_s)
        self.send(Tick())

    # ---- what must always be true

    @invariant()
    def books_agree(self) -> None:
        self.core.check_invariants()
        self.core.books.residency.check_invariants()

    @invariant()
    def views_are_up_to_date(self) -> None:
        fleet = self.core.books.fleet
        fresh = [(name, fleet.books[name].view(self.now)) for name in sorted(fleet.books)]
        assert list(fleet.views(self.now).items()) == fresh

    @invariant()
    def every_round_is_somewhere(self) -> None:
        queued = {r for b in self.core.books.fleet.books.values() for r in b.queue}
        assert set(self.core.rounds) == set(self.calls) | queued, "a round waits for nothing"
        assert not set(self.calls) & queued

    def teardown(self) -> None:
        """Every accepted round can be brought to exactly one end."""
        for round_id in sorted(self.core.rounds):
            if round_id in self.core.rounds:
                self.send(ClientGone(round_id))
        self.core.check_invariants()
        assert not self.core.rounds and sum(self.core.ended.values()) == self.core.accepted
        for book in self.core.books.fleet.books.values():
            assert not (book.queue or book.in_flight or book.prefill_s or book.decode)


TestCore = Machine.TestCase
TestCore.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
