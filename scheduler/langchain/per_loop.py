"""An HTTP transport for one client that is used in several event loops.

langchain-openai keeps one async HTTP client per base URL for the whole process. Its connections belong to the
loop that opened them, so a second `asyncio.run` fails with "Event loop is closed". Here each loop has
connections of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai


class PerLoopTransport(httpx2.AsyncBaseTransport):
    """One `AsyncHTTPTransport` for each loop that is open."""

    def __init__(self, limits: httpx2.Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._transports: dict[asyncio.AbstractEventLoop, httpx2.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await self._here().handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections of the running loop; those of other loops are theirs to close."""
        with self._lock:
            transport = self._transports.pop(asyncio.get_running_loop(), None)
        if transport is not None:
            await transport.aclose()

    def _here(self) -> httpx2.AsyncHTTPTransport:
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._transports:
                # A closed loop's sockets can no longer be closed by it: dropping them does.
                self._transports = {at: kept for at, kept in self._transports.items() if not at.is_closed()}
                self._transports[loop] = httpx2.AsyncHTTPTransport(limits=self._limits)
            return self._transports[loop]


def async_client_for(base_url: str) -> httpx2.AsyncClient | None:
    """A client for any loop; None where the environment asks for a proxy, which a transport would pass by."""
    host = urlsplit(base_url).hostname or ""
    proxies: Mapping[str, str] = getproxies()
    if any(proxies.get(scheme) for scheme in ("http", "https", "all")) and not proxy_bypass(host):
        return None
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
    return openai.DefaultAsyncHttpxClient(transport=PerLoopTransport(limits))
