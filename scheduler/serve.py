"""`antiphon serve`: one replica behind uvicorn, from configuration to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import uvicorn
import uvloop
from starlette.types import ASGIApp

from antiphon.scheduler.answers import Calls
from antiphon.scheduler.api_keys import KeyRing, LedgerKeys
from antiphon.scheduler.config import Config, masked
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.fleet_key import load_or_create_fleet_key
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.conversations import Conversations
from antiphon.scheduler.gateway.limits import Limits
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.gateway.salts import CacheSalts
from antiphon.scheduler.gateway.tenants import Access
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.logs import configure_logging
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.models import Model, Models
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.response_store import ResponseStore
from antiphon.scheduler.session_store import SessionStore
from antiphon.scheduler.stopping import CUT_MARGIN_S, Stopping
from antiphon.scheduler.token_log import TokenLogs
from antiphon.scheduler.valkey import EmbeddedValkey, ValkeyError

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
KEEP_ALIVE_S = 75
"""For an idle connection: longer than clients keep theirs, so that none writes into one that closes."""


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`: uvicorn raises them again before we have closed what stands behind it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(config: Config) -> int:
    """Serve until SIGINT or SIGTERM; 0 after a clean end. Raises `UserError` if it cannot start."""
    configure_logging(config.gateway.log_level)
    state_dir = config.state_dir()
    key_file = Path(config.fleet.key_file).expanduser() if config.fleet.key_file else None
    fleet_key = load_or_create_fleet_key(state_dir, key_file)
    listener = _bind(config)
    try:
        embedded = None if config.ledger.url else EmbeddedValkey.start(state_dir)
    except ValkeyError as error:
        raise UserError(str(error)) from error
    try:
        url = config.ledger.url or (embedded.url if embedded else "")
        uvloop.run(_serve(config, url, fleet_key, listener))
    finally:
        if embedded is not None:
            embedded.stop()
    return 0


async def _serve(config: Config, ledger_url: str, fleet_key: bytes, listener: socket.socket) -> None:
    metrics = Metrics()
    lease_ttl_s = max(900.0, 2 * config.scheduler.request_deadline_s)  # longer than any round
    ledger = Ledger(ledger_url, fleet=config.ledger.fleet, lease_ttl_s=lease_ttl_s, fleet_key=fleet_key)
    metrics.watch_records(lambda: ledger.records.refused)
    metrics.watch_doubles(lambda: ledger.doubles)
    try:
        replica = Replica(config, ledger, fleet_key, uuid.uuid4().hex, metrics)
    except ValueError as error:
        raise UserError(str(error)) from error

    keys = KeyRing(config, LedgerKeys(ledger.connection))
    limits = Limits(ledger.connection, session_ttl_s=config.ledger.session_ttl_s)
    access = Access(keys, CacheSalts(fleet_key, apart=keys.required), limits)
    responses = ResponseStore(ledger, config.gateway.response_ttl_s)
    store = SessionStore(ledger)
    logs = TokenLogs(
        ledger_url,
        fleet=config.ledger.fleet,
        memory_bytes=config.gateway.history_memory_bytes,
        failures=ledger.connection.failures,
    )
    ttl_s = config.ledger.session_ttl_s
    conversations = Conversations(logs, store if config.session.infer else None, ledger, ttl_s)
    stopping = Stopping()
    app = create_app(
        replica,
        tokenizers_of(config, replica),
        config,
        replica,
        metrics,
        access,
        store,
        responses,
        conversations,
        replica.session_ended,
        Calls(ledger.connection),
        stopping=stopping,
        drains=replica.drains,
    )
    grace_s = config.gateway.shutdown_grace_s
    server = _Server(_settings(app, grace_s))
    _stop_on_signals(stopping)
    host, port = listener.getsockname()[:2]
    try:
        async with replica.running():
            log.info("serving", extra={"url": f"http://{host}:{port}", "ledger": masked(ledger_url)})
            ending = asyncio.create_task(
                stopping.end(server, replica, config.gateway.lame_duck_s, grace_s), name="stopping"
            )
            try:
                await server.serve(sockets=[listener])
            finally:
                ending.cancel()
    finally:
        await logs.close()
        await ledger.close()


def _settings(app: ASGIApp, grace_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        http="h11",  # whose limit of headers holds, whatever else is installed
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(grace_s + 2 * CUT_MARGIN_S),  # we end it before that
    )


def tokenizers_of(config: Config, replica: Replica) -> TokenizerSource:
    """Of every model: from the configured place, else from where its engines found it."""

    def locate(model: Model) -> str | None:
        return model.path or replica.model_path(model.key)

    return TokenizerSource({model.key: partial(locate, model) for model in Models(config)})


def _stop_on_signals(stopping: Stopping) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.on_signal, number)


def _bind(config: Config) -> socket.socket:
    """The listening socket, bound before anything else is started. Raises `UserError`."""
    host, port = config.gateway.host, config.gateway.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # what is left for a client that takes nothing goes with it
            stall_ms = math.ceil(config.gateway.reader_stall_s * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_ms)
        return listener
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}") from error
