"""`isl_bounding`: local iff the home lacks few tokens and a small share: Dynamo's conditional disaggregation.

    effective ISL = L - H(d)          ratio = effective ISL / L
    local iff effective ISL < eff_isl_threshold and ratio < eff_isl_ratio_threshold, else remote on p

The engines are chosen by the cost of Dynamo's KV router, its weights 1, in tokens (it counts blocks):

    d, for a session without a home    least (context of its decodes + L) - H(d)
    p                                  least (prefill tokens queued there) + L - H(p)

Rule and values: Dynamo v1.6 docs (conditional disaggregation, its default policy); the costs: its
scheduling/selector.rs, where conditional disaggregation credits a decode worker with its overlap and the
prefill router counts no decodes. Antiphon's own: a session keeps its home; the queue of p is known in
seconds, so both terms of p are priced in seconds of prefill; equal costs go by the default home rule (d) or
engine id (p), where Dynamo draws. The decode-busy guard, unset there, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from antiphon.policies import arms, choices
from antiphon.policies.base import Candidate, ClusterView, EngineView, Placement, Pool, Reject, RoundView
from antiphon.policies.home import can_be_home, choose_home, least_used, session_home


@dataclass(frozen=True, slots=True)
class IslBoundingParameters:
    eff_isl_threshold: int = 2048
    """Tokens that the home lacks: fewer may be prefilled there; 0 = never local."""
    eff_isl_ratio_threshold: float = 0.7
    """Share of the prompt that the home lacks: a smaller one may be prefilled there. 0 to 1."""
    shortlist: int = 4
    """Estimated are this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        choices.check_not_negative(eff_isl_threshold=self.eff_isl_threshold)
        ratio = self.eff_isl_ratio_threshold
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise ValueError(f"eff_isl_ratio_threshold must be between 0 and 1, got {ratio}")
        choices.check_shortlist(self.shortlist)


@dataclass(frozen=True, slots=True)
class IslBounding:
    parameters: IslBoundingParameters = field(default_factory=IslBoundingParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = session_home(round, cluster) or new_home(round, cluster)
        if isinstance(home, Reject):
            return home
        most, share = self.parameters.eff_isl_threshold, self.parameters.eff_isl_ratio_threshold
        lacks = round.prompt_tokens - round.held(home.engine_id)
        ratio = lacks / round.prompt_tokens
        told = f"{home.engine_id} lacks {lacks} tokens, {ratio:.3f} of the prompt"
        local = arms.local(round, home)
        if lacks < most and ratio < share:
            return choices.placement(home, local, f"local: {told}: under {most} and {share:g}")
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        considered = [
            arms.remote_recompute(round, engine, home)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        ]
        best = min(considered, key=_cost)
        reason = (
            f"remote: {told}: not under {most} and {share:g}; {best.prefill_engine} has the least queue and"
            f" prefill, {best.queue_s + best.prefill_s:.3f} s, of {len(considered)} considered"
            f" of {len(engines)} prefill engines"
        )
        return choices.placement(home, best, reason, (*considered, local))


def new_home(round: RoundView, cluster: ClusterView) -> EngineView | Reject:
    """The decode engine of least cost, equal ones by the default rule; without any, the default rule."""
    usable = [engine for engine in cluster.pool(Pool.DECODE) if can_be_home(engine, round)]
    costs = [engine.context_tokens - round.held(engine.engine_id) for engine in usable]  # + L, for all
    least = min(costs, default=0)
    best = least_used(engine for cost, engine in zip(costs, usable, strict=True) if cost == least)
    return best or choose_home(round, cluster)


def _cost(candidate: Candidate) -> tuple[float, str]:
    return candidate.queue_s + candidate.prefill_s, candidate.prefill_engine
