"""`threshold_queue`: remote iff the home lacks many tokens and few rounds wait. Dynamo's classic rule.

    remote iff int(L * (1 - hit rate)) > max_local_prefill_length and queue size < max_prefill_queue_size

with the hit rate H(d) / L of the home d, so the first term is L - H(d). The prefill engine reads the prefix
that the home holds from there (`remote_pull`), computes the rest and writes it back.

Rule and values: Dynamo @02e16f7 (examples/llm/components/disagg_router.py). Its prefill workers take one
request at a time from one NATS queue, and what they have taken is no longer in it. Antiphon has a queue on
each prefill engine and counts rounds until their prefill is done, so, our own: the queue size is the rounds
with prefill reserved on usable prefill engines, less one in work for each of these engines, at least 0; and
the engine is the one with least queued seconds, then id: the one that would take the next from such a queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from antiphon.policies import arms, choices
from antiphon.policies.base import ClusterView, EngineView, Placement, Reject, RoundView
from antiphon.policies.home import choose_home


@dataclass(frozen=True, slots=True)
class ThresholdQueueParameters:
    max_local_prefill_length: int = 1000
    """Most tokens that the home computes itself, as long as the queue is short."""
    max_prefill_queue_size: int = 2
    """From this many waiting rounds on, all is local; 0 = never remote."""

    def __post_init__(self) -> None:
        choices.check_not_negative(
            max_local_prefill_length=self.max_local_prefill_length,
            max_prefill_queue_size=self.max_prefill_queue_size,
        )


@dataclass(frozen=True, slots=True)
class ThresholdQueue:
    parameters: ThresholdQueueParameters = field(default_factory=ThresholdQueueParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        local = arms.local(round, home)
        remote = arms.remote_pull(round, min(engines, key=_queue), home)
        most, limit = self.parameters.max_local_prefill_length, self.parameters.max_prefill_queue_size
        lacks, waiting = round.prompt_tokens - round.held(home.engine_id), queue_size(engines)
        if lacks <= most:
            reason = f"local: {home.engine_id} lacks {lacks} tokens, not more than {most}"
            return choices.placement(home, local, reason, (local, remote))
        if waiting >= limit:
            reason = f"local: waiting for prefill are {waiting} rounds, not fewer than {limit}"
            return choices.placement(home, local, reason, (local, remote))
        reason = (
            f"remote: {home.engine_id} lacks {lacks} tokens, more than {most}; waiting are {waiting},"
            f" fewer than {limit}; {remote.prefill_engine} is free first, in {remote.queue_s:.3f} s"
        )
        return choices.placement(home, remote, reason, (remote, local))


def queue_size(engines: Sequence[EngineView]) -> int:
    """Rounds that would wait in one queue before these engines, each of which works on one."""
    return max(0, sum(engine.queued_rounds for engine in engines) - len(engines))


_queue = attrgetter("queue_s", "engine_id")
