"""The ledger when things break: lost data, dead and hanging servers, cancelled calls."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from antiphon.scheduler.heartbeat import Heartbeat
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.messages import Holding, Totals
from antiphon.scheduler.retries import Call
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at, page, until


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_fences_grow_through_a_loss_of_all_data(tmp_path: Path) -> None:
    """A fence after FLUSHALL is above all before; an old holder completes unless a newer claim was there."""

    async def scenario(url: str) -> None:
        async with ledger_at(url) as ledger:
            kept = await claim(ledger, "A", "r1", "kept")
            replaced = await claim(ledger, "A", "r2", "replaced")
            await ledger.connection.command("FLUSHALL")
            newer = await claim(ledger, "B", "r3", "replaced")
            assert newer.session_id == "replaced"
            assert newer.fence > max(kept.fence, replaced.fence)
            assert await complete(ledger, "A", kept)
            assert not await complete(ledger, "A", replaced)
            assert await complete(ledger, "B", newer)
            assert not await complete(ledger, "A", replaced)

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server.url))


def test_two_degraded_tries_are_one_completion_while_the_session_has_gone_on(valkey_url: str) -> None:
    """Their session's next round runs when they are told: the first try must be remembered all the same."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            call = Call(secrets.token_hex(16), asks="this", again=True)
            held = await claim(ledger, "A", "next")
            for replica, round_id in (("A", "try1"), ("B", "try2")):
                tried = structs.replace(held, round_id=round_id)
                assert await complete(ledger, replica, tried, fence=0, call=call)
            assert await complete(ledger, "A", held)
            recorded = [receipt["round_id"] for receipt in await ledger.receipts()]
            assert sorted(recorded) == ["next", "try1"]
            counters = await ledger.counters()
            assert (counters["completed"], counters["repeated"]) == (2, 1)

    run(scenario())


def test_residency_is_written_again_after_a_loss(tmp_path: Path) -> None:
    """What a completion need not write again is written again once the ledger has lost it."""

    async def scenario(url: str) -> None:
        async with ledger_at(url) as ledger:
            holdings = [(page(1), 512, "d0", "one")]
            candidates = [(512, page(1))]
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=holdings)
            await ledger.connection.command("FLUSHALL")
            lost = await claim(ledger, "A", "r2", candidates=candidates)
            assert lost.holdings == ()
            await complete(ledger, "A", lost, holdings=holdings)
            found = await claim(ledger, "A", "r3", candidates=candidates)
            assert found.holdings == (Holding("d0", "one", 512),)

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server.url))


def test_a_restarted_server_is_used_again(tmp_path: Path) -> None:
    """kill -9 and restart of the server lose no session; scripts and connections are made anew."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with ledger_at(server.url, retry_after_s=0.0) as ledger:
            await complete(ledger, "A", await claim(ledger, "A", "r1"), home="d7")
            # a busy disk may hold the write back for up to two seconds, by the server's own rule
            assert (await ledger.connection.command("WAITAOF", 1, 0, 10_000))[0] == 1
            await kill_and_await_restart(server)
            second = await claim(ledger, "A", "r2")
            assert (second.round_number, second.home) == (2, "d7")

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server))


def test_a_ledger_that_hangs_costs_one_deadline(tmp_path: Path) -> None:
    """A stopped server: the first claim fails at its deadline, the next at once; then it works again."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with ledger_at(server.url, deadline_s=0.3, retry_after_s=5.0) as ledger:
            os.kill(server.pointer.pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                with pytest.raises(LedgerUnavailable, match=r"did not answer in 0\.3 s"):
                    await claim(ledger, "A", "r1")
                assert time.monotonic() - started < 3.0
                started = time.monotonic()
                with pytest.raises(LedgerUnavailable, match="a moment ago"):
                    await claim(ledger, "A", "r2")
                assert time.monotonic() - started < 0.1
            finally:
                os.kill(server.pointer.pid, signal.SIGCONT)

            async def answers() -> bool:
                try:
                    await ledger.heartbeat("A", TTL_S)  # not held back, and its success lets claims pass
                except LedgerUnavailable:
                    return False
                return True

            await until(answers)
            await claim(ledger, "A", "r3", "third")

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server))


def test_a_claim_that_nobody_waited_for_is_given_back(tmp_path: Path) -> None:
    """A claim that the server carries out after its deadline, or its cancellation, leaves no lease."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with ledger_at(server.url, deadline_s=0.5, retry_after_s=0.0) as ledger:
            await ledger.heartbeat("A", TTL_S)
            await complete(ledger, "A", await claim(ledger, "A", "r0", "old"))
            os.kill(server.pointer.pid, signal.SIGSTOP)
            try:
                with pytest.raises(LedgerUnavailable):
                    await claim(ledger, "A", "late", "old")
                task = asyncio.create_task(claim(ledger, "A", "cancelled", "new"))
                for _ in range(20):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            finally:
                os.kill(server.pointer.pid, signal.SIGCONT)

            async def settled() -> bool:
                try:
                    await ledger.heartbeat("A", TTL_S)
                    sessions, _ = await ledger.sessions()
                except LedgerUnavailable:
                    return False
                return [(s.session_id, s.in_flight) for s in sessions] == [("old", None)]

            await until(settled)
            assert (await claim(ledger, "A", "r1", "old")).session_id == "old"

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server))


def test_cancelled_calls_leave_the_connections_usable(valkey_url: str) -> None:
    """Cancelled at any await, a call leaves no half-read answer to the next one, and no lease for long."""

    async def scenario() -> None:
        async with ledger_at(valkey_url, max_connections=2) as ledger:
            await ledger.heartbeat("A", TTL_S)
            for steps in range(40):
                task = asyncio.create_task(claim(ledger, "A", f"c{steps}", f"c{steps}"))
                for _ in range(steps % 20):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert await ledger.counters() == {}, "the answer of another command"
                fresh = await claim(ledger, "A", f"f{steps}", f"f{steps}")
                assert fresh.session_id == f"f{steps}"
                if not task.cancelled():  # it was faster than its cancellation: an ordinary claim
                    await ledger.release("A", f"c{steps}")

            async def settled() -> bool:
                await ledger.heartbeat("A", TTL_S)
                sessions, _ = await ledger.sessions(1000)
                return not [s for s in sessions if s.session_id.startswith("c")]

            await until(settled)

    run(scenario())


def test_a_ledger_that_is_away_or_refuses_says_so(tmp_path: Path, valkey_url: str) -> None:
    """Whatever goes wrong is LedgerUnavailable, with where and why."""

    async def scenario() -> None:
        async with ledger_at(f"unix://{tmp_path}/none.sock") as ledger:
            with pytest.raises(LedgerUnavailable, match=r"none\.sock is away"):
                await ledger.check()
        async with ledger_at(valkey_url) as ledger:
            await ledger.check()
            (counters,) = ledger.connection.keys("counters")
            await ledger.connection.command("SET", counters, "not a hash")
            with pytest.raises(LedgerUnavailable, match=r"refuses: .*WRONGTYPE"):
                await ledger.counters()
        async with ledger_at("redis://user:secret@127.0.0.1:1") as ledger:
            with pytest.raises(LedgerUnavailable, match=r"at redis://127\.0\.0\.1:1 is away") as caught:
                await ledger.check()
            assert "secret" not in str(caught.value)

    run(scenario())


def test_a_url_that_is_none_is_the_callers_error() -> None:
    """A wrong scheme is a ValueError at once, not an outage."""
    with pytest.raises(ValueError, match="scheme"):
        Ledger("http://127.0.0.1")


def test_the_heartbeat_task_beats_through_an_outage_and_retires(tmp_path: Path) -> None:
    """It goes on when the ledger comes back, brings the totals again, and retires when cancelled."""

    async def scenario(server: EmbeddedValkey) -> None:
        async with ledger_at(server.url, retry_after_s=0.0) as ledger:
            heart = Heartbeat(ledger, "A", ttl_s=30.0, interval_s=0.05)
            await ledger.publish_totals("A", {"d0": Totals(1.0, 1, 1, 1)})

            async def seen() -> bool:
                return bool((await claim(ledger, "B", secrets.token_hex(4))).others)

            async with asyncio.TaskGroup() as group:
                task = group.create_task(heart.run())
                await until(seen)
                await kill_and_await_restart(server)
                await ledger.connection.command("FLUSHALL")
                await until(seen)
                assert not heart.away
                task.cancel()
            assert not await seen()

    with EmbeddedValkey.start(tmp_path) as server:
        run(scenario(server))


def test_the_heartbeat_says_that_the_ledger_is_away(tmp_path: Path) -> None:
    """`away` while the last beat failed; being cancelled then is quick and raises nothing else."""

    async def scenario() -> None:
        async with ledger_at(f"unix://{tmp_path}/none.sock") as ledger:
            heart = Heartbeat(ledger, "A")
            async with asyncio.TaskGroup() as group:
                task = group.create_task(heart.run())

                async def away() -> bool:
                    return heart.away

                await until(away)
                task.cancel()
            assert heart.beats == 0

    run(scenario())


async def kill_and_await_restart(server: EmbeddedValkey) -> None:
    killed = server.pointer.pid
    os.kill(killed, signal.SIGKILL)

    async def back() -> bool:
        return server.pointer.pid != killed

    await until(back)
