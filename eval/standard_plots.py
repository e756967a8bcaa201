"""The figures of the standard evaluation: attainment against load, a panel for each trace, one per cluster.

Pictures have a white ground of their own, so that they can be read on a dark page too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from antiphon.eval.report_style import QUIET, drawing, png_of, series_look
from antiphon.eval.standard_data import SATURATION, Cell, Found
from antiphon.eval.standard_grid import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL_INCHES = 2.4
NAMED = ("ampd", "local", "remote", "threshold_queue", "isl_bounding")
"""Drawn in colour beside ours, where they ran: the paper's policy and those it compared itself with."""
OTHERS: Mapping[str, Any] = {"color": "#bbbbbb", "linewidth": 1.0, "zorder": 2}
LINE: Mapping[str, Any] = {"linewidth": 1.4, "markersize": 4.0, "zorder": 3}
FIRST: Mapping[str, Any] = {
    "color": "#000000", "marker": "o", "linewidth": 2.6, "markersize": 5.0, "zorder": 4,
}  # fmt: skip


def attainment_figure(found: Found, cluster: str) -> bytes:
    """PNG: share of rounds that attain over rho, policies as lines, each under its better ordering."""
    cells = [cell for cell in found.cells if cell.scenario.cluster == cluster]
    traces = list(dict.fromkeys(cell.scenario.source.name for cell in cells))
    rows = math.ceil(len(traces) / COLUMNS)
    with drawing(0.75 + PANEL_INCHES * rows) as figure:
        made = figure.subplots(rows, min(COLUMNS, len(traces)), squeeze=False, sharex=True, sharey=True)
        axes = [axis for row in made for axis in row]
        for axis, trace in zip(axes, traces, strict=False):
            _panel(axis, [cell for cell in cells if cell.scenario.source.name == trace])
            axis.set_title(trace)
        for axis in axes[len(traces) :]:
            axis.set_visible(False)
        for row in made:
            row[0].set_ylabel("rounds that attain, %")
        for column in range(len(made[0])):
            lowest = [row[column] for row in made if row[column].get_visible()][-1]
            lowest.set_xlabel("load rho")
            lowest.tick_params(labelbottom=True)
        _legend(figure, axes)
        return png_of(figure)


def _panel(axis: Axes, cells: Sequence[Cell]) -> None:
    """Loads in order; grey lines first, ours last and above all."""
    present = {name for cell in cells for name in cell.policies}
    others = sorted(present - {OURS, *NAMED})
    for name in others:
        _line(axis, cells, name, label="every other policy" if name == others[0] else "", **OTHERS)
    looks = series_look(NAMED)
    for name in (name for name in NAMED if name in present):
        _line(axis, cells, name, label=name, **{**looks[name], **LINE})
    if OURS in present:
        _line(axis, cells, OURS, label=OURS, **FIRST)
    axis.axvline(SATURATION, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axis.set_ylim(-3, 103)
    axis.set_xticks([cell.load for cell in cells])


def _line(axis: Axes, cells: Sequence[Cell], name: str, **look: Any) -> None:
    shown = [(cell.load, cell.policies[name].attained) for cell in cells if name in cell.policies]
    loads, means = [load for load, _ in shown], [100 * interval.mean for _, interval in shown]
    axis.plot(loads, means, **look)
    halves = [interval.half for _, interval in shown]
    if name == OURS and None not in halves:
        reach = [100 * (half or 0.0) for half in halves]
        low = [mean - half for mean, half in zip(means, reach, strict=True)]
        high = [mean + half for mean, half in zip(means, reach, strict=True)]
        axis.fill_between(loads, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=1)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Each policy once, ours first, below all panels."""
    known: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    order = sorted(known, key=lambda name: (name != OURS, name not in NAMED, name))
    figure.legend([known[name] for name in order], order, loc="outside lower center", ncols=len(order))
