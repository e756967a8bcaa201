"""Any order of the ledger's calls, each made twice: as the model of leases says, and twice is as once."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antiphon.scheduler.ledger import RoundTaken
from antiphon.scheduler.messages import Claimed
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.retries import Call
from tests.faults.lease_model import Op, State, step
from tests.faults.linearizability import Notes, Recorded
from tests.ledger_helpers import claim, complete

REPLICAS, SESSIONS = ("A", "B", "C"), ("s0", "s1")

replicas = st.sampled_from(REPLICAS)
numbers = st.integers(0, 5)
steps = st.one_of(
    st.tuples(st.just("claim"), replicas, st.sampled_from(SESSIONS), st.none()),
    st.tuples(
        st.just("claim"),
        replicas,
        st.sampled_from(SESSIONS),
        st.builds(Call, st.sampled_from(("c0", "c1")), again=st.booleans(), unnamed=st.booleans()),
    ),
    st.tuples(st.just("complete"), numbers, st.sampled_from(Outcome), st.sampled_from(("d0", "d1"))),
    st.tuples(st.just("release"), numbers),
    st.tuples(st.just("move"), numbers, st.sampled_from(("d0", "d1"))),
    st.tuples(st.sampled_from(("beat", "die")), replicas),
    st.tuples(st.just("close"), st.sampled_from(SESSIONS)),
)


class Calm(random.Random):
    """No delay, nothing is cut off."""

    def random(self) -> float:
        return 1.0

    def uniform(self, a: float, b: float) -> float:
        return 0.0


class Player:
    """Takes steps on the ledger and compares each answer with the model's."""

    def __init__(self, ledger: Recorded, notes: Notes) -> None:
        self.ledger = ledger
        self.notes = notes
        self.state = State()
        self.claims: list[tuple[str, Claimed, Call | None]] = []
        """The latest last."""
        self.rounds = 0

    async def take(self, what: Sequence[Any]) -> None:
        if what[0] == "claim":
            self.rounds += 1
        done = len(self.notes.ops)
        for _ in range(2):
            await self._ask(what)
            for op in self.notes.ops[done:]:
                after = step(self.state, op)
                assert after is not None, (self.state, op)
                self.state = after
            done = len(self.notes.ops)
        if what[0] == "claim" and self._answered(done):
            self.claims.pop()  # both are one claim

    def _answered(self, done: int) -> bool:
        return bool(self.notes.ops[done - 1].answer != "taken")

    async def _ask(self, what: Sequence[Any]) -> None:
        kind, *rest = what
        ledger = self.ledger
        if kind == "claim":
            replica, session, call = rest
            try:
                claimed = await claim(ledger, replica, f"r{self.rounds}", session, call=call)
            except RoundTaken:
                return
            self.claims.append((replica, claimed, call))
        elif kind == "beat":
            await ledger.heartbeat(rest[0], 60.0)
        elif kind == "die":
            await ledger.die(rest[0])
        elif kind == "close":
            await ledger.close_session(rest[0])
        elif rest[0] < len(self.claims):
            replica, claimed, call = self.claims[-1 - rest[0]]
            if kind == "release":
                await ledger.release(replica, claimed.round_id)
            elif kind == "move":
                await ledger.rehome(
                    fence=claimed.fence, session_id=claimed.session_id, tenant="t",
                    from_home=claimed.home or "d0", to_home=rest[1],
                )  # fmt: skip
            else:
                await complete(ledger, replica, claimed, outcome=rest[1], home=rest[2], call=call)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=20))
def test_any_calls_made_twice(valkey_url: str, plan: list[Sequence[Any]]) -> None:
    """A call that was carried out and is made again changes nothing but the count of those fenced off."""

    async def scenario() -> None:
        ledger, notes = Recorded(valkey_url), Notes(Calm())
        try:
            ledger.begin(uuid.uuid4().hex, notes)
            player = Player(ledger, notes)
            for what in plan:
                await player.take(what)
            sessions, _ = await ledger.sessions(1000)
            seen = {s.session_id: (s.rounds, s.home, s.in_flight) for s in sessions}
            last = Op("all", (), (seen, await ledger.counters()), 0.0, 0.0)
            assert step(player.state, last) is not None, (player.state, last)
        finally:
            await ledger.close()

    asyncio.run(scenario())
