"""Arithmetic of a decode run in closed form: its time, its pages, its token gaps.

A run is a number of decode steps of one batch. A step of batch B over total context T costs
`batch_s(B) + T * per_context` (`policies/latency.py`), and every step adds B to T. So k steps take
`k * batch_s(B) + per_context * (k * T + B * k * (k - 1) / 2)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt

from antiphon.policies.latency import DecodeCost


class StepTimes:
    """How long k steps of one batch take: linear * k + square * k^2."""

    __slots__ = ("_cost", "linear", "square")

    def __init__(self, cost: DecodeCost) -> None:
        self._cost = cost
        self.linear = self.square = 0.0

    def set(self, batch: int, context_tokens: int) -> None:
        """From now on for `batch` requests that have `context_tokens` tokens before the first step."""
        cost = self._cost
        self.square = half = cost.per_context_token_s * batch * 0.5
        self.linear = cost.batch_s(batch) + context_tokens * cost.per_context_token_s - half

    def seconds(self, steps: int) -> float:
        return steps * (self.linear + steps * self.square)

    def steps_until(self, seconds: float, most: int) -> int:
        """The fewest steps, 1 to `most`, that take at least `seconds`; `most` if none do."""
        if most <= 1 or seconds >= self.seconds(most):
            return most
        if seconds <= 0.0:
            return 1
        # The root in the form that is stable for a tiny square term, rounded down; then exact by seconds().
        steps = int(2.0 * seconds / (self.linear + sqrt(self.linear**2 + 4.0 * self.square * seconds)))
        steps = min(max(steps, 1), most)
        while steps < most and self.seconds(steps) < seconds:
            steps += 1
        return steps


class PageGrowth:
    """Pages of the requests of a batch, each of which gets one token a step.

    `now` counts steps since the engine started. What a request needs is known by its tokens at step 0 (maybe
    less than none): only their remainder by the page size matters for when it crosses into a new page.
    """

    __slots__ = ("_due", "batch", "page_tokens")

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.batch = 0
        self._due = [0] * page_tokens
        """Step modulo page size -> requests that need a page for that step."""

    def join(self, tokens: int, now: int) -> int:
        """A request with KV for `tokens` tokens: returns what `leave` wants."""
        due = (now - tokens) % self.page_tokens
        self._due[due] += 1
        self.batch += 1
        return due

    def leave(self, due: int) -> None:
        self._due[due] -= 1
        self.batch -= 1

    def pages(self, now: int, steps: int) -> int:
        """New pages for `steps` steps from step `now` on."""
        cycles, rest = divmod(steps, self.page_tokens)
        pages = cycles * self.batch
        if rest:
            first = now % self.page_tokens
            end = first + rest
            pages += sum(self._due[first:end])
            if end > self.page_tokens:
                pages += sum(self._due[: end - self.page_tokens])
        return pages

    def steps_within(self, now: int, pages: int, most: int) -> int:
        """How many steps, at most `most`, the batch can go with that many new pages."""
        if self.batch * (most // self.page_tokens + 1) <= pages or self.pages(now, most) <= pages:
            return most
        low, high = 0, most  # low steps fit, high do not
        while high - low > 1:
            middle = (low + high) // 2
            if self.pages(now, middle) <= pages:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between two tokens of one answer; zeros without any."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


_WIDTH = log(1.005)
_PER_LOG = 1.0 / _WIDTH
_OFFSET = 1e6
"""Keeps bucket numbers above 0, so that int() rounds down."""
_NO_TIME = -1
"""The bucket of gaps that take no time."""


class GapHistogram:
    """Gaps between tokens as weighted runs, in buckets 0.5 % wide: the mean is exact."""

    __slots__ = ("_buckets", "count", "total_s")

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, gap_s: float, tokens: int) -> None:
        """`tokens` tokens that came `gap_s` after the one before them."""
        bucket = int(log(gap_s) * _PER_LOG + _OFFSET) if gap_s > 0.0 else _NO_TIME
        buckets = self._buckets
        buckets[bucket] = buckets.get(bucket, 0) + tokens
        self.count += tokens
        self.total_s += gap_s * tokens

    def merge(self, other: GapHistogram) -> None:
        """Count the other's gaps as well."""
        for bucket, tokens in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + tokens
        self.count += other.count
        self.total_s += other.total_s

    def quantile(self, share: float) -> float:
        """The gap that `share` of the tokens stay within, to half a bucket; 0 without any."""
        left = share * self.count
        gap_s = 0.0
        for bucket in sorted(self._buckets):
            gap_s = exp((bucket - _OFFSET + 0.5) * _WIDTH) if bucket != _NO_TIME else 0.0
            left -= self._buckets[bucket]
            if left <= 0:
                break
        return gap_s

    def summary(self) -> Gaps:
        mean = self.total_s / self.count if self.count else 0.0
        return Gaps(self.count, mean, self.quantile(0.5), self.quantile(0.9), self.quantile(0.99))
