"""Parts of a pull that need no peer: merging of spans, batches, the circuit breaker."""

from __future__ import annotations

from antiphon.engines.breaker import CircuitBreaker
from antiphon.engines.nixl_agent import MAX_BATCH_BYTES, Span, cut_batches, merge_spans


def test_adjacent_pages_are_read_as_one() -> None:
    """Runs that are adjacent on both sides become one descriptor, up to the size of a batch."""
    spans = [Span(0, 100, 10), Span(10, 110, 10), Span(20, 130, 10), Span(40, 140, 10)]
    assert merge_spans(spans) == [Span(0, 100, 20), Span(20, 130, 10), Span(40, 140, 10)]
    half = MAX_BATCH_BYTES // 2 + 1
    large = [Span(0, 0, half), Span(half, half, half)]
    assert merge_spans(large) == large


def test_batches_are_bounded() -> None:
    """No handle carries more than MAX_BATCH_BYTES, and nothing is lost or reordered."""
    third = MAX_BATCH_BYTES // 3
    spans = [Span(number, number, third) for number in range(7)]
    batches = cut_batches(spans)
    assert [span for batch in batches for span in batch] == spans
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert cut_batches([]) == []


def test_circuit_breaker_opens_probes_and_closes() -> None:
    """Three failures in a row open it; after a pause one probe; then a longer pause; success resets."""
    now = [0.0]
    breaker = CircuitBreaker(failures=3, open_s=1.0, max_open_s=3.0, clock=lambda: now[0])
    for _ in range(3):
        assert breaker.allows("peer")
        breaker.failed("peer")
    assert not breaker.allows("peer") and breaker.allows("another")
    now[0] = 1.0
    assert breaker.allows("peer") and not breaker.allows("peer"), "one probe"
    breaker.failed("peer")
    now[0] = 2.5
    assert not breaker.allows("peer")
    now[0] = 3.0
    assert breaker.allows("peer")
    breaker.succeeded("peer")
    assert breaker.allows("peer") and breaker.allows("peer")
