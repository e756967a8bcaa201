"""`first_remote`: a session's first round is prefilled in the prefill pool, every later one on its home.

ConServe (arXiv:2606.01839): the conversation is what is scheduled, not the turn. Its KV moves once, then the
session is pinned to its decoder. That decoder is the one with least KV in use, which is the shared default
rule; the prefill engine is the one with the least predicted TTFT (Antiphon's choice: the paper's rule for the
prefiller is not known to us). The first round is the one without a usable home: that also holds after the
home was lost, where the session begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from antiphon.policies import arms, choices
from antiphon.policies.base import ClusterView, Placement, Reject, RoundView
from antiphon.policies.home import choose_home, session_home


@dataclass(frozen=True, slots=True)
class FirstRemoteParameters:
    shortlist: int = 4
    """First rounds: estimated are this many prefill engines with the shortest queue, as many with history."""

    def __post_init__(self) -> None:
        choices.check_shortlist(self.shortlist)


@dataclass(frozen=True, slots=True)
class FirstRemote:
    parameters: FirstRemoteParameters = field(default_factory=FirstRemoteParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        kept = session_home(round, cluster)
        if kept is not None:
            reason = f"later round: local on the session's home {kept.engine_id}"
            return choices.placement(kept, arms.local(round, kept), reason)
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        considered = tuple(
            arms.remote_recompute(round, engine, home)
            for engine in arms.shortlist(round, engines, self.parameters.shortlist)
        )
        best = choices.least_ttft(considered)
        reason = (
            f"first round: {best.prefill_engine} has the least predicted TTFT, {best.ttft_s:.3f} s,"
            f" of {len(considered)} considered of {len(engines)} prefill engines"
        )
        return choices.placement(home, best, reason, considered)
