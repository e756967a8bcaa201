"""`Leaving`: around any policy, for sessions whose home is to be stopped. They move, whatever it says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from antiphon.policies.arms import prefill_on, transfer_between
from antiphon.policies.base import (
    MOVE,
    Candidate,
    ClusterView,
    EngineView,
    Placement,
    Policy,
    Pool,
    Reject,
    RoundView,
)
from antiphon.policies.home import can_be_home, least_used


@dataclass(frozen=True, slots=True)
class Leaving:
    policy: Policy

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        """Of the policy, unless the round's home drains and there is another one."""
        away = leave(round, cluster) if round.leaving else None
        return away if away is not None else self.policy.place(round, cluster)


def leave(round: RoundView, cluster: ClusterView) -> Placement | None:
    """A move from the round's home to the least used engine of its pool; None where there is no other.

    Engines in `round.excluded` are none; what the home holds of the prompt is fetched from there.
    """
    home = cluster.engines.get(round.home or "")
    if home is None:
        return None
    others = [e for e in cluster.engines.values() if e is not home and can_be_home(e, round)]
    target = new_home(others, home.pool)
    if target is None:
        return None
    held, there = round.held(home.engine_id), round.held(target.engine_id)
    readable = home.can_transfer and target.can_transfer
    known = max(held, there) if readable else there
    predicted = Candidate(
        MOVE,
        target.engine_id,
        target.queue_s,
        prefill_on(target, round.prompt_tokens, known),
        transfer_between(home, target, held - there) if readable and held > there else 0.0,
        0.0,
        target.engine_id,
    )
    reason = f"its home {home.engine_id} drains: it moves to {target.engine_id}, the least used"
    return Placement(MOVE, target.engine_id, target.engine_id, reason, predicted, (), home.engine_id)


def new_home(engines: Iterable[EngineView], pool: Pool) -> EngineView | None:
    """The least used engine of this pool; of any, if it has none."""
    usable = tuple(engines)
    return least_used(e for e in usable if e.pool is pool) or least_used(usable)
