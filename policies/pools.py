"""Which engine should change pool: pure rules over what the work of a fleet costs on each of its engines.

An engine's pool is only a word: a flip needs no restart, and chunk size, decode interval and memory stay as
they are. So every engine comes with what the work of either pool would cost on it, and a rule weighs one flip
at a time: that which makes the fuller pool least full, if that gains enough.

    share of a pool     1 / sum over its engines of (1 / seconds of work that the pool gets per second, on it)
    KV share            KV of sessions that are expected back / room for it, over the homes' pool
    wait                r u^(sqrt(2(n + 1)) - 1) / (n (1 - u)) s for a place in n prefill engines of share u,
                        r = mean rest of a prefill that is found at work (M/G/n, Sakasegawa)
    pressure            prefill: its share + the larger of wait / TTFT target and misses; decode: its share
                        + its misses; KV: its share where it is over 1, for room that is left is of no use.
                        Misses: rounds that missed a target, TTFT where they were prefilled, ITL where they
                        decoded. A flip is taken to make them as much more or less as the share
    peak                the pool that is to give an engine away counts with the most work that it had lately
    gain of a flip      worst pressure now - worst pressure then - seconds of KV to move / horizon
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt

from msgspec import Struct

from antiphon.policies.base import Pool

PREFILL, DECODE = Pool

OVERLOADED = 1.0
"""A pressure from which on a pool is helped, whatever the other may need soon."""

FULL = 0.02
"""Nearer to 1 no share is taken to be: the wait would be endless."""


class PoolEngine(Struct, frozen=True, gc=False):
    """One engine, as far as its pool goes."""

    engine_id: str
    pool: Pool
    may_flip: bool
    """It can move KV: without that its rounds cannot be prefilled elsewhere, nor it prefill others'."""
    as_prefill_s: float
    """Seconds per second that all the work of the prefill pool would take on this engine alone."""
    as_decode_s: float
    """The same of the decode pool, with what prefills there cost the decodes beside them."""
    kv_tokens: int
    """KV here of sessions that are expected back."""
    kv_room_tokens: int
    rest_s: float
    """Of the prefill pool's prefills, on this engine: what is left of one that is found at work."""
    drain_s: float
    """To bring the KV of the sessions at home here to other engines, over its own link."""
    queue_s: float = 0.0
    itl_s: float | None = None
    """Mean of the past seconds; None = no round has ended."""
    floor_itl_s: float = 0.0
    """Of a round that decodes there alone."""


class WindowRounds(Struct, frozen=True, gc=False):
    """Of the window's rounds: mean targets, and the share that missed one by each pool's fault."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    prefill_missed: float = 0.0
    decode_missed: float = 0.0


class PoolRule(Struct, frozen=True, gc=False):
    """What a flip must be worth. The last two are of Arrow's rule."""

    margin: float
    """Least gain, in shares of a pool."""
    floor: float
    """Nothing is flipped while no pool is so full."""
    horizon_s: float
    """Over which the seconds that a flip costs are spread."""
    least_prefill: int = 1
    least_decode: int = 1
    expand: float = 1.0
    shrink: float = 0.5


class PoolShares(Struct, frozen=True, gc=False):
    """How full the pools are; 1 = all of the engines' time, or room, is asked for."""

    prefill: float
    decode: float
    kv: float
    wait_s: float = 0.0
    """Expected, for a place at a prefill engine."""


class Flip(Struct, frozen=True, gc=False):
    """One engine is to change pool, and why."""

    engine_id: str
    from_pool: Pool
    to_pool: Pool
    reason: str
    before: PoolShares
    after: PoolShares
    drain_s: float

    @property
    def direction(self) -> str:
        return f"{self.from_pool.value}_to_{self.to_pool.value}"


class Peaks(Struct, frozen=True, gc=False):
    """How many times its work of now a pool has got at most lately: for the one that gives an engine away."""

    prefill: float = 1.0
    decode: float = 1.0


NO_PEAKS = Peaks()


def shares(
    engines: Iterable[PoolEngine], changed: PoolEngine | None = None, peaks: Peaks = NO_PEAKS
) -> PoolShares:
    """How full each pool is, or would be with one engine in the other pool, and the one that it leaves at its
    peak."""
    rates = {PREFILL: 0.0, DECODE: 0.0}
    idle = {PREFILL: True, DECODE: True}
    kv_tokens = room_tokens = count = 0
    rest_s = 0.0
    for engine in engines:
        pool = engine.pool if engine is not changed else _other(engine.pool)
        cost_s = engine.as_prefill_s if pool is PREFILL else engine.as_decode_s
        if cost_s > 0:
            rates[pool] += 1.0 / cost_s
            idle[pool] = False
        if pool is PREFILL:
            count, rest_s = count + 1, rest_s + engine.rest_s
        else:
            room_tokens += engine.kv_room_tokens
        if engine.pool is DECODE:
            kv_tokens += engine.kv_tokens
    prefill = 0.0 if idle[PREFILL] else 1.0 / rates[PREFILL]
    decode = 0.0 if idle[DECODE] else 1.0 / rates[DECODE]
    if changed is not None:
        prefill *= peaks.prefill if changed.pool is PREFILL else 1.0
        decode *= peaks.decode if changed.pool is DECODE else 1.0
    return PoolShares(
        prefill,
        decode,
        kv_tokens / room_tokens if room_tokens else 0.0,
        _wait_s(prefill, count, rest_s / count) if count else 0.0,
    )


def _wait_s(share: float, engines: int, rest_s: float) -> float:
    room = engines * max(FULL, 1.0 - share)
    return float(rest_s * share ** (sqrt(2.0 * (engines + 1)) - 1.0) / room)


def pressure(then: PoolShares, now: PoolShares, rounds: WindowRounds) -> float:
    """The worst of the pools' pressures with shares as `then`, if `rounds` were served with them as `now`."""
    waits = then.wait_s / rounds.ttft_s if rounds.ttft_s > 0 else 0.0
    return max(
        then.prefill + max(waits, rounds.prefill_missed * _ratio(then.prefill, now.prefill)),
        then.decode + rounds.decode_missed * _ratio(then.decode, now.decode),
        then.kv if then.kv > 1.0 else 0.0,
    )


def balanced_flip(
    engines: Sequence[PoolEngine], rule: PoolRule, rounds: WindowRounds, peaks: Peaks = NO_PEAKS
) -> Flip | None:
    """The flip after which the worst pressure is least; None where none gains enough.

    Ties go to the engine with the least other share, the least KV to move, the lowest id.
    """
    before = shares(engines)
    worst = pressure(before, before, rounds)
    if worst < rule.floor:
        return None
    if worst >= OVERLOADED:
        peaks = NO_PEAKS
    best: tuple[tuple[float, float, float, str], Flip] | None = None
    for engine in _candidates(engines, rule):
        after = shares(engines, engine, peaks)
        drain_s = engine.drain_s if engine.pool is DECODE else 0.0
        loss = pressure(after, before, rounds) + drain_s / rule.horizon_s
        rank = (round(loss, 6), round(after.prefill + after.decode + after.kv, 6), drain_s, engine.engine_id)
        if worst - loss >= rule.margin and (best is None or rank < best[0]):
            best = rank, _flip(engine, _words(before, after, drain_s, rounds), before, after)
    return best[1] if best is not None else None


def arrow_flip(engines: Sequence[PoolEngine], rule: PoolRule, rounds: WindowRounds) -> Flip | None:
    """Arrow's rule (its Algorithm 2, and the third step of Algorithm 1), as Narwhal fills it in.

    Load of the prefill pool: the shortest queue by the TTFT target. Of the decode pool: how much of what lies
    between an idle engine's ITL and the target is used. Prefill to decode if the latter is over `expand`, or
    over `shrink` while the former is under it; decode to prefill if no prefill engine meets its target and
    the decode pool is under `shrink`. The engine with least work at hand changes.
    """
    queues = [e.queue_s for e in engines if e.pool is PREFILL]
    prefill = min(queues) / rounds.ttft_s if queues and rounds.ttft_s > 0 else 0.0
    loads = [_itl_load(e, rounds.itl_s) for e in engines if e.pool is DECODE]
    decode = sum(loads) / len(loads) if loads else 0.0
    if decode >= rule.expand or prefill <= rule.shrink <= decode:
        pool = PREFILL
    elif prefill >= 1.0 and decode < rule.shrink:
        pool = DECODE
    else:
        return None
    able = [e for e in _candidates(engines, rule) if e.pool is pool]
    if not able:
        return None
    engine = min(able, key=lambda e: (e.queue_s, e.kv_tokens, e.engine_id))
    reason = f"Arrow: prefill load {prefill:.2f}, decode load {decode:.2f}"
    return _flip(engine, reason, shares(engines), shares(engines, engine))


def _itl_load(engine: PoolEngine, target_s: float) -> float:
    room_s = target_s - engine.floor_itl_s
    if engine.itl_s is None:
        return 0.0
    return max(0.0, engine.itl_s - engine.floor_itl_s) / room_s if room_s > 0 else 1.0


def _candidates(engines: Sequence[PoolEngine], rule: PoolRule) -> list[PoolEngine]:
    """Those whose pool can do without them."""
    count = {pool: sum(e.pool is pool for e in engines) for pool in Pool}
    least = {PREFILL: max(1, rule.least_prefill), DECODE: max(1, rule.least_decode)}
    return [e for e in engines if e.may_flip and count[e.pool] > least[e.pool]]


def _ratio(then: float, now: float) -> float:
    return then / now if now > 0 else 1.0


def _other(pool: Pool) -> Pool:
    return DECODE if pool is PREFILL else PREFILL


def _flip(engine: PoolEngine, reason: str, before: PoolShares, after: PoolShares) -> Flip:
    drain_s = engine.drain_s if engine.pool is DECODE else 0.0
    return Flip(engine.engine_id, engine.pool, _other(engine.pool), reason, before, after, drain_s)


def _words(before: PoolShares, after: PoolShares, drain_s: float, rounds: WindowRounds) -> str:
    parts = [
        f"{name} {was:.2f} -> {then:.2f}"
        for name, was, then in (
            ("prefill", before.prefill, after.prefill),
            ("decode", before.decode, after.decode),
            ("KV", before.kv, after.kv),
        )
    ]
    waits = f"; wait {before.wait_s:.2f} -> {after.wait_s:.2f} s"
    missed = f"; missed by prefill {rounds.prefill_missed:.1%}, by decode {rounds.decode_missed:.1%}"
    moved = f"; {drain_s:.1f} s of KV to move" if drain_s else ""
    return f"predicted shares: {', '.join(parts)}{waits}{missed}{moved}"
