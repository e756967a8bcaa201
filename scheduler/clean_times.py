"""Which times of one engine may be compared with its profile: nothing else was in them, or it is known what.

An engine's batch loop serves prompts in order, before decodes, several in one pass where a chunk has room. So

    prefill    a prompt's time is its own if it was alone, or if it followed one that had a single pass and
               had begun before this one came: then it began when that one ended. Taken off, where others
               decode: half a step (the one that runs when it comes) and K steps between two chunks
    decode     a round's tokens come at the pace of a batch that changes under it. `clock` adds up 1 / step
               over time, `stalled_s` the prefills in between
    transfer   alone on the source's way out and on the puller's way in, from its start to its end
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.corrections import Corrector
from antiphon.scheduler.fleet import EngineBook

SETTLE_S = 0.02
"""A prompt has surely reached the engine by then: it comes by HTTP."""


class Prefilled(Struct, frozen=True, gc=False):
    """A prompt's own time on an engine."""

    seconds: float
    other_s: float
    """Of these: decode steps of others."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """One that the engine prefills, or has waiting."""

    came_s: float
    began_s: float | None
    """None: others are before it."""
    sure_s: float
    """By then its first pass has begun: who comes later is not in it."""
    new_tokens: int
    cached_tokens: int
    passes: int
    clean: bool
    latency: LatencyModel | None = None
    """By which `alone_s` was worked out; asked again and again while many wait."""
    alone_s: float = 0.0

    def prefill_s(self, latency: LatencyModel) -> float:
        if self.latency is not latency:
            self.latency, self.alone_s = latency, latency.prefill_s(self.new_tokens, self.cached_tokens)
        return self.alone_s


@dataclass(slots=True, eq=False)
class _Flow:
    clean: bool


@dataclass(slots=True, eq=False)
class EngineTimes:
    """One engine of one incarnation, as our own rounds see it."""

    book: EngineBook
    latency: LatencyModel
    """The book's, when `corrector` began."""
    corrector: Corrector
    prompts: dict[str, _Prompt] = field(default_factory=dict)
    incoming: dict[str, _Flow] = field(default_factory=dict)
    outgoing: dict[str, _Flow] = field(default_factory=dict)
    clock: float = 0.0
    """Tokens that a request would have got, decoding here all the time, by the profile."""
    _decoding: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Round -> tokens of its prompt, clock at its first token."""
    _context_tokens: float = 0.0
    _clock_s: float = 0.0
    _stalled_s: float = 0.0
    _prefill_ended_s: float = -1e18

    def round_ids(self) -> set[str]:
        """Rounds that are doing anything here."""
        return {*self.prompts, *self._decoding, *self.incoming, *self.outgoing}

    def holds_its_sessions(self) -> bool:
        """All KV of the sessions that live here fits the device: none of it is in the page store alone."""
        book = self.book
        return book.idle_tokens + book.others.context_tokens <= book.up.pool_tokens

    # ---------------------------------------------------------------- prefill

    def prompt_comes(
        self, round_id: str, now: float, new_tokens: int, cached_tokens: int, tells: bool = True
    ) -> None:
        """`tells`: its own time is wanted at all."""
        book, prompts, decodes = self.book, self.prompts, self.decodes
        chunk = book.up.chunk_tokens
        passes = 1 + (new_tokens - 1) // chunk if chunk else 1
        clean = tells and not book.others.prefill_rounds
        if not prompts:
            idle_s, steps = now - self._prefill_ended_s, book.up.decode_interval
            if clean and decodes and idle_s < steps:  # a step takes no second; how long, is worked out last
                clean = idle_s > steps * self.step_s()  # else steps are due before it
            prompts[round_id] = _Prompt(now, now, now + SETTLE_S, new_tokens, cached_tokens, passes, clean)
            return
        for other in prompts.values():
            if now < other.sure_s or other.passes > 1 or decodes:
                other.clean = False
        clean = clean and not decodes
        prompts[round_id] = _Prompt(now, None, float("inf"), new_tokens, cached_tokens, passes, clean)

    def prompt_over(self, round_id: str, now: float) -> Prefilled | None:
        """Its prefill has ended; its own time, if that is known."""
        if round_id not in self.prompts:
            return None
        if self._decoding:
            self._stalled_s = self.stalled_s(now)
        ended = self.prompts.pop(round_id)
        self._prefill_ended_s = now
        for other in self.prompts.values():
            alone = len(self.prompts) == 1 and other.began_s is None
            other.clean = other.clean and alone and ended.passes == 1 and other.came_s >= ended.sure_s
            if alone:
                other.began_s, other.sure_s = now, max(now, other.came_s + SETTLE_S)
        if not ended.clean or ended.began_s is None or self.book.others.prefill_rounds:
            return None
        other_s = 0.0
        if self.decodes:
            other_s = (0.5 + (ended.passes - 1) * self.book.up.decode_interval) * self.step_s()
        return Prefilled(now - ended.began_s, other_s)

    def prompt_dropped(self, round_id: str, now: float) -> None:
        """It was aborted, or failed: what it still did there is not known."""
        self.prompt_over(round_id, now)
        for other in self.prompts.values():
            other.clean = False

    # ---------------------------------------------------------------- decode

    @property
    def decodes(self) -> int:
        """Rounds that have a token and not their last; the other replicas' by their reservations."""
        return len(self._decoding) + self.book.others.decode_rounds

    def step_s(self) -> float:
        """A decode step of the present batch, corrected."""
        context = round(self._context_tokens) + self.book.others.context_tokens
        return self.book.latency.decode_step_s(self.decodes, context) * self.book.corrections.decode

    def run_clock(self, now: float) -> None:
        """Bring `clock` up to now, before the batch changes. Tokens that come are context from then on."""
        batch, elapsed_s = len(self._decoding), now - self._clock_s
        self._clock_s = now
        if batch and elapsed_s > 0:
            step_s = self.book.latency.decode_step_s
            context = self._context_tokens
            tokens = elapsed_s / max(1e-9, step_s(batch, round(context)))
            if batch * tokens > 0.01 * context:  # they lengthen the steps in which they come
                tokens = elapsed_s / max(1e-9, step_s(batch, round(context + batch * tokens / 2)))
            self.clock += tokens
            self._context_tokens = context + batch * tokens

    def decode_begins(self, round_id: str, now: float, prompt_tokens: int) -> None:
        self.run_clock(now)
        self._decoding[round_id] = prompt_tokens, self.clock
        self._context_tokens += prompt_tokens

    def decode_over(self, round_id: str, now: float) -> None:
        if round_id in self._decoding:
            self.run_clock(now)
            prompt_tokens, clock = self._decoding.pop(round_id)
            left = self._context_tokens - prompt_tokens - (self.clock - clock)
            self._context_tokens = left if self._decoding else 0.0

    def stalled_s(self, now: float) -> float:
        """Seconds that prefills have taken from the decodes since the start, as predicted.

        Of those under way: what has passed since one ended, at most what the profile, corrected, says of all.
        """
        if not self.prompts:
            return self._stalled_s
        latency, first = self.book.latency, next(iter(self.prompts.values()))
        most_s = sum([prompt.prefill_s(latency) for prompt in self.prompts.values()])
        passed_s = now - max(first.came_s, self._prefill_ended_s)
        return self._stalled_s + min(passed_s, most_s * self.book.corrections.prefill)


def flow_begins(round_id: str, source: EngineTimes, puller: EngineTimes) -> None:
    flow = _Flow(not source.outgoing and not puller.incoming)
    for others in (source.outgoing, puller.incoming):
        for other in others.values():
            other.clean = False
    source.outgoing[round_id] = puller.incoming[round_id] = flow


def flow_over(round_id: str, source: EngineTimes, puller: EngineTimes) -> bool:
    """Whether it had both links to itself."""
    flow = source.outgoing.pop(round_id, None)
    puller.incoming.pop(round_id, None)
    return flow is not None and flow.clean
