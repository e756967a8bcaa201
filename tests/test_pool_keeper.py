"""Pools that follow the load, live: two replicas, a real Valkey, simulated engines over HTTP."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.engines.simulated_request import expected_tokens
from antiphon.scheduler.config import Config, GatewayConfig, LedgerConfig, SchedulerConfig
from antiphon.scheduler.demand import Counts
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.ledger_connection import LedgerConnection, LedgerUnavailable
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.pool_store import FlipUnderWay, PoolStore, Told
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.repool_config import RepoolConfig
from tests.replica_helpers import KEY, Cluster, cluster, until

QUICK = RepoolConfig(
    enabled=True, period_s=0.2, window_s=1.0, margin=0.0005, floor=0.0, sustain=1, cool_down_s=0.5,
    drain_limit_s=8.0, memory_s=1.0,
)  # fmt: skip
STILL = RepoolConfig(enabled=True, period_s=0.2, window_s=1.0, margin=1e9, drain_limit_s=1.0)
"""Leads, and flips nothing by itself."""

VOCAB_TOKENS = 512


@asynccontextmanager
async def another_replica(
    c: Cluster, valkey_url: str, policy: str, repool: RepoolConfig
) -> AsyncIterator[Replica]:
    fleet = c.ledger.connection.fleet
    ledger = Ledger(valkey_url, fleet=fleet)
    config = Config(
        gateway=GatewayConfig(shutdown_grace_s=0.05),
        scheduler=SchedulerConfig(policy=policy),
        ledger=LedgerConfig(fleet=fleet),
        repool=repool,
    )
    replica = Replica(config, ledger, KEY, uuid.uuid4().hex, Metrics())
    try:
        async with replica.running():
            await until(lambda: replica.readiness().engines_alive == len(c.engines))
            yield replica
    finally:
        await ledger.close()


def pools(replica: Replica) -> str:
    return replica.core.books.fleet.pools


def pool_of(replica: Replica, engine_id: str) -> str:
    return replica.core.books.fleet.books[engine_id].up.pool


class Agents:
    """Sessions that talk at both replicas in turn until they are told to end; every token is checked."""

    def __init__(self, c: Cluster, replicas: list[Replica]) -> None:
        self._c, self._replicas = c, replicas
        self.new_tokens, self.output_tokens = 300, 2
        self.over = False
        self.rounds = 0
        self.pools: set[str] = set()

    async def talk(self, number: int) -> None:
        chance = random.Random(number)
        while not self.over:
            ids = [chance.randrange(5, VOCAB_TOKENS) for _ in range(self.new_tokens)]
            session_id = f"s{number}-{self.rounds}"
            for _ in range(3):
                await self._round(session_id, ids)
                ids += [chance.randrange(5, VOCAB_TOKENS) for _ in range(max(8, self.new_tokens // 4))]

    async def _round(self, session_id: str, ids: list[int]) -> None:
        replica = self._replicas[self.rounds % len(self._replicas)]
        self.rounds += 1
        said = self.output_tokens
        async with replica.submit(self._c.request(session_id, ids, said)) as handle:
            await handle.start()
            answer = [token async for chunk in handle for token in chunk.token_ids]
        await handle.recorded(5.0)
        assert handle.receipt is not None
        assert tuple(answer) == expected_tokens(ids, said, VOCAB_TOKENS), f"{session_id}: another's answer"
        self.pools.add(handle.receipt.pools)
        ids += answer


@asynccontextmanager
async def talking(agents: Agents, count: int = 4) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(agents.talk(number))
        try:
            yield
        finally:
            agents.over = True


async def test_pools_follow_the_load_and_both_replicas_agree(valkey_url: str) -> None:
    """Long prompts, then long answers: an engine goes over to prefill, and back; every token is right."""
    async with (
        cluster(valkey_url, "remote_pull_always", engines="p0 d0 d1", repool=QUICK) as c,
        another_replica(c, valkey_url, "remote_pull_always", QUICK) as other,
    ):
        both = [c.replica, other]
        agents = Agents(c, both)
        async with talking(agents):
            await until(lambda: all(pools(r) == "2p+1d" for r in both), 20.0)
            changed = next(e for e in ("d0", "d1") if pool_of(c.replica, e) == "prefill")
            assert pool_of(other, changed) == "prefill"
            await until(lambda: "2p+1d" in agents.pools, 10.0)
            agents.new_tokens, agents.output_tokens = 16, 150
            await until(lambda: all(pools(r) == "1p+2d" for r in both), 20.0)
            assert not c.replica.core.standings.draining
            before = agents.rounds
            await until(lambda: agents.rounds > before + 10)
        ended = sum(_flips(r, "decode_to_prefill", "done") for r in both)
        assert ended >= 1 and sum(_flips(r, "prefill_to_decode", "done") for r in both) >= 1


def _flips(replica: Replica, direction: str, result: str) -> float:
    return float(replica._metrics.flips.labels(direction, result)._value.get())


# ---------------------------------------------------------------- step by step


@asynccontextmanager
async def a_store(c: Cluster, valkey_url: str) -> AsyncIterator[PoolStore]:
    """With more patience than a replica has."""
    ledger = Ledger(valkey_url, fleet=c.ledger.connection.fleet, deadline_s=10.0)
    try:
        yield PoolStore(ledger.connection)
    finally:
        await ledger.close()


async def begin(c: Cluster, store: PoolStore, engine_id: str, lead_s: float = 3.0) -> FlipUnderWay:
    """What a leader leaves behind that begins a flip and dies: its lead runs out."""
    life = c.engines[engine_id].record.incarnation
    clock = await store.lead("ghost", lead_s)
    flip = FlipUnderWay("prefill", life, clock, "a test")
    assert await store.step("ghost", engine_id, None, flip) == "done"
    await until(lambda: engine_id in c.replica._pools.flips)
    assert await store.step("ghost", engine_id, flip, flip, drain="mark", incarnation=life) == "done"
    return flip


async def test_a_flip_whose_leader_died_is_ended_by_the_next(valkey_url: str) -> None:
    """Sessions that were at home there are moved whole, and the engine is used for prefill afterwards."""
    async with (
        cluster(valkey_url, "remote_pull_always", engines="p0 d0 d1") as c,
        a_store(c, valkey_url) as store,
    ):
        agents = Agents(c, [c.replica])
        for number in range(6):
            await agents._round(f"s{number}", [number * 50 + i for i in range(5, 205)])
        await begin(c, store, "d0")
        async with another_replica(c, valkey_url, "remote_pull_always", STILL) as other:
            await until(lambda: pool_of(other, "d0") == pool_of(c.replica, "d0") == "prefill", 20.0)
            await until(lambda: not c.replica.core.standings.draining | other.core.standings.draining)
            assert await store.read() == ({"d0": "prefill"}, {}, {})
            assert (
                _flips(other, "decode_to_prefill", "done") + _flips(other, "decode_to_prefill", "in_part")
                == 1
            )
            homes = {s["home"] for s in await other.sessions(100)}
            assert homes == {"d1"}
            async with another_replica(c, valkey_url, "remote_pull_always", RepoolConfig()) as late:
                await until(lambda: pool_of(late, "d0") == "prefill")


async def test_who_is_not_expected_back_stays(valkey_url: str) -> None:
    """An engine that changes pool keeps its store: of sessions that have been idle for long nothing moves."""
    async with cluster(valkey_url, "local", engines="p0 d0 d1") as c, a_store(c, valkey_url) as store:
        agents = Agents(c, [c.replica])
        for number in range(6):
            await agents._round(f"s{number}", [number * 50 + i for i in range(5, 205)])
        homes = {s["session_id"]: s["home"] for s in await c.replica.sessions(100)}
        c.replica.core.books.fleet.returns.horizon_s = 0.0
        await begin(c, store, "d0")
        async with another_replica(c, valkey_url, "local", STILL) as other:
            await until(lambda: _flips(other, "decode_to_prefill", "done") == 1, 20.0)
            assert {s["session_id"]: s["home"] for s in await other.sessions(100)} == homes
        assert "d0" in homes.values()


async def test_an_operators_drain_takes_over(valkey_url: str) -> None:
    """The engine that was leaving its pool is drained, and not used again by itself."""
    async with cluster(valkey_url, "local", engines="p0 d0 d1") as c, a_store(c, valkey_url) as store:
        flip = await begin(c, store, "d0")
        await c.replica.drains.mark("d0", flip.incarnation)
        async with another_replica(c, valkey_url, "local", STILL) as other:
            await until(lambda: other._pools._repoolers)
            await until(lambda: all(r.core.standings.draining == {"d0"} for r in (c.replica, other)))
            assert await store.read() == ({}, {}, {"d0": flip.incarnation})
            assert pool_of(other, "d0") == "decode"


async def test_what_is_taken_back_stays_where_it_was(valkey_url: str) -> None:
    async with cluster(valkey_url, "local", engines="p0 d0 d1") as c, a_store(c, valkey_url) as store:
        await begin(c, store, "d0")
        await c.replica.drains.unmark("d0")
        async with another_replica(c, valkey_url, "local", STILL) as other:
            await until(lambda: _flips(other, "decode_to_prefill", "given_up") == 1)
            assert await store.read() == ({}, {}, {})
            assert pool_of(other, "d0") == "decode"


@pytest.mark.parametrize("again", [False, True])
async def test_a_flip_whose_engine_died_is_given_up_at_once(valkey_url: str, again: bool) -> None:
    """Whether it is gone or back with nothing of what it had: `drain_limit_s` is not waited for."""
    patient = replace(STILL, drain_limit_s=3600.0)
    async with (
        cluster(valkey_url, "local", engines="p0 d0") as c,
        a_store(c, valkey_url) as store,
        AsyncExitStack() as life,
    ):
        options = SimulatedOptions(
            engine_id="d1", pool="decode", ledger=valkey_url, fleet=c.ledger.connection.fleet, speed=20.0
        )
        c.engines["d1"] = await life.enter_async_context(SimulatedEngine(options, fleet_key=KEY))
        await until(lambda: c.replica.readiness().engines_alive == 3)
        await begin(c, store, "d1", lead_s=600.0)
        async with another_replica(c, valkey_url, "local", patient) as other:
            await until(lambda: other._pools._met)
            await life.aclose()
            await until(lambda: other.readiness().engines_alive == 2)
            if again:
                await life.enter_async_context(SimulatedEngine(options, fleet_key=KEY))
                await until(lambda: other.readiness().engines_alive == 3)
            assert "d1" in (await store.read())[1], "somebody ended it before there was a leader"
            await store.lead("ghost", 0.001)
            await until(lambda: _flips(other, "decode_to_prefill", "given_up") == 1, 5.0)
            assert await store.read() == ({}, {}, {})


async def test_who_has_not_met_the_engine_waits_for_it(valkey_url: str) -> None:
    """A gateway that has just been started may lead before it has found the engines."""
    async with cluster(valkey_url, "local", engines="d0") as c, a_store(c, valkey_url) as store:
        flip = FlipUnderWay("prefill", "a life", await store.lead("ghost", 0.5), "a test")
        assert await store.step("ghost", "d1", None, flip, drain="mark", incarnation="a life") == "done"
        async with another_replica(c, valkey_url, "local", STILL) as other:
            await until(lambda: _flips(other, "decode_to_prefill", "given_up") == 1)
            waited_ms = await store.lead(other._pools._replica, 5.0) - flip.began_ms
            assert waited_ms >= 1000 * STILL.drain_limit_s
            assert await store.read() == ({}, {}, {})


async def test_a_replica_that_was_away_does_not_look_like_load(valkey_url: str) -> None:
    """It has served for hours, was stopped for a while, and is seen again in the middle of a window."""
    async with (
        cluster(valkey_url, "local", engines="p0 d0", repool=STILL) as c,
        a_store(c, valkey_url) as store,
    ):
        keeper, demand = c.replica._pools, c.replica.core.demand
        await until(lambda: keeper.shares() is not None)
        assert demand is not None
        hours = {key: (36_000.0, 36_000.0, 36_000.0) for key in demand.counts().work}
        ghost = Told(Counts(hours, rounds=100_000), {})
        await c.ledger.heartbeat("ghost", 30.0)
        await store.tell("ghost", "", ghost)
        repooler = keeper._repoolers[""]
        looked = len(repooler._works)
        seen: list[float] = []

        def looks() -> int:
            shares = keeper.shares()
            assert shares is not None
            seen.append(max(shares.prefill, shares.decode))
            return sum("ghost" in counts for _, counts in repooler._window._looks)

        await until(lambda: looks() >= 3)
        assert len(repooler._works) > looked
        assert max(seen) == 0.0


async def test_a_pool_is_of_the_engine_and_outlives_its_process(valkey_url: str) -> None:
    async with cluster(valkey_url, "local", engines="d0") as c, a_store(c, valkey_url) as store:
        options = SimulatedOptions(
            engine_id="d1", pool="decode", ledger=valkey_url, fleet=c.ledger.connection.fleet, speed=20.0
        )
        for life in range(2):
            async with SimulatedEngine(options, fleet_key=KEY):
                await until(lambda: c.replica.readiness().engines_alive == 2)
                if not life:
                    assert await store.lead("ghost", 5.0)
                    assert await store.step("ghost", "d1", None, None, pool="prefill") == "done"
                await until(lambda: pools(c.replica) == "1p+1d")
            await until(lambda: c.replica.readiness().engines_alive == 1)


async def test_a_step_needs_the_lead_and_what_was_read(valkey_url: str) -> None:
    async with cluster(valkey_url, "local", engines="") as c, a_store(c, valkey_url) as store:
        assert await store.lead("one", 5.0)
        assert not await store.lead("two", 5.0)
        flip = FlipUnderWay("prefill", "life", 1, "why")
        assert await store.step("two", "d0", None, flip) == "not_leading"
        assert await store.step("one", "d0", None, flip, drain="mark", incarnation="life") == "done"
        assert await store.step("one", "d0", None, flip) == "other_flip"
        assert await store.step("one", "d1", None, flip, drain="mark", incarnation="x") == "done"
        assert await store.step("one", "d1", flip, None, drain="unmark", incarnation="another") == "done"
        assert await store.read() == ({}, {"d0": flip}, {"d0": "life", "d1": "x"}), (
            "another life's mark stays"
        )
        assert await store.step("one", "d2", None, flip, drain="mark", incarnation="x") == "done"
        assert await store.step("one", "d2", flip, None, incarnation="x") == "done"
        assert await store.step("one", "d2", None, flip, drain="mark", incarnation="x") == "drains"


async def test_without_the_ledger_nobody_leads() -> None:
    connection = LedgerConnection("redis://127.0.0.1:1", "f", 0.5, 1)
    try:
        with pytest.raises(LedgerUnavailable):
            await PoolStore(connection).lead("one", 5.0)
    finally:
        await connection.close()
