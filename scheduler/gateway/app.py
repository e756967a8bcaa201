"""The gateway: an ASGI app with the OpenAI routes, health, metrics, receipts; knows rounds, not the core."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.scheduler.answers import Calls
from antiphon.scheduler.config import Config
from antiphon.scheduler.drain_store import DrainStore
from antiphon.scheduler.errors import (
    ApiError,
    gateway_stopping,
    invalid,
    model_not_found,
    permission_denied,
)
from antiphon.scheduler.gateway.caller import current_caller
from antiphon.scheduler.gateway.completions import LOG_FIELDS, ROUND_ID, CompletionRoute, ExplainRoute
from antiphon.scheduler.gateway.conversations import Conversations
from antiphon.scheduler.gateway.drain_route import DrainRoute
from antiphon.scheduler.gateway.error_shapes import error_body
from antiphon.scheduler.gateway.identity import Identifier, given_request_id
from antiphon.scheduler.gateway.intake import ClientGone, FleetModel, Intake, served_models
from antiphon.scheduler.gateway.limits import LimitedRunner, Limits
from antiphon.scheduler.gateway.openapi import openapi_route
from antiphon.scheduler.gateway.overload import OverloadGate
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.gateway.requests import CHAT_ROUTE, COMPLETION_ROUTE
from antiphon.scheduler.gateway.rounds_route import ROUNDS_PATH, RoundsRoute
from antiphon.scheduler.gateway.sessions import PATH as SESSIONS_PATH
from antiphon.scheduler.gateway.sessions import SessionPages
from antiphon.scheduler.gateway.surface import surface_routes
from antiphon.scheduler.gateway.tenants import Access, TenantGate, refusal
from antiphon.scheduler.logs import request_id_var
from antiphon.scheduler.metrics import CONTENT_TYPE, Metrics
from antiphon.scheduler.models import Model, Models
from antiphon.scheduler.response_store import ResponseStore
from antiphon.scheduler.rounds import RoundRunner
from antiphon.scheduler.session_store import SessionStore
from antiphon.scheduler.stopping import Stopping

log = logging.getLogger(__name__)

DEFAULT_LIST_ITEMS = 100
MAX_LIST_ITEMS = 10_000
ABOUT_THE_PROCESS = frozenset({"/health", "/ready", "/metrics"})
CLIENT_CLOSED_STATUS = 499
"""In logs and metrics only: the client went away before there was a status."""

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this replica can serve, and what it stands on."""

    engines_alive: int
    ledger: str
    """"ok", "degraded" (away: rounds go on with what the core knows) or "starting"."""
    detail: str = ""

    @property
    def ready(self) -> bool:
        return self.engines_alive > 0 and self.ledger != "starting"


class GatewayState(FleetModel, Protocol):
    """What the gateway shows of the replica behind it. Items are JSON-ready."""

    def readiness(self) -> Readiness: ...

    async def receipts(self, limit: int, session_id: str | None, tenant: str | None) -> Sequence[Item]:
        """Newest first; `tenant` None = of all."""

    async def engines(self) -> Sequence[Item]: ...

    async def sessions(self, limit: int, tenant: str | None) -> Sequence[Item]:
        """Last active first; `tenant` None = of all."""


def create_app(
    runner: RoundRunner,
    tokenizers: TokenizerSource,
    config: Config,
    state: GatewayState,
    metrics: Metrics,
    access: Access | None = None,
    store: SessionStore | None = None,
    responses: ResponseStore | None = None,
    conversations: Conversations | None = None,
    on_session_ended: Callable[[str, str], None] = lambda tenant, session_id: None,
    calls: Calls | None = None,
    stopping: Stopping | None = None,
    drains: DrainStore | None = None,
) -> ASGIApp:
    """The ASGI application of one replica. The caller owns all that it is given, and starts and stops it.

    Without `access` the configured keys and limits are this replica's alone; without `store` conversations
    that name no session are all new, and sessions can only be listed. `on_session_ended` is told (tenant, id)
    of sessions that are closed here. Once `stopping` has begun, only pages about the process are answered.
    """
    metrics.watch_engines(lambda: state.readiness().engines_alive)
    access = access or Access.alone(config)
    pages = _Pages(config, state, metrics, stopping)
    identifier = _identifier(config, store, metrics)
    intake = Intake(tokenizers, config, state, access.salts, identifier, conversations, calls)
    runner = LimitedRunner(runner, access.limits)
    chat, completion = (
        CompletionRoute(path, runner, intake, config, metrics) for path in (CHAT_ROUTE, COMPLETION_ROUTE)
    )
    routes = [
        Route(CHAT_ROUTE, chat, methods=["POST"]),
        Route(COMPLETION_ROUTE, completion, methods=["POST"]),
        Route(ROUNDS_PATH, RoundsRoute(chat, intake), methods=["POST"]),
        *surface_routes(chat, intake, config, responses),
        Route("/v1/explain", ExplainRoute(runner, intake, config), methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model:path}", pages.model),
        Route("/v1/receipts", pages.receipts),
        *(DrainRoute(drains, state.engines).routes() if drains is not None else ()),
        Route("/v1/engines", pages.engines),
        *_session_routes(pages, intake, store, config, on_session_ended, access.limits),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics),
        openapi_route(),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: pages.api_error,
            HTTPException: pages.http_error,
            ClientGone: pages.client_gone,
            Exception: pages.bug,
        },
    )
    gate = TenantGate(OverloadGate(app, config.gateway, metrics), access.keys, config, metrics)
    return _RequestScope(gate, metrics, frozenset(route.path for route in routes), stopping)


def _identifier(config: Config, store: SessionStore | None, metrics: Metrics) -> Identifier:
    return Identifier(
        config.session,
        store,
        on_identified=lambda kind: metrics.identified.labels(kind).inc(),
        on_failed=metrics.identity_lookups_failed.inc,
    )


def _session_routes(
    pages: _Pages,
    intake: Intake,
    store: SessionStore | None,
    config: Config,
    on_ended: Callable[[str, str], None],
    limits: Limits,
) -> list[Route]:
    if store is None:
        return [Route(SESSIONS_PATH, pages.sessions)]
    return SessionPages(store, intake, config.ledger.session_ttl_s, on_ended, limits).routes()


class _Pages:
    """Everything that is not a completion."""

    def __init__(
        self, config: Config, state: GatewayState, metrics: Metrics, stopping: Stopping | None
    ) -> None:
        self._config = config
        self._stopping = stopping
        self._state = state
        self._models = Models(config)
        self._metrics = metrics
        self._started_at = int(time.time())

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok", "policy": self._config.scheduler.policy})

    async def ready(self, request: Request) -> Response:
        readiness = self._state.readiness()
        stops = self._stopping is not None and self._stopping.begun
        ready = readiness.ready and not stops
        shown = {
            "ready": ready,
            "engines_alive": readiness.engines_alive,
            "ledger": readiness.ledger,
            "detail": "the gateway is stopping" if stops else readiness.detail,
            "policy": self._config.scheduler.policy,
        }
        return _json(shown, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        served = served_models(self._models, self._state)
        return _list([self._model(name, model) for name, model in served.items()])

    async def model(self, request: Request) -> Response:
        name, served = request.path_params["model"], served_models(self._models, self._state)
        if name not in served:
            raise model_not_found(name, tuple(served))
        return _json(self._model(name, served[name]))

    async def receipts(self, request: Request) -> Response:
        limit, tenant = _limit(request.query_params), current_caller().sees_tenant
        return _list(await self._state.receipts(limit, request.query_params.get("session_id"), tenant))

    async def engines(self, request: Request) -> Response:
        if not current_caller().admin:
            raise permission_denied("Engines are shown to admin keys only.")
        return _list(await self._state.engines())

    async def sessions(self, request: Request) -> Response:
        limit, tenant = _limit(request.query_params), current_caller().sees_tenant
        return _list(await self._state.sessions(limit, tenant))

    async def api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self._metrics.errors.labels(error.code).inc()
        request.scope.setdefault(LOG_FIELDS, {})["code"] = error.code
        closing = {"Connection": "close"} if error.status in (408, 413) else {}  # the body was not read whole
        shown = error_body(request.url.path, error)
        return _json(shown, error.status, error.headers() | closing)

    async def client_gone(self, request: Request, error: Exception) -> Response:
        """Before its request was there. Nobody reads this; the log and the metrics say what happened."""
        self._metrics.disconnects.labels("body").inc()
        return Response(status_code=CLIENT_CLOSED_STATUS)

    async def http_error(self, request: Request, error: Exception) -> Response:
        """Starlette's own: no such route, or not with this method."""
        assert isinstance(error, HTTPException)
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        what = f"{request.method} {request.url.path}: {error.detail}."
        shaped = await self.api_error(request, ApiError(error.status_code, code, what))
        shaped.headers.update(error.headers or {})
        return shaped

    async def bug(self, request: Request, error: Exception) -> Response:
        """Our own fault; the exception goes on to the log."""
        shown = ApiError(
            500, "internal_error", "The gateway failed; its log has the request id.", kind="server_error"
        )
        return await self.api_error(request, shown)

    def _model(self, name: str, model: Model) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "antiphon",
            "max_model_len": self._state.context_tokens(model.key) or None,
        }


class _RequestScope:
    """Outermost layer: request id in context and answer, one log line and the HTTP metrics per request."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], stopping: Stopping | None
    ) -> None:
        self._app = app
        self._stopping = stopping
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        round_id = f"r{secrets.token_hex(12)}"
        request_id = given_request_id(Headers(scope=scope)) or round_id
        token = request_id_var.set(request_id)
        fields: dict[str, Any] = {}
        scope[LOG_FIELDS] = fields
        scope[ROUND_ID] = round_id
        status = CLIENT_CLOSED_STATUS
        began_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            with self._metrics.in_flight.track_inprogress():
                await self._serve(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed by a bug")
            raise
        finally:
            self._record(scope, status, time.perf_counter() - began_s, fields)
            request_id_var.reset(token)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """By the app; while the gateway stops, only what is asked about the process."""
        if self._stopping is None or not self._stopping.begun or scope["path"] in ABOUT_THE_PROCESS:
            await self._app(scope, receive, send)
            return
        error = gateway_stopping()
        self._metrics.errors.labels(error.code).inc()
        scope[LOG_FIELDS]["code"] = error.code
        answer = refusal(scope["path"], error)
        answer.headers["Connection"] = "close"
        await answer(scope, receive, send)

    def _record(self, scope: Scope, status: int, elapsed_s: float, fields: dict[str, Any]) -> None:
        route = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(elapsed_s)
        quiet = scope["method"] == "GET" and status < 400
        shown = {"method": scope["method"], "path": scope["path"], "status": status}
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={**shown, "elapsed_s": round(elapsed_s, 6), **fields},
        )


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def _list(items: Sequence[Item]) -> Response:
    return _json({"object": "list", "data": items})


def _limit(query: QueryParams) -> int:
    given = query.get("limit", str(DEFAULT_LIST_ITEMS))
    if (
        not given.isdecimal()
        or not given.isascii()
        or not 1 <= int(given[:9]) <= MAX_LIST_ITEMS
        or len(given) > 9
    ):
        raise invalid(f"`limit` must be 1 to {MAX_LIST_ITEMS}, got {given[:20]!r}.", param="limit")
    return int(given)
