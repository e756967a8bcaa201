"""`ampd`: Algorithm 1 of AMPD (arXiv:2602.14516), three tiers over `local` and `remote_pull`.

    1. p in the prefill engines, in random order: windowed TTFT of p < alpha * TTFT target   -> remote on p
    2. windowed ITL of the home < beta * ITL target                                          -> local
    3. else the least estimate of Eq. 2 (`arms.py`) among local and remote on p, for the shortlisted p

The first engine with slack in a random order is any engine with slack with equal chance, so one of them is
drawn by `RoundView.seed`. A remote round pulls what the home holds beyond p; with nothing to pull it counts
as `remote_recompute`.

The paper's code is not public. Antiphon's own choices: the default values of alpha and beta; the meaning of
an empty window (tier 1: p's queue stands in for its TTFT; tier 2: the predicted decode step of the home's
batch for its ITL); the shortlist (the paper estimates every engine); ties (local first, then engine id).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from antiphon.policies import arms
from antiphon.policies.base import Arm, Candidate, ClusterView, EngineView, Placement, Reject, RoundView
from antiphon.policies.home import choose_home


@dataclass(frozen=True, slots=True)
class AmpdParameters:
    alpha: float = 0.5
    """Share of the TTFT target under which a prefill engine has slack. Antiphon's: the best of a sweep."""
    beta: float = 0.2
    """Share of the ITL target under which the home has slack. Antiphon's: the best of a sweep."""
    shortlist: int = 4
    """Tier 3 estimates this many prefill engines with the shortest queue and as many with most history."""

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        if self.shortlist < 1:
            raise ValueError(f"shortlist must be at least 1, got {self.shortlist}")


class _Case(Struct, frozen=True, gc=False):
    """One decision: the round, its home, and the prefill engines that could compute it (at least one)."""

    round: RoundView
    home: EngineView
    engines: Sequence[EngineView]
    local: Candidate

    def remote(self, engine: EngineView) -> Candidate:
        return arms.remote_pull(self.round, engine, self.home)

    def estimates(self, count: int) -> tuple[Candidate, ...]:
        """Local and remote on every shortlisted engine."""
        return (self.local, *map(self.remote, arms.shortlist(self.round, self.engines, count)))

    def placement(self, choice: Candidate, reason: str, considered: tuple[Candidate, ...]) -> Placement:
        return Placement(choice.arm, self.home.engine_id, choice.prefill_engine, reason, choice, considered)


@dataclass(frozen=True, slots=True)
class Ampd:
    parameters: AmpdParameters = field(default_factory=AmpdParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        local = arms.local(round, home)
        case = _Case(round, home, engines, local)
        if not engines:
            reason = f"no prefill engine is usable for {home.engine_id}: prefilled there"
            return case.placement(local, reason, (local,))
        return self._first_tier(case) or self._second_tier(case) or self._third_tier(case)

    def _first_tier(self, case: _Case) -> Placement | None:
        limit_s = self.parameters.alpha * case.round.slo_ttft_s
        slack = [engine for engine in case.engines if ttft_seen(engine) < limit_s]
        if not slack:
            return None
        engine = slack[case.round.seed % len(slack)]
        remote = case.remote(engine)
        name = "no TTFT in the window, queue" if engine.window_ttft_s is None else "windowed TTFT"
        reason = (
            f"tier 1: {engine.engine_id} {name} {ttft_seen(engine):.3f} s"
            f" < {self.parameters.alpha:g} x {case.round.slo_ttft_s:.3f} s"
        )
        return case.placement(remote, reason, (remote, case.local))

    def _second_tier(self, case: _Case) -> Placement | None:
        seen_s = itl_seen(case.home)
        if seen_s >= self.parameters.beta * case.round.slo_itl_s:
            return None
        name = "no ITL in the window, predicted step" if case.home.window_itl_s is None else "windowed ITL"
        least_s, least = min((ttft_seen(engine), engine.engine_id) for engine in case.engines)
        reason = (
            f"tier 2: no prefill engine under {self.parameters.alpha:g} x {case.round.slo_ttft_s:.3f} s"
            f" (best: {least} {least_s:.3f} s); {case.home.engine_id} {name} {seen_s:.4f} s"
            f" < {self.parameters.beta:g} x {case.round.slo_itl_s:.4f} s"
        )
        return case.placement(case.local, reason, case.estimates(self.parameters.shortlist))

    def _third_tier(self, case: _Case) -> Placement:
        considered = case.estimates(self.parameters.shortlist)
        best = min(considered, key=_preference)
        reason = (
            f"tier 3: least predicted TTFT of {len(considered)} considered is {best.ttft_s:.3f} s,"
            f" {best.arm.value} on {best.prefill_engine}"
            f" (local on {case.home.engine_id} {case.local.ttft_s:.3f} s)"
        )
        return case.placement(best, reason, considered)


def ttft_seen(engine: EngineView) -> float:
    """What tier 1 compares: the windowed TTFT, or the queue when the window is empty."""
    return engine.queue_s if engine.window_ttft_s is None else engine.window_ttft_s


def itl_seen(home: EngineView) -> float:
    """What tier 2 compares: the windowed ITL, or the predicted step of the present batch."""
    if home.window_itl_s is not None:
        return home.window_itl_s
    return home.latency.decode_step_s(home.batch, home.context_tokens)


def _preference(candidate: Candidate) -> tuple[float, bool, str]:
    return candidate.ttft_s, candidate.arm is not Arm.LOCAL, candidate.prefill_engine
