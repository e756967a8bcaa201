"""What a simulated engine does with an API key: as SGLang with `--api-key`."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

OPEN_PATHS = ("/health", "/ready", "/metrics", "/antiphon/")
"""By their beginning. The last are the test hooks, there only with fault injection."""


def asking_for(key: str) -> Any:
    """A middleware: the same paths are open as SGLang's, and others get the same answer."""

    @web.middleware
    async def gate(
        http: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        scheme, _, presented = http.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(
            presented.encode("utf-8", "surrogateescape"), key.encode()
        )
        if known or http.path.startswith(OPEN_PATHS):
            return await handler(http)
        return web.json_response({"error": "Unauthorized"}, status=401)

    return gate
