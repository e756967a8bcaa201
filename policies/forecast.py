"""What a placement does: to the round's own TTFT and ITL, and to the SLOs of everybody else.

`arms.py` prices one engine and one idle link. A forecast adds the links' queues, the wait for the engine's
turn, loading what was fetched, the home's part of a remote round (it computes the last page), and the room
for KV. What it expects to be lost, in SLOs (`Candidate.misses`), is the sum of

    own       1 - (1 - chance(TTFT)) * (1 - chance(ITL)); chance is logistic in predicted / target
    harmed    rounds that decode where W seconds are prefilled and can take a stall of less (`itl_slacks_s`)
    delayed   delay_weight * in_time_per_s * (late(queue + W) - late(queue)): rounds that come meanwhile;
              late(x) = the integral of min(1, wait / target) from 0 to x, as each waits for what is left
    evicted   evict_weight * the share of this KV that is new to a store * kv_share^2 * (1 + prefill /
              target): sessions that lose their history to it, and have it computed again

Harmed decodes are counted one by one. Those who come are taken to arrive steadily, under this round's target;
sessions that are evicted to be as long as this one. W counts where the round is prefilled, and at its home.
"""

from __future__ import annotations

import math

from msgspec import Struct

from antiphon.policies import arms
from antiphon.policies.base import Arm, Candidate, EngineView, RoundView

CERTAIN = 4.0
"""Spreads away from the target, a miss is sure, or impossible."""

MOST_STRETCH = 10.0
"""Of an ITL, on an engine that seems to do nothing but prefill."""

CALL_S = 0.005
"""What a call on an engine costs before its batch loop sees it. Antiphon's guess."""

JITTER_S = 0.010
"""By how much any prediction can be wrong, however small it is. Antiphon's guess."""


class Forecast(Struct, frozen=True, gc=False):
    """Of one round, under the parameters of `adaptive`."""

    round: RoundView
    spread: float
    """Width of `chance` for a TTFT, as a share of the target."""
    itl_spread: float
    delay_weight: float = 1.0
    evict_weight: float = 1.0
    guard: bool = True
    """`harmed` counts."""
    decode_tax: float = 0.0
    """SLOs charged for each second by which each decode is stalled, within its target or not."""

    def at_home(self, home: EngineView, source: EngineView | None = None) -> Candidate:
        """The home prefills, over what it has and what it fetches from `source` first."""
        round = self.round
        held, pull_s, load_s = round.held(home.engine_id), 0.0, 0.0
        if source is not None:
            there = round.held(source.engine_id)
            pull_s, load_s = transfer(source, home, there - held), home.latency.load_s(there - held)
            held = max(held, there)
        queue_s = backlog(home) + turn(home)
        prefill_s = arms.prefill_on(home, round.prompt_tokens, held) + load_s
        itl_s = itl_at(round, home)
        misses = self.own(home, queue_s + prefill_s + pull_s, itl_s)
        misses += self.others(home, prefill_s) + self.evicted(home)
        arm = Arm.LOCAL if source is None else Arm.MOVE
        return Candidate(arm, home.engine_id, queue_s, prefill_s, pull_s, 0.0, home.engine_id, itl_s, misses)

    def elsewhere(self, engine: EngineView, home: EngineView, source: EngineView | None = None) -> Candidate:
        """`engine` prefills, over what it has or pulls from `source`; then the home fetches what it lacks.

        The home's own part, the last page and the wait for it, counts as part of the push.
        """
        round = self.round
        held, pull_s, load_s = round.held(engine.engine_id), 0.0, 0.0
        if source is not None:
            there = round.held(source.engine_id)
            pull_s, load_s = transfer(source, engine, there - held), engine.latency.load_s(there - held)
            held = there
        queue_s = backlog(engine) + turn(engine)
        prefill_s = arms.prefill_on(engine, round.prompt_tokens, held) + load_s
        last_s = last_page(round, home)
        push_s = transfer(engine, home, round.prompt_tokens - round.held(home.engine_id))
        before_s = queue_s + prefill_s + pull_s + push_s
        push_s += last_s + turn(home) + max(0.0, backlog(home) - before_s)
        itl_s = itl_at(round, home)
        misses = self.own(home, queue_s + prefill_s + pull_s + push_s, itl_s)
        misses += self.others(engine, prefill_s) + self.others(home, last_s)
        misses += self.evicted(engine) + self.evicted(home)
        arm = Arm.REMOTE_RECOMPUTE if source is None else Arm.REMOTE_PULL
        return Candidate(
            arm, engine.engine_id, queue_s, prefill_s, pull_s, push_s, home.engine_id, itl_s, misses
        )

    def own(self, home: EngineView, ttft_s: float, itl_s: float) -> float:
        """Chance that the round misses a target. Without room for its KV it waits for others: it does."""
        round = self.round
        if home.batch and home.context_tokens + round.prompt_tokens > home.pool_tokens:
            return 1.0
        spread = self.spread + JITTER_S / round.slo_ttft_s
        in_time = 1.0 - chance(round.waited_s + ttft_s, round.slo_ttft_s, spread)
        return 1.0 - in_time * (1.0 - chance(itl_s, round.slo_itl_s, self.itl_spread))

    def others(self, engine: EngineView, work_s: float) -> float:
        """`harmed` + `delayed` by so much prefill on the engine."""
        lost = self.decode_tax * engine.batch * work_s
        if self.guard:
            for slack_s in engine.itl_slacks_s:
                if slack_s >= work_s:
                    break
                lost += 1.0
        if engine.in_time_per_s:
            queue_s, target_s = backlog(engine), self.round.slo_ttft_s
            more = late(queue_s + work_s, target_s) - late(queue_s, target_s)
            lost += self.delay_weight * engine.in_time_per_s * more
        return lost

    def evicted(self, engine: EngineView) -> float:
        round = self.round
        new = 1.0 - round.held(engine.engine_id) / round.prompt_tokens
        if new <= 0.0 or not engine.kv_share:
            return 0.0
        share = min(1.0, engine.kv_share)
        again_s = engine.latency.prefill_s(round.prompt_tokens, 0)
        return self.evict_weight * new * share * share * (1.0 + again_s / round.slo_ttft_s)


def backlog(engine: EngineView) -> float:
    """Seconds of prefill before a round that comes now. What waits shares one pass, and pays for it once."""
    merged = engine.queued_rounds - 1
    if merged <= 0:
        return engine.queue_s
    return max(0.0, engine.queue_s - merged * engine.latency.prefill.fixed_s * engine.corrections.prefill)


def turn(engine: EngineView) -> float:
    """Seconds until an idle queue is looked at: the call, and half of the decode step that runs."""
    return CALL_S + 0.5 * arms.decode_step(engine) if engine.batch else CALL_S


def late(wait_s: float, target_s: float) -> float:
    """The integral of min(1, w / target) for w from 0 to `wait_s`, in seconds."""
    return wait_s * wait_s / (2.0 * target_s) if wait_s < target_s else wait_s - target_s / 2.0


def transfer(source: EngineView, puller: EngineView, tokens: int) -> float:
    """Seconds to move the KV of `tokens` behind what the two links owe already."""
    if tokens <= 0:
        return 0.0
    out_s = source.latency.transfer_s(tokens, source.outgoing_bytes) * source.corrections.transfer
    in_s = puller.latency.transfer_s(tokens, puller.incoming_bytes) * puller.corrections.transfer
    return out_s if out_s > in_s else in_s


def last_page(round: RoundView, home: EngineView) -> float:
    """Seconds of the home's part of a remote round: it loads what came, and computes one token over it."""
    load_s = home.latency.load_s(round.prompt_tokens - round.held(home.engine_id))
    return load_s + home.latency.prefill_s(1, round.prompt_tokens - 1) * home.corrections.prefill


def itl_at(round: RoundView, home: EngineView) -> float:
    """Mean seconds between the round's tokens: the step of the batch with it, stretched by prefills there.

    While a share u of the engine's time goes to prefills, a token takes step / (1 - u); but never more than a
    step and its part of a chunk, where K steps come between two chunks.
    """
    context = round.prompt_tokens + round.expected_output_tokens // 2
    step_s = arms.decode_step(home, 1, context)
    itl_s = step_s / max(1.0 - home.prefill_share, 1.0 / MOST_STRETCH)
    if home.chunk_tokens and home.decode_interval:
        chunk_s = home.latency.prefill_s(home.chunk_tokens, context) * home.corrections.prefill
        itl_s = min(itl_s, step_s + chunk_s / home.decode_interval)
    return itl_s


def chance(predicted_s: float, target_s: float, spread: float) -> float:
    """That a prediction turns out above its target: logistic in predicted / target, `spread` wide."""
    away = (predicted_s / target_s - 1.0) / spread
    if away >= CERTAIN:
        return 1.0
    return 0.0 if away <= -CERTAIN else 1.0 / (1.0 + math.exp(-away))
