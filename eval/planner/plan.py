"""`antiphon plan`: from a trace, GPUs, targets and a rate to a plan.

In this order: the sessions; the engines that the GPUs can make of the model; the MILP (`solve.py`); the
search (`search.py`), which starts from its plans too; what binds the answer; the known cases. Equal asks have
equal answers, but for the seconds that they took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from antiphon.engines.cluster import Slo
from antiphon.eval.known_models import KnownModel, model_named, read_models
from antiphon.eval.planner.around import around, cheaper
from antiphon.eval.planner.ask import Ask, Found, PlanError, Rated, Solved
from antiphon.eval.planner.candidates import check_number
from antiphon.eval.planner.cases import Case, cases
from antiphon.eval.planner.effort import Effort
from antiphon.eval.planner.engine_types import Menu, attainable, engine_types, gpu_budget, typical
from antiphon.eval.planner.explain import explain, left_out_lines
from antiphon.eval.planner.plan_document import document
from antiphon.eval.planner.plan_files import write_files
from antiphon.eval.planner.plan_page import page
from antiphon.eval.planner.plan_plots import front_png
from antiphon.eval.planner.planned import Planned, headline, under_way
from antiphon.eval.planner.pool import ScorePool
from antiphon.eval.planner.prices import GpuPrice, read_prices
from antiphon.eval.planner.read_sessions import read_sessions
from antiphon.eval.planner.score import rounds_of
from antiphon.eval.planner.search import last_views, search
from antiphon.eval.planner.solve import rounded_down, solve
from antiphon.eval.planner.workload import Workload
from antiphon.eval.report_style import require_matplotlib
from antiphon.policies.registry import make_policy
from antiphon.traces.formats import Form
from antiphon.traces.output import check_writable
from antiphon.traces.provenance import commit
from antiphon.traces.results import ResultError

OnProgress = Callable[[str], None]

NO_PREFILL_POOL = "local"
"""The policy under which engines of that pool would idle."""

MOST_LIVE = 20_000
"""Sessions under way in a window that is simulated; more would take hours and all memory."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What `antiphon plan` can be told, as it is told."""

    trace: str
    """A trace, or a workload profile by name or TOML file."""
    gpus: str
    """"h100:16,a100:16"."""
    model: str
    slo_ttft_s: float
    slo_itl_s: float
    session_rate_per_s: float
    tensor_parallel: str = "1,2,4,8"
    mixed_tensor_parallel: bool = False
    policies: str = "adaptive,ampd"
    prices_path: Path | None = None
    models_path: Path | None = None
    max_gap_s: float = 60.0
    max_sessions: int | None = None
    divide: int = 1
    share_system: bool = False
    form: Form = "auto"
    skip_bad: bool = False
    tolerance: float = 0.005
    seed: int = 0
    jobs: int = 2
    explain: bool = False
    cases: bool = False
    json_path: Path | None = None
    out: Path | None = None
    effort: Effort | None = None
    """Of the search; None = as much as it needs."""


def make_plan(options: PlanOptions, on_progress: OnProgress) -> Planned:
    """Plan and write what the options name.

    Raises `PlanError` for an ask that cannot be understood, `Infeasible` for one that no fleet can do,
    `TraceError`, `PoolError`, and OSError for a file that cannot be written.
    """
    began_s = time.perf_counter()
    models, prices = _tables(options)
    model_name, model = _model(options, models)
    ask = ask_of(options, model_name, model)
    _check_outputs(options)
    read = read_sessions(options, model.window_tokens)
    longest = max(turn.total_tokens for session in read.sessions for turn in session.rounds)
    menu = engine_types(ask, model, prices, longest)
    check_number(ask, menu.types)
    idle = typical(menu.types).latency
    workload = Workload.of(read.sessions, ask.session_rate_per_s, idle, ask.slo)
    check_live(workload)
    unloaded = attainable(menu.types, workload, ask.slo)
    on_progress(
        f"{read.described}: {workload.rounds_per_s:.3g} rounds per second,"
        f" {under_way(workload.live_sessions, workload.live_tokens)}"
    )
    chosen = _chosen(options, ask, model, menu, workload, on_progress)
    tried: tuple[Case, ...] = ()
    if options.cases:
        tried = cases(ask, model, models, prices, read.sessions, on_progress)
    explanation = (*chosen.explanation, *left_out_lines(menu.left_out, unloaded)) if options.explain else ()
    planned = Planned(
        ask=ask,
        trace=options.trace,
        trace_sha256=read.sha256,
        sessions=len(read.sessions),
        rounds=sum(len(session.rounds) for session in read.sessions),
        rounds_per_s=workload.rounds_per_s,
        live_sessions=workload.live_sessions,
        live_tokens=workload.live_tokens,
        headline=headline(chosen.found, ask.tolerance),
        found=chosen.found,
        cheaper=chosen.cheaper,
        solved=chosen.solved,
        left_out=menu.left_out,
        unloaded=unloaded,
        explanation=explanation,
        cases=tried,
        commit=commit() or "",
        took_s=time.perf_counter() - began_s,
    )
    _write(options, planned, prices)
    return planned


def check_live(workload: Workload) -> None:
    """Raises `PlanError` where more is under way than can be simulated, naming a rate that can."""
    live = workload.live_sessions
    if live > MOST_LIVE:
        most = rounded_down(workload.rate_per_s * MOST_LIVE / live)
        raise PlanError(
            f"--session-rate {workload.rate_per_s:g} has {live:.0f} sessions under way at any time, more than"
            f" {MOST_LIVE}: plan a part of the load, at most {most} sessions per second, on its share of the"
            " GPUs"
        )


class _Chosen(NamedTuple):
    solved: Solved
    found: Found
    cheaper: tuple[Rated, ...]
    explanation: tuple[str, ...]


def _chosen(
    options: PlanOptions,
    ask: Ask,
    model: KnownModel,
    menu: Menu,
    workload: Workload,
    on_progress: OnProgress,
) -> _Chosen:
    """The MILP's answer and the search's, and what else is simulated of it while the processes are there."""
    with ScorePool(workload, ask.slo, ask.window_tokens, ask.jobs) as pool:
        solved = solve(ask, menu.types, workload, executor=pool.executor)
        on_progress(
            f"MILP: {solved.plan.describe()}: Z {solved.plan_z:.2f}"
            f" (tables {solved.curves_s:.1f} s, solved in {solved.solve_s:.1f} s)"
        )
        found = search(
            ask,
            menu.types,
            workload,
            solved=solved,
            pool=pool,
            on_progress=on_progress,
            effort=options.effort,
        )
        written = options.out is not None or options.json_path is not None
        below = cheaper(ask, menu.types, found, pool) if written else ()
        explanation: tuple[str, ...] = ()
        if options.explain:
            window = workload.window(*last_views(ask, found)[0])
            rounds = rounds_of(found.best.plan, window, ask.slo, ask.window_tokens)
            beside = around(ask, found, pool)
            explanation = explain(ask, model, workload, found, solved, beside, rounds)
    return _Chosen(solved, found, below, explanation)


# ---------------------------------------------------------------- what is asked


def ask_of(options: PlanOptions, model_name: str, model: KnownModel) -> Ask:
    """The options as an `Ask`; raises `PlanError` naming the option."""
    for name, value in (
        ("--slo-ttft", options.slo_ttft_s),
        ("--slo-itl", options.slo_itl_s),
        ("--session-rate", options.session_rate_per_s),
    ):
        if not 0 < value < float("inf"):
            raise PlanError(f"{name} must be above 0, not {value:g}")
    if not 0 <= options.tolerance < 1:
        raise PlanError(
            f"--tolerance is a share of the rounds, at least 0 and below 1, not {options.tolerance:g}"
        )
    if options.jobs < 1:
        raise PlanError(f"--jobs must be at least 1, not {options.jobs}")
    policies = tuple(filter(None, (name.strip() for name in options.policies.split(","))))
    if not policies:
        raise PlanError("--policies names no policy")
    if NO_PREFILL_POOL in policies:
        raise PlanError(
            f"--policies: {NO_PREFILL_POOL} sends nothing to a prefill pool; co-located plans have it"
            " without being told"
        )
    for name in policies:
        try:
            make_policy(name)
        except ValueError as error:
            raise PlanError(f"--policies: {error}") from error
    ask = Ask(
        model=model_name,
        budget=parse_gpus(options.gpus),
        slo=Slo(options.slo_ttft_s, options.slo_itl_s),
        session_rate_per_s=options.session_rate_per_s,
        window_tokens=model.window_tokens,
        tensor_parallel=parse_degrees(options.tensor_parallel),
        mixed_tensor_parallel=options.mixed_tensor_parallel,
        policies=policies,
        tolerance=options.tolerance,
        seed=options.seed,
        jobs=options.jobs,
    )
    return msgspec.structs.replace(ask, budget=gpu_budget(ask))


def parse_gpus(text: str) -> dict[str, int]:
    """`h100:16,a100:16`; raises `PlanError` saying what of it is wrong."""
    budget: dict[str, int] = {}
    for part in text.split(","):
        name, colon, count = (piece.strip() for piece in part.partition(":"))
        if not (name and colon and count.isascii() and count.isdigit()) or not 0 < int(count) <= 100_000:
            raise PlanError(
                f"--gpus {text!r}: {part.strip()!r} is not KIND:NUMBER with a number of 1 to 100000,"
                " as in h100:16,a100:16"
            )
        if name in budget:
            raise PlanError(f"--gpus {text!r}: {name} is there twice")
        budget[name] = int(count)
    return budget


def parse_degrees(text: str) -> tuple[int, ...]:
    """`2,4`; raises `PlanError`."""
    degrees = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 64 for part in degrees):
        raise PlanError(f"--tp {text!r}: GPUs of one engine, 1 to 64, as in 2,4")
    return tuple(sorted({int(part) for part in degrees}))


def _model(options: PlanOptions, models: Mapping[str, KnownModel]) -> tuple[str, KnownModel]:
    try:
        return model_named(options.model, models)
    except ValueError as error:
        raise PlanError(f"--model: {error}") from error


def _tables(options: PlanOptions) -> tuple[dict[str, KnownModel], dict[str, GpuPrice]]:
    """Models and prices: ours, or the user's."""
    try:
        return read_models(options.models_path), read_prices(options.prices_path)
    except ValueError as error:
        raise PlanError(str(error)) from error


# ---------------------------------------------------------------- what is written


def _check_outputs(options: PlanOptions) -> None:
    """Before minutes of simulation are lost."""
    if options.out is not None:
        try:
            require_matplotlib()
        except ResultError as error:
            raise PlanError(f"--out: {error}") from error
        options.out.mkdir(parents=True, exist_ok=True)
        check_writable(options.out / "report.html")
    if options.json_path is not None:
        check_writable(options.json_path)


def _write(options: PlanOptions, planned: Planned, prices: dict[str, GpuPrice]) -> None:
    if options.out is not None:
        per_node = {gpu: price.gpus_per_node for gpu, price in prices.items()}
        write_files(options.out, planned.found.best.plan, planned.ask, per_node)
        (options.out / "front.png").write_bytes(front_png(planned))
        (options.out / "report.html").write_text(page(planned))
    if options.json_path is not None:
        encoded = msgspec.json.encode(document(planned))
        options.json_path.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
