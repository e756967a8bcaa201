"""What the ledger keeps of a session beyond a round, on a real Valkey: parent, own TTL, targets, its end."""

from __future__ import annotations

import asyncio
from typing import Any

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.hints import Hints
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.messages import Claimed
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.recorder import Recorder
from antiphon.scheduler.rounds import RoundRequest
from antiphon.scheduler.session_store import SessionStore
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at, page


async def remaining_s(ledger: Ledger, session_id: str, tenant: str = "t") -> float:
    key = ledger.connection.session_key(tenant, session_id)
    return int(await ledger.connection.command("PTTL", key)) / 1000


async def run_round(ledger: Ledger, round_id: str, session_id: str, **more: Any) -> Claimed:
    """Claimed and completed at d0, which then holds two pages' worth."""
    claimed = await claim(ledger, "A", round_id, session_id, **more)
    await complete(ledger, "A", claimed, holdings=[(page(1), 512, "d0", "i")])
    return claimed


def test_a_child_starts_where_its_parent_is(valkey_url: str) -> None:
    """Home and tip at its first round; later it goes its own way, and its parent is not changed any more."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await run_round(ledger, "r1", "parent")
            child = await run_round(ledger, "r2", "child", parent_id="parent")
            assert (child.parent_id, child.home, child.round_number) == ("parent", "d0", 1)
            assert child.tip is not None and child.tip[0] == page(1)
            later = await claim(ledger, "A", "r3", "child", parent_id="somebody else")
            assert (later.parent_id, later.round_number) == ("parent", 2)
            grandchild = await claim(ledger, "A", "r4", "grandchild", parent_id="child")
            assert grandchild.parent_id == "child"
            document = await SessionStore(ledger).get("t", "grandchild")
            assert document is not None
            assert (document.record.parent_id, document.root_id) == ("child", "parent")

    asyncio.run(scenario())


def test_a_parent_may_be_unknown_or_the_session_itself(valkey_url: str) -> None:
    """The link is kept, there is just nothing to start from; nobody is their own parent."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            orphan = await claim(ledger, "A", "r1", "orphan", parent_id="never seen")
            assert (orphan.parent_id, orphan.home, orphan.tip) == ("never seen", None, None)
            alone = await claim(ledger, "A", "r2", "alone", parent_id="alone")
            assert alone.parent_id is None

    asyncio.run(scenario())


def test_a_parent_of_another_tenant_is_unknown(valkey_url: str) -> None:
    """An id is a tenant's own."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await run_round(ledger, "r1", "parent")
            child = await claim(ledger, "A", "r2", "child", tenant="u", parent_id="parent")
            assert (child.parent_id, child.home) == ("parent", None)

    asyncio.run(scenario())


def test_a_look_tells_what_a_child_would_start_with(valkey_url: str) -> None:
    """As the claim that follows."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await run_round(ledger, "r1", "parent")
            look = await ledger.look(
                replica="A", session_id="child", tenant="t", candidates=(), parent_id="parent"
            )
            got = await claim(ledger, "A", "r2", "child", parent_id="parent")
            assert not look.known
            told = (look.claimed.parent_id, look.claimed.home, look.claimed.tip, look.claimed.round_number)
            assert told == (got.parent_id, got.home, got.tip, got.round_number)

    asyncio.run(scenario())


def test_a_session_has_a_ttl_of_its_own(valkey_url: str) -> None:
    """Once told it is kept, for forks too; the default is for the others."""

    async def scenario() -> None:
        async with ledger_at(valkey_url, lease_ttl_s=1.0) as ledger:
            first = await claim(ledger, "A", "r1", "s", own_ttl_s=5000.0)
            assert first.ttl_s == 5000.0
            fork = await claim(ledger, "A", "r2", "s")
            assert (fork.parent_id, fork.ttl_s) == ("s", 5000.0)
            await complete(ledger, "A", first)
            assert 4900 < await remaining_s(ledger, "s") <= 5000
            assert (await claim(ledger, "A", "r3", "s")).ttl_s == 5000.0
            other = await run_round(ledger, "r4", "other")
            assert other.ttl_s == TTL_S
            assert TTL_S - 10 < await remaining_s(ledger, "other") <= TTL_S
            assert (await claim(ledger, "A", "r5", "other", own_ttl_s=7.0)).ttl_s == 7.0

    asyncio.run(scenario())


def test_a_created_session_outlives_a_refused_first_round(valkey_url: str) -> None:
    """One that only a round has named does not."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            store = SessionStore(ledger)
            await store.create("t", "made", TTL_S)
            for session_id in ("made", "named"):
                claimed = await claim(ledger, "A", f"r-{session_id}", session_id)
                await complete(ledger, "A", claimed, outcome=Outcome.REFUSED)
                again = await claim(ledger, "A", f"released-{session_id}", session_id)
                assert again.round_number == 1
                assert await ledger.release("A", f"released-{session_id}")
            assert await store.get("t", "named") is None
            made = await store.get("t", "made")
            assert made is not None and made.record.rounds == 0 and made.record.in_flight is None
            assert (await claim(ledger, "A", "later", "made", parent_id="p")).parent_id == "p"

    asyncio.run(scenario())


def test_a_session_closes_with_its_last_round(valkey_url: str) -> None:
    """When that has completed; a failed one may come again. Who uses it again opens it."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            store = SessionStore(ledger)

            async def status() -> str:
                document = await store.get("t", "s")
                assert document is not None
                return document.status

            await run_round(ledger, "r0", "s")
            failing = await claim(ledger, "A", "r1", "s", final=True)
            assert await status() == "closing"
            await complete(ledger, "A", failing, outcome=Outcome.FAILED)
            assert await status() == "active"
            await run_round(ledger, "r2", "s", final=True)
            assert await status() == "closed"
            again = await claim(ledger, "A", "r3", "s")
            assert (again.session_id, again.round_number, await status()) == ("s", 4, "active")

    asyncio.run(scenario())


def test_a_session_s_own_targets_are_for_rounds_that_name_none(valkey_url: str) -> None:
    """The ledger tells them; the recorder leaves out what the request has said itself."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            store = SessionStore(ledger)
            await store.create("t", "s", TTL_S, slo_ttft_s=0.5, slo_itl_s=0.02, expected_rounds=3)
            recorder = Recorder(ledger, "A")

            async def claimed(number: int, hints: Hints) -> Claimed:
                request = RoundRequest(
                    f"r{number}", "s", "t", "/v1/x", Prompt((1,)), {}, 1, 1.0, 1.0, hints=hints
                )
                look = await recorder.look(request, ())
                answer = await recorder.claim(request, ())
                assert isinstance(answer, Claimed) and not isinstance(look, Exception)
                told = (look.claimed.slo_ttft_s, look.claimed.slo_itl_s, look.claimed.expected_rounds)
                assert told == (answer.slo_ttft_s, answer.slo_itl_s, answer.expected_rounds)
                await ledger.release("A", f"r{number}")
                return answer

            first = await claimed(1, Hints())
            assert (first.slo_ttft_s, first.slo_itl_s, first.expected_rounds) == (0.5, 0.02, 3)
            second = await claimed(2, Hints(ttft_s=1.0))
            assert (second.slo_ttft_s, second.slo_itl_s) == (0.0, 0.02)

    asyncio.run(scenario())
