"""`antiphon keys`: API keys in the ledger, each shown when it is made and never again. Imports as cli.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from antiphon.scheduler.errors import UserError

T = TypeVar("T")

app = typer.Typer(
    name="keys",
    help="API keys: made, listed and removed in the ledger. Gateways with `ledger_keys` ask for them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEADLINE_S = 10.0

Name = Annotated[str, typer.Argument(help="In logs and lists; there is one key of a name.")]
Tenant = Annotated[str, typer.Option(help="Whose it is: tenants see nothing of each other.")]
Admin = Annotated[bool, typer.Option("--admin", help="Sees engines, and what is all tenants'.")]
Limit = Annotated[int | None, typer.Option(help="Not given: that of every key; 0 = no limit.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Default: ./antiphon.toml if it is there.")]
LedgerUrl = Annotated[str | None, typer.Option("--ledger", help="Redis URL; default: as `antiphon serve`.")]
StateDir = Annotated[Path | None, typer.Option(help="Of the embedded Valkey.")]
Fleet = Annotated[str | None, typer.Option(help="Name of the fleet in the ledger.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


@app.command()
def add(
    name: Name,
    tenant: Tenant = "default",
    admin: Admin = False,
    body_bytes: Limit = None,
    sessions: Limit = None,
    rounds_in_flight: Limit = None,
    tokens_per_minute: Limit = None,
    config: ConfigFile = None,
    ledger: LedgerUrl = None,
    state_dir: StateDir = None,
    fleet: Fleet = None,
) -> None:
    """Make a key and print it, once. What the ledger keeps is its digest."""
    from antiphon.scheduler.api_keys import ApiKey, KeyLimits, digest_of, new_key

    limits = KeyLimits(body_bytes, sessions, rounds_in_flight, tokens_per_minute)
    key = new_key()
    _checked(name, tenant, digest_of(key), limits)
    record = ApiKey(name, tenant, admin, limits, round(time.time(), 3))
    with _ledger(config, ledger, state_dir, fleet) as (ask, asked_for):
        if not ask(lambda keys: keys.add(record, digest_of(key))):
            raise UserError(f"there is a key {name!r} already; `antiphon keys remove {name}` takes it out")
    typer.echo(f"key {name!r} of tenant {tenant!r}; it is shown this once:", err=True)
    typer.echo(key)
    if not asked_for:
        typer.echo("gateways ask for keys of the ledger where [access] has `ledger_keys = true`", err=True)


@app.command("list")
def list_keys(
    as_json: AsJson = False,
    config: ConfigFile = None,
    ledger: LedgerUrl = None,
    state_dir: StateDir = None,
    fleet: Fleet = None,
) -> None:
    """The keys of the ledger, by name: tenant, limits, when they were made."""
    import msgspec

    with _ledger(config, ledger, state_dir, fleet) as (ask, _):
        keys = ask(lambda keys: keys.list())
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(keys), indent=2).decode())
        return
    typer.echo(f"keys: {len(keys)}")
    for key in keys:
        limits = ", ".join(f"{name} {value}" for name, value in msgspec.to_builtins(key.limits).items())
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created_s))
        typer.echo(f"{key.name}  tenant {key.tenant}{'  admin' if key.admin else ''}  {made}  {limits}")


@app.command()
def remove(
    name: Name,
    config: ConfigFile = None,
    ledger: LedgerUrl = None,
    state_dir: StateDir = None,
    fleet: Fleet = None,
) -> None:
    """Take a key out. Gateways let it in for `key_cache_s` more."""
    with _ledger(config, ledger, state_dir, fleet) as (ask, _):
        if not ask(lambda keys: keys.remove(name)):
            raise UserError(f"there is no key {name!r}; `antiphon keys list` shows them")
    typer.echo(f"removed key {name!r}")


@app.command()
def new(name: Name, tenant: Tenant = "default", admin: Admin = False) -> None:
    """Make a key for the configuration file: prints it, once, and its entry. Nothing is stored."""
    from antiphon.scheduler.api_keys import KeyLimits, digest_of, new_key

    key = new_key()
    _checked(name, tenant, digest_of(key), KeyLimits())
    typer.echo(f"# the key, shown this once: {key}")
    typer.echo(f'[[keys]]\nname = "{_escaped(name)}"\ntenant = "{_escaped(tenant)}"')
    typer.echo(f'key_sha256 = "{digest_of(key).hex()}"' + ("\nadmin = true" if admin else ""))


def _checked(name: str, tenant: str, digest: bytes, limits: Any) -> None:
    """As the configuration would check them."""
    import msgspec

    from antiphon.scheduler.access_config import KeyConfig

    try:
        KeyConfig(name, tenant, digest.hex(), **msgspec.to_builtins(limits))
    except ValueError as error:
        raise UserError(str(error)) from error


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


@contextmanager
def _ledger(
    file: Path | None, url: str | None, state_dir: Path | None, fleet: str | None
) -> Iterator[tuple[Callable[[Callable[[Any], Coroutine[Any, Any, T]]], T], bool]]:
    """A function that asks the ledger's keys, and whether this configuration's gateways do."""
    from antiphon.scheduler.api_keys import LedgerKeys
    from antiphon.scheduler.config import load_config
    from antiphon.scheduler.ledger_connection import LedgerConnection, LedgerUnavailable
    from antiphon.scheduler.valkey import EmbeddedValkey, ValkeyError

    overrides = {
        "ledger.url": url,
        "ledger.state_dir": None if state_dir is None else str(state_dir),
        "ledger.fleet": fleet,
    }
    config = load_config(file, overrides)
    try:
        embedded = None if config.ledger.url else EmbeddedValkey.start(config.state_dir())
    except ValkeyError as error:
        raise UserError(str(error)) from error
    where = config.ledger.url or (embedded.url if embedded else "")

    def ask(question: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        async def asked() -> T:
            connection = LedgerConnection(where, config.ledger.fleet, DEADLINE_S, 2)
            try:
                return await question(LedgerKeys(connection))
            finally:
                await connection.close()

        try:
            return asyncio.run(asked())
        except (LedgerUnavailable, ValueError) as error:
            raise UserError(f"--ledger: {error}") from error

    try:
        yield ask, config.access.ledger_keys
    finally:
        if embedded is not None:
            embedded.stop()
