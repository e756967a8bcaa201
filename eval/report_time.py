"""The plots over time: which arms ran when, and one session round by round. From the rounds files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from antiphon.eval.report_data import Cell, Run, Scenario, rounds_attained, rounds_of
from antiphon.eval.report_plots import load_words
from antiphon.eval.report_style import (
    INK,
    Plot,
    arm_look,
    arm_order,
    drawing,
    legend_outside,
    panels,
    png_of,
    short,
)
from antiphon.traces.result_types import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60
PANELS_SHOWN = 8
SESSION_ROUNDS = 14
"""A session of about this many rounds is chosen: enough to see a pattern, few enough to read."""
MOST_ROUNDS = 40

PHASES: tuple[tuple[str, str, str], ...] = (
    ("waiting in the scheduler", "#999999", ""),
    ("pulling history to the prefill engine", "#cc79a7", "//"),
    ("prefill", "#0072b2", ""),
    ("pushing KV to the home", "#e69f00", "\\\\"),
    ("at the home, to the first token", "#56b4e9", ".."),
    ("decode", "#009e73", ""),
    ("tool runs (no request)", "#d4d4d4", ""),
)


@dataclass(frozen=True, slots=True)
class Session:
    """The completed rounds of one session, in order."""

    name: str
    rounds: tuple[RoundRecord, ...]
    policy: str


# ---------------------------------------------------------------- arms over time


def arms_over_time_plot(scenario: Scenario, unread: list[str]) -> Plot | None:
    """One panel for each policy that runs more than one arm; None if no rounds were kept."""
    found: list[tuple[str, list[RoundRecord]]] = []
    for cell in scenario.at(scenario.focus):
        if len(cell.runs[0].result.arms) < 2 or len(found) == PANELS_SHOWN:
            continue
        if rounds := [record for record in rounds_of(cell.runs[0], unread) if record.completed]:
            found.append((cell.series, rounds))
    if not found:
        return None
    last_s = max(record.sent_s for _, rounds in found for record in rounds) or 1.0
    arms = arm_order([record.arm or "unknown" for _, rounds in found for record in rounds])
    with drawing(0.9 + 1.45 * len(found)) as figure:
        made = figure.subplots(len(found), 1, sharex=True, squeeze=False)
        for (axis,), (name, rounds) in zip(made, found, strict=True):
            _stack(axis, rounds, arms, last_s)
            axis.set_title(short(name))
            axis.set_ylabel("rounds/s")
        made[-1][0].set_xlabel("seconds since the run began")
        handles, labels = made[0][0].get_legend_handles_labels()
        legend_outside(figure, handles, labels, "arm")
        png = png_of(figure)
    seed = scenario.at(scenario.focus)[0].runs[0].result.seed
    return Plot(
        "arms-over-time",
        "When does each policy use which arm?",
        "Completed rounds by the time at which they were sent, stacked by arm: the outline is the rate of "
        f"all rounds ({load_words(scenario, scenario.focus)}, seed {seed}). Policies that run a single arm "
        "are left out.",
        png,
    )


def _stack(axis: Axes, rounds: Iterable[RoundRecord], arms: Sequence[str], last_s: float) -> None:
    width_s = last_s / BINS
    rates: dict[str, list[float]] = {arm: [0.0] * BINS for arm in arms}
    for record in rounds:
        rates[record.arm or "unknown"][min(BINS - 1, int(record.sent_s / width_s))] += 1 / width_s
    edges = [width_s * index for index in range(BINS + 1)]
    below = [0.0] * BINS
    for arm in arms:
        above = [low + rate for low, rate in zip(below, rates[arm], strict=True)]
        axis.stairs(above, edges, baseline=below, fill=True, label=arm, **arm_look(arm))
        below = above
    axis.set_xlim(0, last_s)
    axis.set_ylim(0, max(below) * 1.08)


# ---------------------------------------------------------------- one session


def session_plot(scenario: Scenario, unread: list[str]) -> Plot | None:
    """None if no rounds were kept."""
    session = choose_session(scenario, unread)
    if session is None:
        return None
    rows = range(len(session.rounds))
    with drawing(1.7 + 0.21 * len(session.rounds)) as figure:
        left, right = panels(figure, 2, sharey=True, width_ratios=(1.15, 1.0))
        for row, record in enumerate(session.rounds):
            _whole(left, row, record, session.rounds[row - 1] if row else None, session.rounds[0].sent_s)
            _to_first_token(right, row, record)
        left.set_yticks(rows, [f"{r.round}  {r.arm or 'unknown'}" for r in session.rounds], fontsize=7.5)
        left.set_ylim(len(session.rounds) - 0.4, -0.6)
        left.set_ylabel("round and its arm")
        left.set_xlabel("seconds since the session's first request")
        left.set_title("The whole session")
        right.set_xlabel("seconds since the round's request")
        right.set_title("From each request to its first token")
        _session_target(right, session.rounds)
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
            axis.set_xlim(left=0)
        _phase_legend(figure)
        png = png_of(figure)
    return Plot(
        "session",
        "What happens inside one session?",
        f"Session {short(session.name, 40)} under {session.policy}, {load_words(scenario, scenario.focus)}: "
        "one row for each round, named by its arm. Left, the session in time: a round begins when the tool "
        "before it has ended. Right, the same rounds from a common start: what the wait for the first token "
        "is made of; a dotted line is the target.",
        png,
    )


def choose_session(scenario: Scenario, unread: list[str]) -> Session | None:
    """Of the best policy that mixes arms (else of the best), the session that shows most arms."""
    cells = [cell for cell in scenario.at(scenario.focus) if cell.runs[0].rounds_path is not None]
    if not cells:
        return None

    def rank(cell: Cell) -> tuple[bool, float]:
        span = cell.span(rounds_attained)
        return len(cell.runs[0].result.arms) > 1, span.mean if span else 0.0

    cell = max(cells, key=rank)
    return _pick(cell.series, cell.runs[0], unread)


def _pick(policy: str, run: Run, unread: list[str]) -> Session | None:
    sessions: dict[str, list[RoundRecord]] = defaultdict(list)
    for record in rounds_of(run, unread):
        if record.completed and record.ttft_s is not None and record.e2e_s is not None:
            sessions[record.session].append(record)
    if not sessions:
        return None

    def rank(name: str) -> tuple[int, int, str]:
        kinds = len({record.arm for record in sessions[name]})
        return -kinds, abs(len(sessions[name]) - SESSION_ROUNDS), name

    name = min(sessions, key=rank)
    rounds = sorted(sessions[name], key=lambda record: record.round)
    return Session(name, tuple(rounds[:MOST_ROUNDS]), policy)


def _bar(axis: Axes, row: int, start_s: float, length_s: float, phase: int, height: float = 0.62) -> None:
    _, colour, hatch = PHASES[phase]
    if length_s > 0:
        axis.barh(
            row, length_s, left=start_s, height=height, facecolor=colour, hatch=hatch, edgecolor="white",
            linewidth=0.3,
        )  # fmt: skip


def _whole(axis: Axes, row: int, record: RoundRecord, before: RoundRecord | None, began_s: float) -> None:
    """The tool that ran before the round, its way to the first token, its decode."""
    sent_s, ttft_s, e2e_s = record.sent_s - began_s, record.ttft_s or 0.0, record.e2e_s or 0.0
    if before is not None:
        ended_s = before.sent_s + (before.e2e_s or 0.0) - began_s
        _bar(axis, row, ended_s, sent_s - ended_s, 6, 0.3)
    _to_first_token(axis, row, record, sent_s)
    _bar(axis, row, sent_s + ttft_s, e2e_s - ttft_s, 5)


def _to_first_token(axis: Axes, row: int, record: RoundRecord, start_s: float = 0.0) -> None:
    """Waiting, pull, prefill, push, and what is left until the first token."""
    end_s = start_s + (record.ttft_s or 0.0)
    parts = (record.queue_s, record.pull_s, record.prefill_s, record.push_s)
    for phase, part in enumerate(parts):
        length_s = min(part or 0.0, end_s - start_s)
        _bar(axis, row, start_s, length_s, phase)
        start_s += length_s
    _bar(axis, row, start_s, end_s - start_s, 4)


def _session_target(axis: Axes, rounds: Sequence[RoundRecord]) -> None:
    """Where it is in sight: a far target would flatten every bar."""
    target_s = rounds[0].slo_ttft_s
    if target_s is not None and target_s <= 2 * max(record.ttft_s or 0.0 for record in rounds):
        axis.axvline(target_s, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))


def _phase_legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="white") for _, colour, hatch in PHASES]
    labels = [name for name, _, _ in PHASES]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
