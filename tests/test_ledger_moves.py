"""Moving a session's home, and looking at a session without claiming it, on a real Valkey."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import Counter
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable, Moved
from antiphon.scheduler.messages import (
    Claimed,
    Rehome,
    Totals,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.recorder import Recorder
from antiphon.scheduler.rounds import RoundRequest
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at, page


async def move(ledger: Ledger, claimed: Claimed, from_home: str, to_home: str) -> Moved:
    session_id = claimed.session_id
    return await ledger.rehome(
        fence=claimed.fence, session_id=session_id, tenant="t", from_home=from_home, to_home=to_home
    )


async def home(ledger: Ledger, session_id: str = "s") -> str | None:
    sessions, _ = await ledger.sessions(100)
    return next(record.home for record in sessions if record.session_id == session_id)


def test_a_moved_session_is_found_at_its_new_home(valkey_url: str) -> None:
    """The new home counts at once, also if the round then fails, and for a fork that begins meanwhile."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await complete(ledger, "A", await claim(ledger, "A", "r1"), home="d0")
            second = await claim(ledger, "A", "r2")
            assert await move(ledger, second, "d0", "d1") is Moved.MOVED
            assert (await claim(ledger, "A", "fork")).home == "d1"
            await complete(ledger, "A", second, outcome=Outcome.CANCELLED, home="d1")
            assert (await claim(ledger, "A", "r3")).home == "d1"

    asyncio.run(scenario())


def test_who_may_not_move_a_session(valkey_url: str) -> None:
    """A stale claim, one that is over, one that names another home, and one of nothing: the home stays."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            first = await claim(ledger, "A", "r1")
            await complete(ledger, "A", first, home="d0")
            assert await move(ledger, first, "d0", "d1") is Moved.ENDED
            lost = await claim(ledger, "A", "r2")  # without a heartbeat, so that B may take over
            held = await claim(ledger, "B", "r3")
            assert held.session_id == "s"
            assert await move(ledger, lost, "d0", "d1") is Moved.FENCED
            assert await move(ledger, held, "d7", "d1") is Moved.OTHER_HOME
            assert await home(ledger) == "d0"
            unknown = replace(held, session_id="nobody")
            assert await move(ledger, unknown, "d0", "d1") is Moved.UNKNOWN_SESSION
            sessions, _ = await ledger.sessions(100)
            assert [record.session_id for record in sessions] == ["s"], "nothing is made by asking"
            assert await move(ledger, held, "d0", "d1") is Moved.MOVED
            assert await move(ledger, held, "d0", "d1") is Moved.MOVED, "asked again, as after a lost answer"
            assert await home(ledger) == "d1"

    asyncio.run(scenario())


def test_two_replicas_at_once(valkey_url: str) -> None:
    """A replica that was given up moves a session while another claims it: the newer claim wins."""

    async def race(one: Ledger, other: Ledger, session: str) -> Moved:
        await complete(one, "A", await claim(one, "A", f"{session}-1", session), home="d0")
        stale = await claim(one, "A", f"{session}-2", session)

        async def take_over() -> Claimed:
            held = await claim(other, "B", f"{session}-3", session)
            assert held.home is not None and await move(other, held, held.home, "d2") is Moved.MOVED
            return held

        result, held = await asyncio.gather(move(one, stale, "d0", "d1"), take_over())
        assert held.home == ("d1" if result is Moved.MOVED else "d0")
        assert await home(one, session) == "d2"
        assert await move(one, stale, "d2", "d1") is Moved.FENCED
        return result

    async def scenario() -> None:
        fleet = secrets.token_hex(6)
        async with ledger_at(valkey_url, fleet) as one, ledger_at(valkey_url, fleet) as other:
            results = Counter([await race(one, other, f"s{n}") for n in range(40)])
            assert sum(results.values()) == 40 and set(results) <= {Moved.MOVED, Moved.FENCED}

    asyncio.run(scenario())


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


def test_a_ledger_that_is_away_costs_a_note(silent_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Within its deadline the attempt is over, counted and logged; it raises nothing, also when unclaimed."""

    async def scenario() -> None:
        async with ledger_at(silent_url, deadline_s=0.1) as ledger:
            counted: list[str] = []
            recorder = Recorder(ledger, "A", on_move=counted.append)
            request = RoundRequest("r", "s", "t", "/v1/x", Prompt((1,)), {}, 1, 1.0, 1.0)
            async with asyncio.timeout(5.0):
                await recorder.rehome("t", "s", 7, Rehome("r1", "d0", "d1"))
                await recorder.rehome("t", "s", 0, Rehome("r2", "d0", "d1"))
                assert isinstance(await recorder.look(request, ()), LedgerUnavailable)
            assert counted == ["away", "unclaimed"]

    asyncio.run(scenario())
    notes = [record.message for record in caplog.records if "is not moved" in record.message]
    assert ["r1" in notes[0], "r2" in notes[1], len(notes)] == [True, True, 2]


async def everything(ledger: Ledger) -> dict[str, tuple[object, bool]]:
    """Every key of the fleet: its content, and whether it expires."""
    names = [key async for key in ledger.connection.redis.scan_iter(f"{ledger.connection.tag}:*")]
    return {name: (await content(ledger, name), await expires(ledger, name)) for name in sorted(names)}


async def content(ledger: Ledger, name: str) -> object:
    commands = {"hash": ("HGETALL",), "set": ("SMEMBERS",), "zset": ("ZRANGE", "0", "-1"), "string": ("GET",)}
    kind = await ledger.connection.command("TYPE", name)
    if kind == "stream":
        return await ledger.connection.command("XLEN", name)
    command, *rest = commands[kind]
    return await ledger.connection.command(command, name, *rest)


async def expires(ledger: Ledger, name: str) -> bool:
    return int(await ledger.connection.command("PTTL", name)) >= 0


def test_a_look_tells_what_a_claim_would_and_changes_nothing(valkey_url: str) -> None:
    """Unknown, known and busy sessions: home, tip, holdings, round and the others' totals are the claim's."""

    async def scenario() -> None:
        fleet = secrets.token_hex(6)
        async with ledger_at(valkey_url, fleet) as ledger, ledger_at(valkey_url, fleet) as other:
            await other.heartbeat("B", TTL_S)
            await other.publish_totals("B", {"d0": Totals(1.5, 1, 2, 3000)})
            candidates = [(1024, page(2)), (512, page(1))]
            held = [(page(1), 512, "d0", "i"), (page(2), 1024, "d0", "i"), (page(1), 512, "p0", "j")]
            for number in range(3):
                before = await everything(ledger)
                look = await ledger.look(replica="A", session_id="s", tenant="t", candidates=candidates)
                assert await everything(ledger) == before
                assert (look.known, look.busy) == (number > 0, False)
                got = await claim(ledger, "A", f"r{number}", candidates=candidates)
                assert replace(look.claimed, round_id=got.round_id, fence=got.fence, ttl_s=TTL_S) == got
                assert got.others == {"d0": Totals(1.5, 1, 2, 3000)} and len(got.holdings) == 2 * (number > 0)
                busy = await ledger.look(replica="A", session_id="s", tenant="t", candidates=candidates)
                fork = await claim(ledger, "A", f"f{number}", candidates=candidates)
                assert busy.busy and busy.claimed.parent_id == "s" == fork.parent_id
                same = replace(fork, round_id="", fence=0, session_id="s", ttl_s=0.0)
                assert busy.claimed == same
                await complete(ledger, "A", got, holdings=held, home="d0")

    asyncio.run(scenario())


def test_a_look_keeps_nothing_alive(valkey_url: str) -> None:
    """The TTL of what it reads goes on running, where a claim would renew it."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            c = ledger.connection
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=[(page(1), 512, "d0", "i")])
            keys = [c.session_key("t", "s"), *c.residency_keys("t", [page(1)])]
            for key in keys:
                await c.command("PEXPIRE", key, 30_000)
            candidates = [(512, page(1))]
            look = await ledger.look(replica="A", session_id="s", tenant="t", candidates=candidates)
            assert look.known and look.claimed.holdings
            assert all([await c.command("PTTL", key) <= 30_000 for key in keys])
            await claim(ledger, "A", "r2", candidates=candidates)
            assert all([await c.command("PTTL", key) > 30_000 for key in keys])

    asyncio.run(scenario())
