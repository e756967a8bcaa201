"""docs/planner_results.md, from the results of `standard.py` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.score import Score
from antiphon.eval.planner.standard_ask import LOOKS, SHARES, WANTED
from antiphon.eval.planner.workload import MOST_WARM_UP_ROUNDS, WARM_UP_SHARE

GOAL = 0.01
"""Of attainment: so far may the plan be from brute force's."""
PLAN, BRUTE = "the plan", "brute force"


class Row(Struct, frozen=True):
    """A plan on the windows of the comparison."""

    name: str
    plan: str
    settings: tuple[tuple[int, int], ...]
    """C and K of each group."""
    gpus: dict[str, int]
    price_per_hour: float
    per_1k_rounds: float
    asked: Score
    """At the load that was planned for."""
    more: Score
    """At 20 % more."""


class Timed(Struct, frozen=True):
    """How long a plan took."""

    gpus: int
    took_s: float
    curves_s: float
    solve_s: float
    simulated_rounds: int
    """By the search."""


class Case(Struct, frozen=True):
    """A trace on a budget."""

    trace: str
    budget: dict[str, int]
    slo: Slo
    tolerance: float
    rate_per_s: float
    rounds_per_s: float
    live_sessions: float
    share: float
    plans: int
    brute_plans: int
    rows: tuple[Row, ...]
    timed: Timed
    long: Score
    """The plan in one window that is many times as long."""

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


class Results(Struct, frozen=True):
    """All cases."""

    model: str
    commit: str | None
    traces: dict[str, str]
    rounds: int
    windows: int
    tolerance: float
    cases: tuple[Case, ...]
    wanted: int
    """Cases that the evaluation has."""
    took_s: float


class Verdict(Struct, frozen=True):
    """The plan against brute force's."""

    behind: float
    """Of attainment; below 0 = ahead."""
    dearer: float
    """USD per hour; below 0 = cheaper."""

    @property
    def met(self) -> bool:
        """The goal is of attainment, which a plan is chosen by first; what it costs is told beside it."""
        return self.behind <= GOAL

    @property
    def outcome(self) -> str:
        if not self.met:
            return "**missed**"
        return "met, dearer" if self.dearer > 0 else "met"

    def words(self) -> str:
        points = f"{abs(self.behind) * 100:.2f} points {'behind' if self.behind > 0 else 'ahead'}"
        return f"{points}, {f'{self.dearer:+.2f} USD/h' if self.dearer else 'at the same cost'}"


def verdict(case: Case) -> Verdict | None:
    """None where there was no brute force."""
    ours, best = case.row(PLAN), case.row(BRUTE)
    if ours is None or best is None:
        return None
    return Verdict(
        best.asked.attainment - ours.asked.attainment, round(ours.price_per_hour - best.price_per_hour, 6)
    )


def page(results: Results) -> str:
    """Markdown."""
    return (
        "\n".join(
            (*_head(results), *_overview(results), *_lasting(results), *_times(results), *_cases(results))
        )
        + "\n"
    )


def _head(results: Results) -> Iterator[str]:
    yield "# The planner's plans"
    yield ""
    yield "Written by `make plan-eval` from its results (`results/planner.json`); not by hand."
    yield ""
    yield (
        f"Model {results.model}, profiles and prices that ship with the package. Traces: "
        + "; ".join(f"{name} ({words})" for name, words in results.traces.items())
        + ". Gaps are at most 60 s."
    )
    shares = ", ".join(f"{share:.0%}" for share in SHARES)
    looks = " and in ".join(f"one window of {rounds:,} rounds" for rounds in LOOKS)
    yield (
        f"The load is the largest of some shares ({shares}) of what keeps the whole"
        " budget busy, co-located, at which one of six plans (those that the screen puts first) attains"
        f" {WANTED:.0%} in {looks}, or the least of them."
    )
    yield (
        f"Every figure is of {results.windows} windows of {results.rounds:,} rounds or more after a"
        f" warm-up of {WARM_UP_SHARE:.0%} of that (at most {MOST_WARM_UP_ROUNDS:,} rounds or two of each live"
        " session), the same for all plans of a case, with seeds that nobody chose by; `+20 %` are"
        " other windows at 1.2 times the rate."
        f" Plans whose attainments differ by less than {results.tolerance:.1%} count as equal: the cheaper is"
        " chosen."
    )
    if len(results.cases) < results.wanted:
        yield f"**{len(results.cases)} of {results.wanted} cases are done**: the others were not simulated."
    yield ""


def _overview(results: Results) -> Iterator[str]:
    known = [(case, found) for case in results.cases if (found := verdict(case)) is not None]
    met = sum(found.met for _, found in known)
    dearer = sum(found.met and found.dearer > 0 for _, found in known)
    yield "## Against brute force"
    yield ""
    yield (
        f"Goal: at most {GOAL:.0%} of attainment behind the best of all plans that last."
        f" Met in {met} of {len(known)} cases, in {dearer} of them at a higher cost than brute force's plan."
    )
    yield ""
    yield "| trace | GPUs | the plan | attains | brute force | attains | difference | goal |"
    yield "|---|---|---|---|---|---|---|---|"
    for case, found in known:
        ours, best = case.row(PLAN), case.row(BRUTE)
        assert ours is not None and best is not None
        yield (
            f"| {case.trace} | {_gpus(case.budget)} | {ours.plan} | {_share(ours.asked)} | {best.plan} |"
            f" {_share(best.asked)} | {found.words()} | {found.outcome} |"
        )
    yield ""


def _lasting(results: Results) -> Iterator[str]:
    yield "## Does it last?"
    yield ""
    yield (
        "The plan in one window that is much longer, other than that by which the search saw whether it"
        " lasts, and its standard error in the short ones: a fleet that is a little too small does well for"
        " many minutes."
    )
    yield ""
    yield "| trace | GPUs | the plan | attains | rounds | in one window it attains |"
    yield "|---|---|---|---|---|---|"
    for case in results.cases:
        plan = case.row(PLAN)
        assert plan is not None
        yield (
            f"| {case.trace} | {_gpus(case.budget)} | {plan.plan} | {_share(plan.asked)} ±"
            f" {plan.asked.noise:.1%} | {case.long.rounds:,} | {_share(case.long)} |"
        )
    yield ""


def _times(results: Results) -> Iterator[str]:
    yield "## Plan time"
    yield ""
    yield "Wall seconds of MILP and search on the machine of this run, which other work may have shared."
    yield ""
    yield "| GPUs | trace | plans | seconds | of them the MILP's tables | solver | simulated rounds |"
    yield "|---|---|---|---|---|---|---|"
    for case in sorted(results.cases, key=lambda each: each.timed.gpus):
        timed = case.timed
        yield (
            f"| {timed.gpus} | {case.trace} | {case.plans:,} | {timed.took_s:.0f} | {timed.curves_s:.0f} |"
            f" {timed.solve_s:.1f} | {timed.simulated_rounds:,} |"
        )
    yield ""


def _cases(results: Results) -> Iterator[str]:
    for case in results.cases:
        yield f"## {case.trace} on {_gpus(case.budget)}"
        yield ""
        yield (
            f"{case.rate_per_s:.4g} sessions/s ({case.share:.0%} of the budget's time),"
            f" {case.rounds_per_s:.2f} rounds/s, {case.live_sessions:.0f} sessions live;"
            f" TTFT {case.slo.ttft_s:g} s, ITL {case.slo.itl_s:g} s;"
            f" {case.plans:,} plans."
        )
        yield ""
        yield (
            "| | plan | C, K of each pool | attains | +20 % | TTFT P95 | ITL P95 | USD/h |"
            " USD per 1,000 rounds |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in case.rows:
            settings = "; ".join(f"{chunk}, {interval}" for chunk, interval in row.settings)
            yield (
                f"| {row.name} | {row.plan} | {settings} | {_share(row.asked)} | {_share(row.more)} |"
                f" {row.asked.ttft_p95:.2f} | {row.asked.itl_p95:.2f} | {row.price_per_hour:.2f} |"
                f" {row.per_1k_rounds:.2f} |"
            )
        yield ""
    yield "TTFT and ITL P95 are shares of their targets; a pool of two kinds of engine has its C and K twice."


def _share(score: Score) -> str:
    return f"{score.attainment:.1%}"


def _gpus(budget: Mapping[str, int]) -> str:
    return " + ".join(f"{count} x {gpu}" for gpu, count in budget.items())
