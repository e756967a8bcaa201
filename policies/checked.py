"""`Checked`, `CheckedOrdering`: a policy or ordering that fails costs its own choice, never a round.

Anybody may write one, and the core carries out what it answers. Where it raises or names what is not there,
the fallback chooses: `local` for a placement, first come first served for a queue. The reason tells of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from antiphon.policies.base import Arm, ClusterView, Ordering, Placement, Policy, Reject, RoundView
from antiphon.policies.fcfs import Fcfs
from antiphon.policies.local import Local


@dataclass(frozen=True, slots=True)
class Checked:
    policy: Policy
    fallback: Policy = field(default_factory=Local)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        try:
            answer = self.policy.place(round, cluster)
            wrong = "" if isinstance(answer, Reject) else _wrong(answer, cluster)
            if not wrong:
                return answer
        except Exception as error:
            wrong = repr(error)
        answer = self.fallback.place(round, cluster)
        return replace(answer, reason=f"{answer.reason}, because the policy failed: {wrong}")


@dataclass(frozen=True, slots=True)
class CheckedOrdering:
    ordering: Ordering
    fallback: Ordering = field(default_factory=Fcfs)

    @property
    def window(self) -> int:
        return max(1, self.ordering.window)

    def key(self, round: RoundView) -> float:
        try:
            key = self.ordering.key(round)
        except Exception:
            return self.fallback.key(round)
        return key if key == key else self.fallback.key(round)  # a NaN sorts nowhere

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        """A permutation of `queue`, whatever the ordering answers."""
        try:
            ordered = self.ordering.order(queue, cluster)
            fine = sorted(r.round_id for r in ordered) == sorted(r.round_id for r in queue)
        except Exception:
            fine = False
        return ordered if fine else self.fallback.order(queue, cluster)


def _wrong(placement: Placement, cluster: ClusterView) -> str:
    """Why the core could not carry it out; "" if it can."""
    home, prefill_engine = placement.home, placement.prefill_engine
    for engine_id in (home, prefill_engine):
        if engine_id not in cluster.engines:
            return f"engine {engine_id} is not alive"
    if (placement.arm in (Arm.LOCAL, Arm.MOVE)) != (home == prefill_engine):
        return f"{placement.arm.value} with home {home} and prefill engine {prefill_engine}"
    return ""
