"""Properties of leases, fences and completions under any order of claims, deaths, losses and repeats."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from antiphon.scheduler.ledger import Ledger, Moved, RoundTaken
from antiphon.scheduler.ledger_connection import LedgerConnection
from antiphon.scheduler.messages import Claimed
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at, page

REPLICAS = ("A", "B", "C")
SESSIONS = ("s", "s~1", "t:s", "{x}")
HOMES = ("d0", "d1", "d2")


@dataclass(slots=True)
class Running:
    """A round that a replica believes to run."""

    replica: str
    claimed: Claimed


class Leases(RuleBasedStateMachine):
    """The ledger against a model: who holds which session, its home, and the last fence seen there."""

    url: ClassVar[str]
    rounds = Bundle("rounds")

    @initialize()
    def connect(self) -> None:
        self.runner = asyncio.Runner()
        self.runner.run(self._connect())
        self.alive: set[str] = set()
        self.holders: dict[str, Running] = {}
        """Session -> who claimed it last and has not completed; its replica may be dead."""
        self.last_fences: dict[str, int] = {}
        """Session -> the largest fence that this ledger has seen there."""
        self.fences: list[int] = []
        self.recorded = self.fenced = 0
        self.number = 0
        self.done: dict[str, int] = {}
        """Round -> fence of the completion that was recorded."""
        self.homes: dict[str, str | None] = {}
        """Of every session that the ledger has a record of."""
        self.completed: dict[str, int] = {}
        """Session -> fence of its last recorded completion."""
        self.latest: dict[str, Running] = {}
        """Round -> its last claim that this ledger knows."""
        self.gone: set[str] = set()
        """Rounds that were given back or fenced off: none of their claims is recorded any more."""

    async def _connect(self) -> None:
        self.ledger = Ledger(self.url, fleet=secrets.token_hex(6), deadline_s=10.0)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.ledger.close())
            self.runner.close()

    # ---- replicas

    @rule(replica=st.sampled_from(REPLICAS))
    def beat(self, replica: str) -> None:
        self.runner.run(self.ledger.heartbeat(replica, TTL_S))
        self.alive.add(replica)

    @rule(replica=st.sampled_from(REPLICAS))
    def die(self, replica: str) -> None:
        self.runner.run(self.ledger.retire(replica))
        self.alive.discard(replica)

    # ---- rounds

    @rule(target=rounds, replica=st.sampled_from(REPLICAS), session=st.sampled_from(SESSIONS))
    def claim(self, replica: str, session: str) -> Running:
        """A busy session forks, a free one is given; the fence is above all before."""
        self.number += 1
        holder = self.holders.get(session)
        busy = holder is not None and (holder.replica in self.alive or holder.replica == replica)
        claimed = self.runner.run(claim(self.ledger, replica, f"r{self.number}", session))
        assert (claimed.session_id != session) == busy
        assert claimed.parent_id == (session if busy else None)
        assert all(claimed.fence > fence for fence in self.fences)
        self.fences.append(claimed.fence)
        assert claimed.home == self.homes.get(session)
        self.homes.setdefault(claimed.session_id, claimed.home)
        return self._hold(Running(replica, claimed))

    @rule(target=rounds, old=rounds, replica=st.sampled_from(REPLICAS))
    def claim_again(self, old: Running, replica: str) -> object:
        """The same question gets the same answer; another replica gets a round only from a dead one."""
        current = self.holders.get(old.claimed.session_id)
        if current is not old or old.claimed.round_id in self.done:
            return multiple()
        if replica == old.replica:
            again = self.runner.run(claim(self.ledger, replica, old.claimed.round_id, old.claimed.session_id))
            assert again.fence == old.claimed.fence
            assert again.session_id == old.claimed.session_id
            return multiple()
        try:
            taken = self.runner.run(claim(self.ledger, replica, old.claimed.round_id, old.claimed.session_id))
        except RoundTaken:
            assert old.replica in self.alive
            return multiple()
        assert old.replica not in self.alive
        assert taken.session_id == old.claimed.session_id
        assert all(taken.fence > fence for fence in self.fences)
        self.fences.append(taken.fence)
        return self._hold(Running(replica, taken))

    def _hold(self, running: Running) -> Running:
        self.holders[running.claimed.session_id] = self.latest[running.claimed.round_id] = running
        self.last_fences[running.claimed.session_id] = running.claimed.fence
        return running

    @rule(
        running=rounds,
        session=st.sampled_from((None, None, None, *SESSIONS)),
        from_home=st.sampled_from((None, None, *HOMES)),
        to_home=st.sampled_from(HOMES),
    )
    def move(self, running: Running, session: str | None, from_home: str | None, to_home: str) -> None:
        """Only the claim that holds the session moves it, from the home that it has, and twice as once."""
        session = session or running.claimed.session_id
        from_home = from_home or self.homes.get(session) or "d0"
        fence, holder = running.claimed.fence, self.holders.get(session)
        if session not in self.homes:
            expected = Moved.UNKNOWN_SESSION
        elif holder is None and self.completed.get(session) == fence:
            expected = Moved.ENDED
        elif holder is None or holder.claimed.fence != fence:
            expected = Moved.FENCED
        elif self.homes[session] in (from_home, to_home):
            expected, self.homes[session] = Moved.MOVED, to_home
        else:
            expected = Moved.OTHER_HOME
        for _ in range(2):
            question = self.ledger.rehome(
                fence=fence, session_id=session, tenant="t", from_home=from_home, to_home=to_home
            )
            assert self.runner.run(question) is expected

    @rule(running=rounds, home=st.sampled_from(HOMES))
    def complete(self, running: Running, home: str) -> None:
        """Recorded unless a newer claim was there; asked again, the same answer and nothing more."""
        claimed = running.claimed
        round_id, session_id, fence = claimed.round_id, claimed.session_id, claimed.fence
        if round_id in self.done:
            expected = self.done[round_id] == fence
        else:
            expected = round_id not in self.gone and self.last_fences.get(session_id, 0) <= fence
            self.recorded += expected
            if not expected and self.latest.get(round_id) is running:
                self.gone.add(round_id)
        self.fenced += not expected
        assert self.runner.run(complete(self.ledger, running.replica, claimed, home=home)) == expected
        if not expected or round_id in self.done:
            return
        self.done[round_id] = self.completed[session_id] = fence
        self.homes[session_id] = home
        self.last_fences[session_id] = max(self.last_fences.get(session_id, 0), fence)
        if self.holders.get(session_id) is running:
            del self.holders[session_id]

    @rule(running=consumes(rounds))
    def release(self, running: Running) -> None:
        """Only the round that holds the session can give it back."""
        session_id, round_id = running.claimed.session_id, running.claimed.round_id
        holds = self.holders.get(session_id) is running
        if round_id not in self.done and self.latest.get(round_id, running).replica == running.replica:
            self.gone.add(round_id)
        released = self.runner.run(self.ledger.release(running.replica, running.claimed.round_id))
        assert released == holds
        if holds:
            del self.holders[session_id]
            self.last_fences[session_id] = self.completed.get(session_id, 0)
            if session_id not in self.completed:
                del self.homes[session_id]

    # ---- losses

    @precondition(lambda self: len(self.fences) > 2)
    @rule()
    def lose_everything(self) -> None:
        """FLUSHALL: no lease, no count, no replica is left; fences go on."""
        self.runner.run(self.ledger.connection.command("FLUSHALL"))
        self.holders.clear()
        self.last_fences.clear()
        self.alive.clear()
        self.recorded = self.fenced = 0
        self.done.clear()
        self.homes.clear()
        self.completed.clear()
        self.latest.clear()
        self.gone.clear()

    # ---- always

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "runner"):
            return
        counters = self.runner.run(self.ledger.counters())
        assert counters.get("completed", 0) == self.recorded
        assert counters.get("fenced", 0) == self.fenced

    @invariant()
    def one_round_holds_a_session(self) -> None:
        if not hasattr(self, "runner"):
            return
        sessions, _ = self.runner.run(self.ledger.sessions(1000))
        assert {s.session_id: s.home for s in sessions} == self.homes
        in_flight = {s.session_id: s.in_flight for s in sessions if s.in_flight}
        assert in_flight == {name: holder.claimed.round_id for name, holder in self.holders.items()}
        assert len(set(in_flight.values())) == len(in_flight), "one round holds two sessions"


@pytest.fixture(scope="module")
def own_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that may be flushed."""
    with EmbeddedValkey.start(Path(tmp_path_factory.mktemp("ledger"))) as server:
        yield server.url


def test_leases_under_any_order_of_events(own_url: str) -> None:
    """No two live leases of one session or round; fences only grow; completions count once."""

    class Here(Leases):
        url = own_url

    run_state_machine_as_test(Here, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=255)


@settings(deadline=None)
@given(names, names, names, names)
def test_no_name_reaches_another_record(tenant: str, session: str, other: str, other_session: str) -> None:
    """Two sessions share a key only if tenant and id are equal, and no name leaves the fleet's hash tag."""

    async def keys() -> tuple[str, str, str]:
        connection = LedgerConnection("redis://127.0.0.1:1", "f", 1.0, 1)
        await connection.close()
        return connection.tag, connection.session_key(tenant, session), connection.session_key(
            other, other_session
        )  # fmt: skip

    tag, key, other_key = asyncio.run(keys())
    assert (key == other_key) == ((tenant, session) == (other, other_session))
    assert key.startswith(f"{tag}:sess:")
    assert key.count("{") == key.count("}") == 1


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(names, names), min_size=1, max_size=4, unique=True))
def test_any_names_live_side_by_side(own_url: str, pairs: list[tuple[str, str]]) -> None:
    """Whatever tenants and sessions are called, each has its own rounds, forks and view."""

    async def scenario() -> None:
        async with ledger_at(own_url) as ledger:
            for number, (tenant, session) in enumerate(pairs):
                claimed = await claim(ledger, "A", f"r{number}", session, tenant)
                assert (claimed.session_id, claimed.round_number) == (session, 1)
                fork = await claim(ledger, "A", f"f{number}", session, tenant)
                assert (fork.parent_id, len(fork.session_id) <= 255) == (session, True)
                assert await ledger.release("A", f"f{number}")
                assert await complete(ledger, "A", claimed, tenant)
            sessions, _ = await ledger.sessions(10)
            assert {(s.tenant, s.session_id, s.rounds) for s in sessions} == {
                (tenant, session, 1) for tenant, session in pairs
            }

    asyncio.run(scenario())


@st.composite
def holders(draw: st.DrawFn) -> tuple[int, dict[tuple[str, str], int]]:
    """Strides of a prompt, and how many of them each (engine, incarnation) holds."""
    strides = draw(st.integers(1, 300))
    keys = st.tuples(st.sampled_from(["d0", "d|1", "p{0}"]), st.sampled_from(["one", "t|wo"]))
    held = draw(st.dictionaries(keys, st.integers(1, strides), max_size=3))
    by_engine = {engine: (engine, incarnation) for engine, incarnation in held}
    return strides, {pair: held[pair] for pair in by_engine.values()}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(holders())
def test_holdings_are_never_overstated(own_url: str, case: tuple[int, dict[tuple[str, str], int]]) -> None:
    """Every holder is found, exactly where candidates are dense, and else understated by less than 1/8."""
    strides, held = case

    async def scenario() -> None:
        async with ledger_at(own_url) as ledger:
            holdings = [
                (page(n), 512 * n, engine, incarnation)
                for (engine, incarnation), count in held.items()
                for n in range(1, count + 1)
            ]
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=holdings)
            candidates = [(512 * n, page(n)) for n in range(strides, 0, -1)]
            found = await claim(ledger, "A", "r2", candidates=candidates)
            told = {(h.engine_id, h.incarnation): h.tokens // 512 for h in found.holdings}
            assert set(told) == set(held)
            assert all(told[who] <= held[who] for who in held)
            for who, count in held.items():
                dense = count < 16 or count > strides - 24
                assert told[who] == count if dense else told[who] > count * 7 / 8

    asyncio.run(scenario())
