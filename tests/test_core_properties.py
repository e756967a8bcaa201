"""A Hypothesis state machine drives the core as a driver may: any order of answers, failures and deaths.

Under every registered policy and ordering, and under one that draws all arms, sources and homes at random.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from antiphon.policies.base import Arm, Policy, Reject
from antiphon.policies.registry import ORDERINGS, POLICIES, make_ordering, make_policy
from antiphon.scheduler.demand import Demand
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
    EngineDraining,
    EngineFailed,
    EngineSuspect,
    Event,
    FirstToken,
    Generate,
    Holding,
    LoadReported,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Refuse,
    Rehome,
    RoundFinished,
    SessionEnded,
    SessionMoved,
    SessionsAged,
    Tick,
    Totals,
)
from tests.core_helpers import Drawn, arrived, engine_up, scheduler

ENGINES = {"d0": "decode", "d1": "decode", "p0": "prefill", "p1": "prefill"}


class Machine(RuleBasedStateMachine):
    """Keeps, as a driver does, the one call under way of each round; checks that commands make sense."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.calls: dict[str, Command] = {}
        self.streaming: set[str] = set()
        self.ended: dict[str, int] = {}
        self.number = 0
        self.incarnations: dict[str, str] = {}
        self.rids: set[str] = set()

    @initialize(
        policy=st.sampled_from(["drawn"] * len(POLICIES) + sorted(POLICIES)),
        ordering=st.sampled_from(sorted(ORDERINGS)),
    )
    def start(self, policy: str, ordering: str) -> None:
        chosen: Policy = Drawn() if policy == "drawn" else make_policy(policy)
        self.core = scheduler(chosen, make_ordering(ordering), first_token_deadline_s=30.0, max_sessions=3)
        self.core.demand = Demand()
        for engine in ENGINES:
            self.an_engine_comes(engine)

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
                    assert 0 < command.deadline_s <= 30.0 + 1e-6, f"{command} has no deadline"
                    assert command.rid not in self.rids, "a rid was used twice"
                    self.rids.add(command.rid)
            case Abort(round_id=r):
                self.calls.pop(r, None)
                self.streaming.discard(r)
            case Rehome(round_id=r, from_home=left, to_home=home):
                round = self.core.rounds[r]
                assert round.placement is not None and round.arm is Arm.MOVE
                assert round.placement.home == home != left
                assert left in self.incarnations, f"{command} from a dead home"
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
    @rule(data=st.data(), how=st.sampled_from(["stale", "dead", "restarted"]))
    def an_engine_dies(self, data: st.DataObject, how: str) -> None:
        engine = data.draw(st.sampled_from(sorted(self.incarnations)))
        if how == "stale":
            self.send(EngineDown(engine, "long ago", "stale"))
        else:
            self.send(EngineDown(engine, self.incarnations.pop(engine), "killed"))
        if how == "restarted":
            self.an_engine_comes(engine)

    @rule(session=st.integers(0, 5), pages=st.integers(0, 80))
    def a_round_arrives(self, session: int, pages: int) -> None:
        self.number += 1
        tokens = pages * 16 + self.number % 16 + 1
        self.send(arrived(f"{self.number:06d}", f"s{session}", tokens, first=10_000 * session))

    @rule(session=st.integers(0, 2), pages=st.integers(1, 40), bad=st.integers(0, 12), data=st.data())
    def a_session_goes_on(self, session: int, pages: int, bad: int, data: st.DataObject) -> None:
        """A round arrives and runs; its `bad`-th call fails, or none."""
        self.a_round_arrives(session, pages + self.number % 40)
        round_id = f"{self.number:06d}"
        for step in range(12):
            if round_id in self.calls:
                self.end_call(round_id, step != bad, data.draw(st.integers(0, 90)))

    def a_claim_is_answered(self, round_id: str, pages: int) -> None:
        """As explained, so decided: whatever the ledger tells of homes, holders and load."""
        arrival = self.core.rounds[round_id].arrived
        told = Claimed(
            round_id, 1, arrival.session_id, 2, None, f"d{pages % 3}" if pages % 2 else None,
            tuple(Holding(e, f"i{pages % 9}", pages * 16) for e in ("d0", "d1", "p0")[: pages % 4]),
            {"d0": Totals(0.5, 1, pages, 999)} if pages % 5 == 0 else {},
        )  # fmt: skip
        round = self.core.rounds[round_id]
        round.arrived_s = self.now + 0.05  # as one that arrives now: what is explained has not waited
        explained = self.core.explain(arrival, told, round.arrived_s)
        self.done(round_id, told)
        if isinstance(explained, Reject):
            assert not round.tries and round_id not in self.core.rounds
        else:
            assert round.tries[0].placement == explained

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), good=st.integers(0, 3), pages=st.integers(0, 90))
    def a_call_ends(self, data: st.DataObject, good: int, pages: int) -> None:
        self.end_call(data.draw(st.sampled_from(sorted(self.calls))), good > 0, pages)

    @precondition(lambda self: self.calls)
    @rule(pages=st.integers(0, 90))
    def all_calls_end(self, pages: int) -> None:
        for round_id in sorted(self.calls):
            if round_id in self.calls:
                self.end_call(round_id, True, pages)

    def end_call(self, round_id: str, good: bool, pages: int) -> None:
        command = self.calls[round_id]
        match command:
            case Claim() if good:
                self.a_claim_is_answered(round_id, pages)
            case Claim():
                self.done(round_id, ClaimLost(round_id, "away"))
            case Prefetch(engine_id=engine, pages=asked):
                came = asked if pages % 2 else min(pages, asked)
                blamed = pages % 3 == 0
                self.done(round_id, PrefetchDone(round_id, engine, came, 0, pages, 0.1, "x", blamed))
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

    @rule(engine=st.sampled_from(sorted(ENGINES)), used_tokens=st.integers(0, 40_000))
    def an_engine_tells_its_load(self, engine: str, used_tokens: int) -> None:
        self.send(LoadReported(engine, used_tokens))

    @rule(engine=st.sampled_from(sorted(ENGINES)), on=st.booleans(), drains=st.booleans())
    def an_engine_drains_or_misses_a_probe(self, engine: str, on: bool, drains: bool) -> None:
        incarnation = self.incarnations.get(engine, "gone")
        self.send(EngineDraining(engine, on) if drains else EngineSuspect(engine, incarnation, on))

    @rule(engine=st.sampled_from(sorted(ENGINES)))
    def an_engine_changes_pool(self, engine: str) -> None:
        """Whatever is queued, prefilled or decoded there, and whoever has its home there."""
        book = self.core.books.fleet.books.get(engine)
        if book is not None:
            self.send(replace(book.up, pool="decode" if book.up.pool == "prefill" else "prefill"))

    @rule()
    def idle_sessions_count_no_more(self) -> None:
        self.send(SessionsAged())

    @rule(session=st.integers(0, 5), engines=st.permutations(sorted(ENGINES)), pages=st.integers(0, 9))
    def a_session_is_moved_between_rounds(self, session: int, engines: list[str], pages: int) -> None:
        chain = tuple(bytes([session, page]) * 16 for page in range(pages))
        self.send(SessionMoved("t", f"s{session}", engines[0], engines[1], chain, 16))

    @rule(session=st.integers(0, 5))
    def a_session_ends(self, session: int) -> None:
        self.send(SessionEnded("t", f"s{session}"))

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
            assert not (book.incoming.parts or book.outgoing.parts or book.slacks)


TestCore = Machine.TestCase
TestCore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
