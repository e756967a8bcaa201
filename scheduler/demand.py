"""How much work the rounds bring to each pool, on each kind of engine of the fleet: sums that only grow.

Off unless somebody re-plans the pools. Prefill is counted when a round is placed, decode too, with the output
that is expected of it; when it ends, by how much that was wrong is added. Who wants a rate subtracts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

from msgspec import Struct

from antiphon.policies.base import Placement, Pool, RoundView
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.fleet import EngineBook
from antiphon.scheduler.outcomes import Outcome, Receipt
from antiphon.scheduler.states import Round

UNKNOWN_OUTPUT_TOKENS = 256
"""As the books take it, before any round has ended."""

MOST_BATCH = 256
"""No engine decodes more rounds at once, as far as the rule is concerned."""


class Kind(Struct, frozen=True, gc=False):
    """Engines on which the same work takes the same time."""

    latency: LatencyModel
    chunk_tokens: int
    pool_tokens: int

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Of a whole prompt, in chunks: each has its fixed cost and looks back at those before it."""
        c, size = self.latency.prefill, self.chunk_tokens or new_tokens
        full, rest = divmod(new_tokens, size) if new_tokens > 0 else (0, 0)
        n = full + (rest > 0)
        pairs = n * (n - 1) / 2
        over = cached_tokens * new_tokens + size * size * full * (full - 1) / 2 + rest * full * size
        starts = n * cached_tokens + size * pairs
        squares = n * cached_tokens**2 + 2 * cached_tokens * size * pairs + size**2 * pairs * (2 * n - 1) / 3
        return (
            n * c.fixed_s
            + new_tokens * c.per_token_s
            + over * c.per_token_cached_s
            + (full * size * size + rest * rest) * c.per_token_squared_s
            + starts * c.cached_token_s
            + squares * c.cached_squared_s
        )

    def token_s(self, context_tokens: float, itl_slo_s: float) -> float:
        """Engine-seconds of an output token, in the largest batch of such rounds that fits and meets the
        target."""
        context = max(1.0, context_tokens)
        cost = self.latency.decode
        each_s = cost.per_request_s + context * cost.per_context_token_s
        batch = min(self.pool_tokens / context, MOST_BATCH)
        if each_s > 0:
            batch = min(batch, (itl_slo_s - cost.fixed_s - cost.experts_s) / each_s)
        rounds = max(1, int(batch))
        return self.latency.decode_step_s(rounds, round(rounds * context)) / rounds


class Counts(Struct, frozen=True, gc=False):
    """Since the counting began. `work`: "pool kind" -> seconds of prefill and of decode on engines of that
    kind, and the squares of the former."""

    work: Mapping[str, tuple[float, float, float]] = MappingProxyType({})
    rounds: float = 0.0
    """That were placed."""
    new_tokens: float = 0.0
    """Sums over them, as the next three."""
    output_tokens: float = 0.0
    ttft_slo_s: float = 0.0
    itl_slo_s: float = 0.0
    ended: float = 0.0
    """Rounds that are over, cancelled ones left out."""
    prefill_missed: float = 0.0
    """Of those, how many missed their TTFT, but for too long a prefill, after a prefill in this pool."""
    decode_missed: float = 0.0
    """The same of this pool, and those that missed their ITL there."""

    def plus(self, other: Counts, sign: float = 1.0) -> Counts:
        """Both, or what was added since `other` (`sign` -1), which may be of a time when less was counted."""
        work = {}
        for key in {**self.work, **other.work}:
            one, two = self.work.get(key, NOTHING), other.work.get(key, NOTHING)
            work[key] = one[0] + sign * two[0], one[1] + sign * two[1], one[2] + sign * two[2]
        sums = [getattr(self, name) + sign * getattr(other, name) for name in SUMS]
        return Counts(work, *sums)

    def follow(self, earlier: Counts) -> bool:
        """False if the one who counts began anew since then: what only grows has become less."""
        if any(getattr(self, name) < getattr(earlier, name) for name in GROWING):
            return False
        return all(self.work.get(key, NOTHING)[0] >= work[0] for key, work in earlier.work.items())


GROWING = "rounds", "new_tokens", "ended"
"""Not what is expected of outputs: that is taken back when they turn out shorter."""
SUMS = tuple(name for name in Counts.__struct_fields__ if name != "work")
NOTHING = (0.0, 0.0, 0.0)


def kind_name(book: EngineBook) -> str:
    """The same at every replica."""
    return f"{book.latency.name}/{book.up.chunk_tokens}/{book.up.pool_tokens}"


class Demand:
    """Written by the core, read by who re-plans."""

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._work: dict[str, list[float]] = {}
        self._expected: dict[str, tuple[str, str, int, int]] = {}
        """Round in flight -> pool where it decodes, pool where it is prefilled, context and output that its
        decode was counted with."""
        self._sums = dict.fromkeys(SUMS, 0.0)

    def know(self, books: Iterable[EngineBook]) -> None:
        """Count for the kinds of these engines from now on."""
        for book in books:
            name = kind_name(book)
            if name not in self._kinds:
                self._kinds[name] = Kind(book.latency, book.up.chunk_tokens, book.up.pool_tokens)
                for pool in Pool:
                    self._work[f"{pool.value} {name}"] = [0.0, 0.0, 0.0]

    def placed(
        self, round: Round, placement: Placement, view: RoundView, books: Mapping[str, EngineBook]
    ) -> None:
        """A try of the round begins; `books` of all engines."""
        home, engine = books[placement.home], books[placement.prefill_engine]
        self.know((home, engine))
        arrived = round.arrived
        cached = view.held(placement.prefill_engine)
        if round.source is not None:
            cached = max(cached, view.held(round.source))
        new_tokens = max(1, arrived.prompt_tokens - cached)
        self._add(engine.pool, new_tokens, arrived.prompt_tokens - new_tokens)
        output = view.expected_output_tokens or min(arrived.max_output_tokens, UNKNOWN_OUTPUT_TOKENS)
        self._undo(round)
        self._decode(home.pool.value, arrived.prompt_tokens, output, arrived.slo_itl_s)
        self._expected[round.round_id] = home.pool.value, engine.pool.value, arrived.prompt_tokens, output
        if len(round.tries) == 1:
            self._count(rounds=1, new_tokens=new_tokens, output_tokens=output)
            self._count(ttft_slo_s=arrived.slo_ttft_s, itl_slo_s=arrived.slo_itl_s)

    def ended(self, round: Round, receipt: Receipt) -> None:
        """How much it really generated is known now, and whether it was in time."""
        known = self._expected.pop(round.round_id, None)
        if known is None or receipt.outcome is Outcome.CANCELLED:
            return
        pool, prefill_pool, _, output = known
        more = receipt.completion_tokens - output
        self._decode(pool, round.prompt_tokens, more, round.arrived.slo_itl_s)
        alone_s, target_s = round.tries[0].placement.predicted.prefill_s, round.arrived.slo_ttft_s
        late = receipt.ttft_s is None or receipt.ttft_s > target_s
        slow = receipt.itl_s is not None and receipt.itl_s > round.arrived.slo_itl_s
        late = late and alone_s <= target_s
        at_prefill, at_decode = (late and prefill_pool == p.value for p in (Pool.PREFILL, Pool.DECODE))
        slow = slow and pool == Pool.DECODE.value
        self._count(ended=1, output_tokens=more, prefill_missed=at_prefill, decode_missed=at_decode or slow)

    def check(self, rounds: Container[str]) -> None:
        """Raise AssertionError if it remembers a round that is not in flight."""
        assert all(round_id in rounds for round_id in self._expected), "the demand of an ended round"

    def counts(self) -> Counts:
        work = {
            key: (prefill_s, decode_s, squares) for key, (prefill_s, decode_s, squares) in self._work.items()
        }
        return Counts(work, **self._sums)

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._sums[name] += value

    def _add(self, pool: Pool, new_tokens: int, cached_tokens: int) -> None:
        for name, kind in self._kinds.items():
            seconds = kind.prefill_s(new_tokens, cached_tokens)
            work = self._work[f"{pool.value} {name}"]
            work[0] += seconds
            work[2] += seconds * seconds

    def _decode(self, pool: str, prompt_tokens: float, output: int, itl_slo_s: float) -> None:
        """Its first token comes with the prefill."""
        for name, kind in self._kinds.items():
            context = prompt_tokens + abs(output) / 2
            self._work[f"{pool} {name}"][1] += output * kind.token_s(context, itl_slo_s)

    def _undo(self, round: Round) -> None:
        """A further try: what was counted of the decode that did not come."""
        known = self._expected.pop(round.round_id, None)
        if known is not None:
            pool, _, context, output = known
            self._decode(pool, context, -output, round.arrived.slo_itl_s)
