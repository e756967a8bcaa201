"""The gate: an API key makes a request a tenant's. Tenants see nothing of each other, and share no KV.

A key is never logged and never answered. While the ledger is away, keys seen before stay valid for a time,
and others get a 503: whoever cannot be known does not come in.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.scheduler.access_config import AccessConfig, LimitsConfig
from antiphon.scheduler.api_keys import KeyRing
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import ApiError, ledger_unavailable
from antiphon.scheduler.gateway.caller import Caller, caller_var
from antiphon.scheduler.gateway.completions import LOG_FIELDS
from antiphon.scheduler.gateway.error_shapes import error_body
from antiphon.scheduler.gateway.limits import Limits
from antiphon.scheduler.gateway.salts import CacheSalts
from antiphon.scheduler.ledger_connection import LedgerUnavailable
from antiphon.scheduler.metrics import Metrics

MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True)
class Access:
    """All that decides who may do what."""

    keys: KeyRing
    salts: CacheSalts
    limits: Limits

    @classmethod
    def alone(cls, config: Config) -> Access:
        """By the configuration only, for a replica that shares nothing with others."""
        keys = KeyRing(config)
        salts = CacheSalts(secrets.token_bytes(32), apart=keys.required)
        return cls(keys, salts, Limits(None, session_ttl_s=config.ledger.session_ttl_s))


class TenantGate:
    """ASGI middleware: finds the caller or answers 401; puts it into scope, context and log line."""

    def __init__(self, app: ASGIApp, keys: KeyRing, config: Config, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._access: AccessConfig = config.access
        self._limits: LimitsConfig = config.limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fields: dict[str, Any] = scope.setdefault(LOG_FIELDS, {})
        try:
            caller = await self._caller(scope)
        except ApiError as error:
            self._metrics.errors.labels(error.code).inc()
            fields["code"] = error.code
            await refusal(scope["path"], error)(scope, receive, send)
            return
        if caller.key:
            fields |= {"tenant": caller.tenant, "key": caller.key}

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and caller.headers:
                message["headers"] = [*message.get("headers", ()), *caller.headers]
            await send(message)

        token = caller_var.set(caller)
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            caller_var.reset(token)

    async def _caller(self, scope: Scope) -> Caller:
        if not self._keys.required:
            return Caller(limits=self._limits)
        if scope["path"] in self._access.open_paths:
            return Caller(admin=False, limits=self._limits)
        presented = presented_key(Headers(scope=scope))
        if presented is None:
            raise _unauthorized(
                "This gateway asks for an API key: `Authorization: Bearer KEY` or `x-api-key: KEY`."
            )
        try:
            key = await self._keys.find(presented) if len(presented) <= MAX_KEY_CHARS else None
        except LedgerUnavailable as error:
            raise ledger_unavailable("The API key cannot be checked at present.") from error
        if key is None:
            raise _unauthorized("The API key is not known here.")
        return Caller(key.tenant, key.name, key.admin, key.limits.over(self._limits))


def presented_key(headers: Headers) -> bytes | None:
    """The key of `Authorization: Bearer`, else of `x-api-key`; None if there is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    key = value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return key.encode("latin-1") if key else None


def refusal(path: str, error: ApiError) -> Response:
    """An error in the shape that clients of that path expect."""
    body = error_body(path, error)
    headers = error.headers()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(body), error.status, headers, media_type="application/json")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "invalid_api_key", message)
