"""The report's plots, one function each: data in, a matplotlib figure out. Nothing is read or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from antiphon.eval.report_data import (
    Cell,
    Figure,
    Scenario,
    Span,
    arm_shares,
    per_round,
    quantile,
    rounds_attained,
    rounds_of,
    sessions_attained,
)
from antiphon.eval.report_style import (
    INK,
    QUIET,
    Plot,
    arm_look,
    arm_order,
    drawing,
    legend_outside,
    panels,
    png_of,
    seconds,
    seconds_axis,
    series_look,
    short,
)
from antiphon.traces.results import percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_POINTS = 400
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LOAD_WORDS = {
    "rho": "load rho (share of the fleet's time)",
    "session_rate": "sessions that start per second",
    "concurrency": "sessions that are live at once",
}


def load_words(scenario: Scenario, load: float | None) -> str:
    """Such as `rho 0.8`; for captions."""
    kind = scenario.first.load.kind if scenario.first.load else None
    if load is None or kind is None:
        return "the recorded arrivals" if kind == "as_recorded" else "an unknown load"
    return {
        "rho": f"rho {load:g}",
        "session_rate": f"{load:g} sessions/s",
        "concurrency": f"{load:g} live sessions",
    }.get(kind, f"{load:g}")


def seeds_words(scenario: Scenario) -> str:
    """How the seeds show in a plot against load."""
    counts = {len(cell.runs) for cell in scenario.cells.values()}
    if counts == {1}:
        return "One run for each point: no interval can be given."
    most = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(max(counts))
    return f"Points are means of {most} seeds; the band reaches from the lowest seed to the highest."


def targets_words(scenario: Scenario) -> str:
    """Such as: its first token within 2 s and its mean ITL within 50 ms."""
    slo = scenario.first.slo
    named = (("its first token", slo.get("ttft_s")), ("its mean time between tokens", slo.get("itl_s")))
    said = [f"{name} within {seconds(value)}" for name, value in named if value is not None]
    return " and ".join(said) or "the targets met that its session brings"


# ---------------------------------------------------------------- against load


def attainment_plot(scenario: Scenario) -> Plot | None:
    """None where no run had targets."""
    if all(rounds_attained(run.result) is None for run in scenario.runs):
        return None
    wanted = [
        ("rounds that attain", rounds_attained),
        ("sessions that attain whole", sessions_attained),
    ]
    ceiling = max((run.result.attainable or 0.0 for run in scenario.runs), default=0.0)
    with drawing(3.5) as figure:
        axes = panels(figure, 2)
        for axis, (title, value) in zip(axes, wanted, strict=True):
            _against_load(axis, scenario, value)
            axis.set_title(f"Share of {title}")
            axis.yaxis.set_major_formatter(_percent())
        if ceiling:
            axes[0].axhline(ceiling, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            axes[0].annotate(
                "attainable on an idle fleet", (1.0, ceiling), xycoords=("axes fraction", "data"), ha="right",
                va="bottom", fontsize=7.5, color=QUIET, xytext=(0, 1.5), textcoords="offset points",
            )  # fmt: skip
        for axis in axes:
            _share_limits(axis, ceiling if axis is axes[0] else 0.0)
        handles, labels = axes[0].get_legend_handles_labels()
        legend_outside(figure, handles, labels, "policy")
        png = png_of(figure)
    above = (
        " The dashed line is the share of rounds whose first token an idle fleet would bring in time: no "
        "policy can be above it."
    )
    return Plot(
        "attainment",
        f"Which policy meets its targets{' as the load grows' if len(scenario.loads) > 1 else ''}?",
        f"A round attains when it completes with {targets_words(scenario)}; a session, when all its rounds "
        f"do. Higher is better; the axis shows only the range that occurs. {seeds_words(scenario)}"
        f"{above if ceiling else ''}",
        png,
    )


def latency_plot(scenario: Scenario) -> Plot | None:
    """None with a single load: the distributions say more then."""
    if len(scenario.loads) < 2 or None in scenario.loads:
        return None
    with drawing(3.3) as figure:
        axes = panels(figure, 2)
        for axis, (name, metric) in zip(axes, (("TTFT", "ttft_s"), ("ITL", "itl_s")), strict=True):
            _against_load(axis, scenario, quantile(metric, "p90"))
            axis.set_title(f"{name}, 90th percentile")
            axis.set_yscale("log")
            target_s = scenario.first.slo.get(metric)
            _log_limits(axis, target_s)
            seconds_axis(axis.yaxis)
            _target(axis, target_s, vertical=False)
        handles, labels = axes[0].get_legend_handles_labels()
        legend_outside(figure, handles, labels, "policy")
        png = png_of(figure)
    return Plot(
        "latency",
        "How do the slow rounds grow with the load?",
        "Nine of ten rounds are at or below the line. TTFT is the time to a round's first token, ITL its "
        f"mean time between tokens; lower is better, the axes are logarithmic. {seeds_words(scenario)}",
        png,
    )


def _against_load(axis: Axes, scenario: Scenario, value: Figure) -> None:
    """Lines over a numeric load; points side by side where there is one load, or none that is a number."""
    looks = series_look(scenario.series)
    numeric = len(scenario.loads) > 1 and None not in scenario.loads
    for place, name in enumerate(scenario.series):
        found = [(c.load, span) for c in scenario.over_loads(name) if (span := c.span(value)) is not None]
        if not found:
            continue
        x = [load if numeric and load is not None else float(place) for load, _ in found]
        _line(axis, x, [span for _, span in found], looks[name], name)
    if numeric:
        kind = scenario.first.load.kind if scenario.first.load else ""
        axis.set_xlabel(LOAD_WORDS.get(kind, "load"))
    else:
        names = [short(name, 18) for name in scenario.series]
        axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_xlabel(f"policy, at {load_words(scenario, scenario.loads[0])}")


def _line(axis: Axes, x: Sequence[float], spans: Sequence[Span], look: dict[str, Any], name: str) -> None:
    means = [span.mean for span in spans]
    axis.plot(x, means, label=name, zorder=3, **look)
    if all(span.count == 1 for span in spans):
        return
    low, high = [span.low for span in spans], [span.high for span in spans]
    if len(x) > 1:
        axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=2)
    else:
        below, above = means[0] - low[0], high[0] - means[0]
        axis.errorbar(x, means, yerr=[[below], [above]], color=look["color"], capsize=3, zorder=2)


def _share_limits(axis: Axes, ceiling: float) -> None:
    """The range that occurs, with some room; above the ceiling there is room for its label."""
    low, high = axis.get_ylim()
    room = max(0.01, 0.07 * (high - low))
    top = max(min(1.01, high + room), ceiling + room if ceiling else 0.0)
    axis.set_ylim(max(-0.01, low - room), top)
    axis.set_yticks([tick for tick in axis.get_yticks() if max(0.0, low - room) <= tick <= min(1.001, top)])


def _log_limits(axis: Axes, target_s: float | None) -> None:
    """At least a factor of four, so that a flat line looks flat; with the target, if it is not far."""
    low, high = axis.get_ylim()
    if target_s is not None and low / 10 < target_s < high * 10:
        low, high = min(low, target_s * 0.8), max(high, target_s * 1.25)
        axis.set_ylim(low, high)
    if low > 0 and high / low < 4:
        middle = (low * high) ** 0.5
        axis.set_ylim(middle / 2, middle * 2)


def _target(axis: Axes, value: float | None, *, vertical: bool) -> None:
    low, high = axis.get_xlim() if vertical else axis.get_ylim()
    if value is None or not low <= value <= high:
        return
    line = axis.axvline if vertical else axis.axhline
    line(value, color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    words: dict[str, Any] = {"fontsize": 7.5, "color": INK, "textcoords": "offset points"}
    if vertical:
        axis.annotate("target", (value, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right",
                      va="bottom", xytext=(-1.5, 0), **words)  # fmt: skip
    else:
        axis.annotate("target", (0.0, value), xycoords=("axes fraction", "data"), va="bottom",
                      xytext=(3, 1.5), **words)  # fmt: skip


def _percent() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:.4g} %")


# ---------------------------------------------------------------- distributions


def distribution_plot(scenario: Scenario, unread: list[str]) -> Plot:
    """Curves from the rounds files; the three percentiles of the results where there are none."""
    looks = series_look(scenario.series)
    coarse = False
    with drawing(3.4) as figure:
        axes = panels(figure, 2, sharey=True)
        for cell in scenario.at(scenario.focus):
            rounds = [r for run in cell.runs for r in rounds_of(run, unread) if r.completed]
            for axis, metric in zip(axes, ("ttft_s", "itl_s"), strict=True):
                values = sorted(v for r in rounds if (v := getattr(r, metric)) is not None and v > 0)
                coarse |= not values
                _curve(axis, cell, metric, values, looks[cell.series])
        for axis, (name, metric) in zip(axes, (("TTFT", "ttft_s"), ("ITL", "itl_s")), strict=True):
            axis.set_xscale("log")
            _room_for(axis, scenario.first.slo.get(metric))
            seconds_axis(axis.xaxis)
            axis.set_xlabel(f"{name} of a round (logarithmic)")
            axis.set_ylim(0, 1.02)
            axis.yaxis.set_major_formatter(_percent())
            _target(axis, scenario.first.slo.get(metric), vertical=True)
        axes[0].set_ylabel("share of rounds at or below")
        handles, labels = axes[0].get_legend_handles_labels()
        legend_outside(figure, handles, labels, "policy")
        png = png_of(figure)
    points = " Where a run kept no rounds, its 50th, 90th and 99th percentile stand for the curve."
    return Plot(
        "distributions",
        f"How long do rounds take at {load_words(scenario, scenario.focus)}?",
        "Each curve says which share of the completed rounds, of all seeds, had their first token (left) "
        "or their mean time between tokens (right) within that time: a curve further left is faster, and "
        f"where it crosses the dotted target is the share that meets it.{points if coarse else ''}",
        png,
    )


def _room_for(axis: Axes, target_s: float | None) -> None:
    """Show the target, unless it is so far that the curves would become one line."""
    low, high = axis.get_xlim()
    if target_s is not None and low / 30 < target_s < high * 30:
        axis.set_xlim(min(low, target_s * 0.8), max(high, target_s * 1.25))


def _curve(axis: Axes, cell: Cell, metric: str, values: Sequence[float], look: dict[str, Any]) -> None:
    if values:
        shares = [point / CURVE_POINTS for point in range(CURVE_POINTS + 1)]
        line = {key: look[key] for key in ("color", "linestyle")}
        axis.plot([percentile(values, share) for share in shares], shares, label=cell.series, **line)
        return
    spans = [(cell.span(quantile(metric, name)), share) for name, share in QUANTILES.items()]
    known = [(span.mean, share) for span, share in spans if span is not None and span.mean > 0]
    if known:
        axis.plot(*zip(*known, strict=True), label=cell.series, **look)


# ---------------------------------------------------------------- arms and bytes


def arms_plot(scenario: Scenario) -> Plot:
    """Shares of the arms beside the bytes that they move."""
    cells = scenario.at(scenario.focus)
    with drawing(1.3 + 0.32 * len(cells)) as figure:
        left, right = panels(figure, 2, sharey=True)
        _arm_bars(left, cells)
        byte_bars(right, cells)
        left.set_yticks(range(len(cells)), [short(cell.series) for cell in cells])
        left.set_ylim(len(cells) - 0.4, -0.6)
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
        handles, labels = left.get_legend_handles_labels()
        more = right.get_legend_handles_labels()
        legend_outside(figure, [*handles, *more[0]], [*labels, *more[1]])
        png = png_of(figure)
    return Plot(
        "arms",
        f"Where is the prompt computed, and what does it move, at {load_words(scenario, scenario.focus)}?",
        "Left, the share of completed rounds that ran each arm. local: the session's home computes the "
        "prompt; remote_pull: a prefill engine does, and pulls the history from the home first; "
        "remote_recompute: a prefill engine does, with what it has; move: another engine takes the session "
        "over, and fetches its history from the home that it leaves. Right, the KV cache that crossed the "
        "network for one completed round, by where it went. All seeds together.",
        png,
    )


def _arm_bars(axis: Axes, cells: Sequence[Cell]) -> None:
    shares = [arm_shares(cell) for cell in cells]
    starts = [0.0] * len(cells)
    for arm in arm_order([arm for found in shares for arm in found]):
        widths = [found.get(arm, 0.0) for found in shares]
        axis.barh(range(len(cells)), widths, left=starts, height=0.62, label=arm, **arm_look(arm))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(_percent())
    axis.set_xlabel("share of completed rounds")


def byte_bars(axis: Axes, cells: Sequence[Cell]) -> None:
    """MB per completed round, stacked by direction."""
    starts = [0.0] * len(cells)
    ways = (
        ("moved to prefill (pull)", "bytes_decode_to_prefill", "#777777", ""),
        ("moved to decode (push)", "bytes_prefill_to_decode", "#cccccc", "\\\\"),
        ("moved to a new home", "bytes_home_to_home", "#444444", "xx"),
    )
    for name, field_name, colour, hatch in ways:
        spans = [cell.span(per_round(field_name)) for cell in cells]
        widths = [span.mean / 1e6 if span is not None else 0.0 for span in spans]
        if field_name == "bytes_home_to_home" and not any(widths):
            continue  # few policies move sessions
        axis.barh(
            range(len(cells)), widths, left=starts, height=0.62, label=name, facecolor=colour, hatch=hatch,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.set_xlim(0, max(*starts, 1e-3) * 1.05)
    axis.set_xlabel("MB of KV cache moved per round")
