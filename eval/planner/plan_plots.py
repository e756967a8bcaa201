"""The front of attainment against cost, as a picture. Nothing is read or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from antiphon.eval.planner.around import front
from antiphon.eval.planner.ask import Rated
from antiphon.eval.planner.planned import Planned
from antiphon.eval.report_style import (
    INK,
    QUIET,
    SERIES_COLOURS,
    SERIES_MARKERS,
    Plot,
    drawing,
    png_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST = "*"
NAMED_MARKERS = "^vDsPX"
QUESTION = "What does attainment cost?"


def rated_plans(planned: Planned) -> tuple[Rated, ...]:
    """All that were simulated on the last windows, each once; the choice first."""
    every = (*(rated for _, rated in planned.named()), *planned.found.rated, *planned.cheaper)
    return tuple({rated.plan: rated for rated in every}.values())


def front_png(planned: Planned) -> bytes:
    """PNG. Equal answers have equal bytes."""
    every = rated_plans(planned)
    with drawing(4.2) as figure:
        axis = figure.subplots()
        _cloud(axis, every)
        _front(axis, front(every))
        _named(axis, planned)
        axis.set_xlabel("cost of the fleet, USD per hour")
        axis.set_ylabel("rounds that attain, %")
        axis.set_xlim(left=0)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", alignment="left")
        return png_of(figure)


def front_plot(planned: Planned) -> Plot:
    """With its caption, for the page."""
    score = planned.found.best.score
    return Plot(
        "front",
        QUESTION,
        f"Each point is a plan that was simulated on the same windows ({score.rounds:,} rounds of the choice"
        "); bars are one standard error as if rounds were independent. Nothing that is cheaper attains more"
        " than a plan on the line."
        " Of the plans below the choice's price only those are here that a quick estimate puts first at some"
        " price levels, simulated on one of the windows.",
        front_png(planned),
    )


def _cloud(axis: Axes, rated: Sequence[Rated]) -> None:
    for colocated, name, colour, marker in (  # told apart in grey too
        (True, "co-located plans", SERIES_COLOURS[1], SERIES_MARKERS[1]),
        (False, "disaggregated plans", SERIES_COLOURS[0], SERIES_MARKERS[0]),
    ):
        of_form = [each for each in rated if each.plan.colocated is colocated]
        if of_form:
            axis.errorbar(
                [each.plan.price_per_hour for each in of_form],
                [100 * each.score.attainment for each in of_form],
                yerr=[100 * each.score.noise for each in of_form],
                fmt=marker, color=colour, markersize=4.5, elinewidth=0.8, alpha=0.75, label=name, zorder=3,
            )  # fmt: skip


def _front(axis: Axes, best: Sequence[Rated]) -> None:
    axis.step(
        [each.plan.price_per_hour for each in best],
        [100 * each.score.attainment for each in best],
        where="post", color=QUIET, linewidth=1.2, zorder=2, label="front",
    )  # fmt: skip


def _named(axis: Axes, planned: Planned) -> None:
    """Rings, so that the point below shows; names of one plan are told together."""
    names: dict[Rated, list[str]] = {}
    for name, rated in planned.named():
        names.setdefault(rated, []).append(name)
    for number, (rated, called) in enumerate(names.items()):
        first = number == 0
        axis.plot(
            [rated.plan.price_per_hour], [100 * rated.score.attainment], linestyle="", color=INK,
            marker=BEST if first else NAMED_MARKERS[(number - 1) % len(NAMED_MARKERS)],
            markersize=15 if first else 10, fillstyle="none", label=",\n".join(called), zorder=4,
        )  # fmt: skip
