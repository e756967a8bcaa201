"""The events of one streamed HTTP response, each with a deadline; and our errors for those of the network."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import aiohttp

from antiphon.engines.base import EngineError, FailureKind
from antiphon.engines.sse import SseError, SseEvent, SseParser

log = logging.getLogger(__name__)

END_S = 0.05
"""After the end mark, for the body to end too: only then can its connection be used again."""


class ResponseEvents:
    """Server-sent events of one response: a deadline for the first, and one for the silence after each."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        name: str,
        began_s: float,
        deadline_s: float,
        silence_s: Callable[[], float],
    ) -> None:
        """The first event is due `deadline_s` after `began_s`, on the loop's clock."""
        self._response = response
        self._name = name
        self._since_s = began_s
        self._limit_s: Callable[[], float] = lambda: deadline_s
        self._silence_s = silence_s
        self._parser = SseParser()
        self._ready: deque[SseEvent] = deque()

    async def next(self, *, started: bool) -> SseEvent | None:
        """The next event, None at the end of the stream; raises `EngineError`."""
        if self._ready:
            return self._ready.popleft()
        path, loop = self._response.url.path, asyncio.get_running_loop()
        if started:
            self._since_s, self._limit_s = loop.time(), self._silence_s
        while not self._ready:
            limit_s = self._limit_s()
            try:
                async with asyncio.timeout_at(self._since_s + limit_s):
                    received = await self._response.content.readany()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                if isinstance(error, TimeoutError) and loop.time() < self._since_s + self._limit_s():
                    continue  # meanwhile there is reason to wait longer
                raise translated(error, self._name, path, limit_s, started=started) from error
            if not received:
                return None
            try:
                self._ready.extend(self._parser.feed(received))
            except SseError as error:
                raise EngineError(FailureKind.BROKEN, f"{self._name}: {path}: {error}") from error
        return self._ready.popleft()

    async def end(self) -> None:
        """Wait a moment for the body's own end."""
        with suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(END_S):
                while await self._response.content.readany():
                    pass


def translated(error: Exception, name: str, path: str, deadline_s: float, *, started: bool) -> EngineError:
    """Our error for one of aiohttp or the network; `started` = part of the answer was passed on already."""
    if isinstance(error, TimeoutError):
        return EngineError(FailureKind.DEADLINE, f"{name}: {path}: nothing came within {deadline_s:.3g} s")
    kind = FailureKind.BROKEN if started else FailureKind.UNREACHABLE
    log.debug("%s: %s: connection failed: %r", name, path, error)
    return EngineError(kind, f"{name}: {path}: connection failed ({type(error).__name__})")
