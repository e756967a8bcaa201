"""What a rule for the pools is shown: a core's books and the work of the past window. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

from antiphon.policies.base import Pool
from antiphon.policies.pools import PoolEngine, WindowRounds
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.demand import NOTHING, Counts, Kind, kind_name
from antiphon.scheduler.fleet import EngineBook

LEAST_WINDOW = 0.5
"""Of the window: before so much of it has been seen, nothing is said of rates."""


class DemandWindow:
    """Counts of every replica over the past window: work per second. Replicas may come and go.

    A replica counts from the first of the window's looks that has it to the last: what it had counted before
    is of another time, for it may have been away for hours. Of a new one at most one look's work is lost.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._looks: deque[tuple[float, dict[str, Counts]]] = deque()

    def add(self, now: float, counts: Mapping[str, Counts]) -> None:
        """What each replica, by its incarnation, has counted up to now."""
        self._looks.append((now, dict(counts)))
        while len(self._looks) > 2 and self._looks[1][0] <= now - self._window_s:
            self._looks.popleft()

    def clear(self) -> None:
        """The pools are others now: what came before says little of them."""
        self._looks.clear()

    def total(self) -> tuple[Counts, float]:
        """What came in the window, and its seconds; 0 seconds while too little of it has been seen."""
        if not self._looks:
            return Counts(), 0.0
        began_s, now = self._looks[0][0], self._looks[-1][0]
        if now - began_s < LEAST_WINDOW * self._window_s:
            return Counts(), 0.0
        first, last, total = dict[str, Counts](), dict[str, Counts](), Counts()
        for _, looked in self._looks:
            for replica, counts in looked.items():
                if replica in last and not counts.follow(last[replica]):
                    total = total.plus(last[replica].plus(first.pop(replica), -1.0))
                first.setdefault(replica, counts)
                last[replica] = counts
        for replica, counts in last.items():
            total = total.plus(counts.plus(first[replica], -1.0))
        return total, now - began_s


def pool_engines(
    core: Scheduler,
    now: float,
    total: Counts,
    seconds: float,
    held: Mapping[str, int] = MappingProxyType({}),
) -> list[PoolEngine]:
    """The core's engines by id, but for those that drain, are suspect or shunned: nobody counts on them.

    `held`: engine -> KV there of live sessions, as other replicas know it.
    """
    core.standings.refresh(now)
    unusable = core.standings.unusable
    books = [book for book in core.books.fleet.books.values() if book.engine_id not in unusable]
    return [_engine(book, now, total, seconds, held.get(book.engine_id, 0)) for book in books]


def window_rounds(total: Counts) -> WindowRounds:
    rounds, ended = max(1.0, total.rounds), max(1.0, total.ended)
    return WindowRounds(
        total.ttft_slo_s / rounds,
        total.itl_slo_s / rounds,
        total.prefill_missed / ended,
        total.decode_missed / ended,
    )


def live_tokens(core: Scheduler, now: float) -> dict[str, int]:
    """KV of sessions that are expected back, by engine, as this core knows it."""
    return {book.engine_id: book.store.live_tokens(now) for book in core.books.fleet.books.values()}


def _engine(book: EngineBook, now: float, total: Counts, seconds: float, held: int) -> PoolEngine:
    name, per_s = kind_name(book), 1.0 / seconds if seconds > 0 else 0.0
    prefill = total.work.get(f"{Pool.PREFILL.value} {name}", NOTHING)
    decode = total.work.get(f"{Pool.DECODE.value} {name}", NOTHING)
    slower = book.corrections
    stalled_s = decode[0] * slower.prefill * (1.0 + _stall_share(book, total))
    transfer = book.latency.transfer
    return PoolEngine(
        book.engine_id,
        book.pool,
        book.up.can_transfer,
        (prefill[0] * slower.prefill + prefill[1] * slower.decode) * per_s,
        (decode[1] * slower.decode + stalled_s) * per_s,
        max(held, book.store.live_tokens(now)),
        book.store_tokens,
        prefill[2] / (2.0 * prefill[0]) * slower.prefill if prefill[0] > 0 else 0.0,
        book.kv_bytes(book.idle_tokens) / transfer.bytes_per_s * slower.transfer,
        book.prefill_sum_s + book.others.prefill_s,
        book.itl.mean(now),
        book.latency.decode_step_s(1, book.context_tokens // max(1, len(book.decode))),
    )


def _stall_share(book: EngineBook, total: Counts) -> float:
    """How much of the time that an answer has, one chunk of a prefill beside it takes: C and K stay.

    Without an interval (K = 0) it waits for the whole prompt.
    """
    rounds = max(1.0, total.rounds)
    answer_s = total.output_tokens / rounds * (total.itl_slo_s / rounds)
    new_tokens = round(total.new_tokens / rounds)
    up = book.up
    size = min(new_tokens, up.chunk_tokens) if up.chunk_tokens and up.decode_interval else new_tokens
    kind = Kind(book.latency, 0, book.up.pool_tokens)
    return min(1.0, kind.prefill_s(size, 0) / answer_s) if answer_s > 0 else 0.0
