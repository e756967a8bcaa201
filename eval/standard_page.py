"""The page of the standard evaluation: what was found, and under what conditions, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from antiphon.eval.report_data import Run, bundled_fidelity
from antiphon.eval.report_tables import FIDELITY_GOAL, conditions_rows
from antiphon.eval.standard_data import SATURATION, TIE, Found
from antiphon.eval.standard_grid import (
    ABLATION_ORDERING,
    MAX_GAP_S,
    ORDERINGS,
    OURS,
    WITHOUT_ORDERING,
    Scale,
    Scenario,
    workbench,
)
from antiphon.eval.standard_tables import (
    FOCUS_LOADS,
    REORDERED,
    ablation_table,
    attainment_table,
    gain_table,
    local_table,
    lost_table,
    scenario_table,
    table,
    times_table,
    verdict_table,
)
from antiphon.eval.standard_traces import ITL_FACTOR, TTFT_FACTOR

MACHINE = ("system", "architecture", "cpus", "python")

HEAD = """\
# Results

Written by `{command}`: what is changed here is lost. All of it is simulated; how far that can be trusted
is in [fidelity.md](fidelity.md), how far off the latency profiles are in
[latency-model.md](latency-model.md), how to repeat it in
[evaluation.md](evaluation.md#the-standard-evaluation).
"""
SHORT = f"""\
## In short

A cell is one trace on one cluster at one load. `{OURS}` wins or loses it by the share of rounds that
attain, against the best other policy of that very cell; within {100 * TIE:.0f} point, or inside the 95 %
interval over seeds, the cell is tied. Cells below rho = {SATURATION:g} count.
"""
GAINS = f"""\
Relative gain of `{OURS}` in attainment, beside what AMPD's paper reports of AMPD against Dynamo and
against co-located vLLM. Fleets, models, targets and loads are not those of the paper: read the figures
beside each other, do not compare them.
"""
WITHOUT = f"""\
## Ablation

`{OURS}` under `{ABLATION_ORDERING}` with one part left out, less the whole, in points of attainment over
the cells below rho = {SATURATION:g}; without ordering is under `{WITHOUT_ORDERING}`. Engines here take
what the profile says that the scheduler knows, so corrections have only the model's own gaps to work on,
not a profile that is wrong.
"""
SENT = """\
What was sent. Live: sessions that would live at once at the highest load if no round waited. Left out:
rounds of the trace beyond the model's window. Attainable: rounds whose first token an idle fleet would
bring in time; no policy can attain more.
"""
EVERY = f"""\
## Every cell

Rounds that attain, in percent. Bold: the best of its load. {REORDERED}: under `ampd_reorder`, which was
better than `fcfs`. ±: 95 % interval over seeds, where there are several. Times are of completed rounds,
averaged over seeds; arms are shares of completed rounds.
"""


def page(
    scale: Scale, scenarios: Sequence[Scenario], found: Found, figures: Mapping[str, str], notes: str,
    command: str,
) -> str:  # fmt: skip
    """The whole page. `figures`: cluster -> link to its picture; `notes`: Markdown, taken as it is."""
    parts = [
        HEAD.format(command=command),
        *_summary(found),
        *([notes.strip() + "\n"] if notes.strip() else []),
        *_ablation(found),
        *_figures(figures),
        *_conditions(scale, scenarios, found),
        *_every_cell(scenarios, found),
    ]
    return "\n".join(parts)


def _summary(found: Found) -> Iterator[str]:
    yield from (SHORT, verdict_table(found), GAINS, gain_table(found))
    yield from ("Share of completed rounds that ran `local`:\n", local_table(found))
    yield from ("### Lost cells\n", lost_table(found))
    if found.missing:
        yield f"**{len(found.missing)} cells of the grid have no result**, such as {found.missing[0]}.\n"


def _ablation(found: Found) -> Iterator[str]:
    if rows := ablation_table(found):
        yield from (WITHOUT, rows)


def _figures(figures: Mapping[str, str]) -> Iterator[str]:
    if figures:
        yield f"## Attainment against load\n\nDashed: rho = {SATURATION:g}, all of the fleet's time.\n"
    for cluster, link in figures.items():
        yield f"### On {cluster}\n\n![Rounds that attain, by load, for each trace on {cluster}]({link})\n"


# ---------------------------------------------------------------- conditions


def _conditions(scale: Scale, scenarios: Sequence[Scenario], found: Found) -> Iterator[str]:
    rows = [
        *_made_with(found),
        ["grid", f"{scale.name}: {len(found.runs):,} runs"],
        ["loads", f"rho {', '.join(f'{load:g}' for load in scale.loads)}: shares of the fleet's time"],
        ["seeds", f"{', '.join(map(str, scale.seeds))}: of Poisson arrivals, equal for all policies"],
        ["policies", f"{', '.join(scale.policies)}; parameters as they are by default"],
        ["orderings", f"{', '.join(ORDERINGS)}; a policy is shown under its better one, cell by cell"],
        ["gaps", f"as recorded, at most {MAX_GAP_S:g} s"],
        ["targets", _targets()],
        ["sessions", _sessions(scale)],
    ]
    yield f"## Conditions\n\n{table(['what', 'how'], rows, left=2)}"
    yield from (SENT, scenario_table(found, scenarios))
    traces = {scenario.source.name: scenario.source.describe() for scenario in scenarios}
    yield table(["trace", "source"], ([name, words] for name, words in traces.items()), left=2)
    yield from (_profiles(scale), _fidelity())


def _made_with(found: Found) -> Iterator[list[str]]:
    """Commit, machine without its name, and what the simulations took."""
    if not found.runs:
        return
    known = dict(conditions_rows([Run(Path(run.trace.path), run, None) for run in found.runs]))
    machine = found.runs[0].conditions.machine
    yield ["commit", known["commit"]]
    yield ["machine", ", ".join(f"{key} {machine[key]}" for key in MACHINE if key in machine)]
    yield ["simulation", known["simulation"]]


def _targets() -> str:
    return (
        f"for each trace and cluster, to two digits: TTFT {TTFT_FACTOR:g} x the 90th percentile of what its "
        f"rounds take on an idle fleet; ITL {ITL_FACTOR:g} x the median decode step of a lone request"
    )


def _sessions(scale: Scale) -> str:
    amount = scale.amount
    parts = (
        [f"at least {amount.sessions}", "the whole trace"]
        if amount.whole
        else [f"at least {amount.sessions}"]
    )
    if amount.times_live:
        parts.append(f"{amount.times_live:g} x those that live at once at the highest load")
    parts.append(f"{amount.rounds:,} rounds, but no more than {amount.most_rounds:,}")
    return f"{', '.join(parts)}; shuffled once; repeated with new content where the trace has fewer"


def _profiles(scale: Scale) -> str:
    """Of each cluster its kinds of engines; pools of one profile in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for cluster in scale.clusters:
        for kind in workbench(cluster).kinds:
            group, latency = kind.group, kind.latency
            row = rows.setdefault((Path(cluster).stem, latency.name), [Path(cluster).stem, "", ""])
            engines = f"{group.count} {group.pool}"
            row[1] = f"{row[1]}, {engines}" if row[1] else f"{latency.gpus} x {latency.gpu}: {engines}"
            row[2] = f"{latency.name}: {latency.source}"
    return table(["cluster", "engines", "latency profile, and its source"], rows.values(), left=3)


def _fidelity() -> str:
    fidelity = bundled_fidelity()
    if fidelity is None:
        return "Nobody has compared this simulator with live engines here.\n"
    errors = ", ".join(
        f"{row.metric.removesuffix('_s').upper()} {row.quantile} {100 * row.error:+.1f} %"
        for row in fidelity.rows
    )
    engines = fidelity.conditions.get("engines", "unknown engines")
    return (
        f"Fidelity, simulated against live ({engines}): {errors}; the goal is "
        f"{100 * FIDELITY_GOAL:.0f} %. It says nothing of GPUs.\n"
    )


# ---------------------------------------------------------------- every cell


def _every_cell(scenarios: Sequence[Scenario], found: Found) -> Iterator[str]:
    yield EVERY
    for scenario in scenarios:
        cells = found.of(scenario)
        if not cells:
            continue
        targets = f"TTFT {scenario.spec.slo_ttft_s:g} s, ITL {scenario.spec.slo_itl_s:g} s"
        yield f"### {scenario.source.name} on {scenario.cluster}\n\nTargets: {targets}.\n"
        yield attainment_table(cells)
        for cell in cells:
            if cell.load in FOCUS_LOADS:
                summary = f"<summary>Times and arms at rho {cell.load:g}</summary>"
                yield f"<details>{summary}\n\n{times_table(cell)}\n</details>\n"
