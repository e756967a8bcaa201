"""A policy that moves sessions by count, for tests of the arm `move` on the live driver."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from antiphon.policies import arms
from antiphon.policies.base import Arm, Candidate, ClusterView, Placement, Reject, RoundView


@dataclass(slots=True)
class MovesEvery:
    """Each session begins on `engines[0]`; every `every`-th of its rounds moves it to the next one.

    With `recompute` it goes there too, but nothing is pulled: what a move is compared with.
    """

    engines: tuple[str, ...]
    every: int = 3
    recompute: bool = False
    placed: Counter[str] = field(default_factory=Counter)
    """Session -> rounds, tries included."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        usable = [e for e in self.engines if e in cluster.engines and e not in round.excluded]
        if not usable:
            return Reject("no engine", 0.1)
        self.placed[round.session_id] += 1
        home = round.home if round.home in usable else usable[0]
        if self.placed[round.session_id] % self.every or len(usable) == 1 or round.home is None:
            predicted = arms.local(round, cluster.engines[home])
            return Placement(Arm.LOCAL, home, home, "not yet", predicted)
        target = usable[(usable.index(home) + 1) % len(usable)]
        engine = cluster.engines[target]
        if self.recompute:
            return Placement(Arm.LOCAL, target, target, "from nothing", arms.local(round, engine))
        moved = max(0, round.held(home) - round.held(target))
        pull_s = arms.transfer_between(cluster.engines[home], engine, moved)
        prefill_s = arms.prefill_on(engine, round.prompt_tokens, round.held(home))
        predicted = Candidate(Arm.MOVE, target, engine.queue_s, prefill_s, pull_s, 0.0, target)
        return Placement(Arm.MOVE, target, target, "its turn", predicted, (predicted,), home)
