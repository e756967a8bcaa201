"""What the core learns from its rounds: it watches events and commands, and corrects predictions.

A round is watched from its first call on an engine to its end. What was measured of it is kept until it
finishes: only a round that finished at its first try, with a ledger, for a client that kept up, teaches. The
observer writes nothing but `EngineBook.corrections`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec import Struct

from antiphon.policies.base import NEUTRAL
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.clean_times import EngineTimes, Prefilled, flow_begins, flow_over
from antiphon.scheduler.corrections import CorrectionConfig, Corrector, learn_transfer
from antiphon.scheduler.fleet import Fleet
from antiphon.scheduler.messages import (
    Abort,
    Command,
    Complete,
    EngineFailed,
    Event,
    FirstToken,
    Generate,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    RoundFinished,
)
from antiphon.scheduler.states import Round

LEAST_STEPS = 16
"""Fewer decode steps are mostly their first and last."""
MOST_OTHER = 0.5
"""Of a prefill's time, decode steps of others: with more of them too little of it is known."""
MOST_STALLED = 0.2
"""Of a decode's time, prefills of others: they are subtracted as predicted."""
MOST_LOADED = 0.15
"""Of a prefill, what its cached tokens would add if they all came from the page store."""


class _Transfer(Struct, frozen=True, gc=False):
    source: EngineTimes
    puller: EngineTimes
    moved_bytes: int
    seconds: float


class _Computed(Struct, frozen=True, gc=False):
    engine: EngineTimes
    time: Prefilled
    pulled_tokens: int
    """That surely had to be loaded from the page store."""
    cached_tokens: int | None
    """None: the finished round tells."""


@dataclass(slots=True, eq=False)
class _Watched:
    round: Round
    clean: bool = True
    prompt_at: EngineTimes | None = None
    """Where its prompt is being prefilled."""
    flow: tuple[EngineTimes, EngineTimes] | None = None
    """(source, puller) of the transfer under way."""
    began_s: float = 0.0
    """Of that transfer."""
    arrived: tuple[str, int, int] = ("", 0, 0)
    """Of the last transfer: puller, tokens that it has since, tokens that came."""
    remote: bool = False
    """Another engine has computed its prompt."""
    home: EngineTimes | None = None
    """Where it decodes; None before its first token."""
    first_s: float = 0.0
    clock: float = 0.0
    stalled_s: float = 0.0
    alone: bool = False
    """No other replica had rounds that decode there."""
    transfers: list[_Transfer] = field(default_factory=list)
    computed: list[_Computed] = field(default_factory=list)


class Observer:
    """Told by the core of every event that it has taken and what it commanded."""

    def __init__(self, fleet: Fleet, rounds: Mapping[str, Round], config: CorrectionConfig) -> None:
        """`rounds`: those in flight, as the core has them."""
        self._fleet = fleet
        self._rounds = rounds
        self._config = config
        self._engines: dict[str, EngineTimes] = {}
        self._watched: dict[str, _Watched] = {}

    def observe(self, event: Event, commands: Sequence[Command], now: float) -> None:
        on_event = self._on_events.get(type(event))
        if on_event is not None:
            watched = self._watched.get(event.round_id)  # type: ignore[union-attr]
            if watched is not None:
                on_event(self, watched, event, now)
        for command in commands:
            on_command = self._on_commands.get(type(command))
            if on_command is not None:
                on_command(self, command, now)

    def check(self) -> None:
        """Raise AssertionError if anything is watched that is not in flight."""
        assert self._watched.keys() <= self._rounds.keys(), "a round is watched that has ended"
        for engine_id, engine in self._engines.items():
            if self._fleet.books.get(engine_id) is engine.book:
                strays = engine.round_ids() - self._watched.keys()
                assert not strays, f"on {engine_id} these are not watched: {sorted(strays)}"

    def _engine(self, engine_id: str) -> EngineTimes | None:
        """None when it is gone. Another incarnation, or another profile, begins anew."""
        book, times = self._fleet.books.get(engine_id), self._engines.get(engine_id)
        if book is None:
            self._engines.pop(engine_id, None)
            return None
        if times is None or times.book is not book:
            times = self._engines[engine_id] = EngineTimes(book, book.latency, Corrector(self._config))
        elif times.latency is not book.latency:
            if times.latency != book.latency:
                times.corrector = Corrector(self._config)
                book.corrections = NEUTRAL
                book.touch()
            times.latency = book.latency
        return times

    # ---------------------------------------------------------------- events

    def _on_prefetch_done(self, watched: _Watched, event: PrefetchDone, now: float) -> None:
        flow, watched.flow = watched.flow, None
        page_tokens = watched.round.arrived.page_size_tokens
        came_tokens = event.pulled_pages * page_tokens
        watched.arrived = event.engine_id, event.pages * page_tokens, came_tokens
        if flow is not None and flow_over(event.round_id, *flow) and event.pulled_bytes > 0:
            watched.transfers.append(_Transfer(*flow, event.pulled_bytes, now - watched.began_s))

    def _on_prefill_done(self, watched: _Watched, event: PrefillDone, now: float) -> None:
        engine, watched.prompt_at = watched.prompt_at, None
        watched.remote = True
        if engine is not None:
            self._computed(watched, engine, now, event.cached_tokens)

    def _on_first_token(self, watched: _Watched, event: FirstToken, now: float) -> None:
        home, watched.prompt_at = watched.prompt_at, None
        if home is None:
            return
        self._computed(watched, home, now, None)
        watched.home, watched.first_s = home, now
        home.decode_begins(event.round_id, now, watched.round.arrived.prompt_tokens)
        watched.clock, watched.stalled_s = home.clock, home.stalled_s(now)
        watched.alone = not home.book.others.decode_rounds

    def _computed(
        self, watched: _Watched, engine: EngineTimes, now: float, cached_tokens: int | None
    ) -> None:
        time = engine.prompt_over(watched.round.round_id, now)
        if time is not None:
            puller, _, pulled_tokens = watched.arrived
            pulled_tokens = pulled_tokens if puller == engine.book.up.engine_id else 0
            watched.computed.append(_Computed(engine, time, pulled_tokens, cached_tokens))

    def _on_finished(self, watched: _Watched, event: RoundFinished, now: float) -> None:
        if not watched.clean or event.reader_lagged:
            return
        changed: list[EngineTimes] = []
        for transfer in watched.transfers:
            changed += _learn_transfer(transfer)
        for computed in watched.computed:
            changed += _learn_prefill(watched, computed, event)
        if watched.home is not None:
            changed += _learn_decode(watched, watched.home, event.completion_tokens - 1, now)
        for engine in changed:
            book = engine.book
            book.corrections = engine.corrector.corrections()
            if self._fleet.books.get(book.up.engine_id) is book:
                book.touch()

    def _on_failed(self, watched: _Watched, event: EngineFailed, now: float) -> None:
        self._let_go(watched, now)

    # ---------------------------------------------------------------- commands

    def _watch(self, round_id: str) -> _Watched | None:
        round = self._rounds.get(round_id)
        if round is None:
            return None
        watched = self._watched.get(round_id)
        if watched is None:
            watched = self._watched[round_id] = _Watched(round)
        watched.clean = watched.clean and len(round.tries) == 1 and not round.degraded
        return watched

    def _on_prefetch(self, command: Prefetch, now: float) -> None:
        watched = self._watch(command.round_id)
        source, puller = self._engine(command.source_id), self._engine(command.engine_id)
        if watched is not None and source is not None and puller is not None:
            watched.flow, watched.began_s = (source, puller), now
            flow_begins(command.round_id, source, puller)

    def _on_compute(self, command: Prefill | Generate, now: float) -> None:
        watched, engine = self._watch(command.round_id), self._engine(command.engine_id)
        if watched is not None and engine is not None:
            watched.prompt_at = engine
            puller, tokens, _ = watched.arrived
            held = watched.round.history.get(command.engine_id, 0)
            held = max(held, tokens) if puller == command.engine_id else held
            prompt_tokens = watched.round.arrived.prompt_tokens
            new_tokens = prompt_tokens - held if prompt_tokens > held else 1
            # after a remote prefill the home computes a page at most: that says nothing
            tells = watched.clean and not watched.remote
            engine.prompt_comes(command.round_id, now, new_tokens, prompt_tokens - new_tokens, tells)

    def _on_abort(self, command: Abort, now: float) -> None:
        watched = self._watched.get(command.round_id)
        if watched is not None:
            self._let_go(watched, now)

    def _on_complete(self, command: Complete, now: float) -> None:
        """Its call, if one was under way, was aborted before."""
        watched = self._watched.pop(command.round_id, None)
        if watched is not None and watched.home is not None:
            watched.home.decode_over(command.round_id, now)

    def _let_go(self, watched: _Watched, now: float) -> None:
        """Its call has ended, or will: what the engines still do for it is not known."""
        round_id = watched.round.round_id
        if watched.prompt_at is not None:
            watched.prompt_at.prompt_dropped(round_id, now)
            watched.prompt_at = None
        if watched.flow is not None:
            flow_over(round_id, *watched.flow)
            watched.flow = None
        if watched.home is not None:
            watched.home.decode_over(round_id, now)
            watched.home = None

    _on_events: ClassVar[dict[type, Callable[[Observer, _Watched, Any, float], None]]] = {
        PrefetchDone: _on_prefetch_done,
        PrefillDone: _on_prefill_done,
        FirstToken: _on_first_token,
        RoundFinished: _on_finished,
        EngineFailed: _on_failed,
    }
    _on_commands: ClassVar[dict[type, Callable[[Observer, Any, float], None]]] = {
        Prefetch: _on_prefetch,
        Prefill: _on_compute,
        Generate: _on_compute,
        Abort: _on_abort,
        Complete: _on_complete,
    }


# ---------------------------------------------------------------- like with like


def _learn_transfer(transfer: _Transfer) -> list[EngineTimes]:
    """Returns, as the other two, whose factors changed."""
    source, puller, sent, actual_s = transfer.source, transfer.puller, transfer.moved_bytes, transfer.seconds
    cost = source.latency.transfer
    source_s = puller_s = cost.fixed_s + sent / cost.bytes_per_s
    if puller.latency is not source.latency:
        cost = puller.latency.transfer
        puller_s = cost.fixed_s + sent / cost.bytes_per_s
    terms = source.corrector.transfer, puller.corrector.transfer
    news = learn_transfer(terms[0], source_s, terms[1], puller_s, actual_s)
    if news == (False, False):
        return []
    return [engine for engine, told in zip((source, puller), news, strict=True) if told]


def _learn_prefill(watched: _Watched, computed: _Computed, finished: RoundFinished) -> list[EngineTimes]:
    """By what was really computed, not by what was believed to be there."""
    engine, time, pulled_tokens = computed.engine, computed.time, computed.pulled_tokens
    at_home = computed.cached_tokens is None
    cached_tokens = finished.cached_tokens if computed.cached_tokens is None else computed.cached_tokens
    new_tokens = max(1, watched.round.arrived.prompt_tokens - cached_tokens)
    latency = engine.latency
    predicted_s = passes_s(latency, new_tokens, cached_tokens, engine.book.up.chunk_tokens)
    if time.other_s > MOST_OTHER * time.seconds:
        return []
    loaded_s = latency.load_s(cached_tokens - pulled_tokens)
    if loaded_s > MOST_LOADED * predicted_s and not (at_home and engine.holds_its_sessions()):
        return []  # on the device, or in the page store? Nobody says
    actual_s = time.seconds - time.other_s - latency.load_s(pulled_tokens)
    return [engine] if engine.corrector.prefill.learn(predicted_s, actual_s) else []


def _learn_decode(watched: _Watched, home: EngineTimes, steps: int, now: float) -> list[EngineTimes]:
    home.run_clock(now)
    elapsed_s = now - watched.first_s
    stalled_s = home.stalled_s(now) - watched.stalled_s
    predicted_steps = home.clock - watched.clock
    alone = watched.alone and not home.book.others.decode_rounds
    if not alone or steps < LEAST_STEPS or stalled_s > MOST_STALLED * elapsed_s or predicted_steps <= 0:
        return []
    predicted_s = steps * elapsed_s / predicted_steps
    return [home] if home.corrector.decode.learn(predicted_s, elapsed_s - stalled_s) else []


def passes_s(latency: LatencyModel, new_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
    """Seconds of a prompt's prefill in chunks of `chunk_tokens` (0 = in one), each over all before it."""
    chunk_tokens = chunk_tokens or new_tokens
    at, end, seconds = cached_tokens, cached_tokens + new_tokens, 0.0
    while at < end:
        take = min(chunk_tokens, end - at)
        seconds += latency.prefill_s(take, at)
        at += take
    return seconds
