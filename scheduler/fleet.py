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

    def mean(self) -> float | None:
        return self.total / len(self.samples) if self.samples else None

    @property
    def expires_s(self) -> float:
        return self.samples[0][0] + WINDOW_S if self.samples else float("inf")


@dataclass(slots=True)
class DecodeSlot:
    """A round that decodes, or will, on an engine."""

    context_tokens: int
    itl_slo_s: float


@dataclass(slots=True)
class EngineBook:
    """Everything the core holds on one engine of one incarnation."""

    up: EngineUp
    queue: list[str] = field(default_factory=list)
    """Round ids that wait for their prefill here, in order of arrival."""
    in_flight: set[str] = field(default_factory=set)
    """Round ids that pull or prefill here."""
    prefill_s: dict[str, float] = field(default_factory=dict)
    """Round id -> predicted seconds of prefill work, reserved and not done."""
    decode: dict[str, DecodeSlot] = field(default_factory=dict)
    session_tokens: dict[str, int] = field(default_factory=dict)
    """Session id -> context of the sessions whose home this is."""
    others: Totals = NO_TOTALS
    """The other replicas' reservations."""
    ttft: Window = field(default_factory=Window)
    itl: Window = field(default_factory=Window)
    idle_tokens: int = 0
    """Sum of `session_tokens`, kept as it changes."""
    reported_tokens: int = 0
    """Device KV in use by the engine's own last word."""
    _view: EngineView | None = None
    _view_expires_s: float = 0.0

    def touch(self) -> None:
        """Something changed: the next `view` is built anew."""
        self._view = None

    def set_session(self, session_id: str, tokens: int) -> None:
        self.idle_tokens += tokens - self.session_tokens.get(session_id, 0)
        self.session_tokens[session_id] = tokens
        self.touch()

    def drop_session(self, session_id: str) -> None:
        self.idle_tokens -= self.session_tokens.pop(session_id, 0)
        self.touch()

    def totals(self) -> Totals:
        """Our own reservations: what the other replicas must count."""
        return Totals(
            prefill_s=sum(self.prefill_s.values()),
            prefill_rounds=len(self.prefill_s),
            decode_rounds=len(self.decode),
            context_tokens=sum(slot.context_tokens for slot in self.decode.values()),
        )

    def view(self, now: float) -> EngineView:
        if self._view is None or now >= self._view_expires_s:
            self._view = self._build(now)
        return self._view

    def _build(self, now: float) -> EngineView:
        self.ttft.trim(now)
        self.itl.trim(now)
        self._view_expires_s = min(self.ttft.expires_s, self.itl.expires_s)
        own, others = self.totals(), self.others
        # What idle homes hold can exceed the device: their oldest KV is in the page store by then.
        used_tokens = max(self.idle_tokens + others.context_tokens, self.reported_tokens)
        return EngineView(
            engine_id=self.up.engine_id,
            pool=Pool(self.up.pool),
            can_transfer=self.up.can_transfer,
            batch=own.decode_rounds + others.decode_rounds,
            context_tokens=own.context_tokens + others.context_tokens,
            queue_s=own.prefill_s + others.prefill_s,
            queued_rounds=own.prefill_rounds + others.prefill_rounds,
            pool_tokens=self.up.pool_tokens,
            used_tokens=min(used_tokens, self.up.pool_tokens),
            sessions=len(self.session_tokens),
            window_ttft_s=self.ttft.mean(),
            window_itl_s=self.itl.mean(),
            tightest_itl_slo_s=min((s.itl_slo_s for s in self.decode.values()), default=None),
            chunk_tokens=self.up.chunk_tokens,
            decode_interval=self.up.decode_interval,
        )


class Fleet:
    """The live engines, by id."""

    def __init__(self) -> None:
        self.books: dict[str, EngineBook] = {}
        self._order: tuple[str, ...] = ()

    def add(self, up: EngineUp) -> None:
        self.books[up.engine_id] = EngineBook(up)
        self._order = tuple(sorted(self.books))

    def remove(self, engine_id: str) -> None:
        del self.books[engine_id]
        self._order = tuple(sorted(self.books))

    def views(self, now: float) -> Mapping[str, EngineView]:
        """Immutable views of the live engines, ordered by id."""
        return MappingProxyType({engine_id: self.books[engine_id].view(now) for engine_id in self._order})
