"""`antiphon report`: one HTML page that stands alone, and its plots as PNGs, from a folder of results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from antiphon.eval.report_data import ReportInput, Scenario, read_folder
from antiphon.eval.report_page import Picture, Section, Table, render
from antiphon.eval.report_plots import (
    arms_plot,
    attainment_plot,
    distribution_plot,
    latency_plot,
    load_words,
)
from antiphon.eval.report_style import Plot, require_matplotlib
from antiphon.eval.report_tables import (
    attainment_table,
    clusters_table,
    conditions_rows,
    fidelity_table,
    finding,
    runs_table,
    times_table,
    work_table,
)
from antiphon.eval.report_time import arms_over_time_plot, session_plot

TITLE = "Antiphon: evaluation report"
FIDELITY_MEASURED = (
    "One trace was replayed on live engines, and simulated with a profile that was measured on those "
    "engines. The error is simulated / live - 1; the goal is 10 %. What simulations say of other hardware "
    "rests on profiles from other measurements: their source and error stand in the profile files."
)
FIDELITY_MISSING = (
    "No fidelity was measured for this report: nobody has compared these simulations with live engines here. "
    "Run `make fidelity` and put its fidelity.json beside the results. Until then, trust the differences "
    "between policies more than the times themselves."
)
FIDELITY_LIVE = (
    "No fidelity was measured for this report, and it needs none: all of its results come from live engines."
)
WORDS = (
    ("round", "one request of a session: what is new in the prompt is computed, then tokens are decoded"),
    ("TTFT", "time to first token of a round, from its request"),
    ("ITL", "mean time between the tokens of a round; a round of one token has none, and meets its target"),
    ("token gap", "time between two single tokens, over all rounds: short stalls show here, not in the ITL"),
    ("attains", "the round completed, TTFT and ITL both within target; refused and failed rounds do not"),
    ("attainable", "share of rounds whose TTFT in an idle fleet would be within its target"),
    ("rho", "share of the fleet's engine-seconds that the arriving sessions ask for; 1 = all of them"),
    ("home", "the engine that decodes a session and holds its KV cache"),
    ("local", "arm: the home computes the prompt itself, between its decode steps"),
    ("remote_pull", "arm: a prefill engine first pulls the history from the home, then computes what is new"),
    ("remote_recompute", "arm: a prefill engine computes all of the prompt that it does not hold itself"),
    ("reused", "prompt tokens that no engine computed for this round: their KV cache was found or moved"),
)


def run_report(directory: Path, out: Path | None = None, console: Console | None = None) -> int:
    """Write the page (default: report.html in the folder) and, in NAME-plots beside it, the PNGs; returns 0.

    Raises `ResultError` if there is no result or no matplotlib, and `OSError`.
    """
    require_matplotlib()
    out = out or directory / "report.html"
    console = console or Console(stderr=True)
    found = read_folder(directory)
    images = out.with_name(f"{out.stem}-plots")
    images.mkdir(parents=True, exist_ok=True)
    sections = list(build(found, images))
    now = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
    out.write_text(render(TITLE, _intro(found, now), sections), encoding="utf-8")
    for line in (*found.unread, f"report: {out}, plots: {images}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _intro(found: ReportInput, now: str) -> list[str]:
    kinds = {"replay": "measured on live engines", "simulation": "simulated"}
    counts = {kind: sum(run.result.kind == kind for run in found.runs) for kind in kinds}
    said = " and ".join(f"{count} {kinds[kind]}" for kind, count in counts.items() if count)
    return [
        "Antiphon decides for every round of an agent's session where its prompt is computed and how the KV "
        "cache gets to where the answer is decoded. This page compares policies for that decision.",
        f"{len(found.runs)} results ({said}); page made {now} UTC.",
    ]


def build(found: ReportInput, images: Path) -> Iterator[Section]:
    """The page's sections, in order. Every plot is also written into `images`."""
    yield Section("What was found", "found", [finding(scenario) for scenario in found.scenarios])
    yield _conditions(found)
    for number, scenario in enumerate(found.scenarios, 1):
        yield _scenario(scenario, number, images, found.unread)
    yield _fidelity(found)
    if found.failed or found.unread:
        yield _missing(found)
    words = Table("", ["word", "meaning"], [list(row) for row in WORDS], left=2)
    yield Section("Words", "words", items=[words])


def _conditions(found: ReportInput) -> Section:
    rows = [list(row) for row in conditions_rows(found.runs)]
    written = sorted(run.path.stat().st_mtime for run in found.runs)
    dates = [datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M") for at in (written[0], written[-1])]
    rows.append(["files written", f"{dates[0]} to {dates[1]} UTC"])
    section = Section("What was run", "conditions", items=[Table("", [], rows, left=2)])
    section.items.append(runs_table(found.scenarios))
    clusters = clusters_table(found.runs)
    if clusters is not None:
        section.items.append(clusters)
    return section


def _scenario(scenario: Scenario, number: int, images: Path, unread: list[str]) -> Section:
    section = Section(scenario.title, f"scenario-{number}")

    def show(plot: Plot | None) -> None:
        if plot is not None:
            (images / f"{number:02d}-{slug(scenario.title)}-{plot.name}.png").write_bytes(plot.png)
            section.items.append(Picture(plot))

    cells = scenario.at(scenario.focus)
    at = load_words(scenario, scenario.focus)
    show(attainment_plot(scenario))
    table = attainment_table(scenario)
    if table is not None and len(scenario.loads) > 1:
        section.items.append(table)
    show(latency_plot(scenario))
    show(distribution_plot(scenario, unread))
    section.items.append(times_table(scenario, cells, f"Times at {at}"))
    show(arms_plot(scenario))
    section.items.append(work_table(scenario, cells, f"Work and cost at {at}"))
    show(arms_over_time_plot(scenario, unread))
    show(session_plot(scenario, unread))
    if len(scenario.loads) > 1:
        everything = [cell for load in scenario.loads for cell in scenario.at(load)]
        section.items.append(times_table(scenario, everything, "Times at every load", folded=True))
        section.items.append(work_table(scenario, everything, "Work and cost at every load", folded=True))
    return section


def _fidelity(found: ReportInput) -> Section:
    section = Section("Fidelity: how far can the simulator be trusted?", "fidelity")
    if found.fidelity is not None:
        section.texts.append(FIDELITY_MEASURED)
        section.items.append(fidelity_table(found.fidelity))
    elif all(run.result.kind == "replay" for run in found.runs):
        section.texts.append(FIDELITY_LIVE)
    else:
        section.texts.append(FIDELITY_MISSING)
    return section


def _missing(found: ReportInput) -> Section:
    """Cells of a sweep that failed, files that could not be read: what the figures above leave out."""
    section = Section("What is missing", "missing")
    if found.failed:
        section.items.append(
            Table("Cells that failed", ["cell", "why"], [list(row) for row in found.failed], left=2)
        )
    if found.unread:
        section.items.append(
            Table("Files that were not read", ["file and why"], [[line] for line in found.unread])
        )
    return section


def slug(text: str) -> str:
    """Text as a part of a file's name: lower-case letters, digits and dashes; short."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "scenario"
