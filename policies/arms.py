"""What an arm costs one round on given engines: the terms of AMPD's Eq. 2, shared by every policy.

With L prompt tokens, home d, prefill engine p and H(e) = history on e:

    local             queue_s(d) + prefill of L - H(d)
    remote_recompute  queue_s(p) + prefill of L - H(p)                           + push of L - H(d)
    remote_pull       queue_s(p) + prefill of L - H(d) + pull of H(d) - H(p)     + push of L - H(d)

An engine always computes at least the prompt's last token. Prefill runs in chunks of C with K decode steps
of the engine's own batch between two of them (`EngineView.chunk_tokens`, `decode_interval`): those steps are
part of its prefill time. Predictions are multiplied by the engine's corrections. NOT in any term: the harm
that a prefill does to the ITL of the rounds that decode on the same engine (AMPD's local prefill "pauses the
batch"); policies guard it by their rules, not by this estimate. Transfers are priced on an idle link. Every
engine is priced by its own latency model, a transfer by the slower of the two engines that it joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from antiphon.policies.base import (
    LOCAL,
    REMOTE_PULL,
    REMOTE_RECOMPUTE,
    Candidate,
    ClusterView,
    EngineView,
    Pool,
    RoundView,
)


def prefill_on(
    engine: EngineView, prompt_tokens: int, cached_tokens: int, step_s: float | None = None
) -> float:
    """Seconds to prefill the prompt over `cached_tokens`, with the decode steps that come in between.

    `step_s`: what such a step takes, if that is known.
    """
    new = prompt_tokens - cached_tokens if prompt_tokens > cached_tokens else 1
    seconds = engine.latency.prefill_s(new, prompt_tokens - new) * engine.corrections.prefill
    if engine.batch and engine.chunk_tokens and engine.decode_interval:
        step_s = decode_step(engine) if step_s is None else step_s
        seconds += (new - 1) // engine.chunk_tokens * engine.decode_interval * step_s
    return seconds


def decode_step(engine: EngineView, more_rounds: int = 0, more_tokens: int = 0) -> float:
    """Seconds of a decode step of its batch with `more_rounds` of `more_tokens` of context in all."""
    step_s = engine.latency.decode_step_s(engine.batch + more_rounds, engine.context_tokens + more_tokens)
    return step_s * engine.corrections.decode


def transfer_between(one: EngineView, other: EngineView, tokens: int) -> float:
    """Seconds to move the KV of `tokens` from one to the other: as slow as the slower of the two."""
    seconds = one.latency.transfer_s(tokens) * one.corrections.transfer
    if other.latency is one.latency and other.corrections.transfer == one.corrections.transfer:
        return seconds
    return max(seconds, other.latency.transfer_s(tokens) * other.corrections.transfer)


def local(round: RoundView, home: EngineView) -> Candidate:
    prefill_s = prefill_on(home, round.prompt_tokens, round.held(home.engine_id))
    return Candidate(LOCAL, home.engine_id, home.queue_s, prefill_s, 0.0, 0.0)


def remote_recompute(round: RoundView, engine: EngineView, home: EngineView) -> Candidate:
    """`engine` computes what it lacks; `home` fetches what it lacks."""
    prefill_s = prefill_on(engine, round.prompt_tokens, round.held(engine.engine_id))
    push_s = transfer_between(engine, home, round.prompt_tokens - round.held(home.engine_id))
    return Candidate(REMOTE_RECOMPUTE, engine.engine_id, engine.queue_s, prefill_s, 0.0, push_s)


def remote_pull(
    round: RoundView, engine: EngineView, home: EngineView, source: EngineView | None = None
) -> Candidate:
    """`engine` first fetches what `source` (default: the home) holds beyond it.

    With nothing to fetch it is `remote_recompute`.
    """
    source = home if source is None else source
    history = round.held(source.engine_id)
    pulled = history - round.held(engine.engine_id)
    if pulled <= 0:
        return remote_recompute(round, engine, home)
    prefill_s = prefill_on(engine, round.prompt_tokens, history)
    pull_s = transfer_between(source, engine, pulled)
    push_s = transfer_between(engine, home, round.prompt_tokens - round.held(home.engine_id))
    return Candidate(REMOTE_PULL, engine.engine_id, engine.queue_s, prefill_s, pull_s, push_s)


def prefill_engines(round: RoundView, home: EngineView, cluster: ClusterView) -> list[EngineView]:
    """Engines of the prefill pool that can compute this round for `home`, in order of engine id.

    None when KV cannot get from there to the home: it has no linker, or it is a prefill engine itself that
    stands in for a decode pool without a usable engine.
    """
    if home.pool is Pool.PREFILL or not home.can_transfer:
        return []
    need, pool, excluded = round.prompt_tokens, Pool.PREFILL, round.excluded
    able = [
        engine
        for engine in cluster.engines.values()
        if engine.pool is pool and engine.can_transfer and need <= engine.pool_tokens
    ]
    return [engine for engine in able if engine.engine_id not in excluded] if excluded else able


def shortlist(round: RoundView, engines: Sequence[EngineView], count: int) -> Sequence[EngineView]:
    """The `count` engines with the shortest queue and the `count` with most history, by engine id.

    So a decision estimates at most 2 * count engines however large the pool is.
    """
    if len(engines) <= count:
        return engines
    by_queue = sorted(engines, key=_queue)
    held = round.history_tokens
    holders = [engine for engine in by_queue if held.get(engine.engine_id)]
    holders.sort(key=lambda engine: held[engine.engine_id], reverse=True)  # stable: ties stay by queue
    chosen = {engine.engine_id: engine for engine in (*by_queue[:count], *holders[:count])}
    return [chosen[engine_id] for engine_id in sorted(chosen)]


_queue = attrgetter("queue_s", "engine_id")
