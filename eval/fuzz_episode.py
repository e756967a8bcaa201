"""One episode of fuzzing: a core, a world around it, and event after event, legal and illegal.

After every event: the core's `check_invariants`, and that every round waits for a call or in a queue. After
every DEEP-th: the residency index, and views against fresh ones. Of one illegal event in DIGESTED, and of
explanations more often: a digest of the whole core from before and after. A twin core gets the legal events
only, is asked to explain nothing, and must command the same.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from msgspec import Struct, msgpack, structs

from antiphon.eval.fuzz_driver import ModelDriver
from antiphon.eval.fuzz_policy import Drawn, DrawnOrdering
from antiphon.eval.fuzz_world import ROUND_EVENTS, World
from antiphon.eval.state_digest import state_digest
from antiphon.policies.base import Ordering, Policy, Reject
from antiphon.policies.latency import load_latency_model
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.demand import Demand
from antiphon.scheduler.messages import (
    Claimed,
    ClaimLost,
    ClientGone,
    Command,
    Complete,
    EngineFailed,
    Event,
    RoundArrived,
    Tick,
)
from antiphon.scheduler.states import ACCEPTS, IllegalEvent, Phase

DRAWN = "drawn"
DEEP = 16
DIGESTED = 50
LOG_EVENTS = 30
DRAIN_EVENTS = 100_000
NOT_STATE = frozenset({"_commands", "_names"})
"""Attributes: `_names` remembers combinations of engines that a look-up came by."""

PROFILES = ("tiny-cpu", "qwen3-32b-h200-tp4")

Pair = tuple[str, str]
"""(phase, event); fleet events have the phase "-", those of unknown rounds "unknown"."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an episode is made of: equal plans are equal episodes."""

    seed: str
    policy: str
    ordering: str
    events: int
    twin: bool = False


@dataclass(slots=True)
class Found:
    """What came of an episode, or of many."""

    events: int = 0
    legal: Counter[Pair] = field(default_factory=Counter)
    illegal: Counter[Pair] = field(default_factory=Counter)
    digests: int = 0
    """How often the whole core was compared, around an illegal event or an explanation."""
    explained: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    arms: Counter[str] = field(default_factory=Counter)
    """Of all tries."""
    commands: bytes = b""
    """A digest of all that the core commanded."""

    def add(self, other: Found) -> None:
        self.events += other.events
        self.digests += other.digests
        self.explained += other.explained
        self.legal.update(other.legal)
        self.illegal.update(other.illegal)
        self.outcomes.update(other.outcomes)
        self.arms.update(other.arms)
        self.commands = blake2b(self.commands + other.commands, digest_size=16).digest()


class Episode:
    """`run()` raises whatever the core or a check raises; `log` then tells what led there."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found = Found()
        self.log: deque[tuple[float, Event, bool, list[Command]]] = deque(maxlen=LOG_EVENTS)
        """The last events: when, what, whether legal, and what the core commanded."""
        self.rng = rng = Random(plan.seed)
        self.now = 1000.0 * rng.random()
        config = CoreConfig(
            max_tries=rng.choice([1, 3]),
            max_queued_rounds=rng.choice([0, 0, 2]),
            admission=rng.choice([0.0, 0.0, 0.5]),
            admission_under_way=rng.choice([0.0, 2.0]),
            prefill_in_flight=rng.choice([1, 1, 2]),
            first_token_deadline_s=rng.choice([4.0, 60.0]),
            session_ttl_s=rng.choice([5.0, 3600.0]),
            max_sessions=rng.choice([3, 1000]),
            call_floor_s=rng.choice([0.5, 10.0]),
            breaker_failures=rng.choice([1, 2, 3]),
            breaker_open_s=rng.choice([0.1, 2.0]),
        )
        pools = rng.choice([(2, 2), (1, 3), (3, 1), (1, 1), (0, 2), (4, 4)])
        names = [
            f"{pool}{number}" for pool, count in zip("pd", pools, strict=True) for number in range(count)
        ]
        self.world = World(rng, names, [load_latency_model(name) for name in PROFILES])
        self.crowd = rng.choice([5, 20, 40])
        """Rounds in flight that arrivals make up for."""
        self.trouble = rng.choice([0.01, 0.1, 0.4])
        """Share of calls that fail."""
        self.unrest = rng.choice([0.01, 0.05])
        """Share of events that come from engines."""
        self.core = make_core(plan, config)
        self.twin = make_core(plan, config) if plan.twin else None
        self.driver = ModelDriver(self.world.live, config)
        self._commands = blake2b(digest_size=16)

    def run(self) -> Found:
        for _ in self.world.engines:
            if self.rng.random() < 0.8:
                self.send(self.world.engine_up())
        while self.found.events < self.plan.events:
            self.step()
        self.drain()
        self.found.outcomes.update({outcome.value: n for outcome, n in self.driver.outcomes.items()})
        self.found.commands = self._commands.digest()
        return self.found

    # ------------------------------------------------------------ what happens next

    def step(self) -> None:
        rng = self.rng
        self.pass_time()
        deadline_s = self.core.next_deadline()
        chance = rng.random()
        if deadline_s is not None and deadline_s <= self.now and rng.random() < 0.8:
            self.send(Tick())
        elif chance < 0.1:
            self.send_illegal()
        elif chance < 0.1 + self.unrest:
            self.send(self.fleet_event())
        elif len(self.core.rounds) < self.crowd and rng.random() < 0.5:
            arrival = self.world.arrival()
            if rng.random() < 0.1:
                self.explain(arrival)
            else:
                self.send(arrival)
        else:
            self.go_on()

    def pass_time(self) -> None:
        """Often not at all, sometimes up to the next deadline."""
        rng = self.rng
        chance = rng.random()
        if chance < 0.002:
            deadline_s = self.core.next_deadline()
            self.now = max(self.now, deadline_s if deadline_s is not None else self.now + 20.0)
        elif chance < 0.7:
            self.now += rng.expovariate(20.0)

    def fleet_event(self) -> Event:
        chance = self.rng.random()
        if chance < 0.35 or len(self.world.live) <= len(self.world.engines) // 3:
            return self.world.engine_up()
        if chance < 0.6:
            return self.world.engine_down()
        if chance < 0.65:
            return self.world.session_ended()
        if chance < 0.73:
            return self.world.standing()
        if chance < 0.78:
            return self.world.session_moved()
        if chance < 0.84:
            return self.world.flip()
        return self.world.load_report() if chance < 0.92 else Tick()

    def go_on(self) -> None:
        """One round gets an event that its phase takes: mostly good news of its call."""
        rng, rounds = self.rng, self.core.rounds
        if not rounds:
            self.send(self.world.arrival())
            return
        has_call = self.driver.calls and rng.random() < 0.92
        round_id = self.some_round(list(self.driver.calls if has_call else rounds))
        phase = rounds[round_id].phase
        kinds = [kind for kind in ROUND_EVENTS if kind in ACCEPTS[phase]]
        good = [kind for kind in kinds if kind not in (ClientGone, EngineFailed)]
        kind = self.least_tried(kinds, phase, self.found.legal)
        new = not self.found.legal[phase.value, kind.__name__]
        if good and rng.random() >= (0.4 if new else self.trouble):
            kind = rng.choice(good)
        self.send(self.world.answer(kind, round_id, self.driver.calls.get(round_id)))

    def some_round(self, ids: list[str]) -> str:
        """Any of them, or any of those in some phase: few rounds are ever in some phases."""
        rng, rounds = self.rng, self.core.rounds
        if rng.random() < 0.5:
            phase = rng.choice(list(dict.fromkeys(rounds[round_id].phase for round_id in ids)))
            ids = [round_id for round_id in ids if rounds[round_id].phase is phase]
        return rng.choice(ids)

    def least_tried(self, kinds: list[type], phase: Phase, tried: Counter[Pair]) -> type:
        """Of kinds of events, the one that came least in this phase."""
        self.rng.shuffle(kinds)
        return min(kinds, key=lambda kind: tried[phase.value, kind.__name__])

    def drain(self) -> None:
        """No more arrivals: every round comes to its end, and nothing is left."""
        for _ in range(DRAIN_EVENTS):
            if not self.core.rounds:
                break
            self.pass_time()
            deadline_s = self.core.next_deadline()
            if deadline_s is not None and deadline_s <= self.now:
                self.send(Tick())
            else:
                self.go_on()
        core, driver = self.core, self.driver
        assert not core.rounds and not driver.in_flight, f"never end: {sorted(driver.in_flight)}"
        assert not driver.calls, f"calls of no round: {driver.calls}"
        assert sum(core.ended.values()) == core.accepted == sum(driver.outcomes.values()), "outcomes differ"
        assert not driver.reserved, f"still published as reserved: {driver.reserved}"
        assert core.next_deadline() is None, "a deadline of nothing"
        for engine_id, book in core.books.fleet.books.items():
            left = book.queue or book.in_flight or book.prefill_s or book.decode
            assert not left, f"{engine_id}: {left} left"

    def explain(self, arrival: RoundArrived) -> None:
        """Ask what would become of a round: that changes nothing, and if it comes at once, it comes true."""
        claim = self.world.answer(self.rng.choice([Claimed, ClaimLost]), arrival.round_id, None)
        core, now = self.core, self.now
        core.books.cluster(now)  # what ages by itself has aged
        core.standings.refresh(now)
        deep = self.rng.randrange(DIGESTED // 5) == 0
        before = core_digest(core) if deep else b""
        foretold = core.explain(arrival, claim if isinstance(claim, Claimed) else None, now)
        if deep:
            self.found.digests += 1
            assert core_digest(core) == before, f"explaining changed the core: {brief(arrival)}"
        self.send(arrival)
        if self.rng.random() < 0.5:
            return
        self.send(claim)
        round = core.rounds.get(arrival.round_id)
        placed = round.tries[0].placement if round is not None else None
        assert placed == (None if isinstance(foretold, Reject) else foretold), f"foretold: {foretold}"
        self.found.explained += 1

    # ------------------------------------------------------------ sending

    def send(self, event: Event) -> None:
        """A legal event: follow what the core commands, and check everything."""
        pair = self.phase_of(event), type(event).__name__
        commands: list[Command] = []
        self.log.append((self.now, event, True, commands))
        commands += self.core.receive(event, self.now)
        self.found.legal[pair] += 1
        self.found.events += 1
        self._commands.update(msgpack.encode(commands))
        self.driver.follow(event, commands)
        if self.twin is not None:
            again = self.twin.receive(event, self.now)
            assert again == commands, f"the same events again lead to {again}"
        for round_id in self.driver.ended:
            arrived, _ = self.world.rounds.pop(round_id)
            self.world.kept.pop(round_id, None)
            assert round_id not in self.core.rounds, f"{arrived.round_id} ended and is kept"
        self.count_arms(commands)
        self.check()

    def send_illegal(self) -> None:
        """What a driver must never send: the core says so, and nothing has changed."""
        event = self.illegal_event()
        pair = self.phase_of(event), type(event).__name__
        self.log.append((self.now, event, False, []))
        deep = self.rng.randrange(DIGESTED) == 0
        before = core_digest(self.core) if deep else b""
        try:
            self.core.receive(event, self.now)
        except IllegalEvent:
            pass
        else:
            raise AssertionError(f"{brief(event)} was taken, while {pair[0]}")
        self.found.illegal[pair] += 1
        self.found.events += 1
        if deep:
            self.found.digests += 1
            assert core_digest(self.core) == before, f"an illegal event changed the core: {event}"
        self.check()

    def illegal_event(self) -> Event:
        """Of an unknown round, or one that its round does not take now, or a second arrival."""
        rng = self.rng
        ids = list(self.core.rounds)
        if not ids or rng.random() < 0.1:
            return self.world.answer(rng.choice(ROUND_EVENTS), "unknown", None)
        round_id = self.some_round(ids)
        phase = self.core.rounds[round_id].phase
        kinds = [kind for kind in (*ROUND_EVENTS, RoundArrived) if kind not in ACCEPTS[phase]]
        kind = self.least_tried(kinds, phase, self.found.illegal)
        if kind is RoundArrived:
            return self.core.rounds[round_id].arrived
        return self.world.answer(kind, round_id, None)

    def phase_of(self, event: Event) -> str:
        round_id = getattr(event, "round_id", None)
        if round_id is None:
            return "-"
        round = self.core.rounds.get(round_id)
        if round is None:
            return "-" if isinstance(event, RoundArrived) else "unknown"
        return round.phase.value

    def last_events(self) -> list[str]:
        """The log as lines of text."""
        lines = []
        for now, event, legal, commands in self.log:
            lines.append(f"{now:.4f} {'' if legal else 'illegal: '}{brief(event)}")
            lines += [f"      -> {brief(command)}" for command in commands]
        return lines

    # ------------------------------------------------------------ checks

    def check(self) -> None:
        core = self.core
        core.check_invariants()
        rounds, calls = core.rounds, self.driver.calls
        assert rounds.keys() == self.driver.in_flight, "the core's rounds are not those in flight"
        for round_id, round in rounds.items():
            waiting = round.phase is Phase.QUEUED
            assert waiting != (round_id in calls), f"{round_id}: {round.phase.value}, {calls.get(round_id)}"
        books = core.books.fleet.books
        assert books.keys() == self.world.live.keys(), f"engines: {[*books]}, alive {sorted(self.world.live)}"
        if self.found.events % DEEP == 0:
            core.books.residency.check_invariants()
            views = list(core.books.fleet.views(self.now).items())
            assert views == [(name, books[name].view(self.now)) for name in sorted(books)], "an old view"

    def count_arms(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Complete):
                self.found.arms.update(tried.placement.arm.value for tried in command.receipt.tries)


def make_core(plan: Plan, config: CoreConfig) -> Scheduler:
    policy: Policy = Drawn() if plan.policy == DRAWN else make_policy(plan.policy)
    ordering: Ordering = DrawnOrdering() if plan.ordering == DRAWN else make_ordering(plan.ordering)
    core = Scheduler(policy, ordering, load_latency_model(PROFILES[0]), config)
    core.demand = Demand()
    return core


def core_digest(core: Scheduler) -> bytes:
    """Of everything but the commands of the last event, which every event clears, and memos."""
    return state_digest(core, NOT_STATE)


def brief(message: Struct) -> str:
    """As repr, with hashes counted instead of shown."""
    words = []
    for name, value in structs.asdict(message).items():
        if name in ("hashes", "holdings", "receipt", "latency", "tip"):
            value = f"<{len(value)}>" if isinstance(value, tuple) and name != "tip" else "<...>"
        words.append(f"{name}={value}")
    return f"{type(message).__name__}({', '.join(words)})"
