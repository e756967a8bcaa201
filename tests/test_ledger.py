"""The ledger on a real Valkey: claims, forks, fences and completions of rounds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from typing import Any

import pytest

from antiphon.scheduler.ledger import Moved, RoundTaken
from antiphon.scheduler.messages import (
    Claimed,
    Totals,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.retries import Call
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at, receipt, until


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_rounds_of_a_session_follow_each_other(valkey_url: str) -> None:
    """A round that follows a completed one gets the next number and the home that the last one left."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            first = await claim(ledger, "A", "r1")
            assert (first.session_id, first.round_number, first.home, first.parent_id) == ("s", 1, None, None)
            assert await complete(ledger, "A", first, home="d7")
            second = await claim(ledger, "B", "r2")
            assert (second.session_id, second.round_number, second.home) == ("s", 2, "d7")
            assert second.fence > first.fence

    run(scenario())


def test_two_rounds_at_once_make_a_fork(valkey_url: str) -> None:
    """The second of two rounds gets a session of its own, with a parent and the parent's home."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await complete(ledger, "A", await claim(ledger, "A", "r0"), home="d7")
            await ledger.heartbeat("A", TTL_S)
            first = await claim(ledger, "A", "r1")
            for replica, round_id in (("A", "r2"), ("B", "r3")):
                fork = await claim(ledger, replica, round_id)
                assert fork.session_id.startswith("s~")
                assert (fork.parent_id, fork.round_number, fork.home) == ("s", 1, "d7")
                assert await complete(ledger, replica, fork)
            assert await complete(ledger, "A", first)
            assert (await claim(ledger, "A", "r4")).session_id == "s"

    run(scenario())


def test_a_fork_of_a_long_id_is_still_a_valid_id(valkey_url: str) -> None:
    """Forks of ids with 255 characters have at most 255 and can be used by the client."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            long = "x" * 255
            await claim(ledger, "A", "r1", long)
            fork = await claim(ledger, "A", "r2", long)
            assert len(fork.session_id) <= 255
            assert fork.parent_id == long
            await complete(ledger, "A", fork)
            again = await claim(ledger, "A", "r3", fork.session_id)
            assert (again.session_id, again.round_number) == (fork.session_id, 2)

    run(scenario())


def test_a_dead_replicas_lease_is_taken_over(valkey_url: str) -> None:
    """When the heartbeat of the replica that runs a round has run out, its session is free; it is fenced."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.heartbeat("A", 0.2)
            lost = await claim(ledger, "A", "r1")
            assert (await claim(ledger, "B", "r2")).session_id != "s"

            async def expired() -> bool:
                heartbeat, _ = ledger.connection.replica_keys("A")
                return not await ledger.connection.command("EXISTS", heartbeat)

            await until(expired)
            taken = await claim(ledger, "B", "r3")
            assert (taken.session_id, taken.round_number) == ("s", 1)
            assert not await complete(ledger, "A", lost)
            assert await complete(ledger, "B", taken)
            assert not await complete(ledger, "A", lost)
            assert await ledger.counters() == {"completed": 1, "fenced": 2}
            assert [row["round_id"] for row in await ledger.receipts()] == ["r3"]

    run(scenario())


def test_a_retired_replica_frees_its_sessions_at_once(valkey_url: str) -> None:
    """A clean end voids leases and totals without waiting for the TTL."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.publish_totals("A", {"e": Totals(1.0, 1, 1, 1)})
            await ledger.heartbeat("A", TTL_S)
            await claim(ledger, "A", "r1")
            await ledger.retire("A")
            taken = await claim(ledger, "B", "r2")
            assert (taken.session_id, taken.others) == ("s", {})

    run(scenario())


def test_a_lease_ends_even_if_its_replica_lives(valkey_url: str) -> None:
    """A lease that its replica lost track of runs out by its own TTL."""

    async def scenario() -> None:
        async with ledger_at(valkey_url, lease_ttl_s=0.2) as ledger:
            await ledger.heartbeat("A", TTL_S)
            await claim(ledger, "A", "r1")
            assert (await claim(ledger, "B", "r2")).session_id != "s"

            async def free() -> bool:
                return (await claim(ledger, "B", secrets.token_hex(4))).session_id == "s"

            await until(free)

    run(scenario())


def test_a_claim_asked_twice_is_one_claim(valkey_url: str) -> None:
    """After a lost answer the same question gets the same answer: no second lease, no second fence."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            first = await claim(ledger, "A", "r1")
            assert await claim(ledger, "A", "r1") == first
            fork = await claim(ledger, "A", "r2")
            assert await claim(ledger, "A", "r2") == fork

    run(scenario())


def test_one_round_runs_once(valkey_url: str) -> None:
    """A round that another live replica runs, or that has ended, cannot be claimed; a dead one's can."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.heartbeat("A", TTL_S)
            first = await claim(ledger, "A", "r1")
            with pytest.raises(RoundTaken, match="runs on replica A"):
                await claim(ledger, "B", "r1")
            await ledger.retire("A")
            taken = await claim(ledger, "B", "r1")
            assert taken.session_id == "s"
            assert taken.fence > first.fence
            assert not await complete(ledger, "A", first)
            assert await complete(ledger, "B", taken)
            with pytest.raises(RoundTaken, match="has ended"):
                await claim(ledger, "B", "r1")

    run(scenario())


def test_a_retry_takes_the_lease_from_a_replica_that_lives(valkey_url: str) -> None:
    """As from one that is stopped: its heartbeat key is there, and it learns by its next beat."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger, ledger_at(valkey_url, ledger.connection.fleet) as other:
            await ledger.heartbeat("A", TTL_S)
            first = await claim(ledger, "A", "r1", call=Call("c"))
            retry = await claim(other, "B", "r2", call=Call("c", again=True))
            assert (retry.session_id, retry.round_number, retry.replaces) == ("s", 1, "r1")
            assert retry.fence > first.fence
            move = {"session_id": "s", "tenant": "t", "from_home": "d0", "to_home": "d1"}
            assert await ledger.rehome(fence=first.fence, **move) is Moved.FENCED
            assert await ledger.heartbeat("A", TTL_S) == ("r1",)
            assert not await complete(ledger, "A", first, call=Call("c"))
            assert await ledger.heartbeat("A", TTL_S) == ()
            with pytest.raises(RoundTaken, match="replaced by its retry"):
                await claim(ledger, "A", "r1", call=Call("c"))
            assert await complete(other, "B", retry, call=Call("c", again=True))
            assert await other.counters() == {"fenced": 1, "completed": 1}
            ((session,), _) = await other.sessions()
            assert session.rounds == 1

    run(scenario())


def test_a_retry_keeps_the_number_of_a_round_that_failed(valkey_url: str) -> None:
    """Also when the session has gone on since; what came later stands."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            again = Call("c", again=True)
            await complete(
                ledger,
                "A",
                await claim(ledger, "A", "r1", call=Call("c")),
                outcome=Outcome.FAILED,
                call=Call("c"),
            )
            assert await complete(ledger, "A", await claim(ledger, "A", "r2"), home="d2")
            retry = await claim(ledger, "B", "r3", call=again)
            assert (retry.session_id, retry.round_number) == ("s", 1)
            assert await complete(ledger, "B", retry, home="d3", call=again)
            ((session,), _) = await ledger.sessions()
            assert (session.rounds, session.home, session.prompt_tokens) == (2, "d2", 200)
            assert (await claim(ledger, "A", "r4")).round_number == 3

    run(scenario())


def test_a_degraded_try_counts_once_with_its_retry(valkey_url: str) -> None:
    """The ledger was away for the first try: whichever completion is offered first counts."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            again = Call("c", again=True)
            unseen = Claimed("r1", 0, "s", 1)
            assert await complete(ledger, "A", unseen, degraded=True, call=Call("c"))
            retry = await claim(ledger, "B", "r2", call=again)
            assert (retry.session_id, retry.round_number) == ("s", 1)
            assert await complete(ledger, "B", retry, call=again)
            assert await complete(ledger, "A", Claimed("r3", 0, "s", 1), degraded=True, call=again)
            assert await ledger.counters() == {"completed": 1, "repeated": 2}
            ((session,), _) = await ledger.sessions()
            assert session.rounds == 1

    run(scenario())


def test_a_completion_sent_twice_counts_once(valkey_url: str) -> None:
    """Repeating a completion answers True again and adds nothing."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            claimed = await claim(ledger, "A", "r1")
            for _ in range(3):
                assert await complete(ledger, "A", claimed)
            assert await ledger.counters() == {"completed": 1}
            assert len(await ledger.receipts()) == 1
            (session,), _ = await ledger.sessions()
            assert (session.rounds, session.prompt_tokens, session.cached_tokens) == (1, 100, 40)

    run(scenario())


def test_a_late_completion_leaves_the_next_round_alone(valkey_url: str) -> None:
    """A repeated completion does not free the lease of the round that followed."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            first = await claim(ledger, "A", "r1")
            await complete(ledger, "A", first)
            second = await claim(ledger, "A", "r2")
            await complete(ledger, "A", first)
            assert (await claim(ledger, "A", "r3")).parent_id == "s"
            assert await complete(ledger, "A", second)

    run(scenario())


def test_a_refused_round_leaves_no_session(valkey_url: str) -> None:
    """A round that never started is counted and has its receipt, but makes no session and no number."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            refused = await claim(ledger, "A", "r1")
            assert await complete(ledger, "A", refused, outcome=Outcome.REFUSED, home=None)
            assert await ledger.sessions() == ((), None)
            assert await ledger.counters() == {"refused": 1}
            await complete(ledger, "A", await claim(ledger, "A", "r2"))
            again = await claim(ledger, "A", "r3")
            await complete(ledger, "A", again, outcome=Outcome.REFUSED, home=None)
            assert (await claim(ledger, "A", "r4")).round_number == 2

    run(scenario())


def test_a_failed_round_counts_and_moves_no_home(valkey_url: str) -> None:
    """Failed and cancelled rounds have their number; the home stays where the last completed one was."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await complete(ledger, "A", await claim(ledger, "A", "r1"), home="d0")
            for number, outcome in ((2, Outcome.FAILED), (3, Outcome.CANCELLED)):
                claimed = await claim(ledger, "A", f"r{number}")
                assert claimed.round_number == number
                await complete(ledger, "A", claimed, outcome=outcome, home="d9")
            assert (await claim(ledger, "A", "r4")).home == "d0"
            assert await ledger.counters() == {"completed": 1, "failed": 1, "cancelled": 1}

    run(scenario())


def test_a_released_claim_leaves_nothing(valkey_url: str) -> None:
    """Giving a claim back frees its session and forgets one that the claim made; others are left alone."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await claim(ledger, "A", "r1")
            assert not await ledger.release("B", "r1")
            assert await ledger.release("A", "r1")
            assert not await ledger.release("A", "r1")
            assert await ledger.sessions() == ((), None)
            ended = await claim(ledger, "A", "r2")
            await complete(ledger, "A", ended)
            assert not await ledger.release("A", "r2")
            assert await complete(ledger, "A", ended)  # still known as recorded
            assert await ledger.counters() == {"completed": 1}
            await claim(ledger, "A", "r3")
            assert await ledger.release("A", "r3")
            ((session,), _) = await ledger.sessions()
            assert (session.rounds, session.in_flight) == (1, None)

    run(scenario())


def test_a_round_without_a_claim_is_recorded_once(valkey_url: str) -> None:
    """A degraded round (fence 0) is recorded, once, and frees the lease if its claim landed unseen."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            unseen = await claim(ledger, "A", "r1")
            for _ in range(2):
                assert await complete(ledger, "A", unseen, fence=0, degraded=True)
            assert await ledger.counters() == {"completed": 1}
            following = await claim(ledger, "A", "r2")
            assert (following.session_id, following.round_number) == ("s", 2)

    run(scenario())


def test_a_round_without_a_claim_leaves_the_holder_alone(valkey_url: str) -> None:
    """A degraded round is recorded beside a live one in its session and does not take its lease."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.heartbeat("B", TTL_S)
            holder = await claim(ledger, "B", "r1")
            degraded = receipt("r2", "s", home="d9", degraded=True)
            assert await ledger.complete(
                replica="A", fence=0, session_id="s", tenant="t", receipt=degraded, ttl_s=TTL_S
            )
            ((session,), _) = await ledger.sessions()
            assert (session.in_flight, session.home) == ("r1", None)
            assert await complete(ledger, "B", holder)
            assert await ledger.counters() == {"completed": 2}

    run(scenario())
