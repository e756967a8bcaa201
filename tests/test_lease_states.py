"""The table of lease states is what the ledger's scripts do."""

from __future__ import annotations

import asyncio

import pytest

from antiphon.scheduler.lease_states import TRANSITIONS, Answer, Lease, Step
from antiphon.scheduler.ledger import Ledger, Moved, RoundTaken
from antiphon.scheduler.messages import Claimed
from antiphon.scheduler.retries import Call
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at

CALL, AGAIN = Call("c"), Call("c", again=True)
UNCLAIMED = Claimed("me", 1, "s", 1)
"""A round that was never given the session."""


async def enter(ledger: Ledger, state: Lease, step: Step) -> Claimed:
    """Bring session "s" into the state, as seen by round "me" of replica A; what A knows of its claim."""
    await ledger.heartbeat("B", TTL_S)
    mine = step in (Step.COMPLETE, Step.RELEASE, Step.MOVE)
    match state:
        case Lease.FREE:
            if not mine:
                await complete(ledger, "B", await claim(ledger, "B", "before"))
                return UNCLAIMED
            claimed = await claim(ledger, "A", "me")
            await complete(ledger, "A", claimed)
            return claimed
        case Lease.OURS:
            return await claim(ledger, "A", "me", call=CALL)
        case Lease.EARLIER:
            await claim(ledger, "B", "first", call=CALL)
        case Lease.OTHERS:
            await claim(ledger, "B", "other")
        case Lease.LAPSED:
            claimed = await claim(ledger, "A" if mine else "B", "me" if mine else "other")
            await ledger.retire("A" if mine else "B")
            return claimed
        case Lease.NEWER:
            claimed = await claim(ledger, "A", "me", call=CALL)
            await claim(ledger, "B", "retry", call=AGAIN)
            return claimed
    return UNCLAIMED


async def take(ledger: Ledger, step: Step, before: Claimed) -> Answer:
    match step:
        case Step.CLAIM | Step.RETRY:
            try:
                claimed = await claim(ledger, "A", "me", call=AGAIN if step is Step.RETRY else None)
            except RoundTaken:
                return Answer.TAKEN
            if claimed.session_id != "s":
                assert claimed.parent_id == "s"
                return Answer.FORK
            return Answer.SAME if claimed.fence == before.fence else Answer.GIVEN
        case Step.COMPLETE:
            total = (await ledger.counters()).get("completed", 0)
            if not await complete(ledger, "A", before):
                return Answer.FENCED
            return Answer.RECORDED if (await ledger.counters())["completed"] > total else Answer.SAME
        case Step.RELEASE:
            return Answer.FREED if await ledger.release("A", "me") else Answer.NOTHING
        case Step.MOVE:
            moved = await ledger.rehome(
                fence=before.fence, session_id="s", tenant="t", from_home="d0", to_home="d1"
            )
            said = {Moved.MOVED: Answer.MOVED, Moved.FENCED: Answer.FENCED, Moved.ENDED: Answer.NOTHING}
            return said[moved]
        case Step.EXPIRE:
            await ledger.retire("A")
            return Answer.SILENT
    key = ledger.connection.session_key("t", "s")
    status, _, _ = await ledger.connection.script("session_close", [key], [ledger.connection.tag, ""])
    return Answer(status)


async def seen(ledger: Ledger, before: Lease) -> Lease:
    """The state that the session is in now."""
    records = {record.session_id: record.in_flight for record in (await ledger.sessions())[0]}
    holder = records.get("s")
    if before is Lease.NEWER:
        return Lease.NEWER if holder == "retry" else Lease.FREE
    if holder is None:
        return Lease.FREE
    lives = await ledger.connection.command("EXISTS", *ledger.connection.replica_keys("A")[:1])
    others_live = await ledger.connection.command("EXISTS", *ledger.connection.replica_keys("B")[:1])
    if holder == "me":
        return Lease.OURS if lives else Lease.LAPSED
    if not others_live:
        return Lease.LAPSED
    return Lease.EARLIER if holder == "first" else Lease.OTHERS


@pytest.mark.parametrize(("state", "step"), TRANSITIONS, ids=lambda item: item.value)
def test_a_step_does_what_the_table_says(valkey_url: str, state: Lease, step: Step) -> None:
    """The answer, and the state after it."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            before = await enter(ledger, state, step)
            if step is Step.MOVE:
                key = ledger.connection.session_key("t", "s")
                await ledger.connection.command("HSET", key, "home", "d0")
            if not (state is Lease.LAPSED and step in (Step.COMPLETE, Step.RELEASE, Step.MOVE)):
                await ledger.heartbeat("A", TTL_S)
            answer, after = TRANSITIONS[state, step]
            assert await take(ledger, step, before) is answer
            assert await seen(ledger, state) is after

    asyncio.run(scenario())
