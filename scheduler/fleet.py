"""The core's books on engines: who is alive, what is reserved there, and the view that policies get.

Written only by the core. A view is rebuilt only when its engine changed, so that a decision costs what it
looks at; the windows (mean TTFT and ITL of the past 10 s) age, so a view also expires with its oldest sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import MappingProxyType

from msgspec import Struct

from antiphon.policies.base import EngineView, Pool
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.messages import EngineUp, Totals

WINDOW_S = 10.0
"""AMPD's window of latency statistics (reference: section 2 of the paper's readings)."""


SessionKey = tuple[str, str]
"""(tenant, session id)."""

INFINITY = float("inf")
NO_TOTALS = Totals()
"""One object, so that "nobody else" is told by identity."""


@dataclass(slots=True)
class Window:
    """Mean over the past WINDOW_S seconds."""

    samples: deque[tuple[float, float]] = field(default_factory=deque)
    total: float = 0.0

    def add(self, now: float, value: float) -> None:
        self.samples.append((now, value))
        self.total += value
        self.trim(now)

    def trim(self, now: float) -> None:
        while self.samples and self.samples[0][0] <= now - WINDOW_S:
            self.total -= self.samples.popleft()[1]

    def mean(self, now: float) -> float | None:
        samples = self.samples
        if samples and samples[0][0] <= now - WINDOW_S:
            self.trim(now)
        return self.total / len(samples) if samples else None


class DecodeSlot(Struct, frozen=True, gc=False):
    """A round that decodes, or will, on an engine."""

    context_tokens: int
    itl_slo_s: float


@dataclass(slots=True, eq=False)
class EngineBook:
    """Everything the core holds on one engine of one incarnation. Sums are kept as their parts change."""

    up: EngineUp
    default_latency: LatencyModel
    """Counts where `up` has none."""
    stale: set[str]
    """Of the whole fleet: ids of engines whose view must be built anew."""
    queue: list[str] = field(default_factory=list)
    """Round ids that wait for their prefill here, in order of arrival."""
    in_flight: set[str] = field(default_factory=set)
    """Round ids that pull or prefill here."""
    prefill_s: dict[str, float] = field(default_factory=dict)
    """Round id -> predicted seconds of prefill work, reserved and not done. Written by `add_prefill`."""
    decode: dict[str, DecodeSlot] = field(default_factory=dict)
    """Written by `add_decode`."""
    session_tokens: dict[SessionKey, int] = field(default_factory=dict)
    """Session -> context of the sessions whose home this is."""
    others: Totals = NO_TOTALS
    """The other replicas' reservations."""
    ttft: Window = field(default_factory=Window)
    itl: Window = field(default_factory=Window)
    idle_tokens: int = 0
    """Sum of `session_tokens`."""
    prefill_sum_s: float = 0.0
    """Sum of `prefill_s`; exactly 0 when that is empty, so that rounding never adds up."""
    context_tokens: int = 0
    """Sum over `decode`."""
    itl_slos: dict[float, int] = field(default_factory=dict)
    """ITL target -> rounds in `decode` that have it."""
    reported_tokens: int = 0
    """Device KV in use by the engine's own last word."""
    pool: Pool = field(init=False)
    latency: LatencyModel = field(init=False)

    def __post_init__(self) -> None:
        self.renew(self.up)

    def renew(self, up: EngineUp) -> None:
        """The same incarnation said hello again."""
        self.up = up
        self.pool = Pool(up.pool)
        self.latency = up.latency or self.default_latency
        self.touch()

    def touch(self) -> None:
        """Something changed: the engine's view must be built anew."""
        self.stale.add(self.up.engine_id)

    def add_prefill(self, round_id: str, seconds: float) -> None:
        self.drop_prefill(round_id)
        self.prefill_s[round_id] = seconds
        self.prefill_sum_s += seconds

    def drop_prefill(self, round_id: str) -> None:
        seconds = self.prefill_s.pop(round_id, None)
        if seconds is not None:
            self.prefill_sum_s = self.prefill_sum_s - seconds if self.prefill_s else 0.0

    def add_decode(self, round_id: str, slot: DecodeSlot) -> None:
        self.drop_decode(round_id)
        self.decode[round_id] = slot
        self.context_tokens += slot.context_tokens
        self.itl_slos[slot.itl_slo_s] = self.itl_slos.get(slot.itl_slo_s, 0) + 1

    def drop_decode(self, round_id: str) -> None:
        slot = self.decode.pop(round_id, None)
        if slot is not None:
            self.context_tokens -= slot.context_tokens
            left = self.itl_slos[slot.itl_slo_s] - 1
            if left:
                self.itl_slos[slot.itl_slo_s] = left
            else:
                del self.itl_slos[slot.itl_slo_s]

    def set_session(self, session: SessionKey, tokens: int) -> None:
        self.idle_tokens += tokens - self.session_tokens.get(session, 0)
        self.session_tokens[session] = tokens
        self.touch()

    def drop_session(self, session: SessionKey) -> None:
        self.idle_tokens -= self.session_tokens.pop(session, 0)
        self.touch()

    def totals(self) -> Totals:
        """Our own reservations: what the other replicas must count."""
        return Totals(self.prefill_sum_s, len(self.prefill_s), len(self.decode), self.context_tokens)

    def expires_s(self) -> float:
        """When a view built now ages by itself: a sample leaves its window."""
        ttft, itl = self.ttft.samples, self.itl.samples
        return min(ttft[0][0] if ttft else INFINITY, itl[0][0] if itl else INFINITY) + WINDOW_S

    def view(self, now: float) -> EngineView:
        others = self.others
        # What idle homes hold can exceed the device: their oldest KV is in the page store by then.
        used_tokens = max(self.idle_tokens + others.context_tokens, self.reported_tokens)
        up = self.up
        return EngineView(  # by position, as several times per decision: keywords cost five times as much
            up.engine_id,
            self.pool,
            up.can_transfer,
            len(self.decode) + others.decode_rounds,
            self.context_tokens + others.context_tokens,
            self.prefill_sum_s + others.prefill_s,
            len(self.prefill_s) + others.prefill_rounds,
            up.pool_tokens,
            min(used_tokens, up.pool_tokens),
            len(self.session_tokens),
            self.latency,
            self.ttft.mean(now),
            self.itl.mean(now),
            min(self.itl_slos) if self.itl_slos else None,
            up.chunk_tokens,
            up.decode_interval,
        )


class Fleet:
    """The live engines, by id."""

    def __init__(self, latency: LatencyModel) -> None:
        """`latency` is the profile of engines that come without one."""
        self._latency = latency
        self.books: dict[str, EngineBook] = {}
        """Ordered by id."""
        self._stale: set[str] = set()
        self._views: Mapping[str, EngineView] = MappingProxyType({})
        self._expiries: list[tuple[float, str]] = []
        """A heap: when views age. Of an engine only the entry that `_expires_s` has too counts."""
        self._expires_s: dict[str, float] = {}

    def add(self, up: EngineUp) -> None:
        books = {**self.books, up.engine_id: EngineBook(up, self._latency, self._stale)}
        self.books = dict(sorted(books.items()))

    def remove(self, engine_id: str) -> None:
        del self.books[engine_id]
        self._stale.discard(engine_id)
        self._expires_s.pop(engine_id, None)
        self._views = MappingProxyType({e: view for e, view in self._views.items() if e != engine_id})

    def views(self, now: float) -> Mapping[str, EngineView]:
        """Immutable views of the live engines, ordered by id; the same object while nothing changed."""
        expiries, expires_s = self._expiries, self._expires_s
        while expiries and expiries[0][0] <= now:
            when, engine_id = heappop(expiries)
            if expires_s.get(engine_id) == when:
                del expires_s[engine_id]
                self._stale.add(engine_id)
        if self._stale:
            fresh = {engine_id: self.books[engine_id].view(now) for engine_id in self._stale}
            views = {**self._views, **fresh}
            if len(views) > len(self._views):
                views = dict(sorted(views.items()))
            self._views = MappingProxyType(views)
            for engine_id in self._stale:
                when = self.books[engine_id].expires_s()
                if when == INFINITY:
                    expires_s.pop(engine_id, None)
                elif when != expires_s.get(engine_id):
                    expires_s[engine_id] = when
                    heappush(expiries, (when, engine_id))
            self._stale.clear()
        return self._views
