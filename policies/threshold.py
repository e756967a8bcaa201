"""`threshold`: remote iff the home lacks at least N tokens of the prompt. llm-d's prefix-based PD decider.

The decode engine d comes first; then, with L prompt tokens and H(d) of them held there:

    local if non_cached_tokens = 0 (off), L < non_cached_tokens, or prompt_tokens > 0 and L < prompt_tokens
    remote iff L - H(d) >= non_cached_tokens

Both engines are those of most points among their pool, by the sample configuration's two scorers:

    points(e) = 2 * H(e) / L + (longest queue - queue(e)) / (longest - shortest queue)      equal queues: + 1

Rule: llm-d-router @ebab687 (prefix_based_pd_decider.go), whose documented example has 512 and 1024 tokens;
scorers and weights: its deploy/config/pd-epp-config.yaml. Antiphon's own: a session keeps its home, so d is
chosen for new ones only; the queue is the rounds with prefill reserved on the engine (llm-d reads its waiting
requests); equal points go to the shorter queue in seconds (p) or by the default home rule (d), where llm-d
draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.policies import arms, choices
from antiphon.policies.base import ClusterView, EngineView, Placement, Pool, Reject, RoundView
from antiphon.policies.home import can_be_home, choose_home, least_used, session_home

PREFIX_WEIGHT = 2.0
QUEUE_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class ThresholdParameters:
    non_cached_tokens: int = 512
    """Least tokens that the home lacks for a remote prefill; 0 = never remote."""
    prompt_tokens: int = 1024
    """Least tokens of a prompt that may go remote; 0 = any."""

    def __post_init__(self) -> None:
        choices.check_not_negative(non_cached_tokens=self.non_cached_tokens, prompt_tokens=self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Threshold:
    parameters: ThresholdParameters = field(default_factory=ThresholdParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        home = session_home(round, cluster) or new_home(round, cluster)
        if isinstance(home, Reject):
            return home
        local = arms.local(round, home)
        why = self._why_local(round, home)
        if why:
            return choices.placement(home, local, f"local: {why}")
        engines = arms.prefill_engines(round, home, cluster)
        if not engines:
            return choices.prefilled_at_home(round, home)
        marks = points(round, engines)
        chosen = min(zip(marks, engines, strict=True), key=_preference)
        remote = arms.remote_recompute(round, chosen[1], home)
        reason = (
            f"remote: {home.engine_id} lacks {round.prompt_tokens - round.held(home.engine_id)} tokens,"
            f" at least {self.parameters.non_cached_tokens}; {remote.prefill_engine} has most points,"
            f" {chosen[0]:.2f}, of {len(engines)} prefill engines"
        )
        return choices.placement(home, remote, reason, (remote, local))

    def _why_local(self, round: RoundView, home: EngineView) -> str:
        """In words; "" for a round that goes remote."""
        least, least_prompt = self.parameters.non_cached_tokens, self.parameters.prompt_tokens
        prompt, lacks = round.prompt_tokens, round.prompt_tokens - round.held(home.engine_id)
        if not least:
            return "non_cached_tokens is 0, which turns remote prefill off"
        if prompt < least_prompt:
            return f"a prompt of {prompt} tokens, fewer than {least_prompt}"
        if lacks < least:  # also where the whole prompt is shorter
            return f"{home.engine_id} lacks {lacks} tokens, fewer than {least}"
        return ""


def new_home(round: RoundView, cluster: ClusterView) -> EngineView | Reject:
    """The decode engine of most points, equal ones by the default rule; without any, the default rule."""
    usable = [engine for engine in cluster.pool(Pool.DECODE) if can_be_home(engine, round)]
    marks = points(round, usable)
    most = max(marks, default=0.0)
    best = least_used(engine for mark, engine in zip(marks, usable, strict=True) if mark == most)
    return best or choose_home(round, cluster)


def points(round: RoundView, engines: Sequence[EngineView]) -> list[float]:
    """Points of each engine among these; at most PREFIX_WEIGHT + QUEUE_WEIGHT."""
    queues = [engine.queued_rounds for engine in engines]
    longest, shortest = max(queues, default=0), min(queues, default=0)
    span = longest - shortest
    return [
        PREFIX_WEIGHT * round.held(engine.engine_id) / round.prompt_tokens
        + QUEUE_WEIGHT * ((longest - queue) / span if span else 1.0)
        for queue, engine in zip(queues, engines, strict=True)
    ]


def _preference(scored: tuple[float, EngineView]) -> tuple[float, float, str]:
    mark, engine = scored
    return -mark, engine.queue_s, engine.engine_id
