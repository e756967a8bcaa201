"""A plan on the terminal: the headline, the engines, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from rich.table import Table

from antiphon.eval.planner.ask import Rated, cost_per_1k_rounds
from antiphon.eval.planner.lasting import lasts
from antiphon.eval.planner.planned import Planned


def lines(planned: Planned) -> Iterator[str | Table]:
    """What is printed, in order; the headline comes first."""
    yield planned.headline
    yield engines_table(planned)
    yield plans_table(planned)
    single = planned.found.single_tier
    if single is not None and len(planned.found.best.plan.gpus) > 1:
        both = _cost(planned.found.best, planned), _cost(single, planned)
        yield "1,000 rounds: {}; with one kind of GPU {}".format(*both)
    if planned.unloaded.share < 1:
        yield f"without any load {planned.unloaded.share:.1%} of the rounds would be within both targets"
    yield from planned.explanation
    if planned.cases:
        yield cases_table(planned)
    found, solved = planned.found, planned.solved
    yield (
        f"MILP: tables {solved.curves_s:.1f} s, solved {solved.solve_s:.1f} s; search {found.took_s:.1f} s;"
        f" in all {planned.took_s:.1f} s"
    )


def _cost(rated: Rated, planned: Planned) -> str:
    usd = cost_per_1k_rounds(rated.plan, planned.rounds_per_s)
    return f"USD {usd:.2f} at {attained(rated)}"


def engines_table(planned: Planned) -> Table:
    plan = planned.found.best.plan
    table = Table(title=f"{planned.ask.model} on {', '.join(_gpus(planned))}: policy {plan.policy}")
    for name in ("pool", "engines", "GPUs each", "C, tokens", "K, steps", "KV tokens each", "USD/h"):
        table.add_column(name, justify="left" if name == "pool" else "right")
    for group in plan.groups:
        table.add_row(
            "all" if plan.colocated else group.pool,
            str(group.count),
            f"{group.type.tp} x {group.type.gpu}",
            f"{group.chunk_tokens:,}",
            str(group.decode_interval),
            f"{group.type.device_tokens:,}",
            f"{group.count * group.type.price_per_hour:.2f}",
        )
    return table


def _gpus(planned: Planned) -> Iterator[str]:
    used = planned.found.best.plan.gpus
    for gpu, most in planned.ask.budget.items():
        yield f"{used.get(gpu, 0)} of {most} {gpu}"


def plans_table(planned: Planned) -> Table:
    """All plans that have a name, simulated on the same windows."""
    score = planned.found.best.score
    table = Table(title=f"simulated on the same windows: {score.rounds:,} rounds of the plan")
    for name in ("", "plan", "attained", "TTFT p95", "ITL p95", "USD/h", "USD/1k rounds"):
        table.add_column(name, justify="left" if name in ("", "plan") else "right", no_wrap=name == "")
    names: dict[Rated, list[str]] = {}
    for name, rated in planned.named():
        names.setdefault(rated, []).append(name)
    for rated, its_names in names.items():
        table.add_row("\n".join(its_names), *cells(rated, planned.rounds_per_s))
    table.caption = "p95 as a share of the target; C and K may differ between equal fleets"
    return table


def cases_table(planned: Planned) -> Table:
    """Where co-location is said to win, and whether it does with this load."""
    table = Table(title="where co-location is said to win")
    for name in ("case", "here", "by", "co-located", "disaggregated"):
        table.add_column(name)
    for case in planned.cases:
        both = (case.colocated, case.disaggregated)
        table.add_row(f"{case.name}: {case.what}", case.winner, case.margin, *map(of_case, both))
    return table


def of_case(rated: Rated | None) -> str:
    """What a form's best is in one cell."""
    if rated is None:
        return "-"
    plan = rated.plan
    return f"{attained(rated)}, USD {plan.price_per_hour:.2f}/h: {plan.describe()}"


def attained(rated: Rated) -> str:
    """In few words."""
    share = f"{rated.score.attainment:.1%}"
    if rated.long is None or lasts(rated):
        return share
    return f"{share}, then drowns: {rated.long.attainment:.0%} of {rated.long.rounds:,} rounds"


def cells(rated: Rated, rounds_per_s: float) -> Iterator[str]:
    """Plan, attainment, both percentiles, price and cost in words: a row of any table of plans."""
    plan, score = rated.plan, rated.score
    yield plan.describe()
    if score.hopeless:
        yield f"given up at {score.attainment:.0%}"
    elif not lasts(rated):
        yield attained(rated)
    else:
        yield f"{score.attainment:.1%} ± {score.noise:.1%}"
    for share in (score.ttft_p95, score.itl_p95):
        yield f"{share:.2f}" if isfinite(share) else "-"
    yield f"{plan.price_per_hour:.2f}"
    yield f"{cost_per_1k_rounds(plan, rounds_per_s):.2f}"
