"""`mooncake`: Algorithm 1 of Mooncake's Conductor (FAST'25), prefill where it gives the least TTFT.

    best = the longest prefix of this prompt that any engine holds
    for p in the prefill engines:
        if best / H(p) > balancing_threshold: p pulls best - H(p) from its holder       (remote_pull)
        else: p computes what it lacks                                                  (remote_recompute)
    the least queue + pull + prefill + push wins

Theirs: the rule, and its rejection when a target cannot be met (`early_rejection`). Antiphon's: the value of
the threshold (theirs is "adjusted manually"); H(p) = 0 counts as an infinite ratio; every engine with our
linker can be the holder, homes included, since they alone hold what was generated; the push is part of TTFT;
the home is kept for decode and is one candidate more, with nothing to move (`home_prefills`); the shortlist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from msgspec.structs import replace

from antiphon.policies import arms, choices
from antiphon.policies.base import Arm, Candidate, ClusterView, EngineView, Placement, Reject, RoundView
from antiphon.policies.home import RETRY_AFTER_S, choose_home, session_home


@dataclass(frozen=True, slots=True)
class MooncakeParameters:
    balancing_threshold: float = 1.0
    """Best prefix over the engine's own above which fetching beats computing. The value is Antiphon's."""
    home_prefills: bool = True
    """The home of a session is a candidate too; false = prefill engines only, as theirs."""
    early_rejection: bool = False
    """Refuse a round that is predicted to miss a target. Off here: a refused round attains nothing either."""
    shortlist: int = 4
    """Estimated are this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.balancing_threshold) and self.balancing_threshold >= 1):
            raise ValueError(f"balancing_threshold must be at least 1, got {self.balancing_threshold}")
        choices.check_shortlist(self.shortlist)


@dataclass(frozen=True, slots=True)
class Mooncake:
    parameters: MooncakeParameters = field(default_factory=MooncakeParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        holder = _best_holder(round, home, cluster)
        considered: list[Candidate] = []
        if self.parameters.home_prefills and session_home(round, cluster) is home:
            considered.append(arms.local(round, home))
        considered += [
            self._remote(round, engine, home, holder)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        ]
        best = min(considered, key=_preference)
        if self.parameters.early_rejection and (refusal := _missed(round, home, best)):
            return refusal
        reason = (
            f"mooncake: least predicted TTFT of {len(considered)} considered is {best.ttft_s:.3f} s,"
            f" {best.arm.value} on {best.prefill_engine}"
        )
        answer = choices.placement(home, best, reason, tuple(considered))
        if best.arm is not Arm.REMOTE_PULL or holder is None:
            return answer
        reason += f" from {holder.engine_id}, which holds {round.held(holder.engine_id)} tokens"
        source = None if holder is home else holder.engine_id
        return replace(answer, reason=reason, source=source)

    def _remote(
        self, round: RoundView, engine: EngineView, home: EngineView, holder: EngineView | None
    ) -> Candidate:
        if holder is not None:
            longest, own = round.held(holder.engine_id), round.held(engine.engine_id)
            if longest > self.parameters.balancing_threshold * own:
                return arms.remote_pull(round, engine, home, holder)
        return arms.remote_recompute(round, engine, home)


def _best_holder(round: RoundView, home: EngineView, cluster: ClusterView) -> EngineView | None:
    """Who holds the longest prefix and can give it; of equals the home, then by engine id."""
    best, most = home, round.held(home.engine_id)
    for engine_id in sorted(round.history_tokens):
        engine = cluster.engines.get(engine_id)
        if engine is None or not engine.can_transfer or engine_id in round.excluded:
            continue
        if round.history_tokens[engine_id] > most:
            best, most = engine, round.history_tokens[engine_id]
    return best if most else None


def _missed(round: RoundView, home: EngineView, best: Candidate) -> Reject | None:
    """Algorithm 1's last lines: the target that this round would miss."""
    ttft_s, itl_s = round.waited_s + best.ttft_s, arms.decode_step(home, 1, round.prompt_tokens)
    if ttft_s > round.slo_ttft_s:
        return Reject(f"predicted TTFT {ttft_s:.3f} s is over {round.slo_ttft_s:.3f} s", RETRY_AFTER_S)
    if itl_s > round.slo_itl_s:
        return Reject(f"predicted ITL {itl_s:.4f} s is over {round.slo_itl_s:.4f} s", RETRY_AFTER_S)
    return None


def _preference(candidate: Candidate) -> tuple[float, bool, str]:
    return candidate.ttft_s, candidate.arm is not Arm.LOCAL, candidate.prefill_engine
