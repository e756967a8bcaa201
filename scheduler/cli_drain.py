"""`antiphon drain`: empty an engine before it is stopped, through a gateway."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from antiphon.scheduler.cli_options import DEFAULT_URL, Url
from antiphon.scheduler.errors import UserError

POLL_S = 0.5
NOT_IN_TIME = 3
"""Exit status when the deadline passed before it was safe to stop."""


def register(app: typer.Typer) -> None:
    app.command()(drain)


def drain(
    engine: Annotated[str, typer.Argument(help="Its id, as `antiphon engines` shows it.")],
    url: Url = DEFAULT_URL,
    undo: Annotated[bool, typer.Option("--undo", help="Use the engine again.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is safe to stop it.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Place nothing new on ENGINE, move its sessions' KV to other homes, and say when it can be stopped.

    Exit status: 0 it is safe to stop (or was told not to wait), 2 it cannot be drained, 3 not in time.
    """
    from antiphon.scheduler.sources import GatewaySource

    gateway, path = GatewaySource(url), f"/v1/engines/{quote(engine, safe='')}/drain"
    status = _checked(gateway.ask("DELETE" if undo else "POST", path))
    if undo or not wait:
        _show(status, as_json)
        return
    deadline = time.monotonic() + timeout_s
    said = ""
    while not status["safe"] and time.monotonic() < deadline:
        if not status["draining"]:
            raise UserError(f"{engine}: somebody has taken the drain back")
        if not as_json and (line := _line(status)) != said:
            typer.echo(line)
            said = line
        time.sleep(POLL_S)
        status = _checked(gateway.ask("GET", path))
    _show(status, as_json)
    if not status["safe"]:
        raise typer.Exit(NOT_IN_TIME)


def _checked(answer: Any) -> dict[str, Any]:
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        raise UserError(str(error.get("message")))
    if not isinstance(answer, dict) or answer.get("object") != "antiphon.drain":
        raise UserError("the gateway answered no drain; is it as new as this command?")
    return answer


def _show(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(status).decode())
    else:
        typer.echo(_line(status))


def _line(status: dict[str, Any]) -> str:
    name, work = status["engine_id"], status["work"]
    if not status["draining"]:
        return f"{name}: not draining"
    moved = f"{work['moved']} sessions moved ({work['moved_bytes'] / 1e6:.1f} MB"
    moved += f", {work['moved_partly']} of them in part)" if work["moved_partly"] else ")"
    if status["safe"]:
        return f"{name}: safe to stop; {moved}"
    waits = [
        f"{status['replicas_seen']} of {status['replicas']} gateways have seen it",
        f"{status['rounds']} rounds in flight",
        f"{work['left']} sessions left" if work["began_ms"] else "sessions are being counted",
        moved,
    ]
    stuck = f"; stuck: {work['stuck']}" if work["stuck"] else ""
    return f"{name}: draining: {', '.join(waits)}{stuck}"
