"""Waits until a watched round really is in a phase. Simulated engines say what they are at; of real ones the
linker's reads and the client's own stream tell.

    prefill    its session's request is being computed on the prefill engine
    transfer   its prefill is over, its decode has not begun, and the decode engine READs. READs are made slow
               beforehand, so that this lasts. Of a link fault: a READ of its was hit; nobody else reads then
    decode     its tokens come
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import httpx

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryError
from tests.faults.client import RetryingClient
from tests.faults.fleet import POOLS, Fleet

POLL_S = 0.01
FIRST_TOKENS = 2


class Watch:
    """Of one session's round under way."""

    def __init__(self, fleet: Fleet, client: RetryingClient, session: str, asked: asyncio.Task[Any]) -> None:
        self._fleet = fleet
        self._client = client
        self._session = session
        self._asked = asked
        self._prefilled = False
        """It was seen on a prefill engine."""

    async def reached(self, phase: str, deadline_s: float) -> bool:
        """Whether the round came into the phase in time, and before it was over."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline and not self._asked.done():
            if await self._is_in(phase):
                return not self._asked.done()
            await asyncio.sleep(POLL_S)
        return False

    async def _is_in(self, phase: str) -> bool:
        if not self._fleet.simulated:
            if phase == "decode":
                return self._client.progress.get(self._session, 0) >= FIRST_TOKENS
            return await self.reading() > 0
        prefilling = await self._on("prefill")
        if phase == "prefill":
            return any(each["admitted"] for each in prefilling)
        decoding = await self._on("decode")
        if phase == "decode":
            return any(each["output_tokens"] >= FIRST_TOKENS for each in decoding)
        self._prefilled = self._prefilled or bool(prefilling)
        return self._prefilled and not prefilling and not decoding and await self.reading() > 0

    async def hit(self, before: int, deadline_s: float) -> bool:
        """Whether a READ went wrong on command meanwhile; the round may be over by then."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            over = self._asked.done()
            if await hit_reads(self._fleet) > before:
                return True
            if over:
                break
            await asyncio.sleep(POLL_S)
        return False

    async def reading(self) -> int:
        """READs under way into decode engines."""
        return sum(state.reading for state in await _links(self._fleet, "decode"))

    async def _on(self, pool: str) -> Sequence[dict[str, Any]]:
        """The session's requests on the engines of a pool."""
        found: list[dict[str, Any]] = []
        for engine_id, at in self._fleet.ports.items():
            if POOLS[engine_id] == pool:
                with contextlib.suppress(httpx.HTTPError):
                    answer = await self._fleet.http.get(f"http://127.0.0.1:{at.http}/antiphon/live")
                    found += [each for each in answer.json() if each["session"] == self._session]
        return found


async def hit_reads(fleet: Fleet) -> int:
    """READs that were slow, cut or corrupt on command so far."""
    return sum(state.hit_reads for state in await _links(fleet, "decode", "prefill"))


async def _links(fleet: Fleet, *pools: str) -> list[wire.LinkFaults]:
    found = []
    for engine_id in fleet.engine_ids:
        if POOLS[engine_id] in pools:
            with contextlib.suppress(DirectoryError):
                found.append(await fleet.link_fault(engine_id, wire.LinkFault("none")))
    return found
