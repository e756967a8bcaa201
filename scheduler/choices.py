"""What policy and ordering answer, checked: one that fails costs its own choice, never a round or the replica.

Both are pure functions that anybody may write. Instead of an answer that cannot be carried out, a round is
placed by `local`, and a queue is served first come first served. What was wrong comes back in words.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.policies.base import Arm, ClusterView, Ordering, Placement, Policy, Reject, RoundView
from antiphon.policies.local import Local

_FALLBACK = Local()


def choose_placement(
    policy: Policy, round: RoundView, cluster: ClusterView
) -> tuple[Placement | Reject, str]:
    """Where the round goes, and what was wrong with the policy's own answer ("" = nothing)."""
    try:
        answer = policy.place(round, cluster)
        wrong = "" if isinstance(answer, Reject) else _wrong(answer, cluster)
        if not wrong:
            return answer, ""
    except Exception as error:
        wrong = repr(error)
    return _FALLBACK.place(round, cluster), f"the policy failed, so `local` chose: {wrong}"


def choose_first(ordering: Ordering, queue: Sequence[RoundView], cluster: ClusterView) -> tuple[str, str]:
    """Id of the round to serve next, and what was wrong with the ordering's own answer ("" = nothing)."""
    try:
        first = ordering.order(queue, cluster)[0].round_id
        if any(round.round_id == first for round in queue):
            return first, ""
        wrong = f"{first} does not wait here"
    except Exception as error:
        wrong = repr(error)
    return queue[0].round_id, f"the ordering failed, so the first in the queue was served: {wrong}"


def _wrong(placement: Placement, cluster: ClusterView) -> str:
    home, prefill_engine = placement.home, placement.prefill_engine
    for engine_id in (home, prefill_engine):
        if engine_id not in cluster.engines:
            return f"engine {engine_id} is not alive"
    if (placement.arm is Arm.LOCAL) != (home == prefill_engine):
        return f"{placement.arm.value} with home {home} and prefill engine {prefill_engine}"
    return ""
