"""What replicas learn of each other through the ledger, and what people see: residency, totals, views."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Coroutine
from importlib import resources
from typing import Any

import msgspec

from antiphon.scheduler.ledger import thin
from antiphon.scheduler.ledger_connection import SCRIPTS
from antiphon.scheduler.messages import Holding, Totals
from tests.ledger_helpers import TTL_S, claim, complete, ledger_at, page, receipt, until


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


# ---------------------------------------------------------------- residency


def test_a_claim_finds_who_holds_how_much(valkey_url: str) -> None:
    """Each engine's longest prefix, of every incarnation, and only the tenant's own."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            holdings = [
                *((page(n), 512 * n, "d0", "one") for n in range(1, 5)),
                *((page(n), 512 * n, "p0", "one") for n in range(1, 3)),
                (page(1), 512, "e|}0", "a|b"),
            ]
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=holdings)
            restarted = [(page(1), 512, "d0", "two")]
            await complete(ledger, "A", await claim(ledger, "A", "r2"), holdings=restarted)
            candidates = [(512 * n, page(n)) for n in range(6, 0, -1)]
            found = await claim(ledger, "A", "r3", "another session", candidates=candidates)
            assert set(found.holdings) == {
                Holding("d0", "one", 2048),
                Holding("d0", "two", 512),
                Holding("p0", "one", 1024),
                Holding("e|}0", "a|b", 512),
            }
            other = await claim(ledger, "A", "r4", tenant="other", candidates=candidates)
            assert other.holdings == ()

    run(scenario())


def test_an_entry_is_not_written_twice_in_a_row(valkey_url: str) -> None:
    """A round repeats only entries whose TTL has worn down: its cost does not grow with its history."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            holdings = [(page(n), 512 * n, "d0", "one") for n in range(1, 100)]
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=holdings)
            keys = ledger.connection.residency_keys("t", [page(n) for n in range(1, 100)])
            assert await ledger.connection.command("DEL", *keys) == 99
            again = [*holdings, (page(100), 51200, "d0", "one")]
            await complete(ledger, "A", await claim(ledger, "A", "r2"), holdings=again)
            assert await ledger.connection.command("EXISTS", *keys) == 0
            (key,) = ledger.connection.residency_keys("t", [page(100)])
            assert 0 < await ledger.connection.command("PTTL", key) <= TTL_S * 1000

    run(scenario())


def test_a_claim_renews_what_it_finds(valkey_url: str) -> None:
    """Residency that is in use does not expire under its readers."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            holdings = [(page(1), 512, "d0", "one")]
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=holdings)
            (key,) = ledger.connection.residency_keys("t", [page(1)])
            await ledger.connection.command("PEXPIRE", key, 30_000)
            await claim(ledger, "A", "r2", candidates=[(512, page(1))])
            assert await ledger.connection.command("PTTL", key) > 30_000

    run(scenario())


def test_thin_keeps_both_ends_and_grows_slowly() -> None:
    """Up to 24 candidates all stay; of 2,000 fewer than 110, in order, with the longest and the shortest."""
    for count in (0, 1, 24):
        candidates = [(n, page(n)) for n in range(count, 0, -1)]
        assert thin(candidates) == candidates
    for count in range(25, 2000, 7):
        candidates = [(n, page(n)) for n in range(count, 0, -1)]
        kept = thin(candidates)
        assert kept == sorted(set(kept), reverse=True)
        assert kept[:24] == candidates[:24]
        assert kept[-1] == candidates[-1]
        assert len(kept) < 110


# ---------------------------------------------------------------- replicas


def test_the_others_totals_are_summed_and_ours_left_out(valkey_url: str) -> None:
    """A claim brings what all other live replicas have reserved, engine by engine."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.publish_totals("A", {"d0": Totals(9.0, 9, 9, 9)})
            await ledger.publish_totals("B", {"d0": Totals(1.0, 1, 2, 300), "p0": Totals(0.5, 1, 0, 0)})
            await ledger.publish_totals("C", {"d0": Totals(2.0, 1, 1, 100)})
            for replica in "ABC":
                await ledger.heartbeat(replica, TTL_S)
            claimed = await claim(ledger, "A", "r1")
            assert claimed.others == {"d0": Totals(3.0, 2, 3, 400), "p0": Totals(0.5, 1, 0, 0)}
            await ledger.publish_totals("B", {})  # a published change needs no heartbeat to be seen
            assert (await claim(ledger, "A", "r2")).others == {"d0": Totals(2.0, 1, 1, 100)}
            await ledger.retire("C")
            assert (await claim(ledger, "A", "r3")).others == {}

    run(scenario())


def test_the_totals_of_the_dead_end_with_them(valkey_url: str) -> None:
    """Without a heartbeat totals do not count, and a live replica's heartbeat clears the dead one's name."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.publish_totals("B", {"d0": Totals(1.0, 1, 1, 1)})
            assert (await claim(ledger, "A", "r1")).others == {}
            await ledger.heartbeat("B", 0.2)
            assert (await claim(ledger, "A", "r2")).others

            async def gone() -> bool:
                return not (await claim(ledger, "A", secrets.token_hex(4))).others

            await until(gone)
            await ledger.heartbeat("A", TTL_S)
            assert await ledger.connection.command("SMEMBERS", *ledger.connection.keys("replicas")) == {"A"}

    run(scenario())


def test_totals_that_cannot_be_read_are_left_out(valkey_url: str) -> None:
    """Another version's totals do not break a claim."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.publish_totals("C", {"d0": Totals(2.0, 1, 1, 100)})
            for replica in "BC":
                await ledger.heartbeat(replica, TTL_S)
            _, totals = ledger.connection.replica_keys("B")
            await ledger.connection.command("SET", totals, '{"d0": "much"}')
            assert (await claim(ledger, "A", "r1")).others == {"d0": Totals(2.0, 1, 1, 100)}

    run(scenario())


def test_fleets_do_not_see_each_other(valkey_url: str) -> None:
    """Two fleets on one server share nothing."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as one, ledger_at(valkey_url) as other:
            await one.heartbeat("A", TTL_S)
            first = await claim(one, "A", "r1")
            assert (await claim(other, "B", "r1")).session_id == "s"
            await complete(one, "A", first)
            assert await other.counters() == {}
            assert [s.rounds for s in (await other.sessions())[0]] == [0]

    run(scenario())


# ---------------------------------------------------------------- views


def test_sessions_come_in_pages(valkey_url: str) -> None:
    """Every session is on one page, latest use first."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            for n in range(7):
                claimed = await claim(ledger, "A", f"r{n}", f"s{n}", slo_ttft_s=1.5, slo_itl_s=0.05)
                await complete(ledger, "A", claimed)
            names: list[str] = []
            cursor: int | None = 0
            while cursor is not None:
                sessions, cursor = await ledger.sessions(3, cursor)
                assert len(sessions) <= 3
                names += [session.session_id for session in sessions]
            assert sorted(names) == [f"s{n}" for n in range(7)]
            await complete(ledger, "A", await claim(ledger, "A", "again", "s3"), home="d1")

            async def first() -> bool:
                (latest, *_), _ = await ledger.sessions(1)
                return latest.session_id == "s3"

            await until(first)  # times within one millisecond are in no order
            ((session,), _) = await ledger.sessions(1)
            assert (session.home, session.rounds, session.in_flight) == ("d1", 2, None)
            assert (session.context_tokens, session.prompt_tokens, session.slo_itl_s) == (110, 200, 0.0)
            assert abs(session.updated_s - time.time()) < 60

    run(scenario())


def test_receipts_come_latest_first_and_by_session(valkey_url: str) -> None:
    """The receipts of all, or of one session, as JSON objects with the fields of a Receipt."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            for n in range(12):
                await complete(ledger, "A", await claim(ledger, "A", f"r{n}", f"s{n % 2}"))
            assert [row["round_id"] for row in await ledger.receipts(3)] == ["r11", "r10", "r9"]
            assert len(await ledger.receipts(1000)) == 12
            of_one = await ledger.receipts(2, "s0")
            assert [row["round_id"] for row in of_one] == ["r10", "r8"]
            expected = msgspec.to_builtins(receipt("r10", "s0"))
            assert {name: of_one[0][name] for name in expected} == msgspec.json.decode(
                msgspec.json.encode(expected)
            )
            assert of_one[0]["tenant"] == "t"
            assert await ledger.receipts(5, "nobody") == ()

    run(scenario())


def test_what_a_round_writes_expires(valkey_url: str) -> None:
    """Every key that a round makes has a TTL; what has none is bounded by itself."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            await ledger.heartbeat("A", TTL_S)
            holdings = [(page(1), 512, "d0", "one")]
            await complete(ledger, "A", await claim(ledger, "A", "r1"), holdings=holdings)
            await claim(ledger, "A", "r2", "running")
            tag = ledger.connection.tag
            bounded = {"fence", "sessions", "receipts", "counters", "replicas"}
            keys = [key async for key in ledger.connection.redis.scan_iter(f"{tag}:*", 1000)]
            assert {key.removeprefix(f"{tag}:") for key in keys} >= bounded
            assert len(keys) == len(bounded) + 8
            for key in keys:
                lasting = key.removeprefix(f"{tag}:") in bounded
                assert (await ledger.connection.command("PTTL", key) == -1) == lasting, key

    run(scenario())


def test_scripts_use_commands_of_redis_6_2_only() -> None:
    """No FUNCTION, no per-field TTL: any Redis or Valkey since 6.2 will do."""
    allowed = {
        "TIME", "EXISTS", "HSETNX", "HGET", "HSET", "HMGET", "HDEL", "HINCRBY", "HGETALL", "PEXPIRE", "ZADD",
        "ZREM", "ZREMRANGEBYSCORE", "ZRANGEBYSCORE", "SMEMBERS", "SADD", "SREM", "GET", "SET", "DEL", "XADD",
        "HEXISTS", "PTTL", "LTRIM", "RPUSH", "COPY", "LLEN", "LRANGE", "LINDEX", "ZSCORE", "ZCARD",
    }  # fmt: skip
    for name in {part for parts in SCRIPTS.values() for part in parts}:
        text = (resources.files("antiphon.scheduler") / "data" / f"{name}.lua").read_text()
        used = set(re.findall(r"redis\.call\('([A-Z]+)'", text))
        assert used, name
        assert used <= allowed, name
