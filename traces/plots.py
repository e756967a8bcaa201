"""Terminal pictures of a trace, with rich alone: one table, histograms on a 1-2-5 scale, plain words."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from antiphon.traces.info import Spread, Tallies, Tally, TraceSummary

MOST_BINS = 12
BAR_CELLS = 18
EIGHTHS = " ▏▎▍▌▋▊▉█"
TOOLS_SHOWN = 8

LABELS = {
    "rounds_per_session": "rounds per session",
    "first_prompt": "first prompt, tokens",
    "prompt": "prompt, tokens",
    "increment": "increment, tokens",
    "output": "output, tokens",
    "kept_share": "kept of what was there",
    "gap_s": "gap, seconds",
    "longest_context": "longest context, tokens",
    "session_prompts": "prompts per session, tokens",
    "session_gaps_s": "gaps per session, seconds",
}
HISTOGRAMS = ("rounds_per_session", "first_prompt", "increment", "output", "gap_s", "longest_context")


class Bin(NamedTuple):
    label: str
    share: float
    """Of all values."""


def show_info(summary: TraceSummary, tallies: Tallies, console: Console) -> None:
    """The whole screen of `antiphon trace info`."""
    console.print(_overview(summary))
    console.print(_table(summary))
    plain = console.options.ascii_only
    console.print(_histograms(tallies, columns=max(1, min(3, console.width // 39)), plain=plain))
    for line in _facts(summary):
        console.print(line, markup=False, highlight=False)


def histogram(tally: Tally) -> list[Bin]:
    """Shares of the values from one step of 1, 2, 5, 10, ... to the next, at most `MOST_BINS`: the ends are
    joined to "below" and "from" bins where there are more. Zero has a bin of its own, and so has each of
    a few small whole numbers."""
    if tally.exact and tally.most <= MOST_BINS and all(value == int(value) for value, _ in tally.items()):
        return [Bin(f"{value:g}", count / tally.count) for value, count in tally.items()]
    counts: dict[float, int] = {}
    for value, count in tally.items():
        edge = _edge(value)
        counts[edge] = counts.get(edge, 0) + count
    if not counts:
        return []
    zero = counts.pop(0.0, 0)
    bins = [(edge, counts.get(edge, 0)) for edge in _edges(min(counts), max(counts))] if counts else []
    below = above = False
    while len(bins) > MOST_BINS - bool(zero):
        if bins[0][1] <= bins[-1][1]:
            bins[:2] = [(bins[1][0], bins[0][1] + bins[1][1])]
            below = True
        else:
            bins[-2:] = [(bins[-2][0], bins[-2][1] + bins[-1][1])]
            above = True
    shown = [Bin("0", zero / tally.count)] if zero else []
    for index, (edge, count) in enumerate(bins):
        label = f"{short(edge)} - {short(_next_edge(edge))}"
        if below and index == 0:
            label = f"below {short(_next_edge(edge))}"
        elif above and index == len(bins) - 1:
            label = f"from {short(edge)}"
        shown.append(Bin(label, count / tally.count))
    return shown


def short(value: float) -> str:
    """3 figures with k, M, G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


STEPS = (1.0, 2.0, 5.0)
LEAST = 1e-6
"""What is smaller counts as zero."""


def _step(value: float) -> tuple[int, int]:
    """Decade and index into `STEPS` of the edge at or below a value above 0."""
    decade = math.floor(math.log10(value) + 1e-9)
    index = bisect_right(STEPS, value / 10.0**decade * (1 + 1e-9)) - 1
    return decade, max(0, index)


def _at(decade: int, index: int) -> float:
    decade, index = decade + index // 3, index % 3
    return float(f"{STEPS[index]:g}e{decade}")


def _edge(value: float) -> float:
    return _at(*_step(value)) if value >= LEAST else 0.0


def _next_edge(edge: float) -> float:
    decade, index = _step(edge)
    return _at(decade, index + 1)


def _edges(low: float, high: float) -> Iterator[float]:
    while low <= high:
        yield low
        low = _next_edge(low)


def _overview(summary: TraceSummary) -> Text:
    words = (
        f"{summary.path}: {summary.sessions:,} sessions, {summary.rounds:,} rounds, "
        f"{short(summary.prompt_tokens)} prompt tokens, {short(summary.output_tokens)} output tokens"
    )
    return Text(words, style="bold")


def _table(summary: TraceSummary) -> Table:
    table = Table()
    table.add_column("")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for key, label in LABELS.items():
        spread = summary.spreads[key]
        if spread is None:
            continue
        values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
        table.add_row(label, *(_cell(key, value) for value in values))
    return table


def _cell(key: str, value: float) -> str:
    if key == "kept_share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _histograms(tallies: Tallies, columns: int, plain: bool) -> RenderableType:
    """Side by side, as many as fit."""
    pictures = [
        _picture(LABELS[key], histogram(getattr(tallies, key)), plain)
        for key in HISTOGRAMS
        if getattr(tallies, key).count
    ]
    rows: list[RenderableType] = []
    for begin in range(0, len(pictures), columns):
        grid = Table.grid(padding=(0, 2))
        for _ in range(columns):
            grid.add_column(vertical="top")
        grid.add_row(*pictures[begin : begin + columns])
        rows.append(Padding(grid, (1, 0, 0, 0)))
    return Group(*rows)


def _picture(title: str, bins: list[Bin], plain: bool) -> Text:
    most = max((item.share for item in bins), default=0.0) or 1.0
    wide = max((len(item.label) for item in bins), default=0)
    lines = [Text(title, style="bold")]
    for item in bins:
        line = Text(f"{item.label:>{wide}} ")
        line.append(f"{_bar(item.share / most, plain):<{BAR_CELLS}} ", style="cyan")
        lines.append(line.append(f"{item.share:5.1%}" if item.share < 0.9995 else " 100%"))
    return Text("\n").join(lines)


def _bar(share: float, plain: bool) -> str:
    """A bar of at most `BAR_CELLS`; what is there at all is seen."""
    eighths = max(1, round(share * BAR_CELLS * 8)) if share > 0 else 0
    if plain:
        return "#" * math.ceil(eighths / 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _facts(summary: TraceSummary) -> Iterator[str]:
    yield ""
    yield (
        f"reuse with an infinite cache: {summary.cached_share:.1%} of all prompt tokens"
        f" ({summary.cached_share_within:.1%} within sessions; {summary.shared_prefixes} shared prefixes)"
    )
    later = summary.rounds - summary.sessions
    if later:
        yield (
            f"of {later:,} later rounds {summary.partly_kept:,} keep only a part of what was there, "
            f"{summary.compactions:,} have a shorter prompt than the one before"
        )
    over = ", ".join(f"{count:,} rounds over {int(w):,}" for w, count in summary.rounds_over.items())
    yield f"windows (prompt and output): {over}"
    if summary.sub_agents:
        yield f"sub-agents: {summary.sub_agents:,} sessions have a parent"
    if summary.tools:
        yield f"tools: {_tools(summary)}"
    if any(spread and not spread.exact for spread in _spreads(summary)):
        yield "percentiles are within 1 %: too many different values to keep all"
    for lack in summary.lacks:
        yield f"{lack.missing} ({lack.field}): {lack.meaning}"


def _tools(summary: TraceSummary) -> str:
    used = sum(summary.tools.values())
    names = [f"{name} {count / used:.0%}" for name, count in list(summary.tools.items())[:TOOLS_SHOWN]]
    more = len(summary.tools) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _spreads(summary: TraceSummary) -> Iterator[Spread | None]:
    yield from summary.spreads.values()
