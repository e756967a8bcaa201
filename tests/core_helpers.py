"""Small builders for tests of the core: engines, rounds, and a policy that draws."""

from __future__ import annotations

from antiphon.engines.page_hash import page_hashes
from antiphon.policies.base import Arm, Candidate, ClusterView, Placement, Reject, RoundView
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.latency import LatencyModel, load_latency_model
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.messages import Claimed, EngineUp, RoundArrived

PAGE = 16
LATENCY: LatencyModel = load_latency_model("tiny-cpu")


def engine_up(engine_id: str, pool: str, incarnation: str = "one") -> EngineUp:
    return EngineUp(engine_id, incarnation, pool, True, PAGE, 32768, 2048)


def arrived(round_id: str, session_id: str = "s", tokens: int = 100, first: int = 0) -> RoundArrived:
    hashes = page_hashes(range(first, first + tokens), PAGE)
    return RoundArrived(round_id, session_id, "t", tokens, hashes, PAGE, 16, 1.0, 0.1)


def claimed(round_id: str, session_id: str = "s", number: int = 1, home: str | None = None) -> Claimed:
    return Claimed(round_id, 1, session_id, number, None, home)


class Chosen:
    """A policy that answers with what the test wrote into it; local on the first engine otherwise."""

    def __init__(self) -> None:
        self.next: list[tuple[Arm, str, str]] = []

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        usable = [e for e in cluster.engines if e not in round.excluded]
        if not usable:
            return Reject("no engine", 1.0)
        arm, home, prefill = self.next.pop(0) if self.next else (Arm.LOCAL, usable[0], usable[0])
        return Placement(arm, home, prefill, "chosen", Candidate(arm, prefill, 0.0, 0.1, 0.0, 0.0))


class Drawn:
    """A pure policy that draws arm and engines from the round's seed: for finding holes in the core."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        usable = [e for e in cluster.engines if e not in round.excluded]
        if not usable:
            return Reject("no engine", 1.0)
        seed = round.seed + len(round.excluded)
        home = round.home if round.home in usable and seed % 3 else usable[seed % len(usable)]
        others = [e for e in usable if e != home]
        arm = list(Arm)[seed // 7 % 3] if others else Arm.LOCAL
        prefill = home if arm is Arm.LOCAL else others[seed // 11 % len(others)]
        return Placement(arm, home, prefill, "drawn", Candidate(arm, prefill, 0.0, 0.1, 0.0, 0.0))


def scheduler(policy: Chosen | Drawn, **config: float) -> Scheduler:
    return Scheduler(policy, Fcfs(), LATENCY, CoreConfig(**config))  # type: ignore[arg-type]
