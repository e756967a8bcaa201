"""Sessions whose home is to be stopped: where they go, whatever the policy; and the switch of owners."""

from __future__ import annotations

import uuid

import pytest

from antiphon.policies.base import MOVE, Placement
from antiphon.policies.checked import Checked
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.leaving import Leaving
from antiphon.policies.local import Local
from antiphon.policies.registry import POLICIES, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.drain_store import AtHome, DrainStore
from antiphon.scheduler.messages import EngineDraining, Generate, Prefetch, Reserved, SessionMoved
from antiphon.scheduler.outcomes import Outcome
from tests.core_helpers import LATENCY, LOCAL, Bench, arrived, claimed, engine_up
from tests.ledger_helpers import claim, complete, ledger_at, page
from tests.policy_helpers import a_round, cluster, engine


def test_it_moves_to_the_least_used_engine_of_its_pool() -> None:
    """Prefill engines only where there is no other; what the home holds is fetched from there."""
    fleet = cluster(engine("d0"), engine("d1", used_tokens=9000), engine("d2", used_tokens=10), engine("p0"))
    round = a_round(home="d0", history={"d0": 600}, leaving=True, excluded=frozenset({"d0"}))
    placed = Leaving(Local()).place(round, fleet)
    assert isinstance(placed, Placement)
    assert (placed.arm, placed.home, placed.source) == (MOVE, "d2", "d0")
    assert "drains" in placed.reason
    assert placed.predicted.pull_s == pytest.approx(0.05 + 600 * 100 / 1e6)
    assert placed.predicted.prefill_s == pytest.approx(0.1 + 0.001 * 400)
    only = Leaving(Local()).place(round, cluster(engine("d0"), engine("p0")))
    assert isinstance(only, Placement) and (only.arm, only.home) == (MOVE, "p0")


def test_where_there_is_no_other_the_policy_decides() -> None:
    """As for rounds that do not leave."""
    alone = a_round(home="d0", leaving=True, excluded=frozenset())
    placed = Leaving(Local()).place(alone, cluster(engine("d0")))
    assert isinstance(placed, Placement) and placed.home == "d0"
    staying = Leaving(Local()).place(a_round(home="d0"), cluster(engine("d0"), engine("d1")))
    assert isinstance(staying, Placement) and staying.home == "d0"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_leaves_a_home_that_drains(name: str) -> None:
    """In the core: the round fetches its history from there, and its session has a new home."""
    core = Scheduler(Leaving(Checked(make_policy(name, {}))), Fcfs(), LATENCY)
    for up in (engine_up("d0", "decode"), engine_up("d1", "decode"), engine_up("p0", "prefill")):
        core.receive(up, 0.0)
    core.receive(EngineDraining("d0", True), 0.1)
    hashes = arrived("r1", tokens=960).hashes
    core.receive(SessionMoved("t", "s", "elsewhere", "d0", hashes, 16), 0.2)
    core.receive(arrived("r1", tokens=1000), 0.3)
    commands = core.receive(claimed("r1", number=2, home="d0"), 0.4)
    placed = core.rounds["r1"].placement
    assert placed is not None and (placed.arm, placed.home, placed.source) == (MOVE, "d1", "d0")
    (fetch,) = [c for c in commands if not isinstance(c, Reserved)]
    assert isinstance(fetch, Prefetch)
    assert (fetch.engine_id, fetch.source_id, fetch.pages) == ("d1", "d0", 60)
    core.check_invariants()


def test_what_was_moved_is_known_at_its_new_home() -> None:
    """Its KV counts there, and the next round is placed by it."""
    bench = Bench()
    bench.run("r0", LOCAL)
    before = bench.view("d0").used_tokens
    assert bench.send(SessionMoved("t", "s", "d0", "p0", arrived("r0", tokens=112).hashes, 16)) == []
    assert bench.view("d0").used_tokens == 0 and bench.view("p0").used_tokens == before
    (generate,) = bench.place("r1", tokens=120)
    assert isinstance(generate, Generate)
    assert bench.policy.seen[-1].home == "p0" and bench.policy.seen[-1].held("p0") == 112


def test_a_late_move_changes_nothing_of_a_round_in_flight() -> None:
    """Where the round runs is its session's home; what was copied is still believed."""
    bench = Bench()
    bench.run("r0", LOCAL)
    bench.place("r1", LOCAL, tokens=120)
    bench.send(SessionMoved("t", "s", "d0", "p0", arrived("r0", tokens=112).hashes, 16))
    assert bench.core.books.sessions.live_home(("t", "s")) == "d0"
    bench.send(SessionMoved("t", "s", "d0", "gone", (), 16))


TIP = f"{page(7).hex()}|112|one|d0"
NEW_TIP = f"{page(7).hex()}|112|two|d1"


async def test_the_owner_is_switched_only_if_nothing_happened_since(valkey_url: str) -> None:
    """Not under a round, not after one, not twice otherwise; and residency tells of the new home."""
    async with ledger_at(valkey_url) as ledger:
        store = DrainStore(ledger.connection)
        await ledger.heartbeat("a", 60.0)
        first = await claim(ledger, "a", "r0")
        await complete(ledger, "a", first, holdings=[(page(7), 112, "d0", "one")])
        (session,) = await store.at_home("d0")
        assert (session.session_id, session.tenant, session.tip) == ("s", "t", TIP)

        async def switch(at: AtHome, tip: str = NEW_TIP) -> str:
            return await store.switch(at, "d0", "d1", tip, [(112, page(7))], "two", 60.0)

        second = await claim(ledger, "a", "r1")
        assert (await store.at_home("d0"))[0].in_flight
        assert await switch(session) == "busy"
        await complete(ledger, "a", second, holdings=[(page(9), 144, "d0", "one")])
        assert await switch(session) == "went_on"
        (session,) = await store.at_home("d0")
        assert await switch(session) == "moved"
        assert await switch(session) == "moved"
        assert await switch(session, tip="") == "went_on"
        assert await store.at_home("d0") == []
        third = await claim(ledger, "a", "r2", candidates=[(112, page(7))])
        assert third.home == "d1" and third.tip is not None and third.tip[1].engine_id == "d1"
        assert ("d1", "two", 112) in [(h.engine_id, h.incarnation, h.tokens) for h in third.holdings]
        await complete(ledger, "a", third, outcome=Outcome.CANCELLED)
        gone = AtHome(ledger.connection.session_key("t", "nobody"), "nobody", "t", "", 0, False)
        assert await switch(gone) == "unknown_session"


async def test_the_lease_of_a_dead_replica_does_not_hold_a_session_back(valkey_url: str) -> None:
    async with ledger_at(valkey_url) as ledger:
        store = DrainStore(ledger.connection)
        for replica in ("a", "b"):
            await ledger.heartbeat(replica, 60.0)
        await complete(ledger, "a", await claim(ledger, "a", "r0"))
        await claim(ledger, "b", uuid.uuid4().hex)
        await ledger.retire("b")
        (session,) = await store.at_home("d0")
        assert not session.in_flight
        assert await store.switch(session, "d0", "d1", "", (), "two", 60.0) == "moved"
