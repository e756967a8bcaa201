"""Histories of the ledger under concurrent replicas, delays, deaths and lost answers, checked by a model.

    python -m tests.faults.linearizability --histories 10000 --seed 1

Each history: 2 to 4 replicas with connections of their own play clients' rounds on 1 to 3 sessions of a
fleet of its own, on a real Valkey: claims, retries by any replica, completions, releases, moves, closings,
beats and deaths. Calls wait before and after their exchange; some are cut off by their caller before or after
they were sent, and made again. What the server did with those is noted all the same, at the time when it was
done, so that a history says exactly what happened. One seed and number make one plan; the interleaving is the
event loop's and the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from antiphon.scheduler.ledger import Ledger, RoundTaken
from antiphon.scheduler.ledger_answers import read_claim
from antiphon.scheduler.messages import Claimed
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.retries import Call
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.faults.lease_model import Op, linearized
from tests.ledger_helpers import claim, complete

MAX_DELAY_S = 0.002
CUT_OFF = 0.15
"""Of the calls, by their caller."""
LANES = 16
"""Histories at a time."""
HOMES = ("d0", "d1")
OUTCOMES = (Outcome.COMPLETED,) * 5 + (Outcome.FAILED, Outcome.CANCELLED, Outcome.REFUSED)


class CutOff(Exception):
    """The caller does not wait for the answer: it knows nothing."""


@dataclass(slots=True)
class Notes:
    """What happened in one history."""

    random: random.Random
    ops: list[Op] = field(default_factory=list)
    under_way: set[asyncio.Task[Any]] = field(default_factory=set)


class Recorded(Ledger):
    """A replica's ledger whose exchanges are noted, delayed and cut off."""

    notes: Notes

    def __init__(self, url: str, broken: tuple[str, str, str] | None = None) -> None:
        """`broken`: (script, text of it, what stands there instead)."""
        super().__init__(url, deadline_s=30.0, retry_after_s=0.0, max_connections=8)
        connection = self.connection
        self._plain = connection.script
        connection.script = self._exchange  # type: ignore[method-assign]
        if broken is not None:
            name, was, instead = broken
            text = connection._texts[name]
            assert was in text
            connection._scripts[name] = connection.redis.register_script(text.replace(was, instead))

    def begin(self, fleet: str, notes: Notes) -> None:
        """Another history."""
        self.connection.tag = f"{{antiphon:{fleet}}}"
        self._claimed.clear()
        self._settling._open.clear()
        self.notes = notes

    async def _exchange(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        notes, invoked_s = self.notes, time.perf_counter()
        chance = notes.random.random()
        await asyncio.sleep(notes.random.uniform(0.0, MAX_DELAY_S))
        if chance < CUT_OFF / 3:
            raise CutOff
        exchange = asyncio.ensure_future(self._note(notes, name, keys, arguments, invoked_s))
        notes.under_way.add(exchange)
        exchange.add_done_callback(notes.under_way.discard)
        if chance < CUT_OFF:
            await asyncio.sleep(notes.random.uniform(0.0, 0.0005))
            exchange.add_done_callback(lambda done: done.exception())
            raise CutOff
        answer = await asyncio.shield(exchange)
        await asyncio.sleep(notes.random.uniform(0.0, MAX_DELAY_S))
        return answer

    async def _note(
        self, notes: Notes, name: str, keys: Sequence[str], arguments: Sequence[Any], invoked_s: float
    ) -> Any:
        taken: RoundTaken | None = None
        answer: Any = None
        try:
            answer = await self._plain(name, keys, arguments)
        except RoundTaken as error:
            taken = error
        kind, asked, said = _as_op(name, keys, arguments, "taken" if taken is not None else answer)
        notes.ops.append(Op(kind, asked, said, invoked_s, time.perf_counter()))
        if taken is not None:
            raise taken
        return answer

    async def die(self, replica: str) -> None:
        """Its heartbeat key is gone, as after its time."""
        invoked_s = time.perf_counter()
        await self.retire(replica)
        self.notes.ops.append(Op("retire", (replica,), None, invoked_s, time.perf_counter()))

    async def close_session(self, session_id: str) -> None:
        key = self.connection.session_key("t", session_id)
        await self.connection.script("session_close", [key], [self.connection.tag, ""])


def _as_op(name: str, keys: Sequence[str], asked: Sequence[Any], answer: Any) -> tuple[str, Any, Any]:
    """An exchange as the model names it."""
    if name == "claim":
        call = keys[5].rpartition(":")[2] if asked[16] else ""
        question = asked[1], asked[2], asked[3], call, asked[16], bool(asked[18])
        if answer == "taken":
            return name, question, answer
        told = read_claim(asked[2], answer)
        return name, question, (told.fence, told.session_id, told.round_number, told.parent_id, told.replaces)
    if name == "complete":
        call = keys[6].rpartition(":")[2] if asked[16] else ""
        return name, (asked[1], asked[2], asked[3], asked[4], asked[6], asked[7], call), bool(answer[0])
    if name == "release":
        return name, (asked[1], asked[2]), bool(answer)
    if name == "rehome":
        return name, (keys[0].rpartition(":")[2], asked[2], asked[3], asked[4]), answer
    if name == "session_close":
        return "close", (keys[0].rpartition(":")[2],), (answer[0], bool(answer[1]))
    running = tuple(key.rpartition(":")[2] for key in keys[3:])
    return name, (asked[1], running), tuple(running[place - 1] for place in answer)


@dataclass(slots=True)
class Play:
    """One history in the making: what its clients have begun."""

    notes: Notes
    sessions: list[str]
    calls: list[tuple[str, str, bool]] = field(default_factory=list)
    """(name, session or "" if it names none, whether it has a key): may be made again."""
    rounds: int = 0

    async def replica(self, name: str, others: Sequence[str], ledger: Recorded) -> None:
        """What one replica does: a few rounds, one after the other."""
        chance = self.notes.random
        await _until_heard(lambda: ledger.heartbeat(name, 60.0))
        for _ in range(chance.randint(2, 3)):
            await self.round(name, ledger)
            what = chance.random()
            if what < 0.2:
                await ledger.die(chance.choice([name, *others]))
            elif what < 0.4:
                await _until_heard(lambda: ledger.heartbeat(name, 60.0))
            elif what < 0.5:
                await _until_heard(lambda: ledger.close_session(chance.choice(self.sessions)))

    async def round(self, name: str, ledger: Recorded) -> None:
        chance = self.notes.random
        self.rounds += 1
        round_id = f"r{self.rounds}"
        session, call = self._asked()
        tries = 1 if chance.random() < 0.3 else 4
        try:
            claimed = await _until_heard(lambda: claim(ledger, name, round_id, session, call=call), tries)
        except RoundTaken:
            return
        if claimed is None or chance.random() < 0.1:
            await _until_heard(lambda: ledger.release(name, round_id))
            return
        if chance.random() < 0.25:
            await _until_heard(
                lambda: ledger.rehome(
                    fence=claimed.fence, session_id=claimed.session_id, tenant="t",
                    from_home=claimed.home or HOMES[0], to_home=HOMES[1],
                )
            )  # fmt: skip
        if chance.random() < 0.2:
            return  # its replica has hung up: the lease stays
        await self._end(name, ledger, claimed, call)

    async def _end(self, name: str, ledger: Recorded, claimed: Claimed, call: Call | None) -> None:
        outcome, home = self.notes.random.choice(OUTCOMES), self.notes.random.choice(HOMES)
        for _ in range(2 if self.notes.random.random() < 0.2 else 1):
            await _until_heard(
                lambda: complete(
                    ledger, name, claimed, outcome=outcome, home=home, call=call,
                    round_number=claimed.round_number,
                )
            )  # fmt: skip

    def _asked(self) -> tuple[str, Call | None]:
        """A session, and a new call, one that was made before, or none."""
        chance = self.notes.random
        what = chance.random()
        if what < 0.2:
            return chance.choice(self.sessions), None
        if what < 0.6 or not self.calls:
            unnamed, keyed = chance.random() < 0.2, chance.random() < 0.5
            self.calls.append((f"c{len(self.calls)}", "" if unnamed else chance.choice(self.sessions), keyed))
            digest, session, again = self.calls[-1]
        else:
            digest, session, keyed = chance.choice(self.calls)
            again = keyed or chance.random() < 0.9
        return session or f"n{self.rounds}", Call(digest, again=again, unnamed=not session)


async def _until_heard(ask: Any, tries: int = 4) -> Any:
    """The same again when it was cut off; None when nobody ever heard."""
    for _ in range(tries):
        with suppress(CutOff):
            return await ask()
    return None


async def play(seed: int, number: int, ledgers: Sequence[Recorded]) -> tuple[list[Op], str]:
    """One history, whole: all that was sent has been carried out. And what is wrong with it at sight."""
    chance = random.Random(f"{seed}/{number}")
    notes = Notes(chance)
    fleet = f"lin-{seed}-{number}"
    names = [f"R{at}" for at in range(chance.randint(2, len(ledgers)))]
    plan = Play(notes, [f"s{at}" for at in range(chance.randint(1, 3))])
    for ledger in ledgers:
        ledger.begin(fleet, notes)
    async with asyncio.TaskGroup() as tasks:
        for name, ledger in zip(names, ledgers, strict=False):
            tasks.create_task(plan.replica(name, [other for other in names if other != name], ledger))
    while notes.under_way:
        await asyncio.wait(notes.under_way)
    began_s = time.perf_counter()
    sessions, _ = await ledgers[0].sessions(1000)
    seen = {s.session_id: (s.rounds, s.home, s.in_flight) for s in sessions}
    counts = await ledgers[0].counters()
    notes.ops.append(Op("all", (), (seen, counts), began_s, time.perf_counter()))
    return notes.ops, await _numbers_that_came_twice(ledgers[0])


async def _numbers_that_came_twice(ledger: Ledger) -> str:
    """Independent of the model: no two completions are recorded for one round number of a session."""
    told = [
        (receipt["session_id"], receipt["round_number"])
        for receipt in await ledger.receipts(1000)
        if receipt["outcome"] == "completed"
    ]
    twice = {where for where in told if told.count(where) > 1}
    return f"two completions are recorded for {sorted(twice)}" if twice else ""


@dataclass(slots=True)
class Report:
    histories: int = 0
    ops: int = 0
    violation: str = ""


async def check(
    url: str, histories: int, seed: int, *, first: int = 0, broken: tuple[str, str, str] | None = None
) -> Report:
    """Play and check histories `first` and on; stops at the first that is wrong."""
    report, numbers = Report(), iter(range(first, first + histories))

    async def lane() -> None:
        ledgers = [Recorded(url, broken) for _ in range(4)]
        try:
            for number in numbers:
                if report.violation:
                    return
                ops, wrong = await play(seed, number, ledgers)
                if not wrong and linearized(ops) is None:
                    wrong = "no order explains this history"
                report.histories += 1
                report.ops += len(ops)
                if wrong and not report.violation:
                    report.violation = f"seed {seed}, history {number}: {wrong}\n{shown(ops)}"
        finally:
            for ledger in ledgers:
                await ledger.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(LANES, histories)):
            tasks.create_task(lane())
    return report


def shown(ops: Sequence[Op]) -> str:
    """A history, by the times at which its calls were made, in microseconds."""
    began_s = min((op.invoked_s for op in ops), default=0.0)
    return "\n".join(
        f"  {round((op.invoked_s - began_s) * 1e6):>7} {round((op.answered_s - began_s) * 1e6):>7} "
        f"{op.kind} {op.asked} -> {op.answer}"
        for op in sorted(ops, key=lambda op: op.invoked_s)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first history: to play one again")
    options = parser.parse_args()
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey.start(Path(folder)) as server:
        report = asyncio.run(check(server.url, options.histories, options.seed, first=options.first))
    elapsed_s = time.perf_counter() - began_s
    print(f"seed {options.seed}: {report.histories} histories, {report.ops} calls in {elapsed_s:.1f} s")
    print(report.violation or "each has an order that the model of the leases accepts")
    return 1 if report.violation else 0


if __name__ == "__main__":
    sys.exit(main())
