"""The switch of owners, after whatever happened since the session was looked at."""

from __future__ import annotations

import asyncio
from itertools import count

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from antiphon.scheduler.drain_store import AtHome, DrainStore
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.messages import Claimed
from tests.ledger_helpers import claim, complete, ledger_at, page

CLAIM, RELEASE, AT_OLD, AT_THIRD = "claim", "release", "complete at d0", "complete at d2"
UNHEARD = "complete at d2, which tells of no KV"
DIE, BEAT, MOVE_ON, MOVE_BACK = "die", "beat", "switch d0 to d2", "switch d2 to d0"
HAPPENINGS = (CLAIM, AT_OLD, AT_THIRD, UNHEARD, RELEASE, DIE, BEAT, MOVE_ON, MOVE_BACK)


class Session:
    """One session in the ledger, next to what must be there."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.store = DrainStore(ledger.connection)
        self.numbers = count(1)
        self.home, self.tip = "d0", ""
        self.held: Claimed | None = None
        self.alive = True

    @property
    def busy(self) -> bool:
        return self.held is not None and self.alive

    async def happens(self, what: str) -> None:
        """What cannot happen now does not."""
        if what == CLAIM and self.held is None:
            self.held = await claim(self.ledger, "a", f"r{next(self.numbers)}")
            assert self.held.session_id == "s"
        elif what in (AT_OLD, AT_THIRD) and self.held is not None:
            await self.complete(what.removeprefix("complete at "))
        elif what == UNHEARD and self.held is not None:
            assert await complete(self.ledger, "a", self.held, home="d2")
            self.home, self.held = "d2", None
        elif what == RELEASE and self.held is not None:
            assert await self.ledger.release("a", self.held.round_id)
            self.held = None
        elif what == DIE:
            await self.ledger.retire("a")
            self.alive = False
        elif what == BEAT:
            await self.ledger.heartbeat("a", 60.0)
            self.alive = True
        elif what in (MOVE_ON, MOVE_BACK):
            _, from_home, _, to_home = what.split()
            await self.another_drain(from_home, to_home)

    async def complete(self, home: str) -> None:
        held = self.held
        assert held is not None
        page_hash = page(next(self.numbers))
        assert await complete(self.ledger, "a", held, home=home, holdings=[(page_hash, 16, home, "one")])
        self.home, self.tip, self.held = home, f"{page_hash.hex()}|16|one|{home}", None

    async def another_drain(self, from_home: str, to_home: str) -> None:
        """Of another engine; it looks and switches at once."""
        found = await self.store.at_home(from_home)
        seen = [(each.tip, each.in_flight) for each in found]
        assert seen == ([(self.tip, self.busy)] if self.home == from_home else [])
        for each in found:
            tip = f"{page(999).hex()}|16|one|{to_home}"
            answer = await self.store.switch(each, from_home, to_home, tip, (), "one", 60.0)
            assert answer == ("busy" if self.busy else "moved")
            if answer == "moved":
                self.home, self.tip = to_home, tip

    async def switched(self, seen: AtHome, whole: bool) -> None:
        """The drain of d0 has copied what it saw to d1, and asks twice, as after a lost answer."""
        new_tip = f"{page(888).hex()}|16|two|d1" if whole else ""
        if self.busy:
            expected = "busy"
        elif (self.home, self.tip) != ("d0", seen.tip):
            expected = "went_on"
        else:
            expected, self.home, self.tip = "moved", "d1", new_tip
        checkpoints = [(16, page(888))] if whole else []
        for _ in range(2):
            answer = await self.store.switch(seen, "d0", "d1", new_tip, checkpoints, "two", 60.0)
            assert answer == expected


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(HAPPENINGS), max_size=5), st.booleans())
@example([CLAIM], True)
@example([CLAIM, DIE], True)
@example([CLAIM, AT_OLD], True)
@example([CLAIM, AT_THIRD], True)
@example([CLAIM, UNHEARD], True)
@example([CLAIM, RELEASE], False)
@example([MOVE_ON, MOVE_BACK], False)
@example([MOVE_ON], True)
def test_no_switch_goes_over_a_round(valkey_url: str, happenings: list[str], whole: bool) -> None:
    """And what it leaves is what the next round is told: home, end of its KV, and who has it."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            session = Session(ledger)
            await session.happens(BEAT)
            await session.happens(CLAIM)
            await session.complete("d0")
            (seen,) = await session.store.at_home("d0")
            for what in happenings:
                await session.happens(what)
            await session.switched(seen, whole)
            if session.busy:
                await session.happens(RELEASE)
            told = await claim(ledger, "b", "last", candidates=[(16, page(888))])
            assert (told.session_id, told.home) == ("s", session.home)
            tip = f"{told.tip[0].hex()}|{told.tip[1].tokens}" if told.tip is not None else ""
            assert tip == "|".join(session.tip.split("|")[:2])
            moved_whole = session.home == "d1" and whole
            assert ("d1" in [held.engine_id for held in told.holdings]) == moved_whole

    asyncio.run(scenario())
