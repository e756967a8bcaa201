"""`antiphon plan`: how many engines of which GPUs, and whether to disaggregate. Imports inside, as cli.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from antiphon.scheduler.errors import UserError

WIDE = 130
"""Columns of what does not go to a terminal."""
PLAIN: Mapping[str, Any] = {"markup": False, "highlight": False}
INFEASIBLE = 3
"""Exit status: the ask was understood, and no plan can do it."""


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    trace: Annotated[str, typer.Argument(help="A trace, or a workload profile: claude-code, a .toml file.")],
    gpus: Annotated[str, typer.Option(help="The most of each kind: h100:16,a100:16")],
    model: Annotated[str, typer.Option(help="A model of the latency profiles: qwen3-32b, ...")],
    slo_ttft_s: Annotated[float, typer.Option("--slo-ttft", help="Target of every round, seconds.")],
    slo_itl_s: Annotated[float, typer.Option("--slo-itl", help="Target of every round, seconds.")],
    session_rate_per_s: Annotated[
        float, typer.Option("--session-rate", help="Sessions that arrive per second.")
    ],
    tensor_parallel: Annotated[str, typer.Option("--tp", help="GPUs of one engine: a menu.")] = "1,2,4,8",
    mixed_tensor_parallel: Annotated[
        bool, typer.Option("--mixed-tp", help="Engines of several degrees.")
    ] = False,
    policies: Annotated[str, typer.Option(help="A menu, of plans with a prefill pool.")] = "adaptive,ampd",
    prices_path: Annotated[Path | None, typer.Option("--prices", help="TOML: what GPUs cost.")] = None,
    models_path: Annotated[Path | None, typer.Option("--models", help="TOML: models of your own.")] = None,
    max_gap_s: Annotated[float, typer.Option("--max-gap", help="Cap of recorded gaps, seconds.")] = 60.0,
    max_sessions: Annotated[int | None, typer.Option(help="Only the trace's first so many.")] = None,
    divide: Annotated[int, typer.Option(help="Divide all lengths by this.")] = 1,
    share_system: Annotated[bool, typer.Option(help="Weka: sessions share tools and system prompt.")] = False,
    form: Annotated[str, typer.Option(help="Mooncake with delays: auto, cumulative or delta.")] = "auto",
    skip_bad: Annotated[bool, typer.Option(help="Leave out lines that cannot be read.")] = False,
    tolerance: Annotated[float, typer.Option(help="Attainment within which the cheapest wins.")] = 0.005,
    seed: int = 0,
    jobs: Annotated[int, typer.Option(help="Processes that simulate.")] = 2,
    explain: Annotated[bool, typer.Option("--explain", help="Say what keeps it from being better.")] = False,
    cases: Annotated[bool, typer.Option("--cases", help="Try where co-location is said to win.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all of it there.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder: page, plot, configuration, start lines.")] = None,
) -> None:
    """Choose engines, pools, policy, C and K for a load: attain most, then cost least. Exit status 3: no plan
    can do it."""
    _plan(locals())


def _plan(said: dict[str, Any]) -> None:
    """`said`: the command's options by name, which are those of `PlanOptions`."""
    from rich.console import Console

    from antiphon.eval.planner.ask import Infeasible, PlanError
    from antiphon.eval.planner.plan import PlanOptions, make_plan
    from antiphon.eval.planner.plan_table import lines
    from antiphon.eval.planner.pool import PoolError
    from antiphon.traces.schema import TraceError

    progress, answer = Console(stderr=True), Console()
    if not answer.is_terminal:
        answer.width = WIDE
    options = PlanOptions(**said)
    try:
        planned = make_plan(
            options, lambda line: progress.print(line, markup=False, highlight=False, soft_wrap=True)
        )
    except Infeasible as error:
        answer.print(f"no plan: {error.reason}\nnearest: {error.nearest}", **PLAIN, soft_wrap=True)
        raise typer.Exit(INFEASIBLE) from error
    except (PlanError, PoolError, TraceError, OSError) as error:
        raise UserError(str(error)) from error
    for line in lines(planned):
        answer.print(line, **PLAIN, soft_wrap=isinstance(line, str))
    for path in (options.json_path, options.out):
        if path is not None:
            progress.print(f"written: {path}", **PLAIN)
