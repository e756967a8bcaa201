"""One run of one cell: sessions that talk, a fault while the watched round is in its phase, the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.engines.simulated_request import expected_tokens
from antiphon.scheduler.gateway.prompts import PromptTokenizer
from antiphon.scheduler.ledger import LedgerUnavailable
from tests.faults import aftermath
from tests.faults.cells import Cell, seed_of
from tests.faults.client import RetryingClient
from tests.faults.conversation import VOCAB_TOKENS, Conversation
from tests.faults.fleet import POOLS, Fleet
from tests.faults.history import LogicalRound, judge
from tests.faults.injury import Injury, slow_reads
from tests.faults.results import Scale, TrialResult
from tests.faults.watch import Watch, hit_reads

PHASE_DEADLINE_S = 6.0
PHASE_TRIES = 3
SLOW_READ_S = 1.5
ROUNDS_AFTER = 2


@dataclass(slots=True)
class Trial:
    """Use `run`."""

    fleet: Fleet
    cell: Cell
    variant: str
    seed: int
    tokenizer: PromptTokenizer
    scale: Scale = field(default_factory=Scale)
    rounds: list[LogicalRound] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> TrialResult:
        """The fleet is healthy before and after."""
        started = time.monotonic()
        draw = random.Random(seed_of(f"{self.cell.name}/{self.variant}", self.seed))
        counters, known = await self._counters(), await aftermath.receipts_of(self.fleet)
        urls = [self.fleet.gateway_url(number) for number in range(2)]
        client = RetryingClient(urls, self.scale.deadline_s, self.scale.attempt_s)
        try:
            async with asyncio.TaskGroup() as group:
                watched = self._conversation("watched", draw)
                others = [self._conversation(f"other{i}", draw) for i in range(self.scale.background)]
                await self._ask(client, watched, self.scale.first_tokens, 16, 0)
                injury = Injury(self.fleet, self.cell, self.variant, self._victim(watched), draw)
                await injury.prepare()
                if not self._alone:
                    talking = [group.create_task(self._talk(client, each)) for each in others]
                hit, asked = await self._bring_about(client, watched, injury)
                before = await aftermath.receipts_of(self.fleet, self._sessions())
                await injury.inject()
                if self.cell.phase == "idle":
                    asked = group.create_task(self._next(client, watched))
                if self._alone:
                    talking = [group.create_task(self._talk(client, each)) for each in others]
                held = group.create_task(asyncio.sleep(injury.hold_s))
                if self.cell.phase == "transfer" and self.cell.component != "link":
                    group.create_task(self._end_slow_reads())
                await asyncio.gather(asked, held)
                await injury.heal()
                self.over.set()
                await asyncio.gather(*talking)
                for _ in range(ROUNDS_AFTER):
                    await asyncio.gather(*(self._next(client, each) for each in (watched, *others)))
        finally:
            await client.close()
        leaks = await aftermath.problems(self.fleet, self._sessions())
        receipts = before | await aftermath.receipts_of(self.fleet, self._sessions())
        if self.variant != "empty":
            leaks += await self._miscounted(counters, known)
        verdict = judge(self.rounds, receipts.values(), self._right_answers())
        unchecked = [] if self.scale.checks_answers else [each for each in self.rounds if each.answer]
        return TrialResult(
            cell=self.cell,
            variant=self.variant,
            engines="simulated" if self.fleet.simulated else "real",
            seed=self.seed,
            phase_hit=hit,
            verdict=verdict,
            leaks=leaks,
            note=injury.note,
            forks=sum(each.forks for each in (watched, *others)),
            duration_s=time.monotonic() - started,
            unchecked=unchecked,
        )

    @property
    def _alone(self) -> bool:
        """The watched session talks alone until the fault: where nothing is to be under way, or where reads
        do not say whose they are."""
        reads = self.cell.component == "link" or not self.fleet.simulated
        return self.cell.phase == "idle" or (self.cell.phase == "transfer" and reads)

    # ---- sessions

    def _conversation(self, name: str, draw: random.Random) -> Conversation:
        session = f"{self.cell.name}{self.variant}-{self.seed}-{draw.randrange(10**6)}-{name}"
        kind = draw.choice(self.scale.kinds)
        stream = draw.random() < 0.5 or (self.cell.phase == "decode" and not self.fleet.simulated)
        return Conversation(session, kind, stream, random.Random(draw.random()), self.tokenizer)

    def _sessions(self) -> set[str]:
        return {each.session for each in self.rounds}

    def _victim(self, watched: Conversation) -> str:
        """The watched session's own replica (its clients ask the first one first), its home, ..."""
        if self.cell.component == "gateway":
            return "gw0"
        if self.cell.component == "decode":
            return watched.home or "d0"
        return next((name for name, pool in POOLS.items() if pool == self.cell.component), "redis")

    async def _ask(
        self, client: RetryingClient, session: Conversation, new_tokens: int, output_tokens: int, replica: int
    ) -> None:
        each, request = session.ask(new_tokens, output_tokens, self.scale.deadline_s)
        self.rounds.append(each)
        outcome = await client.ask(each, request, replica)
        session.heard(each, outcome)

    async def _next(self, client: RetryingClient, session: Conversation) -> None:
        """A round of ordinary size."""
        replica = session.draw.randrange(2) if "other" in session.session else 0
        tokens, output = self.scale.background_tokens, self.scale.background_output_tokens
        await self._ask(client, session, tokens, output, replica)

    async def _talk(self, client: RetryingClient, session: Conversation) -> None:
        """Round after round, until the fault is over."""
        while not self.over.is_set():
            await self._next(client, session)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), session.draw.uniform(0.0, self.scale.pause_s))

    # ---- the phase

    async def _bring_about(
        self, client: RetryingClient, watched: Conversation, injury: Injury
    ) -> tuple[bool, asyncio.Future[None]]:
        """The watched session's round under way, and whether it is in the phase now."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked.set_result(None)
        if self.cell.phase == "idle":
            return True, asked
        if self.cell.phase == "transfer" and self.cell.component != "link":
            await slow_reads(self.fleet, SLOW_READ_S)
        sizes = self.scale.new_tokens[self.cell.phase], self.scale.output_tokens[self.cell.phase]
        for _ in range(PHASE_TRIES):
            hit_before = await hit_reads(self.fleet)
            task = asyncio.create_task(self._ask(client, watched, *sizes, 0))
            watch = Watch(self.fleet, client, watched.goes_by or watched.session, task)
            if self.cell.component == "link" and self.cell.phase == "transfer":
                reached = await watch.hit(hit_before, PHASE_DEADLINE_S)
            else:
                reached = await watch.reached(self.cell.phase, PHASE_DEADLINE_S)
            if reached:
                injury.victim = self._victim(watched)
                return True, task
            await task
        return False, asked

    async def _end_slow_reads(self) -> None:
        await asyncio.sleep(SLOW_READ_S)
        await slow_reads(self.fleet, 0.0)

    # ---- afterwards

    def _right_answers(self) -> dict[str, frozenset[tuple[int, ...]]]:
        """Of simulated engines: a function of the prompt."""
        if not self.scale.checks_answers:
            return {each.name: frozenset([each.answer or ()]) for each in self.rounds}
        return {
            each.name: frozenset(
                expected_tokens(prompt, len(each.answer or ()), VOCAB_TOKENS) for prompt in each.expected
            )
            for each in self.rounds
        }

    async def _counters(self) -> Mapping[str, int]:
        ledger = self.fleet.ledger()
        try:
            return await ledger.counters()
        except LedgerUnavailable:
            return {}
        finally:
            await ledger.close()

    async def _miscounted(
        self, before: Mapping[str, int], known: Mapping[str, Mapping[str, Any]]
    ) -> list[str]:
        """Counters of the ledger that do not agree with its receipts since then."""
        after, receipts = await self._counters(), await aftermath.receipts_of(self.fleet)
        seen = Counter(str(each["outcome"]) for id_, each in receipts.items() if id_ not in known)
        outcomes = {*seen, "completed", "refused", "failed", "cancelled"}
        return [
            f"ledger counts {counted} {outcome}, its receipts are {seen[outcome]}"
            for outcome in sorted(outcomes)
            if (counted := after.get(outcome, 0) - before.get(outcome, 0)) != seen[outcome]
        ]
