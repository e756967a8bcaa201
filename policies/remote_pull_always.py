"""`remote_pull_always`: every round is prefilled in the prefill pool, which fetches what the home holds.

The disaggregated fleet with history transfer: `remote`, but no history is computed twice. With nothing to
fetch, as for a first round, it is `remote_recompute`. The home prefills only when no prefill engine can.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from antiphon.policies import arms, choices
from antiphon.policies.base import ClusterView, Placement, Reject, RoundView
from antiphon.policies.home import choose_home


@dataclass(frozen=True, slots=True)
class RemotePullAlwaysParameters:
    shortlist: int = 4
    """Estimated are this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        choices.check_shortlist(self.shortlist)


@dataclass(frozen=True, slots=True)
class RemotePullAlways:
    parameters: RemotePullAlwaysParameters = field(default_factory=RemotePullAlwaysParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        considered = tuple(
            arms.remote_pull(round, engine, home)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        )
        best = choices.least_ttft(considered)
        reason = (
            f"remote: {best.prefill_engine} has the least predicted TTFT, {best.ttft_s:.3f} s with"
            f" {best.pull_s:.3f} s of pull, of {len(considered)} considered of {len(engines)} prefill engines"
        )
        return choices.placement(home, best, reason, considered)
