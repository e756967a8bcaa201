"""The tables of the standard evaluation, as Markdown. Nothing is read or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from antiphon.eval.report_data import quantile
from antiphon.eval.report_style import arm_order, seconds
from antiphon.eval.standard_data import (
    TIE,
    Cell,
    Found,
    Interval,
    Shown,
    ablation,
    gains,
)
from antiphon.eval.standard_grid import ABLATION, OURS, Scenario

NOTHING = "\N{EN DASH}"
REORDERED = "r"
"""After an attainment that is shown under another ordering than the first."""
FOCUS_LOADS = (0.7, 0.9)
"""Of the times and arms."""
DYNAMO, CO_LOCATED = ("remote", "threshold_queue", "isl_bounding"), ("local",)
PUBLISHED_DYNAMO, PUBLISHED_CO_LOCATED = "+67 % (up to +968 %)", "+340 % (up to +3,435 %)"
PUBLISHED_LOCAL = "14 to 32 %"
"""Of AMPD's paper (arXiv:2602.14516), on its own fleet, models and targets."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns lean left, the others right."""
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: Interval) -> str:
    """A difference of shares, in points, with its interval."""
    half = "" if difference.half is None else f" ±{100 * difference.half:.1f}"
    return f"{100 * difference.mean:+.1f}{half}"


def relative(share: float) -> str:
    return f"{100 * share:+,.0f} %"


# ---------------------------------------------------------------- the summary


def verdict_table(found: Found) -> str:
    """Cells below saturation: won, tied, lost, per cluster."""
    clusters = dict.fromkeys(cell.scenario.cluster for cell in found.counted)
    rows = [[name, *_verdicts(c for c in found.counted if c.scenario.cluster == name)] for name in clusters]
    head = ["cluster", "cells", "won", "tied", "lost", "best or tied"]
    return table(head, [*rows, ["all", *_verdicts(found.counted)]])


def _verdicts(cells: Iterable[Cell]) -> list[str]:
    counts = Counter(cell.verdict for cell in cells if cell.verdict is not None)
    total = counts.total()
    good = counts["won"] + counts["tied"]
    share = f"{100 * good / total:.0f} %" if total else NOTHING
    return [str(total), *(str(counts[name]) for name in ("won", "tied", "lost")), share]


def lost_table(found: Found) -> str:
    """Every lost cell below saturation, the worst first."""
    lost = [cell for cell in found.counted if cell.verdict == "lost"]
    rows = []
    for cell in sorted(lost, key=lambda cell: cell.difference.mean if cell.difference else 0.0):
        if cell.ours is None or cell.best_other is None or cell.difference is None:
            continue
        ours, other = percent(cell.ours.attained.mean), percent(cell.best_other.attained.mean)
        place = [cell.scenario.source.name, cell.scenario.cluster, f"{cell.load:g}"]
        rows.append([*place, ours, f"{cell.best_other.policy} {other}", points(cell.difference)])
    head = ["trace", "cluster", "rho", f"{OURS}, %", "best other, %", "points"]
    return table(head, rows, left=2) if rows else "None.\n"


def gain_table(found: Found) -> str:
    """How much more ours attains than others, beside what AMPD published of itself."""
    wanted: list[tuple[str, Sequence[str], str]] = [
        (f"Dynamo's policies: {', '.join(DYNAMO)}", DYNAMO, PUBLISHED_DYNAMO),
        *((f"- {name}", (name,), "") for name in DYNAMO),
        (f"co-located: {', '.join(CO_LOCATED)}", CO_LOCATED, PUBLISHED_CO_LOCATED),
        ("ampd", ("ampd",), ""),
    ]
    rows = []
    for words, names, published in wanted:
        if values := gains(found.counted, names):
            figures = [relative(fmean(values)), relative(median(values)), relative(max(values))]
            rows.append([words, str(len(values)), *figures, published or NOTHING])
    head = ["against", "comparisons", "mean", "median", "largest", "AMPD's mean, published"]
    return table(head, rows) if rows else "No policy to compare with was run.\n"


def local_table(found: Found) -> str:
    """Share of completed rounds that ran on their home, over the cells below saturation."""
    rows = []
    for name in (OURS, "ampd"):
        shown = [cell.policies[name] for cell in found.counted if name in cell.policies]
        shares = sorted(one.arms().get("local", 0.0) for one in shown)
        if shares:
            figures = [fmean(shares), median(shares), shares[0], shares[-1]]
            rows.append([name, *(f"{100 * figure:.0f} %" for figure in figures)])
    rows.append(["AMPD, published", PUBLISHED_LOCAL, NOTHING, NOTHING, NOTHING])
    return table(["policy", "mean over cells", "median", "least", "most"], rows)


def ablation_table(found: Found) -> str:
    """What ours loses without each of its parts; "" where none was left out."""
    rows = []
    for part in (*ABLATION, "without-ordering"):
        values = ablation(found.counted, part)
        if not values:
            continue
        means = [difference.mean for _, difference in values]
        worst, most = max(values, key=lambda item: item[1].mean)
        where = f"{worst.scenario.source.name}, {worst.scenario.cluster}, rho {worst.load:g}"
        rows.append(
            [
                part.replace("-", " "),
                f"{-100 * fmean(means):+.2f}",
                str(sum(mean > TIE for mean in means)),
                str(sum(mean < -TIE for mean in means)),
                f"{-100 * most.mean:+.1f} ({where})",
            ]
        )
    head = ["variant", "points, mean", "cells > 1 point worse", "cells > 1 point better", "worst cell"]
    return table(head, rows) if rows else ""


# ---------------------------------------------------------------- one trace on one cluster


def attainment_table(cells: Sequence[Cell]) -> str:
    """Policies by loads: rounds that attain, in percent, the best bold; then ours against the others."""
    names = sorted({name for cell in cells for name in cell.policies}, key=lambda name: (name != OURS, name))
    best = [max((percent(s.attained.mean) for s in c.policies.values()), key=float) for c in cells]
    rows = []
    for name in names:
        row = [name]
        for cell, top in zip(cells, best, strict=True):
            row.append(_share(cell.policies.get(name), top))
        rows.append(row)
    if any(cell.difference is not None for cell in cells):
        rows.append([f"*{OURS} less the best other*", *map(_against, cells)])
    return table(["policy", *(f"rho {cell.load:g}" for cell in cells)], rows)


def _share(shown: Shown | None, top: str) -> str:
    if shown is None:
        return NOTHING
    interval = shown.attained
    words = percent(interval.mean)
    words = f"**{words}**" if words == top else words
    half = "" if interval.half is None else f" ±{100 * interval.half:.1f}"
    return words + half + ("" if shown.ordering == "fcfs" else f" {REORDERED}")


def _against(cell: Cell) -> str:
    if cell.difference is None or cell.best_other is None:
        return NOTHING
    words = f"{points(cell.difference)} {cell.verdict}"
    return words if cell.verdict == "tied" else f"{words} ({cell.best_other.policy})"


def times_table(cell: Cell) -> str:
    """Times and arms of every policy at one load, the best first."""
    shown = sorted(cell.policies.values(), key=lambda one: -one.attained.mean)
    arms = arm_order([arm for one in shown for arm in one.arms()])
    rows = []
    for one in shown:
        ttft50, ttft90, itl90 = (
            one.mean(quantile(metric, name))
            for metric, name in (("ttft_s", "p50"), ("ttft_s", "p90"), ("itl_s", "p90"))
        )
        shares = one.arms()
        rows.append(
            [
                one.policy,
                one.ordering,
                percent(one.attained.mean),
                f"{_time(ttft50)} / {_time(ttft90)}",
                _time(itl90),
                *(f"{100 * shares[arm]:.0f}" if arm in shares else NOTHING for arm in arms),
            ]
        )
    head = ["policy", "ordering", "attained, %", "TTFT p50 / p90", "ITL p90"]
    return table([*head, *(f"{arm}, %" for arm in arms)], rows, left=2)


def _time(value_s: float | None) -> str:
    return NOTHING if value_s is None else seconds(value_s)


# ---------------------------------------------------------------- conditions


def scenario_table(found: Found, scenarios: Sequence[Scenario]) -> str:
    """What was sent, and what it was held to."""
    rows = []
    for scenario in scenarios:
        sample, cells = scenario.sample, found.of(scenario)
        runs = [run for cell in cells for one in cell.policies.values() for run in one.runs.values()]
        attainable = percent(runs[0].attainable) if runs and runs[0].attainable is not None else NOTHING
        rows.append(
            [
                scenario.source.name,
                scenario.cluster,
                f"{len(sample.families):,}",
                f"{sample.sent:,}",
                f"{sample.rounds:,}",
                f"{sample.live:.0f}",
                f"{sample.dropped_rounds:,}",
                f"{seconds(sample.slo_ttft_s)} / {seconds(sample.slo_itl_s)}",
                attainable,
            ]
        )
    head = [
        "trace", "cluster", "sessions in it", "sent", "rounds", "live", "left out", "TTFT / ITL target",
        "attainable, %",
    ]  # fmt: skip
    return table(head, rows, left=2)
