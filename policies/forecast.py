"""What a placement does: to the round's own TTFT and ITL, and to the SLOs of everybody else.

`arms.py` prices one engine and one idle link. A forecast adds the links' queues, the wait for the engine's
turn, loading what was fetched, the home's part of a remote round (it computes the last page), and the room
for KV. What it expects to be lost, in SLOs (`Candidate.misses`), is the sum of

    own       1 - (1 - chance(TTFT)) * (1 - chance(ITL)); chance is logistic in predicted / target
    harmed    rounds that decode where W seconds are prefilled and can take a stall of less (`itl_slacks_s`)
    delayed   delay_weight / (1 - prefill_share)^2 * in_time_per_s * (late(queue + W) - late(queue)):
              rounds that come meanwhile; late(x) = the integral of min(1, wait / target) from 0 to x, as
              each waits for what is left, and hands on the delay the longer the busier the engine is
    evicted   evict_weight * the share of this KV that is new to a store * kv_share^2 * (1 + prefill /
              target): sessions that lose their history to it, and have it computed again

Harmed decodes are counted one by one. Those who come are taken to arrive steadily, under this round's target;
sessions that are evicted to be as long as this one. W counts where the round is prefilled, and at its home.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from msgspec import Struct

from antiphon.policies import arms
from antiphon.policies.base import (
    LOCAL,
    MOVE,
    REMOTE_PULL,
    REMOTE_RECOMPUTE,
    Candidate,
    EngineView,
    RoundView,
)

CERTAIN = 4.0
"""Spreads away from the target, a miss is sure, or impossible."""

LEAST_IDLE = 0.1
"""Share of its time, of an engine that seems to do nothing but prefill."""

MOST_STRETCH = 10.0
"""Of an ITL, on an engine that seems to do nothing but prefill."""

CALL_S = 0.005
"""What a call on an engine costs before its batch loop sees it. Antiphon's guess."""

JITTER_S = 0.010
"""By how much any prediction can be wrong, however small it is. Antiphon's guess."""


class _Engine(Struct, gc=False):
    """What is the same of one engine for every candidate."""

    held: int
    backlog_s: float
    step_s: float
    """A decode step of its batch; 0 without one."""
    turn_s: float
    queue_s: float
    """`backlog_s` + `turn_s`."""
    late_s: float
    """`late` of the backlog."""
    evicted: float


class _End(Struct, gc=False):
    """A home to which other engines send a round: what is the same, whoever does."""

    lacks: int
    """Tokens that are sent there."""
    in_s: float
    """Seconds that they take on its link."""
    last_s: float
    """Its own part, the last page."""
    own_s: float
    """The same with the wait for its turn."""
    backlog_s: float
    itl_s: float
    full: bool
    in_time: float
    """Chance that the ITL target is met."""
    lost: float
    """`others` by the last page."""
    evicted: float


class Forecast:
    """Of one round, under the parameters of `adaptive`. Used for one decision: it remembers its engines."""

    __slots__ = (
        "_ends", "_engines", "_spread", "decode_tax", "delay_weight", "evict_weight", "guard", "itl_spread",
        "round",
    )  # fmt: skip

    def __init__(
        self,
        round: RoundView,
        spread: float,
        itl_spread: float,
        delay_weight: float = 1.0,
        evict_weight: float = 1.0,
        guard: bool = True,
        decode_tax: float = 0.0,
    ) -> None:
        """`spread`: width of `chance` for a TTFT, as a share of the target; `guard`: `harmed` counts;
        `decode_tax`: SLOs charged for each second by which each decode is stalled, within its target or not.
        """
        self.round = round
        self.itl_spread = itl_spread
        self.delay_weight = delay_weight
        self.evict_weight = evict_weight
        self.guard = guard
        self.decode_tax = decode_tax
        self._spread = spread + JITTER_S / round.slo_ttft_s
        self._engines: dict[str, _Engine] = {}
        self._ends: dict[str, _End] = {}

    def at_home(self, home: EngineView, source: EngineView | None = None) -> Candidate:
        """The home prefills, over what it has and what it fetches from `source` first."""
        round, known = self.round, self._engine(home)
        held, queue_s, pull_s, load_s = known.held, known.queue_s, 0.0, 0.0
        if source is not None:
            there = round.held(source.engine_id)
            pull_s, load_s = transfer(source, home, there - held), home.latency.load_s(there - held)
            held = there if there > held else held
        prefill_s = arms.prefill_on(home, round.prompt_tokens, held, known.step_s) + load_s
        itl_s = itl_at(round, home)
        misses = self.own(home, queue_s + prefill_s + pull_s, itl_s)
        misses += self._lost(home, known, prefill_s) + known.evicted
        arm = LOCAL if source is None else MOVE
        return Candidate(arm, home.engine_id, queue_s, prefill_s, pull_s, 0.0, home.engine_id, itl_s, misses)

    def elsewhere(self, engine: EngineView, home: EngineView, source: EngineView | None = None) -> Candidate:
        """`engine` prefills, over what it has or pulls from `source`; then the home fetches what it lacks.

        The home's own part, the last page and the wait for it, counts as part of the push.
        """
        round, known, end = self.round, self._engine(engine), self._end(home)
        held, queue_s, pull_s, load_s = known.held, known.queue_s, 0.0, 0.0
        if source is not None:
            there = round.held(source.engine_id)
            pull_s, load_s = transfer(source, engine, there - held), engine.latency.load_s(there - held)
            held = there
        prefill_s = arms.prefill_on(engine, round.prompt_tokens, held, known.step_s) + load_s
        out_s = out_of(engine, end.lacks)
        push_s = out_s if out_s > end.in_s else end.in_s
        before_s = queue_s + prefill_s + pull_s + push_s
        push_s += end.own_s + (end.backlog_s - before_s if end.backlog_s > before_s else 0.0)
        misses = 1.0 if end.full else self._late(queue_s + prefill_s + pull_s + push_s, end.in_time)
        misses += self._lost(engine, known, prefill_s) + end.lost
        misses += known.evicted + end.evicted
        arm = REMOTE_RECOMPUTE if source is None else REMOTE_PULL
        return Candidate(
            arm, engine.engine_id, queue_s, prefill_s, pull_s, push_s, home.engine_id, end.itl_s, misses
        )

    def last_page_s(self, home: EngineView) -> float:
        """Seconds of the home's part of a remote round."""
        return self._end(home).last_s

    def own(self, home: EngineView, ttft_s: float, itl_s: float) -> float:
        """Chance that the round misses a target. Without room for its KV it waits for others: it does."""
        if self._full(home):
            return 1.0
        return self._late(ttft_s, 1.0 - chance(itl_s, self.round.slo_itl_s, self.itl_spread))

    def _full(self, home: EngineView) -> bool:
        return home.batch > 0 and home.context_tokens + self.round.prompt_tokens > home.pool_tokens

    def _late(self, ttft_s: float, itl_in_time: float) -> float:
        """Chance that a target is missed, that of the ITL being met with the chance of `itl_in_time`."""
        round = self.round
        in_time = 1.0 - chance(round.waited_s + ttft_s, round.slo_ttft_s, self._spread)
        return 1.0 - in_time * itl_in_time

    def _engine(self, engine: EngineView) -> _Engine:
        known = self._engines.get(engine.engine_id)
        if known is None:
            backlog_s, step_s = backlog(engine), arms.decode_step(engine)
            turn_s = turn(engine, step_s)
            known = self._engines[engine.engine_id] = _Engine(
                self.round.held(engine.engine_id), backlog_s, step_s, turn_s, backlog_s + turn_s,
                late(backlog_s, self.round.slo_ttft_s), self.evicted(engine),
            )  # fmt: skip
        return known

    def _end(self, home: EngineView) -> _End:
        end = self._ends.get(home.engine_id)
        if end is None:
            round, known = self.round, self._engine(home)
            lacks, last_s, itl_s = (
                round.prompt_tokens - known.held,
                last_page(round, home),
                itl_at(round, home),
            )
            in_time = 1.0 - chance(itl_s, round.slo_itl_s, self.itl_spread)
            end = self._ends[home.engine_id] = _End(
                lacks, into(home, lacks), last_s, last_s + known.turn_s, known.backlog_s, itl_s,
                self._full(home), in_time, self._lost(home, known, last_s), known.evicted,
            )  # fmt: skip
        return end

    def others(self, engine: EngineView, work_s: float) -> float:
        """`harmed` + `delayed` by so much prefill on the engine."""
        return self._lost(engine, self._engine(engine), work_s)

    def _lost(self, engine: EngineView, known: _Engine, work_s: float) -> float:
        lost = self.decode_tax * engine.batch * work_s
        if self.guard:
            lost += bisect_left(engine.itl_slacks_s, work_s)
        if engine.in_time_per_s:
            more = late(known.backlog_s + work_s, self.round.slo_ttft_s) - known.late_s
            idle = max(LEAST_IDLE, 1.0 - engine.prefill_share)
            lost += self.delay_weight / (idle * idle) * engine.in_time_per_s * more
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


def turn(engine: EngineView, step_s: float) -> float:
    """Seconds until an idle queue is looked at: the call, and half of the decode step that runs."""
    return CALL_S + 0.5 * step_s if engine.batch else CALL_S


def late(wait_s: float, target_s: float) -> float:
    """The integral of min(1, w / target) for w from 0 to `wait_s`, in seconds."""
    return wait_s * wait_s / (2.0 * target_s) if wait_s < target_s else wait_s - target_s / 2.0


def transfer(source: EngineView, puller: EngineView, tokens: int) -> float:
    """Seconds to move the KV of `tokens` behind what the two links owe already."""
    if tokens <= 0:
        return 0.0
    out_s, in_s = out_of(source, tokens), into(puller, tokens)
    return out_s if out_s > in_s else in_s


def out_of(source: EngineView, tokens: int) -> float:
    """Seconds of a transfer on the link of who sends; 0 for nothing."""
    return source.latency.transfer_s(tokens, source.outgoing_bytes) * source.corrections.transfer


def into(puller: EngineView, tokens: int) -> float:
    """Seconds of a transfer on the link of who fetches; 0 for nothing."""
    return puller.latency.transfer_s(tokens, puller.incoming_bytes) * puller.corrections.transfer


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
