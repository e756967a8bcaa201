"""How a gateway ends: it says so, lets rounds finish, and sends the rest elsewhere before it goes.

first signal    /ready and new requests are 503; the listener stays open for `lame_duck_s`, so that load
                balancers see it. Ctrl-C has nobody to tell and skips that
then            the listener closes; rounds in flight go on until `grace_s` after the signal
at the end      those that are left are ended with an error that says to send them again: lease first
second signal   cuts everything off at once
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import suppress
from typing import Protocol

log = logging.getLogger(__name__)

WHY = "The gateway is stopping: send the request again."
SEND_AWAY_S = 2.0
"""For the leases of rounds that are cut off to be given back; and again for their clients to be told."""
CUT_MARGIN_S = 2 * SEND_AWAY_S


class Server(Protocol):
    """Of uvicorn's, what is used here."""

    should_exit: bool
    force_exit: bool


class Rounds(Protocol):
    """Of a replica, what is used here."""

    @property
    def rounds_in_flight(self) -> int: ...

    async def send_away(self, why: str, deadline_s: float) -> None: ...

    def hurry(self) -> None: ...


class Stopping:
    """What the gateway knows of its own end. For one event loop."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()
        self._hurried = asyncio.Event()
        self._to_tell = True

    @property
    def begun(self) -> bool:
        """No new request is taken any more."""
        return self._begun.is_set()

    def on_signal(self, number: int) -> None:
        """The first one drains, a second one cuts off."""
        if self.begun:
            self._hurried.set()
        self._to_tell = number != signal.SIGINT
        self._begun.set()

    async def end(self, server: Server, rounds: Rounds, lame_duck_s: float, grace_s: float) -> None:
        """Wait for a signal, then end the server as told above. Cancelled when the server has ended."""
        await self._begun.wait()
        until_s = asyncio.get_running_loop().time() + grace_s
        if self._to_tell:
            await self._pause(min(lame_duck_s, grace_s))
        server.should_exit = True
        await self._pause(until_s - asyncio.get_running_loop().time())
        if not self._hurried.is_set():
            if left := rounds.rounds_in_flight:
                log.warning("%d rounds are sent elsewhere by the shutdown", left)
            await rounds.send_away(WHY, SEND_AWAY_S)
            await self._pause(SEND_AWAY_S)
        rounds.hurry()
        server.force_exit = True

    async def _pause(self, seconds: float) -> None:
        """Cut short by the second signal."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._hurried.wait()
