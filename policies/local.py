"""`local`: every engine is a home and prefills its own rounds; pools are ignored.

The co-located baseline: no KV ever moves, and a home is kept as long as it lives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from antiphon.policies import arms
from antiphon.policies.base import Arm, ClusterView, Placement, Reject, RoundView
from antiphon.policies.home import can_be_home, least_used, no_home, session_home


@dataclass(frozen=True, slots=True)
class LocalParameters:
    """`local` has no parameters."""


@dataclass(frozen=True, slots=True)
class Local:
    parameters: LocalParameters = field(default_factory=LocalParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        kept = session_home(round, cluster)
        home = kept or least_used(e for e in cluster.engines.values() if can_be_home(e, round))
        if home is None:
            return no_home(round, cluster)
        candidate = arms.local(round, home)
        reason = f"local: {home.engine_id} is the session's home"
        if kept is None:
            share = home.used_tokens / max(1, home.pool_tokens)
            reason = f"local: new home {home.engine_id}, least KV in use ({share:.1%})"
        return Placement(Arm.LOCAL, home.engine_id, home.engine_id, reason, candidate, (candidate,))
