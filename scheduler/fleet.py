"""The core's books on engines: who is alive, what is reserved there, and the view that policies get.

Written only by the core. A view is rebuilt only when its engine changed, so that a decision costs what it
looks at; the windows (mean TTFT and ITL of the past 10 s) age, so a view also expires with its oldest sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from antiphon.policies.base import EngineView, Pool
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.messages import EngineUp, Totals

WINDOW_S = 10.0
"""AMPD's window of latency statistics (reference: section 2 of the paper's readings)."""


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

    @property
    def expires_s(self) -> float:
        return self.samples[0][0] + WINDOW_S if self.samples else float("inf")


@dataclass(slots=True)
class DecodeSlot:
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
    session_tokens: dict[str, int] = field(default_factory=dict)
    """Session id -> context of the sessions whose home this is."""
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
    view_expires_s: float = 0.0
    """When the view ages by itself."""
    _view: EngineView | None = None

    def __post_init__(self) -> None:
        self.renew(self.up)

    def renew(self, up: EngineUp) -> None:
        """The same incarnation said hello again."""
        self.up = up
        self.pool = Pool(up.pool)
        self.latency = up.latency or self.default_latency
        self.touch()

    def touch(self) -> None:
        """Something changed: the next `view` is built anew."""
        self._view = None
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

    def set_session(self, session_id: str, tokens: int) -> None:
        self.idle_tokens += tokens - self.session_tokens.get(session_id, 0)
        self.session_tokens[session_id] = tokens
        self.touch()

    def drop_session(self, session_id: str) -> None:
        self.idle_tokens -= self.session_tokens.pop(session_id, 0)
        self.touch()

    def totals(self) -> Totals:
        """Our own reservations: what the other replicas must count."""
        return Totals(self.prefill_sum_s, len(self.prefill_s), len(self.decode), self.context_tokens)

    def view(self, now: float) -> EngineView:
        if self._view is None or now >= self.view_expires_s:
            self._view = self._build(now)
        return self._view

    def _build(self, now: float) -> EngineView:
        ttft_s, itl_s = self.ttft.mean(now), self.itl.mean(now)
        self.view_expires_s = min(self.ttft.expires_s, self.itl.expires_s)
        others = self.others
        # What idle homes hold can exceed the device: their oldest KV is in the page store by then.
        used_tokens = max(self.idle_tokens + others.context_tokens, self.reported_tokens)
        return EngineView(
            engine_id=self.up.engine_id,
            pool=self.pool,
            can_transfer=self.up.can_transfer,
            batch=len(self.decode) + others.decode_rounds,
            context_tokens=self.context_tokens + others.context_tokens,
            queue_s=self.prefill_sum_s + others.prefill_s,
            queued_rounds=len(self.prefill_s) + others.prefill_rounds,
            pool_tokens=self.up.pool_tokens,
            used_tokens=min(used_tokens, self.up.pool_tokens),
            sessions=len(self.session_tokens),
            latency=self.latency,
            window_ttft_s=ttft_s,
            window_itl_s=itl_s,
            tightest_itl_slo_s=min(self.itl_slos, default=None),
            chunk_tokens=self.up.chunk_tokens,
            decode_interval=self.up.decode_interval,
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
        self._expires_s = 0.0
        """No view ages before this."""

    def add(self, up: EngineUp) -> None:
        books = {**self.books, up.engine_id: EngineBook(up, self._latency, self._stale)}
        self.books = dict(sorted(books.items()))
        self._expires_s = 0.0

    def remove(self, engine_id: str) -> None:
        del self.books[engine_id]
        self._stale.discard(engine_id)
        self._expires_s = 0.0

    def views(self, now: float) -> Mapping[str, EngineView]:
        """Immutable views of the live engines, ordered by id; the same object while nothing changed."""
        books = self.books
        if now >= self._expires_s:
            self._views = MappingProxyType({engine_id: book.view(now) for engine_id, book in books.items()})
            self._expires_s = min((book.view_expires_s for book in books.values()), default=now)
        elif self._stale:
            fresh = {engine_id: books[engine_id].view(now) for engine_id in self._stale}
            self._views = MappingProxyType({**self._views, **fresh})
            self._expires_s = min(self._expires_s, *(books[e].view_expires_s for e in fresh))
        self._stale.clear()
        return self._views
