"""The `antiphon` command. What a command needs is imported inside it: --help is quick and needs no torch.

A `UserError` ends a command with one line on stderr and exit status 2; anything else is a bug, and shows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from antiphon.scheduler import cli_drain, cli_evaluation, cli_plan
from antiphon.scheduler.cli_keys import app as keys_app
from antiphon.scheduler.cli_options import DEFAULT_URL, Url
from antiphon.scheduler.cli_trace import app as trace_app
from antiphon.scheduler.errors import UserError

app = typer.Typer(
    name="antiphon",
    help="Session-aware scheduler for multi-round LLM agents on SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(trace_app)
app.add_typer(keys_app)
cli_evaluation.register(app)
cli_plan.register(app)
cli_drain.register(app)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Default: ./antiphon.toml if it is there.")]
LedgerUrl = Annotated[
    str | None, typer.Option("--ledger", help="Read this ledger, not a gateway (redis://...).")
]
Fleet = Annotated[str, typer.Option("--fleet", help="Name of the fleet in that ledger.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=10_000)]


def main() -> None:
    """Entry point of the `antiphon` script."""
    try:
        app()
    except UserError as error:
        sys.exit(_complain(str(error)))


@app.command()
def serve(
    config: ConfigFile = None,
    check: Annotated[bool, typer.Option("--check", help="Print the resolved configuration.")] = False,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option(help="0 = any free port.")] = None,
    policy: Annotated[str | None, typer.Option(help="adaptive, ampd, local, ...")] = None,
    profile: Annotated[str | None, typer.Option(help="Latency profile: a name or a JSON file.")] = None,
    ledger: Annotated[str | None, typer.Option(help="Redis URL; default: an embedded Valkey.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="For the embedded Valkey and the fleet key.")] = None,
    fleet: Annotated[str | None, typer.Option(help="Name of the fleet in the ledger.")] = None,
    model: Annotated[Path | None, typer.Option(help="Directory with tokenizer and chat template.")] = None,
    slo_ttft_s: Annotated[float | None, typer.Option("--slo-ttft")] = None,
    slo_itl_s: Annotated[float | None, typer.Option("--slo-itl")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Write every round there, without its content, and its receipt.")
    ] = None,
    repool: Annotated[
        bool | None, typer.Option("--repool/--no-repool", help="Engines change pool as the load drifts.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Run the gateway and scheduler."""
    from antiphon.scheduler.config import load_config, to_toml

    overrides = {
        "gateway.host": host,
        "gateway.port": port,
        "gateway.log_level": log_level,
        "scheduler.policy": policy,
        "scheduler.profile": profile,
        "scheduler.slo_ttft_s": slo_ttft_s,
        "scheduler.slo_itl_s": slo_itl_s,
        "ledger.url": ledger,
        "ledger.state_dir": _text(state_dir),
        "ledger.fleet": fleet,
        "model.path": _text(model),
        "record.directory": _text(record),
        "repool.enabled": repool,
    }
    resolved = load_config(config, overrides)
    _check_policy(resolved)
    if check:
        typer.echo(to_toml(resolved))
        return
    from antiphon.scheduler.serve import run_server

    raise typer.Exit(run_server(resolved))


@app.command(context_settings={"allow_extra_args": True})
def engine(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="HTTP port.")],
    model: Annotated[Path | None, typer.Option(help="Model directory.")] = None,
    ledger: Annotated[
        str | None, typer.Option(envvar="ANTIPHON_REDIS_URL", help="Ledger to register in; `none` = do not.")
    ] = None,
    fleet: Fleet = "default",
    pool: Annotated[str, typer.Option(help="prefill or decode.")] = "decode",
    engine_id: Annotated[str, typer.Option(help="Default: HOST-PORT.")] = "",
    interface: Annotated[str, typer.Option(help="Interface or own address for HTTP and KV.")] = "127.0.0.1",
    kv_port: Annotated[int, typer.Option(help="Directory port of rank 0; 0 = free ports.")] = 0,
    advertise: Annotated[
        str, typer.Option(help="HOST:PORT of its HTTP for others, behind a port mapping.")
    ] = "",
    advertise_kv: Annotated[str, typer.Option(help="The same for its directory.")] = "",
    key_file: Annotated[Path | None, typer.Option(help="Default: the state directory's fleet key.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where that key is.")] = None,
    store_pages: Annotated[int, typer.Option(help="Pages of the host store; 0 = by the device pool.")] = 0,
    linker: Annotated[bool, typer.Option(help="Without it: `local` rounds only.")] = True,
    checksum: Annotated[bool, typer.Option(help="Check every page that is pulled.")] = False,
    fault_injection: Annotated[bool, typer.Option(hidden=True)] = False,
    replace: Annotated[bool, typer.Option(help="Take the engine id over from a live engine.")] = False,
    simulated: Annotated[bool, typer.Option(help="No model: virtual KV, timing from a profile.")] = False,
    profile: Annotated[str, typer.Option(help="Of a simulated engine.")] = "tiny-cpu",
    script: Annotated[Path | None, typer.Option(help="Answers and faults of a simulated engine.")] = None,
) -> None:
    """Start one SGLang engine with our KV linker. What follows `--` goes to SGLang."""
    if ledger is None:
        raise UserError("no ledger: give --ledger URL (`antiphon serve` logs it) or --ledger none")
    common: dict[str, Any] = {
        "port": port,
        "ledger": "" if ledger == "none" else ledger,
        "fleet": fleet,
        "pool": pool,
        "engine_id": engine_id,
        "interface": interface,
        "kv_port": kv_port,
        "advertise": advertise,
        "advertise_kv": advertise_kv,
        "key_file": _engine_key_file(key_file, state_dir),
        "fault_injection": fault_injection,
        "replace": replace,
    }
    if simulated:
        names = {"model_id": model.name, "model_path": str(model.resolve())} if model else {}
        _run_simulated({**common, **names, "http_key": True}, profile, script, context.args)
    elif model is None:
        raise UserError("--model DIR is needed (`antiphon tiny-model DIR` makes a small one), or --simulated")
    else:
        more = {"model": model, "store_pages": store_pages, "linker": linker, "checksum": checksum}
        _run_sglang({**common, **more}, context.args)


@app.command("tiny-model")
def tiny_model(
    directory: Path,
    architecture: Annotated[str, typer.Option(help="llama or qwen3.")] = "llama",
    seed: int = 0,
) -> None:
    """Write a tiny random checkpoint with tokenizer and chat template: the same bytes for the same seed."""
    from antiphon.engines.tiny_model import TinyModelError, write_tiny_model

    try:
        typer.echo(write_tiny_model(directory, architecture=architecture, seed=seed))
    except TinyModelError as error:
        raise UserError(str(error)) from error


@app.command()
def status(
    url: Url = DEFAULT_URL, ledger: LedgerUrl = None, fleet: Fleet = "default", as_json: AsJson = False
) -> None:
    """Whether the fleet can serve, and what it did last. Exit status 1 if it is not ready."""
    from antiphon.scheduler.tables import status_table

    source = _source(url, ledger, fleet)
    ready, engines, receipts = source.ready(), source.engines(), source.receipts(100, None)
    if as_json:
        _print_json({**ready, "engines": engines, "receipts": receipts})
    else:
        _print_table(status_table(ready, engines, receipts))
    if not ready.get("ready"):
        raise typer.Exit(1)


@app.command()
def engines(
    url: Url = DEFAULT_URL, ledger: LedgerUrl = None, fleet: Fleet = "default", as_json: AsJson = False
) -> None:
    """Engines that are alive, with their loads."""
    from antiphon.scheduler.tables import ENGINE_COLUMNS

    _show("engines", _source(url, ledger, fleet).engines(), ENGINE_COLUMNS, as_json)


@app.command()
def sessions(
    url: Url = DEFAULT_URL,
    ledger: LedgerUrl = None,
    fleet: Fleet = "default",
    as_json: AsJson = False,
    limit: Limit = 50,
) -> None:
    """Sessions, last active first."""
    from antiphon.scheduler.tables import SESSION_COLUMNS

    _show("sessions", _source(url, ledger, fleet).sessions(limit), SESSION_COLUMNS, as_json)


@app.command()
def receipts(
    url: Url = DEFAULT_URL,
    ledger: LedgerUrl = None,
    fleet: Fleet = "default",
    as_json: AsJson = False,
    limit: Limit = 20,
    session: Annotated[str | None, typer.Option("--session", help="Only of this session.")] = None,
) -> None:
    """Decisions, newest first: what was considered, predicted and measured, and why."""
    from antiphon.scheduler.tables import RECEIPT_COLUMNS

    _show("receipts", _source(url, ledger, fleet).receipts(limit, session), RECEIPT_COLUMNS, as_json)


@app.command()
def doctor(
    config: ConfigFile = None,
    ledger: Annotated[str | None, typer.Option(help="Redis URL; default: as `antiphon serve`.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Of the embedded Valkey and the fleet key.")] = None,
    fleet: Annotated[str | None, typer.Option(help="Name of the fleet in the ledger.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is missing, and prove each signal live. Exit status 1 if a check failed."""
    from antiphon.scheduler.config import load_config
    from antiphon.scheduler.doctor import run_doctor

    given = {"ledger.url": ledger, "ledger.state_dir": _text(state_dir), "ledger.fleet": fleet}
    checks = run_doctor(load_config(config, given))
    if as_json:
        _print_json(checks)
    else:
        for check in checks:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
            if check.fix:
                typer.echo(f"     -> {check.fix}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed_version

    typer.echo(f"antiphon {installed_version('antiphon')}")


# ---------------------------------------------------------------- helpers


def _check_policy(config: Any) -> None:
    """Policy, ordering and profile are named by strings: a wrong one must not wait for the first round."""
    from antiphon.policies.latency import load_latency_model
    from antiphon.policies.registry import make_ordering, make_policy

    try:
        make_policy(config.scheduler.policy, config.policy_parameters())
        make_ordering(config.scheduler.ordering)
        load_latency_model(config.scheduler.profile)
    except ValueError as error:
        raise UserError(str(error)) from error


def _run_sglang(options: dict[str, Any], sglang_flags: Sequence[str]) -> None:
    from antiphon.engines.launch_options import EngineOptions, LaunchError
    from antiphon.engines.launcher import run_engine

    try:
        run_engine(EngineOptions(**options, sglang_flags=tuple(sglang_flags)))
    except LaunchError as error:
        raise UserError(str(error)) from error


def _run_simulated(options: dict[str, Any], profile: str, script: Path | None, rest: Sequence[str]) -> None:
    from antiphon.engines.registry import EngineIdTaken
    from antiphon.engines.simulated import SimulatedOptions, run_simulated, with_sglang_flags
    from antiphon.scheduler.logs import configure_logging

    configure_logging()
    try:
        run_simulated(with_sglang_flags(SimulatedOptions(**options, profile=profile, script=script), [*rest]))
    except (ValueError, OSError, EngineIdTaken) as error:
        raise UserError(f"simulated engine: {error}") from error


def _engine_key_file(key_file: Path | None, state_dir: Path | None) -> str:
    """The file that the engine reads its fleet key from; "" when the environment has the key."""
    from antiphon.scheduler.config import Config, LedgerConfig
    from antiphon.scheduler.fleet_key import KEY_FILE, KEY_VARIABLE, load_or_create_fleet_key

    if key_file is not None:
        return str(key_file)
    if os.environ.get(KEY_VARIABLE):
        return ""
    directory = Config(ledger=LedgerConfig(state_dir=_text(state_dir) or "")).state_dir()
    load_or_create_fleet_key(directory)
    return str(directory / KEY_FILE)


def _source(url: str, ledger: str | None, fleet: str) -> Any:
    from antiphon.scheduler.sources import GatewaySource, LedgerSource

    return GatewaySource(url) if ledger is None else LedgerSource(ledger, fleet)


def _show(title: str, items: Sequence[Any], columns: Sequence[Any], as_json: bool) -> None:
    from antiphon.scheduler.tables import list_table

    if as_json:
        _print_json(items)
        return
    typer.echo(f"{title}: {len(items)}")
    if items:
        _print_table(list_table(items, columns))


def _print_json(content: object) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())


def _print_table(table: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe has no width of its own, and a table cut to 80 columns is of no use there.
    Console(width=None if console.is_terminal else 240).print(table)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _complain(message: str) -> int:
    typer.echo(f"antiphon: {message}", err=True)
    return 2


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()
