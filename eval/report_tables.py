"""The report's tables and what they say in words: attainment, times, work, conditions, fidelity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from antiphon.eval.report_data import (
    Cell,
    Fidelity,
    Figure,
    Run,
    Scenario,
    Span,
    arm_shares,
    distinct,
    per_round,
    quantile,
    rounds_attained,
    sessions_attained,
    short_path,
)
from antiphon.eval.report_page import Strong, Table
from antiphon.eval.report_plots import load_words
from antiphon.eval.report_style import arm_order, seconds
from antiphon.traces.result_types import RunResult

NOTHING = "\N{EN DASH}"
FIDELITY_GOAL = 0.10

Column = tuple[str, Figure, Callable[[float], str]]


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


# ---------------------------------------------------------------- attainment


def attainment_table(scenario: Scenario) -> Table | None:
    """Policies by loads, the best of each load in bold; None where no run had targets."""
    spans = {key: cell.span(rounds_attained) for key, cell in scenario.cells.items()}
    if not any(spans.values()):
        return None
    best = {load: _best(scenario, load) for load in scenario.loads}
    rows = []
    for name in scenario.series:
        row = [name]
        for load in scenario.loads:
            words = span_words(spans.get((name, load)))
            row.append(Strong(words) if name in best[load] else words)
        rows.append(row)
    return Table(
        "Share of rounds that attain",
        ["policy", *(load_words(scenario, load) for load in scenario.loads)],
        rows,
        "Mean over seeds (lowest to highest seed). Bold: the highest mean of its load.",
    )


def span_words(span: Span | None) -> str:
    """Mean and range as shares."""
    if span is None:
        return NOTHING
    if span.count == 1:
        return share(span.mean)
    return f"{share(span.mean)} ({100 * span.low:.1f} to {100 * span.high:.1f})"


def _best(scenario: Scenario, load: float | None) -> list[str]:
    """The series with the highest mean, to the digit that is shown."""
    means = {c.series: share(s.mean) for c in scenario.at(load) if (s := c.span(rounds_attained)) is not None}
    top = max(means.values(), key=lambda words: float(words.removesuffix(" %")), default=None)
    return [name for name, words in means.items() if words == top]


def finding(scenario: Scenario) -> str:
    """Who attains most, by how much, and whether the seeds agree, in a sentence or two."""
    load = scenario.focus
    found = [(c.series, s) for c in scenario.at(load) if (s := c.span(rounds_attained)) is not None]
    found.sort(key=lambda item: -item[1].mean)
    at = load_words(scenario, load)
    if not found:
        return f"{scenario.title}: no targets were set, so nothing attains or misses."
    name, span = found[0]
    words = f"{scenario.title}, at {at}: {span_words(span)} of rounds attain under {name}"
    if len(found) == 1:
        return f"{words}, the only policy that ran."
    second, other = found[1]
    if share(span.mean) == share(other.mean):
        equals = ", ".join(item for item, its in found[1:] if share(its.mean) == share(span.mean))
        return f"{words}, and just as many under {equals}: no difference can be seen."
    words += f"; next is {second} with {span_words(other)}."
    if min(span.count, other.count) > 1:
        apart = span.low > other.high
        words += (
            " Every seed of the first is above every seed of the second."
            if apart
            else " Their seeds overlap: the order could be chance."
        )
    else:
        words += " One seed each: the order could be chance."
    return words


# ---------------------------------------------------------------- times and work


def times_table(scenario: Scenario, cells: Sequence[Cell], title: str, *, folded: bool = False) -> Table:
    """Means over seeds of each run's own percentiles."""
    columns: list[Column] = [
        ("rounds attain", rounds_attained, share),
        ("sessions attain", sessions_attained, share),
    ]
    for words, metric, names in (
        ("TTFT", "ttft_s", ("mean", "p50", "p90", "p99")),
        ("TTFT first rounds", "ttft_first_s", ("p90",)),
        ("TTFT later rounds", "ttft_later_s", ("p90",)),
        ("ITL", "itl_s", ("p50", "p90", "p99")),
        ("token gap", "token_gap_s", ("p99",)),
        ("whole round", "e2e_s", ("p50", "p90")),
    ):
        columns += [(f"{words} {name}", quantile(metric, name), seconds) for name in names]
    return _table(scenario, cells, title, columns, "Means over seeds.", folded)


def work_table(scenario: Scenario, cells: Sequence[Cell], title: str, *, folded: bool = False) -> Table:
    """What came of the rounds and what they cost."""
    columns: list[Column] = [
        ("completed", lambda r: r.rounds_completed, _count),
        ("refused", lambda r: r.rounds_refused, _count),
        ("failed or not sent", lambda r: r.rounds_failed + r.rounds_not_sent, _count),
        ("computed tokens/round", per_round("prefill_tokens_computed"), _count),
        ("reused", _reused, share),
        ("moved/round", per_round("bytes_moved"), _size),
        ("GPU time", lambda r: r.gpu_seconds, seconds),
        ("cost of 1,000 rounds", lambda r: r.cost_per_1k_rounds, lambda value: f"{value:,.2f}"),
    ]
    note = "Means over seeds. reused: share of prompt tokens that no engine computed for the round."
    table = _table(scenario, cells, title, columns, note, folded)
    arms = arm_order([arm for cell in cells for arm in arm_shares(cell)])
    rows = []
    for row, cell in zip(table.rows, cells, strict=True):
        shares = arm_shares(cell)
        rows.append([*row, *(share(shares[arm]) if arm in shares else NOTHING for arm in arms)])
    return Table(table.title, [*table.columns, *arms], rows, note, table.left, folded)


def _table(
    scenario: Scenario, cells: Sequence[Cell], title: str, columns: Sequence[Column], note: str, folded: bool
) -> Table:
    """Rows are cells; a column that no cell has is left out."""
    spans = [[cell.span(figure) for _, figure, _ in columns] for cell in cells]
    kept = [index for index in range(len(columns)) if any(row[index] is not None for row in spans)]
    many = len({cell.load for cell in cells}) > 1
    rows = []
    for cell, found in zip(cells, spans, strict=True):
        row = [load_words(scenario, cell.load), cell.series] if many else [cell.series]
        for index in kept:
            span = found[index]
            row.append(NOTHING if span is None else columns[index][2](span.mean))
        rows.append(row)
    names = [columns[index][0] for index in kept]
    head = ["load", "policy"] if many else ["policy"]
    return Table(title, [*head, *names], rows, note, len(head), folded)


def _reused(result: RunResult) -> float | None:
    return result.cached_tokens_total / result.prompt_tokens_total if result.prompt_tokens_total else None


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.3g} {unit}"
    return f"{value:,.0f} B"


# ---------------------------------------------------------------- conditions


def runs_table(scenarios: Sequence[Scenario]) -> Table:
    """One row for each scenario: what was sent, under what."""
    rows = []
    for scenario in scenarios:
        result = scenario.first
        rows.append(
            [
                scenario.title,
                "measured" if result.kind == "replay" else "simulated",
                f"{result.trace.sessions:,} / {result.trace.rounds:,}",
                " / ".join(seconds(v) for v in result.slo.values() if v is not None) or NOTHING,
                seconds(result.conditions.max_gap_s) if result.conditions.max_gap_s else "0 s",
                ", ".join(f"{load:g}" for load in scenario.loads if load is not None) or NOTHING,
                result.load.kind if result.load else NOTHING,
                ", ".join(str(seed) for seed in sorted({run.result.seed for run in scenario.runs})),
                str(len(scenario.runs)),
                result.trace.sha256[:12],
            ]
        )
    names = ["what", "how", "sessions / rounds", "targets TTFT / ITL", "gaps capped at", "loads", "load is"]
    return Table("Runs", [*names, "seeds", "results", "trace sha256"], rows, left=2)


CLUSTER_COLUMNS: tuple[tuple[str, str], ...] = (
    ("count", "engines"), ("gpus", "GPUs each"), ("gpu", "GPU"), ("model", "model"), ("profile", "profile"),
    ("device_tokens", "device tokens"), ("store_tokens", "store tokens"), ("chunk_tokens", "C"),
    ("decode_interval", "K"), ("link_bytes_per_s", "link, bytes/s"), ("price_per_gpu_hour", "price/GPU h"),
)  # fmt: skip


def clusters_table(runs: Sequence[Run]) -> Table | None:
    """A row for each group of engines; None without a simulation."""
    rows: list[list[str]] = []
    for cluster in distinct(run.result.cluster for run in runs if run.result.cluster is not None):
        for group in cluster.engines:
            name = str(group.get("name") or group.get("pool"))
            row = [cluster.name, name, *(_value(group.get(key)) for key, _ in CLUSTER_COLUMNS)]
            if row not in rows:
                rows.append(row)
    if not rows:
        return None
    note = "C = --chunked-prefill-size, K = --prefill-decode-interval. Store: the page store in host memory."
    return Table("Clusters", ["cluster", "group", *(name for _, name in CLUSTER_COLUMNS)], rows, note, left=2)


def _value(value: object) -> str:
    if value is None or value == "":
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def conditions_rows(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """What software and machine; every text once."""
    commits = list(distinct(run.result.conditions.commit or "unknown" for run in runs))
    yield "commit", ", ".join(commits) + (" (results of several commits are mixed)" if commits[1:] else "")
    for machine in distinct(run.result.conditions.machine for run in runs):
        yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items())
    yield "traces", ", ".join(distinct(short_path(run.result.trace.path) for run in runs))
    yield "policies", ", ".join(sorted({run.result.policy or "unknown" for run in runs}))
    orderings = sorted({run.result.ordering for run in runs if run.result.ordering})
    if orderings:
        yield "orderings", ", ".join(orderings)
    times = sorted({run.result.conditions.started_at for run in runs if run.result.conditions.started_at})
    if times:
        yield "measured", f"{times[0]} to {times[-1]}" if times[1:] else times[0]
    simulated = [run.result for run in runs if run.result.simulated_s is not None]
    if simulated:
        rounds = sum(result.rounds_completed for result in simulated)
        wall_s = sum(result.wall_s for result in simulated)
        speed = f", {rounds / wall_s:,.0f} rounds a second" if wall_s else ""
        yield "simulation", f"{rounds:,} rounds in {seconds(wall_s)} of computing{speed}"


# ---------------------------------------------------------------- fidelity


def fidelity_table(fidelity: Fidelity) -> Table:
    rows = [
        [
            row.metric.removesuffix("_s").upper(),
            row.quantile,
            seconds(row.live),
            seconds(row.simulated),
            f"{100 * row.error:+.1f} %",
            "yes" if abs(row.error) <= FIDELITY_GOAL else "no",
        ]
        for row in fidelity.rows
    ]
    columns = ["time", "quantile", "live", "simulated", "error", f"within {FIDELITY_GOAL:.0%}"]
    said = "; ".join(f"{key}: {_plain(value)}" for key, value in fidelity.conditions.items())
    return Table("Live against simulated", columns, rows, f"Conditions: {said}." if said else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
