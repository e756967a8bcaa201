"""Engines that are to be stopped: their sessions are moved between rounds, and it is said when it is safe."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

import pytest

from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.scheduler.config import Config, GatewayConfig, LedgerConfig, SchedulerConfig
from antiphon.scheduler.drain_store import DrainStatus, DrainStore, Work
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.replica import Replica
from tests.replica_helpers import KEY, Cluster, cluster, until

T = TypeVar("T")
SESSIONS = 6


def incarnation(c: Cluster, engine_id: str) -> str:
    return c.engines[engine_id].record.incarnation


async def told(
    store: DrainStore, engine_id: str, condition: Callable[[DrainStatus], object], deadline_s: float = 15.0
) -> DrainStatus:
    """Wait until the ledger tells this of the drain."""
    end = time.monotonic() + deadline_s
    while not condition(status := await store.status(engine_id)):
        assert time.monotonic() < end, f"not within {deadline_s} s: {status}"
        await asyncio.sleep(0.02)
    return status


async def safe(store: DrainStore, engine_id: str) -> DrainStatus:
    """Wait until it is safe to stop the engine."""
    return await told(store, engine_id, lambda status: status.safe)


@asynccontextmanager
async def another_replica(c: Cluster, valkey_url: str, policy: str) -> AsyncIterator[Replica]:
    fleet = c.ledger.connection.fleet
    ledger = Ledger(valkey_url, fleet=fleet)
    config = Config(
        gateway=GatewayConfig(shutdown_grace_s=0.05),
        scheduler=SchedulerConfig(policy=policy),
        ledger=LedgerConfig(fleet=fleet),
    )
    replica = Replica(config, ledger, KEY, uuid.uuid4().hex, Metrics())
    try:
        async with replica.running():
            await until(lambda: replica.readiness().engines_alive == len(c.engines))
            yield replica
    finally:
        await ledger.close()


async def talk(c: Cluster, prompts: dict[str, list[int]], replica: Replica | None = None) -> dict[str, str]:
    """One round of every session; answers are added to the prompts. Session -> its home."""
    runner, homes = replica or c.replica, {}
    for session_id, ids in prompts.items():
        async with runner.submit(c.request(session_id, ids)) as handle:
            await handle.start()
            ids += [token async for chunk in handle for token in chunk.token_ids]
        assert handle.receipt is not None and handle.receipt.home is not None
        homes[session_id] = handle.receipt.home
        await handle.recorded(5.0)
        ids += [5, 6, 7]
    return homes


def some_sessions() -> dict[str, list[int]]:
    return {f"s{n}": [100 * n + 1000 + i for i in range(200)] for n in range(SESSIONS)}


@pytest.mark.parametrize("policy", ["adaptive", "ampd", "local"])
async def test_what_rests_is_moved_whole_and_found_by_every_replica(valkey_url: str, policy: str) -> None:
    """Its next rounds run on the new home, with all of the history from there, on either replica."""
    async with (
        cluster(valkey_url, policy, engines="p0 d0 d1") as c,
        another_replica(c, valkey_url, policy) as other,
    ):
        prompts = some_sessions()
        homes = await talk(c, prompts)
        there = [s for s, home in homes.items() if home == "d0"]
        assert there and len(there) < SESSIONS
        store = c.replica.drains
        await store.mark("d0", incarnation(c, "d0"))
        status = await safe(store, "d0")
        assert (status.replicas, status.replicas_seen, status.rounds) == (2, 2, 0)
        assert status.work.moved == len(there) and status.work.moved_partly == 0
        assert status.work.moved_bytes > 0
        c.engines["d0"].kv.device.flush()  # nothing is found there any more
        for replica in (other, c.replica):
            before = {s: len(ids) for s, ids in prompts.items()}
            assert "d0" not in (await talk(c, prompts, replica)).values()
            for receipt in await replica.receipts(SESSIONS, None):
                assert receipt["cached_tokens"] >= before[receipt["session_id"]] // 16 * 16 - 16


async def test_a_round_takes_its_session_along(valkey_url: str) -> None:
    """A session with a round in flight is not moved under it: its next round moves it."""
    async with cluster(valkey_url, "local", engines="d0 d1", speed=1.0) as c:
        prompts = {"s": list(range(1000, 1200))}
        home = (await talk(c, prompts))["s"]
        store = c.replica.drains
        async with c.replica.submit(c.request("s", prompts["s"], max_tokens=200)) as handle:
            await handle.start()
            await store.mark(home, incarnation(c, home))
            await until(lambda: home in c.replica.core.standings.draining)
            await until(lambda: c.replica.runtime.needing(home) == 1)
            status = await store.status(home)
            assert not status.safe
        await safe(store, home)
        assert (await talk(c, prompts))["s"] != home


async def test_it_is_taken_back_and_ends_with_the_incarnation(valkey_url: str) -> None:
    """A mark of another life of the engine means nothing; without a mark the engine is used again."""
    async with cluster(valkey_url, "local", engines="d0 d1") as c:
        store = c.replica.drains
        await store.mark("d0", "an earlier life")
        await store.mark("d1", incarnation(c, "d1"))
        await until(lambda: c.replica.core.standings.draining == {"d1"})
        assert not (await store.status("d0")).safe
        assert set((await talk(c, some_sessions())).values()) == {"d0"}
        assert await store.unmark("d1")
        assert not await store.unmark("d1")
        await until(lambda: not c.replica.core.standings.draining)
        assert not (await store.status("d1")).draining


async def test_an_engine_that_was_started_again_is_used(valkey_url: str) -> None:
    """Also if it was away for a while; the same incarnation comes back as one that drains."""
    async with cluster(valkey_url, "local", engines="d0") as c:
        draining = c.replica.core.standings
        options = SimulatedOptions(
            engine_id="d1", pool="decode", ledger=valkey_url, fleet=c.ledger.connection.fleet, speed=20.0
        )
        async with SimulatedEngine(options, fleet_key=KEY) as first:
            await until(lambda: c.replica.readiness().engines_alive == 2)
            await c.replica.drains.mark("d1", first.record.incarnation)
            await until(lambda: draining.draining == {"d1"})
        await until(lambda: c.replica.readiness().engines_alive == 1)
        looked = (await c.replica.drains.work("d1")).stuck
        assert looked == "" and draining.draining == {"d1"}
        async with SimulatedEngine(options, fleet_key=KEY):
            await until(lambda: c.replica.readiness().engines_alive == 2)
            await until(lambda: not draining.draining)
            assert set((await talk(c, some_sessions())).values()) == {"d0", "d1"}


async def test_a_move_that_is_cancelled_anywhere_leaves_nothing_behind(valkey_url: str) -> None:
    """At each of its awaits in turn: the session is whole at one of its two homes, and its rounds go on."""
    async with cluster(valkey_url, "local", engines="d0 d1") as c:
        drains, moved, cut = c.replica.drains, list[str](), 0
        while not moved:
            name = f"s{cut}"
            prompts = {name: [cut * 300 + 1000 + i for i in range(200)]}
            before, home = (await talk(c, prompts))[name], ""
            (session,) = [each for each in await drains.at_home(before) if each.session_id == name]
            moving = c.replica._drainer._move(before, incarnation(c, before), session)
            with suppress(asyncio.CancelledError):
                moved.append((await CutOff(moving, at=cut))[0])
            tokens = len(prompts[name])
            for engine_id in c.engines:
                if name in [each.session_id for each in await drains.at_home(engine_id)]:
                    home = engine_id
            assert (await talk(c, prompts))[name] == home
            (receipt,) = await c.replica.receipts(1, name)
            assert receipt["cached_tokens"] >= (tokens - 3) // 16 * 16 - 16, (cut, before, receipt)
            cut += 1
        assert moved == ["whole"] and home != before and cut >= 4
        for engine in c.engines.values():
            await until(lambda store=engine.kv.store: store.counts().pins == 0)  # type: ignore[misc]


class CutOff(Generic[T]):
    """Cancels what it awaits when that waits for the n-th time."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, at: int) -> None:
        self._coroutine = coroutine
        self._at = at

    def __await__(self) -> Generator[Any, None, T]:
        steps, awaited = self._coroutine.__await__(), 0
        try:
            waiting = next(steps)
            while awaited < self._at:
                yield waiting
                waiting = next(steps)
                awaited += 1
            steps.throw(asyncio.CancelledError())
            raise AssertionError("it went on although it was cancelled")
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


async def test_a_replica_that_has_not_seen_it_keeps_it_unsafe(valkey_url: str) -> None:
    """It may place a round there at any moment; when it is dead it does not count."""
    async with cluster(valkey_url, "local", engines="d0 d1") as c:
        store = c.replica.drains
        await c.ledger.heartbeat("sleeper", 30.0)
        assert await store.lead("d0", "sleeper", 0.5), "it dies with it"
        await store.mark("d0", incarnation(c, "d0"))
        status = await told(store, "d0", lambda status: status.replicas_seen and status.work.began_ms)
        assert status.replicas == 2 and not status.safe
        await c.ledger.retire("sleeper")
        await safe(store, "d0")


async def test_a_home_that_cannot_be_left_is_said(valkey_url: str) -> None:
    """A session that fits nowhere else stays, and the drain says why; its rounds go on."""
    async with cluster(valkey_url, "local", engines="d0") as c:
        prompts = {"s": list(range(1000, 1200))}
        await talk(c, prompts)
        store = c.replica.drains
        await store.mark("d0", incarnation(c, "d0"))
        work = (await told(store, "d0", lambda status: status.work.stuck)).work
        assert "no other engine" in work.stuck and work.left == 1
        assert (await talk(c, prompts))["s"] == "d0"


async def test_one_replica_at_a_time(valkey_url: str) -> None:
    """The lead is kept by who has it, and taken over when it runs out."""
    ledger = Ledger(valkey_url, fleet=uuid.uuid4().hex)
    store = DrainStore(ledger.connection)
    try:
        assert await store.lead("d0", "a", 0.3) > 0
        assert await store.lead("d0", "b", 0.3) == 0
        assert await store.lead("d0", "a", 0.01) > 0
        end = time.monotonic() + 5
        while not await store.lead("d0", "b", 0.3):
            assert time.monotonic() < end
            await asyncio.sleep(0.005)
        assert await store.work("d0") == Work()
    finally:
        await ledger.close()
