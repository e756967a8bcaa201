"""The session store on a real Valkey: whose conversation a request goes on with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from antiphon.scheduler.ledger import LedgerUnavailable
from antiphon.scheduler.session_store import SessionStore
from tests.ledger_helpers import ledger_at, until

SCOPE, OTHER_SCOPE = "00" * 16, "01" * 16
TTL_S = 60.0


@asynccontextmanager
async def store_at(url: str) -> AsyncIterator[SessionStore]:
    async with ledger_at(url) as ledger:
        yield SessionStore(ledger)


def values(*numbers: int) -> Sequence[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def test_a_conversation_is_found_where_it_ends_and_where_it_passed(valkey_url: str) -> None:
    """The longest value wins; the latest end of a session is its tip, earlier ends are not."""

    async def scenario() -> None:
        async with store_at(valkey_url) as store:
            one, two, three, four = values(1, 2, 3, 4)
            assert await store.find_chain(SCOPE, [two, one]) is None
            await store.remember_chain(SCOPE, one, [], "s", TTL_S)
            assert await store.find_chain(SCOPE, [two, one]) == (1, "s", True)
            await store.remember_chain(SCOPE, three, [two, one], "s", TTL_S)
            assert await store.find_chain(SCOPE, [four, three, two, one]) == (1, "s", True)
            assert await store.find_chain(SCOPE, [two, one]) == (0, "s", False)
            assert await store.find_chain(SCOPE, [one]) == (0, "s", False)
            assert await store.find_chain(OTHER_SCOPE, [three]) is None

    asyncio.run(scenario())


def test_a_branch_leaves_the_trunk_to_who_grew_it(valkey_url: str) -> None:
    """What two sessions share stays the first one's; each is found at its own end."""

    async def scenario() -> None:
        async with store_at(valkey_url) as store:
            trunk, left, right = values(1, 2, 3)
            await store.remember_chain(SCOPE, left, [trunk], "parent", TTL_S)
            await store.remember_chain(SCOPE, right, [trunk], "child", TTL_S)
            assert await store.find_chain(SCOPE, [trunk]) == (0, "parent", False)
            assert await store.find_chain(SCOPE, [left, trunk]) == (0, "parent", True)
            assert await store.find_chain(SCOPE, [right, trunk]) == (0, "child", True)

    asyncio.run(scenario())


def test_a_long_history_is_found_far_back(valkey_url: str) -> None:
    """Beyond the values that are asked for first."""

    async def scenario() -> None:
        async with store_at(valkey_url) as store:
            history = list(values(*range(100, 0, -1)))
            await store.remember_chain(SCOPE, history[90], [], "s", TTL_S)
            assert await store.find_chain(SCOPE, history) == (90, "s", True)

    asyncio.run(scenario())


def test_a_turn_is_known_while_it_is_the_latest_of_one_session(valkey_url: str) -> None:
    """Not after the session went on, and not when two sessions have had the same one."""

    async def scenario() -> None:
        async with store_at(valkey_url) as store:
            one, two, three = values(1, 2, 3)
            turn, later = values(7, 8)
            await store.remember_chain(SCOPE, one, [], "s", TTL_S, turn)
            assert await store.find_turn(SCOPE, [later, turn]) == "s"
            assert await store.find_turn(OTHER_SCOPE, [turn]) is None
            await store.remember_chain(SCOPE, two, [one], "s", TTL_S, later)
            assert await store.find_turn(SCOPE, [later]) == "s"
            assert await store.find_turn(SCOPE, [turn]) is None
            await store.remember_chain(SCOPE, three, [], "other", TTL_S, later)
            assert await store.find_turn(SCOPE, [later]) is None
            await store.remember_chain(SCOPE, three, [], "other", TTL_S, later)
            assert await store.find_turn(SCOPE, [later]) is None
            assert await store.find_turn(SCOPE, []) is None

    asyncio.run(scenario())


def test_a_conversation_is_forgotten_after_its_ttl(valkey_url: str) -> None:
    """Keys do not stay."""

    async def scenario() -> None:
        async with store_at(valkey_url) as store:
            one, turn = values(1, 2)
            await store.remember_chain(SCOPE, one, [], "s", 0.05, turn)

            async def gone() -> bool:
                return await store.find_chain(SCOPE, [one]) is None

            await until(gone)
            assert await store.find_turn(SCOPE, [turn]) is None

    asyncio.run(scenario())


def test_a_store_that_is_away_says_so() -> None:
    """Every call raises, and after the first one at once."""

    async def scenario() -> None:
        async with ledger_at("redis://127.0.0.1:9/0", deadline_s=0.2) as ledger:
            store = SessionStore(ledger)
            with pytest.raises(LedgerUnavailable):
                await store.find_chain(SCOPE, values(1))
            with pytest.raises(LedgerUnavailable, match="a moment ago"):
                await store.find_turn(SCOPE, values(1))
            with pytest.raises(LedgerUnavailable, match="a moment ago"):
                await store.remember_chain(SCOPE, values(1)[0], [], "s", TTL_S)

    asyncio.run(scenario())
