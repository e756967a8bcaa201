"""Prometheus metrics of one replica, from receipts and gateway events. The table is docs/metrics.md.

Every name begins with `antiphon_` and ends in its unit. Labels have few values: never a session or a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from antiphon.policies.pools import PoolShares
from antiphon.scheduler.outcomes import Receipt

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0)
ITL_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
PHASE_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


class Metrics:
    """One registry per instance, so that several replicas can live in one process (tests do)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="antiphon", registry=self.registry)
        self._gateway()
        self._rounds()

    def _gateway(self) -> None:
        self.requests = self._counter("http_requests", "HTTP requests answered", "route", "status")
        self.in_flight = Gauge(
            "antiphon_http_requests_in_flight", "HTTP requests being answered", registry=self.registry
        )
        self.request_seconds = self._histogram(
            "http_request_seconds", "Whole request, until its last byte was sent", TTFT_BUCKETS_S, "route"
        )
        self.disconnects = self._counter(
            "client_disconnects", "Clients that went away before their answer ended", "phase"
        )
        self.errors = self._counter("errors", "Error answers and error events, by code", "code")
        self.overloaded = self._counter("overloaded", "Requests refused at a bound", "bound")
        self.stalled_readers = self._counter(
            "stalled_readers", "Clients cut off because they took nothing of their answer"
        )
        self.identified = self._counter("sessions_identified", "Rounds, by what named their session", "by")
        self.identity_lookups_failed = self._counter(
            "identity_lookups_failed", "Conversations taken for new because the ledger was away"
        )

    def _rounds(self) -> None:
        self.rounds = self._counter("rounds", "Rounds that ended", "arm", "outcome")
        self.ttft = self._histogram("round_ttft_seconds", "Arrival to first token", TTFT_BUCKETS_S, "arm")
        self.itl = self._histogram("round_itl_seconds", "Mean time between tokens of a round", ITL_BUCKETS_S)
        self.phase = self._histogram("round_phase_seconds", "Parts of the TTFT", PHASE_BUCKETS_S, "phase")
        self.ttft_ratio = self._histogram(
            "round_ttft_actual_to_predicted_ratio", "1 = the latency model was right", RATIO_BUCKETS, "arm"
        )
        self.tokens = self._counter(
            "tokens", "Tokens of completed rounds: prompt, cached (of the prompt), pulled, completion", "kind"
        )
        self.transfer_bytes = self._counter("kv_transfer_bytes", "KV moved between engines", "direction")
        self.failed_tries = self._counter("failed_tries", "Tries of rounds that an engine failed", "arm")
        self.degraded = self._counter("degraded_rounds", "Rounds decided without the ledger")
        self.moves = self._counter("moves", "Homes of sessions that `move` set in the ledger", "result")
        self.drained = self._counter("drained_sessions", "Sessions that a drain tried to move", "result")
        self.flips = self._counter(
            "pool_flips", "Changes of an engine's pool that this replica led", "direction", "result"
        )
        self.unrecorded = self._counter("unrecorded_rounds", "Rounds that --record could not write down")

    def observe_drained(self, result: str, moved_bytes: int) -> None:
        """How a move of a session between its rounds ended."""
        self.drained.labels(result).inc()
        self.transfer_bytes.labels("drain").inc(moved_bytes)

    def watch_load(self, rounds: Callable[[], float], body_bytes: Callable[[], float]) -> None:
        """Asked at every scrape: requests for rounds under way, bytes of bodies in memory."""
        self._watch("gateway_rounds", "Requests for rounds under way", rounds)
        self._watch("request_bodies_bytes", "Request bodies in memory", body_bytes)

    def watch_answers(self, unread_bytes: Callable[[], float]) -> None:
        """Asked at every scrape: bytes of answers that were not read yet."""
        self._watch("answers_buffered_bytes", "Answers that were not read yet", unread_bytes)

    def _watch(self, name: str, text: str, look: Callable[[], float]) -> None:
        Gauge(f"antiphon_{name}", text, registry=self.registry).set_function(look)

    def watch_engines(self, count: Callable[[], int]) -> None:
        """`count` is asked at every scrape for the engines that are alive."""
        gauge = Gauge("antiphon_engines_alive", "Engines that can be used now", registry=self.registry)
        gauge.set_function(count)

    def watch_pools(
        self, count: Callable[[], Mapping[str, int]], shares: Callable[[], PoolShares | None]
    ) -> None:
        """Asked at every scrape: engines by pool; how full the pools are, None where nobody knows."""
        self.registry.register(_Pools(count, shares))

    def watch_breakers(self, look: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """`look` is asked at every scrape: kind -> how many are not closed now, how often one opened."""
        self.registry.register(_Breakers(look))

    def watch_records(self, look: Callable[[], Mapping[str, int]]) -> None:
        """`look` is asked at every scrape: reason -> looks at engine records that were refused."""
        name, text = "engine_records_refused", "Looks at engine records that were refused"
        self.registry.register(_Watched(name, text, "reason", look))

    def watch_doubles(self, look: Callable[[], Mapping[str, int]]) -> None:
        """`look` is asked at every scrape: how -> rounds that ran twice and were recorded once."""
        name, text = "double_rounds", "Rounds that ran twice and were recorded once"
        self.registry.register(_Watched(name, text, "result", look))

    def observe_receipt(self, receipt: Receipt) -> None:
        """Count a round that ended; call it once per receipt."""
        arm = receipt.arm.value if receipt.arm is not None else "none"
        self.rounds.labels(arm, receipt.outcome.value).inc()
        for attempt in receipt.tries:
            if attempt.failure:
                self.failed_tries.labels(attempt.placement.arm.value).inc()
        if receipt.degraded:
            self.degraded.inc()
        self.transfer_bytes.labels("decode_to_prefill").inc(receipt.bytes_decode_to_prefill)
        self.transfer_bytes.labels("prefill_to_decode").inc(receipt.bytes_prefill_to_decode)
        self.transfer_bytes.labels("home_to_home").inc(receipt.bytes_home_to_home)
        if receipt.completion_tokens:
            self._observe_tokens(receipt)
        if receipt.ttft_s is not None:
            self._observe_times(receipt, receipt.ttft_s, arm)

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)

    def _observe_tokens(self, receipt: Receipt) -> None:
        self.tokens.labels("prompt").inc(receipt.prompt_tokens)
        self.tokens.labels("cached").inc(receipt.cached_tokens)
        self.tokens.labels("pulled").inc(receipt.pulled_tokens)
        self.tokens.labels("completion").inc(receipt.completion_tokens)

    def _observe_times(self, receipt: Receipt, ttft_s: float, arm: str) -> None:
        self.ttft.labels(arm).observe(ttft_s)
        if receipt.itl_s is not None:
            self.itl.observe(receipt.itl_s)
        if receipt.predicted_ttft_s > 0:
            self.ttft_ratio.labels(arm).observe(ttft_s / receipt.predicted_ttft_s)
        phases = {
            "queue": receipt.queue_s,
            "pull": receipt.pull_s,
            "prefill": receipt.prefill_s,
            "push": receipt.push_s,
        }
        for phase, seconds in phases.items():
            self.phase.labels(phase).observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"antiphon_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"antiphon_{name}", text, labels, registry=self.registry, buckets=buckets)


class _Breakers(Collector):
    """Circuit breakers, as the cores have them: counted there, read at a scrape."""

    def __init__(self, look: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        self._look = look

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        now = GaugeMetricFamily(
            "antiphon_breakers_not_closed", "Circuit breakers open or probing", labels=["of"]
        )
        opened = CounterMetricFamily(
            "antiphon_breaker_openings", "Circuit breakers that opened", labels=["of"]
        )
        for kind, (not_closed, openings) in self._look().items():
            now.add_metric([kind], not_closed)
            opened.add_metric([kind], openings)
        return now, opened


class _Pools(Collector):
    """Engines by pool, and how full the pools are."""

    def __init__(
        self, count: Callable[[], Mapping[str, int]], shares: Callable[[], PoolShares | None]
    ) -> None:
        self._count, self._shares = count, shares

    def collect(self) -> Iterable[GaugeMetricFamily]:
        engines = GaugeMetricFamily("antiphon_engines", "Engines that are up, by pool", labels=["pool"])
        for pool, count in self._count().items():
            engines.add_metric([pool], count)
        full = GaugeMetricFamily(
            "antiphon_pool_share",
            "Predicted share of a pool's time or KV room that is asked for",
            labels=["of"],
        )
        shares = self._shares()
        if shares is not None:
            for of in ("prefill", "decode", "kv"):
                full.add_metric([of], getattr(shares, of))
        return engines, full


class _Watched(Collector):
    """A counter that is kept elsewhere and read at a scrape."""

    def __init__(self, name: str, text: str, label: str, look: Callable[[], Mapping[str, int]]) -> None:
        self._name, self._text, self._label = f"antiphon_{name}", text, label
        self._look = look

    def collect(self) -> Iterable[CounterMetricFamily]:
        counter = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for value, times in self._look().items():
            counter.add_metric([value], times)
        return (counter,)
