"""The core's books on engines: who is alive, what is reserved there, and the view that policies get.

Written only by the core. A view is rebuilt only when its engine changed, so that a decision costs what it
looks at; the windows (mean TTFT and ITL of the past 10 s) age, so a view also expires with its oldest sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import MappingProxyType

from msgspec import Struct

from antiphon.policies.base import NEUTRAL, SLACKS, Corrections, EngineView, Pool
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.messages import EngineUp, Totals
from antiphon.scheduler.residency import DEVICES_IN_A_STORE
from antiphon.scheduler.store_use import Returns, SessionKey, StoreUse
from antiphon.scheduler.tallies import INFINITY, Owed, PrefillQueue, Slacks, Window

NO_TOTALS = Totals()
"""One object, so that "nobody else" is told by identity."""


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
    queue: PrefillQueue = field(default_factory=PrefillQueue)
    """Rounds that wait for their prefill here."""
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
    placed: Window = field(default_factory=Window)
    """Prefills that were placed here: when, and the seconds of each."""
    in_time: Window = field(default_factory=Window)
    """Of them, those whose rounds were expected to meet their TTFT target."""
    slacks: Slacks = field(default_factory=Slacks)
    """Of the rounds in `decode`, those that are expected to have an ITL at all."""
    incoming: Owed = field(default_factory=Owed)
    """KV that rounds in flight still have to bring here."""
    outgoing: Owed = field(default_factory=Owed)
    """KV that rounds in flight still have to fetch from here."""
    returns: Returns = field(default_factory=Returns)
    """Of the whole fleet."""
    corrections: Corrections = NEUTRAL
    """Who sets it calls `touch`."""
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
    engine_id: str = field(init=False)
    pool: Pool = field(init=False)
    latency: LatencyModel = field(init=False)
    store: StoreUse = field(init=False)
    store_tokens: int = field(init=False)
    """What its page store holds."""

    def __post_init__(self) -> None:
        self.engine_id = self.up.engine_id
        self.store = StoreUse(self.returns)
        self.renew(self.up)

    def renew(self, up: EngineUp) -> None:
        """The same incarnation said hello again."""
        self.up = up
        self.pool = Pool(up.pool)
        self.latency = up.latency or self.default_latency
        self.store_tokens = max(1, up.store_tokens or DEVICES_IN_A_STORE * up.pool_tokens)
        self.touch()

    def touch(self) -> None:
        """Something changed: the engine's view must be built anew."""
        self.stale.add(self.engine_id)

    def add_prefill(self, round_id: str, seconds: float) -> None:
        if round_id in self.prefill_s:
            self.drop_prefill(round_id)
        self.prefill_s[round_id] = seconds
        self.prefill_sum_s += seconds

    def drop_prefill(self, round_id: str) -> None:
        seconds = self.prefill_s.pop(round_id, None)
        if seconds is not None:
            self.prefill_sum_s = self.prefill_sum_s - seconds if self.prefill_s else 0.0

    def stall(self, now: float, prefill_s: float, new_tokens: int, in_time: bool) -> None:
        """A prefill of `new_tokens`, predicted to take `prefill_s`, was placed here: the decodes wait for it.

        They do not wait in the steps that they run themselves between two of its chunks. `in_time`: its round
        is expected to meet its TTFT target.
        """
        if self.batch and self.up.chunk_tokens and self.up.decode_interval:
            steps = (new_tokens - 1) // self.up.chunk_tokens * self.up.decode_interval
            if steps > 0:
                prefill_s = max(0.0, prefill_s - steps * self.decode_step_s())
        self.placed.add(now, prefill_s)
        if in_time:
            self.in_time.add(now, prefill_s)
        self.slacks.stall(prefill_s)

    @property
    def batch(self) -> int:
        """Rounds that decode here, or will: ours and the other replicas'."""
        return len(self.decode) + self.others.decode_rounds

    def decode_step_s(self) -> float:
        """Predicted seconds of a step of all that decodes here."""
        context_tokens = self.context_tokens + self.others.context_tokens
        return self.latency.decode_step_s(self.batch, context_tokens) * self.corrections.decode

    def add_decode(self, round_id: str, slot: DecodeSlot, expected_tokens: int = 0) -> None:
        """`expected_tokens`: of its output. Of a single token no ITL can be missed."""
        if round_id in self.decode:
            self.drop_decode(round_id)
        self.decode[round_id] = slot
        self.context_tokens += slot.context_tokens
        self.itl_slos[slot.itl_slo_s] = self.itl_slos.get(slot.itl_slo_s, 0) + 1
        if expected_tokens > 1:
            budget_s = (expected_tokens - 1) * (slot.itl_slo_s - self.decode_step_s())
            self.slacks.add(round_id, budget_s)

    def drop_decode(self, round_id: str) -> None:
        slot = self.decode.pop(round_id, None)
        if slot is not None:
            self.slacks.drop(round_id)
            self.context_tokens -= slot.context_tokens
            slos, itl_slo_s = self.itl_slos, slot.itl_slo_s
            left = slos[itl_slo_s] - 1
            if left:
                slos[itl_slo_s] = left
            else:
                del slos[itl_slo_s]

    def drop_transfers(self, round_id: str) -> None:
        self.incoming.drop(round_id)
        self.outgoing.drop(round_id)

    def release(self, round_id: str, queue_key: float) -> None:
        """Give back everything that the round holds here."""
        self.drop_decode(round_id)
        self.drop_prefill(round_id)
        self.drop_transfers(round_id)
        self.in_flight.discard(round_id)
        if self.queue.length:
            self.queue.remove(queue_key, round_id)

    def kv_bytes(self, tokens: int) -> int:
        return tokens * (self.up.kv_bytes_per_token or self.latency.transfer.kv_bytes_per_token)

    def transfer_s(self, tokens: int) -> float:
        """Predicted seconds to move the KV of `tokens` over this engine's idle link."""
        return self.latency.transfer_s(tokens) * self.corrections.transfer

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

    def expires_s(self, now: float) -> float:
        """When a view built now ages by itself: a sample leaves its window, a session is expected no more."""
        windows = self.ttft.expires_s, self.itl.expires_s, self.placed.expires_s, self.in_time.expires_s
        return min(*windows, self.store.expires_s(now))

    def view(self, now: float, others: Totals | None = None) -> EngineView:
        """`others`: to be counted instead of those that are known; nothing is remembered of them."""
        if others is None:
            others = self.others
        # What idle homes hold can exceed the device: their oldest KV is in the page store by then.
        used_tokens = self.idle_tokens + others.context_tokens
        if used_tokens < self.reported_tokens:
            used_tokens = self.reported_tokens
        up, slos, pool_tokens = self.up, self.itl_slos, self.up.pool_tokens
        arrivals_per_s, prefill_share = self.placed.rates(now)
        return EngineView(  # by position, as several times per decision: keywords cost five times as much
            self.engine_id,
            self.pool,
            up.can_transfer,
            len(self.decode) + others.decode_rounds,
            self.context_tokens + others.context_tokens,
            self.prefill_sum_s + others.prefill_s,
            len(self.prefill_s) + others.prefill_rounds,
            pool_tokens,
            used_tokens if used_tokens < pool_tokens else pool_tokens,
            len(self.session_tokens),
            self.latency,
            self.ttft.mean(now),
            self.itl.mean(now),
            (min(slos) if len(slos) > 1 else next(iter(slos))) if slos else None,
            up.chunk_tokens,
            up.decode_interval,
            self.corrections,
            self.incoming.total,
            self.outgoing.total,
            self.slacks.least(SLACKS),
            arrivals_per_s,
            prefill_share,
            self.store.live_tokens(now) / self.store_tokens,
            self.in_time.rates(now)[0],
        )


class Fleet:
    """The live engines, by id."""

    def __init__(self, latency: LatencyModel) -> None:
        """`latency` is the profile of engines that come without one."""
        self._latency = latency
        self.returns = Returns()
        self.books: dict[str, EngineBook] = {}
        """Ordered by id."""
        self._stale: set[str] = set()
        self._engines: dict[str, EngineView] = {}
        """Never changed once it was given away: `views` copies it."""
        self._views: Mapping[str, EngineView] = MappingProxyType(self._engines)
        self._expiries: list[tuple[float, str]] = []
        """A heap: when views age. Of an engine only the entry that `_expires_s` has too counts."""
        self._expires_s: dict[str, float] = {}
        self.pools = pools_in_words(())
        """How many engines each pool has, in a word for receipts: "2p+2d"."""

    def add(self, up: EngineUp) -> None:
        books = {**self.books, up.engine_id: EngineBook(up, self._latency, self._stale, returns=self.returns)}
        self.books = dict(sorted(books.items()))
        self.pools = pools_in_words(self.books.values())

    def renew(self, up: EngineUp) -> None:
        """An engine that is up said hello again, perhaps in another pool: rounds that are there stay."""
        self.books[up.engine_id].renew(up)
        self.pools = pools_in_words(self.books.values())

    def remove(self, engine_id: str) -> None:
        del self.books[engine_id]
        self.pools = pools_in_words(self.books.values())
        self._stale.discard(engine_id)
        self._expires_s.pop(engine_id, None)
        self._engines = {e: view for e, view in self._engines.items() if e != engine_id}
        self._views = MappingProxyType(self._engines)

    def views(self, now: float) -> Mapping[str, EngineView]:
        """Immutable views of the live engines, ordered by id; the same object while nothing changed."""
        expiries, expires_s = self._expiries, self._expires_s
        while expiries and expiries[0][0] <= now:
            when, engine_id = heappop(expiries)
            if expires_s.get(engine_id) == when:
                del expires_s[engine_id]
                self._stale.add(engine_id)
        if self._stale:
            engines, known = self._engines.copy(), len(self._engines)
            for engine_id in self._stale:
                book = self.books[engine_id]
                engines[engine_id] = book.view(now)
                when = book.expires_s(now)
                if when == INFINITY:
                    expires_s.pop(engine_id, None)
                elif when != expires_s.get(engine_id):
                    expires_s[engine_id] = when
                    heappush(expiries, (when, engine_id))
            if len(engines) > known:
                engines = dict(sorted(engines.items()))
            self._engines, self._views = engines, MappingProxyType(engines)
            self._stale.clear()
        return self._views


def pools_in_words(books: Iterable[EngineBook]) -> str:
    decode = [book.pool is Pool.DECODE for book in books]
    return f"{len(decode) - sum(decode)}p+{sum(decode)}d"


class LazyViews(Mapping[str, EngineView]):
    """`Fleet.views`, made when somebody looks: orderings seldom do. Valid until the core goes on."""

    __slots__ = ("_fleet", "_now")

    def __init__(self, fleet: Fleet, now: float) -> None:
        self._fleet, self._now = fleet, now

    def __getitem__(self, engine_id: str) -> EngineView:
        return self._fleet.views(self._now)[engine_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fleet.views(self._now))

    def __len__(self) -> int:
        return len(self._fleet.views(self._now))
