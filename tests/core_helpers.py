"""Small builders for tests of the core: engines, rounds, and a policy that draws."""

from __future__ import annotations

from msgspec.structs import replace

from antiphon.engines.page_hash import page_hashes
from antiphon.policies.base import (
    Arm,
    Candidate,
    ClusterView,
    EngineView,
    Ordering,
    Placement,
    Policy,
    Reject,
    RoundView,
)
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.latency import LatencyModel, load_latency_model
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.messages import (
    Claimed,
    Command,
    Complete,
    EngineUp,
    Event,
    FirstToken,
    Generate,
    Prefill,
    Reserved,
    RoundArrived,
    RoundFinished,
)

PAGE = 16
LATENCY: LatencyModel = load_latency_model("tiny-cpu")


def engine_up(
    engine_id: str,
    pool: str,
    incarnation: str = "one",
    *,
    kv_bytes_per_token: int = 2048,
    chunk_tokens: int = 0,
    decode_interval: int = 0,
) -> EngineUp:
    chunks = chunk_tokens, decode_interval
    return EngineUp(engine_id, incarnation, pool, True, PAGE, 32768, kv_bytes_per_token, *chunks)


def arrived(round_id: str, session_id: str = "s", tokens: int = 100, first: int = 0) -> RoundArrived:
    hashes = page_hashes(range(first, first + tokens), PAGE)
    return RoundArrived(round_id, session_id, "t", tokens, hashes, PAGE, 16, 1.0, 0.1)


def claimed(round_id: str, session_id: str = "s", number: int = 1, home: str | None = None) -> Claimed:
    return Claimed(round_id, 1, session_id, number, None, home)


Choice = tuple[Arm, str, str] | tuple[Arm, str, str, str | None]
"""Arm, home, prefill engine; where history is pulled from."""


class Chosen:
    """A policy that answers with what the test wrote into it; local on the first engine otherwise."""

    def __init__(self) -> None:
        self.next: list[Choice] = []
        self.seen: list[RoundView] = []
        self.predicted_s = (0.0, 0.1, 0.0, 0.0)
        """Queue, prefill, pull, push."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        self.seen.append(round)
        usable = [e for e in cluster.engines if e not in round.excluded]
        if not usable:
            return Reject("no engine", 1.0)
        chosen = self.next.pop(0) if self.next else (Arm.LOCAL, usable[0], usable[0])
        arm, home, prefill, source = chosen if len(chosen) == 4 else (*chosen, None)
        candidate = Candidate(arm, prefill, *self.predicted_s)
        return Placement(arm, home, prefill, "chosen", candidate, source=source)


class Drawn:
    """A pure policy that draws arm and engines from the round's seed: for finding holes in the core."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        usable = [e for e in cluster.engines if e not in round.excluded]
        if not usable:
            return Reject("no engine", 1.0)
        seed = round.seed + len(round.excluded)
        home = round.home if round.home in usable and seed % 3 else usable[seed % len(usable)]
        others = [e for e in usable if e != home]
        arm = list(Arm)[seed // 7 % 4] if others else Arm.LOCAL
        at_home = arm is Arm.LOCAL or arm is Arm.MOVE
        prefill = home if at_home else others[seed // 11 % len(others)]
        source = (None, round.home, *others, "gone")[seed // 13 % (len(others) + 3)]
        candidate = Candidate(arm, prefill, 0.0, 0.1 + seed % 5, 0.2, 0.1)
        return Placement(arm, home, prefill, "drawn", candidate, source=source)


def scheduler(policy: Policy, ordering: Ordering | None = None, **config: float) -> Scheduler:
    return Scheduler(policy, ordering or Fcfs(), LATENCY, CoreConfig(**config))  # type: ignore[arg-type]


class Bench:
    """A core with two engines and a clock that moves 0.1 s an event; invariants checked after each."""

    def __init__(self, ordering: Ordering | None = None, **config: float) -> None:
        self.policy = Chosen()
        self.core = scheduler(self.policy, ordering, **config)
        self.now = 0.0
        self.deadlines_s: dict[str, float] = {}
        """Of calls, by their rids: left out of what `send` returns."""
        self.send(engine_up("d0", "decode"))
        self.send(engine_up("p0", "prefill"))

    def send(self, event: Event) -> list[Command]:
        self.now += 0.1
        commands = self.core.receive(event, self.now)
        self.core.check_invariants()
        told = [c for c in commands if not isinstance(c, Reserved)]
        for command in told:
            if isinstance(command, Prefill | Generate):
                self.deadlines_s[command.rid] = command.deadline_s
        return [replace(c, deadline_s=0.0) if isinstance(c, Prefill | Generate) else c for c in told]

    def place(
        self, round_id: str, *choice: Choice, tokens: int = 100, session: str = "s", first: int = 0
    ) -> list[Command]:
        self.policy.next.extend(choice)
        self.send(arrived(round_id, session, tokens, first))
        return self.send(claimed(round_id, session))

    def run(self, round_id: str, choice: Choice, tokens: int = 100, output: int = 12) -> Complete:
        """A whole round that generates `output` tokens where it is placed; not remote."""
        self.place(round_id, choice, tokens=tokens)
        self.send(FirstToken(round_id))
        hashes = arrived(round_id, tokens=tokens + output).hashes
        (done,) = self.send(RoundFinished(round_id, output, 0, hashes))
        assert isinstance(done, Complete)
        return done

    def view(self, engine_id: str) -> EngineView:
        return self.core.books.fleet.views(self.now)[engine_id]


LOCAL = (Arm.LOCAL, "d0", "d0")
PULL = (Arm.REMOTE_PULL, "d0", "p0")
RECOMPUTE = (Arm.REMOTE_RECOMPUTE, "d0", "p0")
MOVING = (Arm.MOVE, "p0", "p0", "d0")
