"""What `trace info` says of a trace: figures by hand, bounded memory, what is lacking, the pictures."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from antiphon.traces.info import Tally, TraceReport, TraceSummary
from antiphon.traces.plots import MOST_BINS, histogram, short, show_info
from antiphon.traces.results import percentile
from antiphon.traces.schema import RoundTrace, SessionTrace

FULL = (
    SessionTrace(
        "a",
        (
            RoundTrace(100, 20),
            RoundTrace(150, 10, 120, 4.0, "bash"),
            RoundTrace(90, 10, 40, 2.0),
            RoundTrace(40_000, 10, 100, 1.0, "bash"),
        ),
        start_s=1.0, shared_prefix="p", shared_tokens=40, slo_ttft_s=1.0,
    ),
    SessionTrace("b", (RoundTrace(200, 5),), start_s=2.0, shared_prefix="p", shared_tokens=40),
    SessionTrace("c", (RoundTrace(140_000, 5),), parent="a", after_round=1),
)  # fmt: skip


def report(*sessions: SessionTrace) -> TraceReport:
    made = TraceReport()
    made.add_all(sessions)
    return made


def summary(*sessions: SessionTrace) -> TraceSummary:
    return report(*sessions).summary("x.jsonl")


def screen(made: TraceReport, **options: Any) -> str:
    console = Console(file=io.StringIO(), color_system=None, **{"width": 120, **options})
    show_info(made.summary("x.jsonl"), made.tallies, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figures_by_hand() -> None:
    """Counts, reuse and windows of three sessions."""
    found = summary(*FULL)
    assert (found.sessions, found.rounds, found.sub_agents, found.shared_prefixes) == (3, 6, 1, 1)
    prompts = 100 + 150 + 90 + 40_000 + 200 + 140_000
    assert (found.prompt_tokens, found.output_tokens) == (prompts, 60)
    assert found.cached_share_within == pytest.approx((120 + 40 + 100) / prompts)
    assert found.cached_share == pytest.approx((120 + 40 + 100 + 40) / prompts)
    assert (found.compactions, found.partly_kept) == (1, 1)
    assert found.rounds_over == {"32768": 2, "131072": 1}
    assert found.tools == {"bash": 2}


def test_distributions_by_hand() -> None:
    """Increments, kept shares and gaps are of later rounds; contexts and sums are of sessions."""
    spreads = summary(*FULL).spreads
    increment, kept, gap = spreads["increment"], spreads["kept_share"], spreads["gap_s"]
    assert increment is not None and kept is not None and gap is not None
    assert (increment.count, increment.min, increment.p50, increment.max) == (3, 30, 50, 39_900)
    assert (kept.min, kept.p50, kept.max) == (40 / 160, 1.0, 1.0)
    assert (gap.mean, gap.p50, gap.p90) == pytest.approx((7 / 3, 2.0, 3.6))
    for name, least in (("rounds_per_session", 1), ("first_prompt", 100), ("longest_context", 205)):
        spread = spreads[name]
        assert spread is not None and (spread.count, spread.min) == (3, least)
    sums = spreads["session_prompts"], spreads["session_gaps_s"]
    assert sums[0] is not None and sums[0].max == 140_000
    assert sums[1] is not None and sums[1].max == 7.0


def test_a_full_trace_lacks_nothing() -> None:
    """A sub-agent needs no arrival: it starts with its parent."""
    assert summary(*FULL).lacks == ()


def test_what_a_trace_lacks() -> None:
    """Each field that no session fills is named with what it means for a run."""
    bare = SessionTrace("a", (RoundTrace(10, 1), RoundTrace(20, 1)))
    lacks = {lack.field: f"{lack.missing}: {lack.meaning}" for lack in summary(bare).lacks}
    assert set(lacks) == {
        "start_s", "slo_ttft_s, slo_itl_s", "gap_s", "tool", "shared_prefix", "kept_tokens",
    }  # fmt: skip
    assert lacks["start_s"].startswith("no arrivals: give --session-rate or --load")
    single = summary(SessionTrace("a", (RoundTrace(10, 1),)))
    assert "no session has a second round" in [lack.missing for lack in single.lacks]
    half = summary(*FULL, SessionTrace("d", (RoundTrace(10, 1),)))
    assert [lack.missing for lack in half.lacks] == ["1 of 3 sessions have no arrival"]


def test_a_prefix_that_one_session_has_is_not_shared() -> None:
    """An id that comes once gives nothing to reuse."""
    alone = SessionTrace("a", (RoundTrace(10, 1),), shared_prefix="p", shared_tokens=5)
    assert "shared_prefix" in [lack.field for lack in summary(alone).lacks]
    assert summary(alone).cached_share == 0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(1, 20))
def test_a_tally_is_exact_or_within_one_percent(values: list[float], exact_values: int) -> None:
    """Percentiles are those of results; over its limit of different values they may be off by 1 %."""
    tally = Tally(exact_values)
    for value in values:
        tally.add(value)
    spread = tally.spread()
    assert spread is not None
    assert spread.exact == (len(set(values)) <= exact_values)
    assert spread.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-6)
    ordered = sorted(values)
    for share, got in ((0.5, spread.p50), (0.9, spread.p90), (0.99, spread.p99)):
        within = 1e-9 if spread.exact else 0.0101
        assert got == pytest.approx(percentile(ordered, share), rel=within, abs=1e-9)


def test_a_tally_is_bounded() -> None:
    """A hundred thousand different values are kept in a few hundred bins."""
    tally = Tally(exact_values=100)
    for value in range(100_000):
        tally.add(value)
    assert len(tally.items()) < 1000
    assert sum(count for _, count in tally.items()) == tally.count == 100_000


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=60))
def test_a_histogram_has_every_value_once(values: list[float]) -> None:
    """However the ends are joined, the shares make 1 and the bins stay few."""
    tally = Tally()
    for value in values:
        tally.add(value)
    bins = histogram(tally)
    assert sum(item.share for item in bins) == pytest.approx(1)
    assert 1 <= len(bins) <= MOST_BINS
    assert len({item.label for item in bins}) == len(bins)


def test_bins_by_hand() -> None:
    """Edges are 1, 2, 5, 10, ...: a value on an edge is in the bin that begins there; zero stands alone."""
    tally = Tally()
    for value in (0.0, 0.05, 1.0, 1.99, 2.0, 1000.0, 0.1, 0.5):
        tally.add(value)
    found = {item.label: round(item.share * 8) for item in histogram(tally) if item.share}
    assert found == {"0": 1, "below 0.2": 2, "0.5 - 1": 1, "1 - 2": 2, "2 - 5": 1, "from 200": 1}
    small = Tally()
    for value in (2, 3, 3, 6):
        small.add(value)
    assert [(item.label, item.share) for item in histogram(small)] == [("2", 0.25), ("3", 0.5), ("6", 0.25)]


def test_short_numbers() -> None:
    """3 figures, and no 1e+03k."""
    assert [short(v) for v in (0.05, 7, 999, 1000, 12_345, 999_999, 2.5e6, 4e9)] == [
        "0.05", "7", "999", "1k", "12.3k", "1M", "2.5M", "4G",
    ]  # fmt: skip


def test_the_screen_tells_all() -> None:
    """Title, table, pictures with shares, reuse, windows, tools, what is lacking."""
    shown = screen(report(*FULL))
    for words in (
        "x.jsonl: 3 sessions, 6 rounds", "rounds per session", "increment, tokens", "10k - 20k", "66.7%", "█",
        "reuse with an infinite cache: 0.2% of all prompt tokens", "1 have a shorter prompt",
        "2 rounds over 32,768, 1 rounds over 131,072", "tools: bash 100%", "1 sessions have a parent",
    ):  # fmt: skip
        assert words in shown, words
    bare = screen(report(SessionTrace("a", (RoundTrace(10, 1),))))
    assert "no arrivals (start_s): give --session-rate or --load" in bare


def test_the_screen_fits_a_narrow_terminal() -> None:
    """80 columns: the pictures go below each other, and no line is longer."""
    shown = screen(report(*FULL), width=80)
    assert max(map(len, shown.splitlines())) <= 80 and "longest context" in shown


def test_the_screen_of_an_empty_trace() -> None:
    """Nothing to count is no reason to fail."""
    assert "0 sessions, 0 rounds" in screen(report())


def test_unsent_output_is_no_compaction() -> None:
    """A prompt between the previous prompt and that with its output is no compaction."""
    found = summary(SessionTrace("a", (RoundTrace(100, 60), RoundTrace(150, 1, 100))))
    assert (found.compactions, found.partly_kept) == (0, 1)
