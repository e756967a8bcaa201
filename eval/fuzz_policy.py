"""A policy and an ordering that draw: for finding holes in the core, not for serving.

Every arm on any engines that may carry it out, chosen by the round's seed; a queue in any order. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.policies.base import Arm, Candidate, ClusterView, Placement, Reject, RoundView

ARMS = (Arm.LOCAL, Arm.REMOTE_RECOMPUTE, Arm.REMOTE_PULL, Arm.REMOTE_PULL, Arm.MOVE)


class Drawn:
    """Any arm, any engines; now and then it turns a round away though there is room."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        usable = [name for name in cluster.engines if name not in round.excluded]
        seed = round.seed + 7919 * len(round.excluded)
        if not usable or seed % 97 == 0:
            return Reject("no engine" if not usable else "drawn", 0.5 + seed % 5)
        home = round.home if round.home in usable and seed % 3 else usable[seed // 3 % len(usable)]
        able = [name for name in usable if cluster.engines[name].can_transfer]
        others = [name for name in able if name != home]
        arm = ARMS[seed // 101 % len(ARMS)] if others and home in able else Arm.LOCAL
        # Half of them in one place: so that there are queues.
        other = others[seed // 13 % len(others) if seed // 29 % 2 else -1] if others else home
        source = others[seed // 17 % len(others)] if others and seed // 19 % 2 else None
        if arm is Arm.LOCAL or arm is Arm.MOVE:
            other = home
        if source == other or arm is Arm.LOCAL or arm is Arm.REMOTE_RECOMPUTE:
            source = None
        seconds = 0.001 * (seed // 23 % 2000)
        predicted = Candidate(arm, other, seconds, seconds, 0.1 if source else 0.0, 0.1)
        return Placement(arm, home, other, "drawn", predicted, (predicted,), source)


class DrawnOrdering:
    """A key and an order of the first four that say nothing of when a round came."""

    window = 4

    def key(self, round: RoundView) -> float:
        return float(round.seed % 5)

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        return sorted(queue, key=lambda round: (round.seed // 5 % 11 - 4 * round.postponed, round.round_id))
