"""What a run shows: a bar on a terminal, lines elsewhere; the closing table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from antiphon.traces.plan import Plan
from antiphon.traces.results import RoundRecord, RunResult

LINES_PER_RUN = 20
"""Of progress where there is no terminal; failures get a line each."""


class ReplayDisplay:
    """Hand its `on_plan` and `on_round` to `replay`; use it as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done = self._failed = self._total = 0
        self._arms: dict[str, int] = {}
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"),
                TimeElapsedColumn(), TextColumn("{task.description}"), console=console,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_plan(self, plan: Plan) -> None:
        """Say what is going to be sent and what was changed to get there."""
        trace, how = plan.trace, plan.conditions
        self._total = trace.rounds
        self._say(
            f"{trace.path}: {trace.sessions} sessions, {trace.rounds} rounds, sha256 {trace.sha256[:12]}"
        )
        self._say(f"to {how.url}, model {how.model}, run {how.run_id}; session starts: {how.arrivals}")
        self._say(f"gaps capped at {how.max_gap_s:g} s: {trace.capped_gaps} were longer")
        if how.divide > 1:
            self._say(f"lengths divided by {how.divide}")
        if trace.dropped_rounds:
            self._say(
                f"left out: {trace.dropped_rounds} rounds over the window of {how.window_tokens} tokens "
                f"or after such a round; {trace.dropped_sessions} sessions whole"
            )
        if trace.bad_lines:
            self._say(f"skipped {trace.bad_lines} bad lines, such as: {'; '.join(plan.bad_lines)}")
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()

    def on_round(self, record: RoundRecord) -> None:
        self._done += record.completed
        self._failed += not record.completed
        arm = record.arm or "unknown"
        self._arms[arm] = self._arms.get(arm, 0) + record.completed
        if not record.completed:
            self._say(
                f"failed: session {record.session}, round {record.round}, "
                f"try {record.tries}: {record.http_status or 'no status'}, {record.message}"
            )
        arms = ", ".join(f"{name} {count}" for name, count in sorted(self._arms.items()) if count)
        words = f"{arms}{f'; failed {self._failed}' if self._failed else ''}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=words)
        elif (self._done + self._failed) % max(1, self._total // LINES_PER_RUN) == 0:
            self._say(f"{self._done + self._failed} of {self._total} rounds: {words}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)


def result_table(result: RunResult) -> Table:
    """The closing table of a run."""
    table = Table(title=f"{Path(result.trace.path).name} under {result.policy or 'an unknown policy'}")
    table.add_column("what", no_wrap=True)
    for column in ("total / mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("rounds completed", f"{result.rounds_completed} of {result.rounds_total}")
    if result.rounds_refused:
        table.add_row("rounds refused", str(result.rounds_refused))
    if result.rounds_failed or result.rounds_not_sent:
        table.add_row("rounds failed, not sent", f"{result.rounds_failed}, {result.rounds_not_sent}")
    for arm, count in sorted(result.arms.items()):
        table.add_row(f"  arm {arm}", str(count))
    for name, times in (
        ("TTFT", result.ttft_s), ("TTFT, first rounds", result.ttft_first_s),
        ("TTFT, later rounds", result.ttft_later_s), ("ITL", result.itl_s),
        ("gap between tokens", result.token_gap_s), ("end to end", result.e2e_s),
    ):  # fmt: skip
        if times is not None:
            table.add_row(name, *(_time(value) for value in (times.mean, times.p50, times.p90, times.p99)))
    share = result.cached_tokens_total / max(1, result.prompt_tokens_total)
    table.add_row("prompt tokens", f"{result.prompt_tokens_total:,}")
    table.add_row("  of them cached", f"{_count(result.cached_tokens_total)} ({share:.1%})")
    table.add_row("output tokens", f"{result.output_tokens_total:,}")
    table.add_row("moved decode -> prefill", _bytes(result.bytes_decode_to_prefill))
    table.add_row("moved prefill -> decode", _bytes(result.bytes_prefill_to_decode))
    if result.bytes_home_to_home:
        table.add_row("moved home -> home", _bytes(result.bytes_home_to_home))
    for name, figure in _closing_figures(result):
        table.add_row(name, figure)
    return table


def _time(seconds: float) -> str:
    """At most eight characters up to an hour: four of these stand in a line of a terminal."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.99995 else f"{seconds:.2f} s"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.1f} M"


def _bytes(count: int) -> str:
    """In the unit that a reader can compare: MB up to 100 GB."""
    return f"{count / 1e6:,.2f} MB" if count < 1e11 else f"{count / 1e12:,.3f} TB"


def _closing_figures(result: RunResult) -> Iterator[tuple[str, str]]:
    if result.attainment is not None:
        yield "SLO attainment, rounds", f"{result.attainment['rounds']:.1%}"
        yield "SLO attainment, sessions", f"{result.attainment['sessions']:.1%}"
    if result.attainable is not None:
        yield "  attainable without load", f"{result.attainable:.1%}"
    if result.load is not None and result.load.sessions_per_s is not None:
        yield "sessions offered", f"{result.load.sessions_per_s:.4g} /s"
    if result.gpu_seconds is not None:
        yield "GPU time", f"{result.gpu_seconds:,.0f} s"
    if result.cost_per_1k_rounds is not None:
        yield "cost of 1,000 rounds", f"{result.cost_per_1k_rounds:,.2f}"
    if result.simulated_s is not None:
        yield "simulated time", f"{result.simulated_s:,.1f} s"
    yield "wall time", f"{result.wall_s:.1f} s"
