"""`remote`: every round is prefilled in the prefill pool, which recomputes what it lacks.

The disaggregated baseline (DistServe, plain Dynamo): KV moves one way, prefill engine to home. The home
prefills only when no prefill engine can.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from antiphon.policies import arms
from antiphon.policies.base import Arm, Candidate, ClusterView, Placement, Reject, RoundView
from antiphon.policies.home import choose_home


@dataclass(frozen=True, slots=True)
class RemoteParameters:
    shortlist: int = 4
    """Estimated are this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ValueError(f"shortlist must be at least 1, got {self.shortlist}")


@dataclass(frozen=True, slots=True)
class Remote:
    parameters: RemoteParameters = field(default_factory=RemoteParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            candidate = arms.local(round, home)
            reason = f"no prefill engine is usable for {home.engine_id}: prefilled there"
            return Placement(Arm.LOCAL, home.engine_id, home.engine_id, reason, candidate, (candidate,))
        considered = tuple(
            arms.remote_recompute(round, engine, home)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        )
        best = min(considered, key=_ttft)
        reason = (
            f"remote: {best.prefill_engine} has the least predicted TTFT, {best.ttft_s:.3f} s, "
            f"of {len(considered)} considered of {len(engines)} prefill engines"
        )
        return Placement(best.arm, home.engine_id, best.prefill_engine, reason, best, considered)


def _ttft(candidate: Candidate) -> tuple[float, str]:
    return candidate.ttft_s, candidate.prefill_engine
