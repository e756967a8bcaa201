"""The front of attainment against cost, as a picture. Nothing is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from typing import TYPE_CHECKING

from antiphon.eval.planner.around import front
from antiphon.eval.planner.ask import Rated
from antiphon.eval.planner.planned import Planned, same_windows
from antiphon.eval.planner.plans import Plan
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
BEST_SIZE, NAMED_SIZE, SIZE = 15.0, 10.0, 4.5
QUESTION = "What does attainment cost?"

AXES_POINTS = 430.0, 250.0
"""Width and height of the axes, about."""
SHIFTS = (0.0, *(side * 5.0 * step for step in range(1, 10) for side in (1, -1)))
"""Points of the picture, by which a mark moves aside."""
COLOCATED = "co-located plans", SERIES_COLOURS[1], SERIES_MARKERS[1]
DISAGGREGATED = "disaggregated plans", SERIES_COLOURS[0], SERIES_MARKERS[0]


def rated_plans(planned: Planned) -> tuple[Rated, ...]:
    """All of the last rung and those below the choice's price, each once; the choice first."""
    every = (*(rated for _, rated in planned.named()), *planned.found.rated, *planned.cheaper)
    return tuple({rated.plan: rated for rated in every}.values())


def front_png(planned: Planned) -> bytes:
    """PNG. Equal answers have equal bytes."""
    with drawing(4.2) as figure:
        axis = figure.subplots()
        draw_front(axis, planned)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", alignment="left")
        return png_of(figure)


def draw_front(axis: Axes, planned: Planned) -> None:
    """All but the legend."""
    every = rated_plans(planned)
    names: dict[Rated, list[str]] = {}
    for name, rated in planned.named():
        names.setdefault(rated, []).append(name)
    at = _places(axis, every, names)
    _cloud(axis, planned, every, at)
    _front(axis, front(every))
    _named(axis, names, at)
    axis.set_xlabel("cost of the fleet, USD per hour")
    axis.set_ylabel("rounds that attain, %")


def _places(axis: Axes, every: Sequence[Rated], names: Mapping[Rated, Sequence[str]]) -> dict[Plan, float]:
    """Where each plan stands on the axis of cost, whose limits are set: at its price or, where that is taken,
    beside it."""
    shares = [100 * each.score.attainment for each in every]
    bars = [_bar(each) for each in every]
    low = min(share - bar for share, bar in zip(shares, bars, strict=True))
    high = max(share + bar for share, bar in zip(shares, bars, strict=True))
    room = max(0.1, 0.06 * (high - low))
    right = 1.1 * max(each.plan.price_per_hour for each in every)
    axis.set_xlim(0, right)
    axis.set_ylim(low - room, high + room)
    wide, tall = AXES_POINTS[0] / right, AXES_POINTS[1] / (high - low + 2 * room)
    marks = [
        (each.plan.price_per_hour * wide, share * tall, _size(number, each in names))
        for number, (each, share) in enumerate(zip(every, shares, strict=True))
    ]
    shifts = aside(marks)
    return {r.plan: r.plan.price_per_hour + shift / wide for r, shift in zip(every, shifts, strict=True)}


def _bar(rated: Rated) -> float:
    """One standard error, in points; none of what is not exact."""
    return 0.0 if rated.score.hopeless else 100 * rated.score.noise


def _size(number: int, named: bool) -> float:
    return SIZE if not named else NAMED_SIZE if number else BEST_SIZE


def front_plot(planned: Planned) -> Plot:
    """With its caption, for the page."""
    best = planned.found.best
    rounds = f"{best.score.rounds:,} rounds of the choice"
    said = [
        f"Each full point is a plan that was simulated on {same_windows(best)} ({rounds}); by these, and by"
        " whether it lasts in a long one, the choice was made; bars are one standard error. Nothing that is"
        " cheaper attains more than a plan on the line. Marks that would cover each other stand side by side."
    ]
    if planned.cheaper:
        said.append(
            "Of the plans below the choice's price only those are here that a quick estimate puts first at"
            " some price levels."
        )
    if not all(map(planned.comparable, rated_plans(planned))):
        said.append(
            "Hollow points do not compare with the others exactly: they were simulated on the first of the"
            " windows only, or given up as far behind, or drown in a longer window."
        )
    return Plot("front", QUESTION, " ".join(said), front_png(planned))


def aside(marks: Sequence[tuple[float, float, float]]) -> list[float]:
    """How far to the right each mark goes, (x, y, size) in points, so that none covers one before it; 0 where
    there is no room."""
    placed: list[tuple[float, float, float]] = []
    shifts: list[float] = []
    for x, y, size in marks:
        free = (
            shift
            for shift in SHIFTS
            if all(hypot(x + shift - a, y - b) >= (size + other) / 2 for a, b, other in placed)
        )
        shifts.append(next(free, 0.0))
        placed.append((x + shifts[-1], y, size))
    return shifts


def _cloud(axis: Axes, planned: Planned, rated: Sequence[Rated], at: Mapping[Plan, float]) -> None:
    for name, colour, marker in (COLOCATED, DISAGGREGATED):  # told apart in grey too
        of_form = [each for each in rated if each.plan.colocated is (name == COLOCATED[0])]
        for full in (True, False):
            shown = [each for each in of_form if planned.comparable(each) is full]
            axis.errorbar(
                [at[each.plan] for each in shown],
                [100 * each.score.attainment for each in shown],
                yerr=[_bar(each) for each in shown],
                fmt=marker, color=colour, markersize=SIZE, markerfacecolor=colour if full else "white",
                elinewidth=0.8, alpha=0.75, zorder=3,
            )  # fmt: skip
        if of_form:
            axis.plot([], [], linestyle="", marker=marker, color=colour, markersize=SIZE, label=name)
    if not all(map(planned.comparable, rated)):
        axis.plot(
            [], [], linestyle="", marker="o", color=QUIET, markerfacecolor="white", markersize=SIZE,
            label="hollow: of one window only,\ngiven up, or drowning later",
        )  # fmt: skip


def _front(axis: Axes, best: Sequence[Rated]) -> None:
    axis.step(
        [each.plan.price_per_hour for each in best],
        [100 * each.score.attainment for each in best],
        where="post", color=QUIET, linewidth=1.2, zorder=2, label="front",
    )  # fmt: skip


def _named(axis: Axes, names: Mapping[Rated, Sequence[str]], at: Mapping[Plan, float]) -> None:
    """Rings, so that the point below shows; names of one plan are told together."""
    for number, (rated, called) in enumerate(names.items()):
        axis.plot(
            [at[rated.plan]], [100 * rated.score.attainment], linestyle="", color=INK,
            marker=NAMED_MARKERS[(number - 1) % len(NAMED_MARKERS)] if number else BEST,
            markersize=_size(number, True), fillstyle="none", label=",\n".join(called), zorder=4,
        )  # fmt: skip
