"""What `make drift` shows: a table of attainment, the flips, a figure over the day."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.eval.drift_types import Days, Run
from antiphon.eval.report_style import SERIES_COLOURS, drawing, png_of


def table(found: Sequence[Run], days: Days) -> str:
    """Markdown: a table per policy; rows are splits and controllers, columns seeds."""
    seeds = sorted({run.seed for run in found})
    policies = list(dict.fromkeys(run.policy for run in found if run.policy != "local"))
    lines = [
        f"An hour takes {days.hour_s:g} s; load {days.load:g}. Attainment, %; in brackets the flips.",
        "",
    ]
    for policy in policies:
        of = [run for run in found if run.policy in (policy, "local")]
        names = list(dict.fromkeys(run.name for run in of))
        lines += [
            f"| `{policy}` | {' | '.join(f'seed {s}' for s in seeds)} | mean |",
            "|---|" + "---|" * (len(seeds) + 1),
        ]
        for name in names:
            runs = [next((r for r in of if r.name == name and r.seed == s), None) for s in seeds]
            cells = ["" if r is None else f"{100 * r.attainment:.2f}" + _flips(r) for r in runs]
            known = [r.attainment for r in runs if r is not None]
            lines.append(f"| {name} | {' | '.join(cells)} | {100 * sum(known) / len(known):.2f} |")
        lines.append("")
    return "\n".join(lines)


def _flips(run: Run) -> str:
    return f" ({len(run.flips)})" if run.online else ""


def flips(run: Run) -> str:
    """Markdown: every flip of one run."""
    lines = [
        "| hour | engine | to | took s | sessions moved, GB | then | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for flip in run.flips:
        to = flip.direction.rpartition("_")[2]
        moved = f"{flip.moved_sessions}, {flip.moved_bytes / 1e9:.1f}" if flip.moved_sessions else ""
        took = f"{flip.seconds:.1f}" + ("" if flip.result == "done" else f" ({flip.result})")
        lines.append(
            f"| {flip.hour:.2f} | {flip.engine} | {to} | {took} | {moved} | {flip.pools} | {flip.reason} |"
        )
    return "\n".join(lines)


def figure(found: Sequence[Run], days: Days) -> bytes:
    """PNG: attainment over the day, a panel per policy, first seed: best and worst static split, online."""
    seed = min(run.seed for run in found)
    policies = list(dict.fromkeys(run.policy for run in found if run.policy != "local"))
    with drawing(0.6 + 2.4 * len(policies)) as drawn:
        axes = drawn.subplots(len(policies), 1, squeeze=False, sharex=True)
        for (axis,), policy in zip(axes, policies, strict=True):
            of = [run for run in found if run.policy == policy and run.seed == seed]
            static = sorted((r for r in of if not r.online), key=lambda r: r.attainment)
            online = [r for r in of if r.online == "online"]
            shown = [static[-1], static[0], *online]
            for run, colour in zip(shown, SERIES_COLOURS, strict=False):
                hours = [hour + 0.5 for hour in range(len(run.by_hour))]
                width = 2.2 if run.online else 1.2
                axis.plot(hours, [100 * v for v in run.by_hour], color=colour, lw=width, label=run.name)
                for flip in run.flips:
                    mark = "^" if flip.direction.endswith("prefill") else "v"
                    axis.plot([flip.hour], [101], marker=mark, color=colour, ms=4, clip_on=False)
            axis.set_ylim(0, 101)
            axis.set_ylabel("attain, %")
            axis.set_title(f"{policy}, seed {seed}")
            axis.legend(fontsize=7, ncols=len(shown), loc="lower left")
        axes[-1][0].set_xlabel("hour (marks: an engine to prefill, upwards, or to decode)")
        return png_of(drawn)
