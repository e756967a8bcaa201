"""Bugs and bad luck around the driver: none of them may cost another round, the replica, or the record."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from antiphon.engines.base import EngineRecord
from antiphon.engines.prompt import Prompt
from antiphon.engines.simulated import SimulatedEngine
from antiphon.policies.base import Arm, ClusterView, Placement, Reject, RoundView
from antiphon.policies.checked import Checked, CheckedOrdering
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.leaving import Leaving
from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable, RoundTaken
from antiphon.scheduler.messages import (
    Reserved,
    Totals,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.recorder import Recorder
from antiphon.scheduler.rounds import STREAM_BUFFER_CHUNKS, RoundHandle, RoundRefused, RoundRequest
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.core_helpers import Chosen, engine_up, scheduler
from tests.ledger_helpers import ledger_at
from tests.replica_helpers import cluster, until
from tests.simulated_helpers import FAST
from tests.test_discovery import TIMES, simulated, watching

PROMPT = list(range(100, 200))


class Broken:
    """A policy and an ordering with a bug."""

    window = 3

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        raise ZeroDivisionError("a policy's bug")

    def key(self, round: RoundView) -> float:
        raise ZeroDivisionError("an ordering's bug")

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        raise ZeroDivisionError("an ordering's bug")


def swap(monkeypatch: pytest.MonkeyPatch, method: str, change: Callable[[Any], Any]) -> None:
    """Put something between the callers of a ledger's method and the method."""
    monkeypatch.setattr(Ledger, method, change(getattr(Ledger, method)))


def test_a_policy_that_fails_costs_its_choice_only(valkey_url: str) -> None:
    """It raises on every round: rounds run locally, and their receipts say why."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd") as c:
            core = c.replica.core
            assert isinstance(core.policy, Leaving) and isinstance(core.policy.policy, Checked)
            assert isinstance(core.ordering, CheckedOrdering)
            core.policy = Leaving(Checked(Broken()))
            handle, output = await c.run("s", PROMPT)
            assert len(output) == 8 and handle.arm == "local" and handle.receipt is not None
            assert "a policy's bug" in handle.receipt.reason

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "choice",
    [
        (Arm.LOCAL, "gone", "gone"),
        (Arm.REMOTE_PULL, "d0", "gone"),
        (Arm.LOCAL, "d0", "p0"),
        (Arm.REMOTE_PULL, "d0", "d0"),
    ],
)
def test_a_placement_that_cannot_be_carried_out_is_replaced(choice: tuple[Arm, str, str]) -> None:
    """Engines that are not there, or an arm that contradicts them, never reach the core's books."""
    core = scheduler(Chosen())
    core.receive(engine_up("d0", "decode"), 0.0)
    core.receive(engine_up("p0", "prefill"), 0.0)
    policy = Chosen()
    policy.next.append(choice)
    view = RoundView("r1", "s", 0, 100, 16, 1.0, 0.1, None, 0.0)
    answer = Checked(policy).place(view, core.books.cluster(0.0))
    assert isinstance(answer, Placement) and answer.arm is Arm.LOCAL and answer.home in ("d0", "p0")
    assert "because the policy failed" in answer.reason


def test_an_ordering_that_fails_leaves_arrival_order() -> None:
    """One that raises, drops or invents rounds: first come, first served."""
    queue = [RoundView(f"r{n}", "s", 0, 1, 1, 1.0, 1.0, None, 9.0 - n, arrived_s=n) for n in range(3)]
    core = scheduler(Chosen())
    cluster_view = core.books.cluster(0.0)

    class Dropping(Fcfs):
        def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
            return queue[1:]

    for ordering in (Broken(), Dropping()):
        ordered = CheckedOrdering(ordering).order(queue[::-1], cluster_view)
        assert [r.round_id for r in ordered] == ["r0", "r1", "r2"]
    assert CheckedOrdering(Fcfs()).order(queue, cluster_view) == queue


def test_a_claim_that_fails_by_a_bug_degrades_one_round(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the ledger's client raises: this round runs degraded, the next as ever."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c:
            with monkeypatch.context() as patch:

                async def claim(self: Ledger, **arguments: Any) -> None:
                    raise ValueError("unreadable")

                patch.setattr(Ledger, "claim", claim)
                handle, output = await c.run("s", PROMPT)
            assert len(output) == 8 and handle.receipt is not None and handle.receipt.degraded
            handle, output = await c.run("s2", PROMPT)
            assert len(output) == 8 and handle.receipt is not None and not handle.receipt.degraded

    asyncio.run(scenario())


def test_a_round_that_another_has_does_not_run(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger says that its place is taken: it is refused before any engine hears of it."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c:
            with monkeypatch.context() as patch:

                async def claim(self: Ledger, **arguments: Any) -> None:
                    raise RoundTaken("ended already")

                patch.setattr(Ledger, "claim", claim)
                with pytest.raises(RoundRefused, match="ended already"):
                    await c.run("s", PROMPT)
            assert not c.replica.core.rounds and not c.replica.runtime.rounds_in_flight
            _, output = await c.run("s2", PROMPT)
            assert len(output) == 8

    asyncio.run(scenario())


def test_a_bug_in_the_core_ends_one_round(valkey_url: str) -> None:
    """An event on which the core raises: its round is refused and released, the others go on."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=1.0) as c:
            async with c.replica.submit(c.request("s1", PROMPT, 60)) as running:
                await running.start()
                core = c.replica.core
                policy, core.policy = core.policy, Broken()  # unchecked
                with pytest.raises(RoundRefused, match="the gateway failed"):
                    await c.run("s2", PROMPT)
                core.policy = policy
                assert len([t async for chunk in running for t in chunk.token_ids]) == 60
            await until(lambda: c.replica.runtime.rounds_in_flight == 0)
            handle, _ = await c.run("s2", PROMPT)
            assert handle.session_id == "s2", "its lease was freed"
            core.check_invariants()

    asyncio.run(scenario())


def test_a_task_in_the_background_that_fails_ends_nothing(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recording and publishing fail by a bug: it is logged, rounds go on."""

    async def broken(self: Ledger, *arguments: Any, **named: Any) -> None:
        raise ValueError("a bug")

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c:
            monkeypatch.setattr(Ledger, "complete", broken)
            monkeypatch.setattr(Ledger, "publish_totals", broken)
            for _ in range(3):
                _, output = await c.run(uuid.uuid4().hex, PROMPT)
                assert len(output) == 8

    asyncio.run(scenario())


def test_a_round_that_ended_is_recorded_before_the_replica_leaves(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop right after the last token: the ledger is slow, the session's record is there all the same."""

    def slow(complete: Any) -> Any:
        async def wrapped(self: Ledger, **arguments: Any) -> bool:
            for _ in range(50):
                await asyncio.sleep(0.002)
            return bool(await complete(self, **arguments))

        return wrapped

    async def scenario() -> None:
        swap(monkeypatch, "complete", slow)
        async with cluster(valkey_url, "local", engines="d0") as c:
            await c.run("s", PROMPT)
            fleet = c.ledger.connection.fleet
        async with ledger_at(valkey_url, fleet) as ledger:
            ((session,), _) = await ledger.sessions()
            assert session.rounds == 1 and session.in_flight is None
            assert await ledger.counters() == {"completed": 1}

    asyncio.run(scenario())


def test_an_answer_whose_rest_is_cut_off_ends(valkey_url: str) -> None:
    """The replica stops while a slow reader still has to be given the end: the reader does not hang."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=500.0) as c:
            handle = c.replica.submit(c.request("s", PROMPT, 3 * STREAM_BUFFER_CHUNKS))
            await handle.start()
            await until(lambda: handle.lagged)
            chunks = aiter(handle)
            while handle.receipt is None:  # read until the usage is known; the buffer stays full
                await anext(chunks)
        async with asyncio.timeout(5):
            async for _ in chunks:
                pass
        assert handle.ended

    asyncio.run(scenario())


def test_the_first_end_of_a_handle_counts() -> None:
    """A call that is cleaned up later must not wipe out the error that the reader is owed."""

    async def scenario() -> None:
        handle = RoundHandle(RoundRequest("r", "s", "t", "/v1/completions", Prompt((1,)), {}, 1, 1.0, 1.0))
        handle.finish(RoundRefused("upstream_failed", "first", 1.0))
        handle.finish()
        with pytest.raises(RoundRefused, match="first"):
            await handle.start()

    asyncio.run(scenario())


@pytest.mark.parametrize("lagging", [True, False])
def test_a_slow_reader_is_no_slow_engine(valkey_url: str, lagging: bool) -> None:
    """What a client's reading held back does not count into the engine's window of ITLs."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=500.0) as c:
            async with c.replica.submit(c.request("s", PROMPT, 3 * STREAM_BUFFER_CHUNKS)) as handle:
                await handle.start()
                if lagging:
                    await until(lambda: handle.lagged)
                async for _ in handle:
                    pass
            book = c.replica.core.books.fleet.books["d0"]
            assert len(book.itl.samples) == (not lagging)

    asyncio.run(scenario())


def test_totals_that_changed_during_an_outage_come_with_a_heartbeat(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write fails while the newest change waits: the next heartbeat brings the newest, not the old."""

    async def scenario(ledger: Ledger) -> None:
        recorder = Recorder(ledger, "A")
        busy, free = Totals(1.0, 1, 1, 100), Totals()
        started, failed = asyncio.Event(), asyncio.Event()

        async def command(*words: Any) -> None:
            started.set()
            await failed.wait()
            raise LedgerUnavailable("away")

        await ledger.heartbeat("A", 60.0)
        with monkeypatch.context() as patch:
            patch.setattr(ledger.connection, "command", command)
            assert recorder.note(Reserved("d0", busy))
            writing = asyncio.create_task(recorder.publish())
            await started.wait()
            assert not recorder.note(Reserved("d0", free))
            failed.set()
            await writing
        await ledger.heartbeat("A", 60.0)
        claimed = await ledger.claim(
            replica="B", round_id="r1", session_id="s", tenant="t", candidates=(), ttl_s=60.0
        )
        assert claimed.others["d0"] == free

    async def run() -> None:
        async with ledger_at(valkey_url) as ledger:
            await scenario(ledger)

    asyncio.run(run())


def test_a_claim_cut_off_before_it_began_leaves_no_coroutine(
    valkey_url: str, recwarn: pytest.WarningsRecorder
) -> None:
    """A client that leaves in the same moment: no call is left behind that never ran."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c:
            async with c.replica.submit(c.request("s", PROMPT)):
                pass
            await until(lambda: c.replica.core.ended[Outcome.CANCELLED] == 1)

    asyncio.run(scenario())
    assert not [w for w in recwarn if "never awaited" in str(w.message)]


# ---------------------------------------------------------------- discovery


@contextlib.asynccontextmanager
async def watched(
    valkey_url: str, static: Sequence[EngineRecord]
) -> AsyncIterator[tuple[Ledger, Any, SimulatedEngine]]:
    async with (
        simulated(replace(FAST, engine_id="d0")) as engine,
        ledger_at(valkey_url) as ledger,
        watching(ledger, static=[engine.record, *static], times=TIMES) as watcher,
    ):
        yield ledger, watcher, engine


def test_an_engine_that_comes_back_within_the_grace_is_replaced(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record goes, then another incarnation's is there: one replacement, and discovery goes on."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger, watching(ledger) as watcher:
            records: tuple[EngineRecord, ...] = ()

            async def engines(self: Ledger) -> tuple[EngineRecord, ...]:
                return records

            monkeypatch.setattr(Ledger, "engines", engines)
            async with (
                simulated(replace(FAST, engine_id="d0")) as old,
                simulated(replace(FAST, engine_id="d0")) as new,
            ):
                records = (old.record,)
                await watcher.until_kinds("EngineUp d0")
                records = ()
                (watch,) = watcher.discovery._watches.values()
                await watcher.until(lambda: watch.missing_since is not None)
                records = (new.record,)
                await watcher.until_kinds("EngineUp d0", "EngineDown d0", "EngineUp d0")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "bad",
    [
        EngineRecord("x", "no-url", "decode", "i"),
        EngineRecord("x", "http://127.0.0.1:1", "decode", "i", ("nowhere",)),
        EngineRecord("x", "http://127.0.0.1:1", "decode", "i", ("127.0.0.1:port",)),
    ],
)
def test_a_record_that_makes_no_sense_harms_nobody(valkey_url: str, bad: EngineRecord) -> None:
    """A bad address in the registry or configuration is complained about; the other engines stay watched."""

    async def scenario() -> None:
        async with watched(valkey_url, [bad]) as (_, watcher, _engine):
            await watcher.until_kinds("EngineUp d0")
            probes = len(watcher.loads)
            await watcher.until(lambda: len(watcher.loads) > probes + 3)

    asyncio.run(scenario())


def test_an_engine_of_an_unknown_pool_is_not_used(valkey_url: str) -> None:
    """Every decision looks at every engine: one of a pool that nobody knows must not come up."""

    async def scenario() -> None:
        async with simulated(replace(FAST, engine_id="x")) as other:
            odd = replace(other.record, pool="mixed")
            async with watched(valkey_url, [odd]) as (_, watcher, _engine):
                await watcher.until_kinds("EngineUp d0")
                (watch,) = (w for w in watcher.discovery._watches.values() if w.record.engine_id == "x")
                await watcher.until(lambda: "mixed" in watch.said)
                assert watcher.kinds() == ["EngineUp d0"]

    asyncio.run(scenario())


def test_a_hurried_replica_gives_no_grace(valkey_url: str) -> None:
    """The second signal: rounds in flight are cut off, however long the grace period is."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0", speed=1.0, grace_s=600.0) as c:
            handle = c.replica.submit(c.request("s", PROMPT, 5000))
            await handle.start()
            c.replica.hurry()
        assert handle.ended

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(bounded())


def test_sessions_are_not_said_to_be_gone_while_the_ledger_is(tmp_path: Path) -> None:
    """Listing sessions without the ledger is an error, not an empty list."""

    async def scenario() -> None:
        server = EmbeddedValkey.start(tmp_path)
        try:
            async with cluster(server.url, "local", engines="d0") as c:
                await c.run("s", list(range(100, 200)))
                await asyncio.to_thread(server.stop)
                with pytest.raises(ApiError, match="Sessions cannot be listed") as error:
                    await c.replica.sessions(10)
                assert error.value.status == 503
        finally:
            server.stop()

    asyncio.run(scenario())
