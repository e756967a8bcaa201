"""What a run of `make drift` found."""

from __future__ import annotations

import msgspec


class Days(msgspec.Struct, frozen=True):
    """`hour_s`: seconds that an hour of the day takes. `load`: of each kind's peak rate."""

    hour_s: float
    load: float


class FlipTold(msgspec.Struct, frozen=True):
    hour: float
    seconds: float
    engine: str
    direction: str
    result: str
    moved_sessions: int
    moved_bytes: int
    pools: str
    reason: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one split, or from one split on."""

    policy: str
    prefill: int
    """Engines that begin in the prefill pool; 0 = all co-located."""
    seed: int
    online: str
    rounds: int
    attainment: float
    """Share of all rounds with TTFT and ITL within their targets, as the next two with one of them."""
    ttft: float
    itl: float
    failed: int
    by_hour: list[float]
    flips: list[FlipTold]
    wall_s: float

    @property
    def name(self) -> str:
        if not self.prefill:
            return "co-located"
        split = f"{self.prefill}p{8 - self.prefill}d"
        return f"{self.online} from {split}" if self.online else split

    def line(self) -> str:
        return (
            f"{self.policy:9} seed {self.seed} {self.name:24} {self.attainment:7.2%} "
            f"(TTFT {self.ttft:.2%}, ITL {self.itl:.2%}) {len(self.flips)} flips, {self.failed} failed, "
            f"{self.rounds} rounds in {self.wall_s:.1f} s"
        )
