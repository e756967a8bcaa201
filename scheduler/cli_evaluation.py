"""The commands that evaluate: replay, simulate, sweep, report, counterfactual, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antiphon.scheduler.cli_options import DEFAULT_URL, Url
from antiphon.scheduler.errors import UserError

if TYPE_CHECKING:
    from antiphon.eval.simulation_plan import SimulateOptions

Trace = Annotated[Path, typer.Argument(help="A file, a folder, or a .tar, .gz or .xz of them.")]
SloTtft = Annotated[float | None, typer.Option("--slo-ttft", help="TTFT target in seconds, for all rounds.")]
SloItl = Annotated[float | None, typer.Option("--slo-itl", help="ITL target in seconds, for all rounds.")]
MaxGap = Annotated[float, typer.Option("--max-gap", help="Cap of the recorded gaps, in seconds.")]
SkipBad = Annotated[bool, typer.Option(help="Leave out lines that cannot be read, and count them.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the result there.")]
RoundsPath = Annotated[Path | None, typer.Option("--rounds", help="Write every round there (.gz: packed).")]
Form = Annotated[str, typer.Option(help="Mooncake with delays: auto, cumulative or delta.")]
ShareSystem = Annotated[bool, typer.Option(help="Weka: sessions share tools and system prompt.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `antiphon` app."""
    for command in (replay, simulate, sweep, report, counterfactual, calibrate):
        app.command()(command)


def replay(
    trace: Trace,
    url: Url = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Default: the first that the gateway lists.")] = None,
    session_rate: Annotated[float | None, typer.Option(help="Poisson session starts per second.")] = None,
    as_recorded: Annotated[bool, typer.Option(help="Sessions start as recorded.")] = False,
    concurrency: Annotated[int | None, typer.Option(help="Most live sessions.")] = None,
    max_sessions: Annotated[int | None, typer.Option(help="Only the first so many sessions.")] = None,
    divide: Annotated[int, typer.Option(help="Divide all lengths by this.")] = 1,
    max_gap_s: MaxGap = 60.0,
    window_tokens: Annotated[int | None, typer.Option(help="Default: what the gateway says.")] = None,
    seed: int = 0,
    slo_ttft_s: SloTtft = None,
    slo_itl_s: SloItl = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="For one try of a round.")] = 120.0,
    retries: int = 1,
    skip_bad: SkipBad = False,
    share_system: ShareSystem = False,
    form: Form = "auto",
    json_path: JsonPath = None,
    rounds_path: RoundsPath = None,
    verify_log: Annotated[Path | None, typer.Option(help="Write every round's token ids there.")] = None,
) -> None:
    """Drive a session trace against a gateway and measure."""
    from antiphon.traces.replay import ReplayOptions, run_replay

    options = ReplayOptions(
        trace=trace,
        url=url,
        model=model,
        session_rate=session_rate,
        as_recorded=as_recorded,
        concurrency=concurrency,
        max_sessions=max_sessions,
        divide=divide,
        max_gap_s=max_gap_s,
        window_tokens=window_tokens,
        seed=seed,
        slo_ttft_s=slo_ttft_s,
        slo_itl_s=slo_itl_s,
        timeout_s=timeout_s,
        retries=retries,
        skip_bad=skip_bad,
        share_system=share_system,
        form=form,  # type: ignore[arg-type]  # ReadOptions refuses others
        json_path=json_path,
        rounds_path=rounds_path,
        verify_log=verify_log,
    )
    raise typer.Exit(run_replay(options))


def simulate(
    trace: Trace,
    cluster: Annotated[str, typer.Option(help="A TOML file or a bundled name (2p2d-qwen3-32b-h200, ...).")],
    policy: Annotated[str, typer.Option(help="A policy of docs/policies.md: adaptive, ampd, local, ...")],
    ordering: Annotated[str, typer.Option(help="Of prefill queues: fcfs, edf, sjf, ampd_reorder.")] = "fcfs",
    session_rate: Annotated[float | None, typer.Option(help="Poisson session starts per second.")] = None,
    load: Annotated[float | None, typer.Option(help="Share of the fleet's time; default 0.7.")] = None,
    as_recorded: Annotated[bool, typer.Option("--as-recorded", help="Sessions start as recorded.")] = False,
    concurrency: Annotated[int | None, typer.Option(help="Most live sessions.")] = None,
    max_gap_s: MaxGap = 60.0,
    max_sessions: Annotated[int | None, typer.Option(help="Only the first so many sessions.")] = None,
    divide: Annotated[int, typer.Option(help="Divide all lengths by this.")] = 1,
    slo_ttft_s: SloTtft = None,
    slo_itl_s: SloItl = None,
    seed: int = 0,
    json_path: JsonPath = None,
    rounds_path: RoundsPath = None,
    share_system: ShareSystem = False,
    form: Form = "auto",
    skip_bad: SkipBad = False,
    correction: Annotated[bool, typer.Option(help="Learn from rounds how far off the profiles are.")] = True,
    repool: Annotated[bool, typer.Option("--repool", help="Engines change pool as the load drifts.")] = False,
) -> None:
    """Run a trace through the production scheduler on simulated engines."""
    from antiphon.eval.simulate import SimulateOptions
    from antiphon.scheduler.repool_config import RepoolConfig

    options = SimulateOptions(
        trace=trace,
        cluster=cluster,
        policy=policy,
        ordering=ordering,
        session_rate=session_rate,
        load=load,
        as_recorded=as_recorded,
        concurrency=concurrency,
        max_gap_s=max_gap_s,
        max_sessions=max_sessions,
        divide=divide,
        slo_ttft_s=slo_ttft_s,
        slo_itl_s=slo_itl_s,
        seed=seed,
        json_path=json_path,
        rounds_path=rounds_path,
        share_system=share_system,
        skip_bad=skip_bad,
        form=form,  # type: ignore[arg-type]  # ReadOptions refuses others
        corrections=correction,
        repool=RepoolConfig(enabled=True) if repool else None,
    )
    _simulate(options)


def _simulate(options: SimulateOptions) -> None:
    """Run it and show what it found."""
    from rich.console import Console

    from antiphon.eval.simulate import prepare, run_simulation
    from antiphon.traces.display import result_table

    console = Console(stderr=True)
    with _user_errors("simulate"):
        prepared = prepare(options)
        for line in (prepared.describe(), *prepared.bad_lines):
            console.print(line, markup=False, highlight=False)
        result = run_simulation(options, prepared)
    console.print(result_table(result))
    for flip in result.flips or ():
        console.print(flip, markup=False, highlight=False)
    for name, path in (("result", options.json_path), ("rounds", options.rounds_path)):
        if path is not None:
            console.print(f"{name}: {path}", markup=False, highlight=False)


def sweep(
    spec: Annotated[Path, typer.Argument(help="TOML: traces, clusters, policies, orderings, loads, seeds.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; what is there already is not run again.")],
    processes: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 2,
) -> None:
    """Run a grid of simulations, resumably. Exit status 1 if a cell failed."""
    from antiphon.eval.sweep import run_sweep

    with _user_errors("sweep"):
        status = run_sweep(spec, out, processes)
    raise typer.Exit(status)


def report(
    directory: Annotated[Path, typer.Argument(help="Folder with result files (and rounds files).")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in that folder.")] = None,
) -> None:
    """Make one HTML page, and its plots, of all results in a folder."""
    from antiphon.eval.report import run_report

    with _user_errors("report"):
        status = run_report(directory, out or directory / "report.html")
    raise typer.Exit(status)


def counterfactual(
    directory: Annotated[Path, typer.Argument(help="A recording of `antiphon serve --record`.")],
    policy: Annotated[str, typer.Option(help="The policy that is asked about.")],
    ordering: Annotated[str | None, typer.Option(help="Default: the recorded one.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Default: the recorded fleet.")] = None,
    seed: int = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the answer there.")] = None,
) -> None:
    """Show what another policy would have changed of recorded rounds (a simulation)."""
    from antiphon.eval.counterfactual import CounterfactualOptions, run_counterfactual

    options = CounterfactualOptions(
        directory=directory,
        policy=policy,
        ordering=ordering,
        cluster=cluster,
        seed=seed,
        json_path=json_path,
    )
    raise typer.Exit(run_counterfactual(options))


def calibrate(
    url: Annotated[str, typer.Option(help="Of an engine, or of a gateway (then with --engine).")],
    engine: Annotated[str | None, typer.Option(help="Engine id at that gateway.")] = None,
    ledger: Annotated[str | None, typer.Option(help="Redis URL; with --peer, for measuring pulls.")] = None,
    peer: Annotated[str | None, typer.Option(help="Engine id that pulls from the measured one.")] = None,
    fleet: Annotated[str, typer.Option(help="Name of the fleet in that ledger.")] = "default",
    state_dir: Annotated[str, typer.Option(help="Where the fleet key is.")] = "",
    base: Annotated[str, typer.Option("--profile", help="For what is not measured.")] = "tiny-cpu",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the profile there.")] = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds to spend on repeats.")] = 75.0,
    most_tokens: Annotated[int, typer.Option(help="Longest prompt to try.")] = 4096,
) -> None:
    """Measure a live engine and write a latency profile."""
    from antiphon.eval.calibrate import CalibrateOptions, run_calibrate

    options = CalibrateOptions(
        url=url,
        engine=engine,
        ledger=ledger,
        peer=peer,
        fleet=fleet,
        state_dir=state_dir,
        base=base,
        output=output,
        budget_s=budget_s,
        most_tokens=most_tokens,
    )
    raise typer.Exit(run_calibrate(options))


class _user_errors:  # noqa: N801
    """What a user's input causes ends the command with one line; anything else is a bug and shows."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from antiphon.engines.cluster import ClusterError
        from antiphon.eval.simulation_plan import SimulationError
        from antiphon.traces.results import ResultError
        from antiphon.traces.schema import TraceError

        if isinstance(error, (SimulationError, ClusterError, TraceError, ResultError, OSError)):
            raise UserError(str(error)) from error
