"""What must be true of the stack when a fault is over and its rounds are answered: nothing leaks."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection, Mapping
from typing import Any

import httpx

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryError
from antiphon.scheduler.ledger import LedgerUnavailable
from tests.faults.fleet import GATEWAYS, Fleet
from tests.faults.history import family

DEADLINE_S = 10.0
POLL_S = 0.2
RECEIPTS = 500
"""More than a run makes."""


async def receipts_of(fleet: Fleet, sessions: Collection[str] | None = None) -> dict[str, Mapping[str, Any]]:
    """Round id -> receipt, of these sessions and their implicit forks, or of all; the latest ones."""
    ledger = fleet.ledger()
    deadline = time.monotonic() + DEADLINE_S
    try:
        while True:
            try:
                found = await ledger.receipts(RECEIPTS)
                break
            except LedgerUnavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
    finally:
        await ledger.close()
    return {
        each["round_id"]: each for each in found if sessions is None or family(each["session_id"]) in sessions
    }


async def problems(fleet: Fleet, sessions: Collection[str]) -> list[str]:
    """What does not come right within the deadline; [] = all is well."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            found = [*await _in_flight(fleet), *await _leases(fleet, sessions), *await _stores(fleet)]
        except (httpx.HTTPError, DirectoryError, LedgerUnavailable) as error:
            found = [f"cannot be asked: {error!r}"]
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(POLL_S)


async def _in_flight(fleet: Fleet) -> list[str]:
    """Rounds that a gateway or an engine still holds."""
    found = []
    for number, name in enumerate(GATEWAYS):
        text = (await fleet.http.get(f"{fleet.gateway_url(number)}/metrics")).text
        match = re.search(r"^antiphon_http_requests_in_flight (\S+)", text, re.MULTILINE)
        requests = float(match.group(1)) if match else -1.0
        if requests > 1:  # this very request may be counted
            found.append(f"{name}: {requests:g} requests in flight")
    for engine_id, at in fleet.ports.items():
        if fleet.simulated:
            live = (await fleet.http.get(f"http://127.0.0.1:{at.http}/antiphon/live")).json()
            if live:
                found.append(f"{engine_id}: still at {live}")
    return found


async def _leases(fleet: Fleet, sessions: Collection[str]) -> list[str]:
    """Sessions that a round still holds."""
    ledger = fleet.ledger()
    try:
        records, _ = await ledger.sessions(1000)
    finally:
        await ledger.close()
    return [
        f"session {each.session_id}: its lease is still with round {each.in_flight}"
        for each in records
        if each.in_flight and family(each.session_id) in sessions
    ]


async def _stores(fleet: Fleet) -> list[str]:
    """Page stores whose books do not add up, or that keep what nobody reads."""
    found = []
    for engine_id in fleet.engine_ids:
        stats: wire.StatsReply = await fleet.ask_directory(engine_id, wire.Stats(), wire.StatsReply)
        kept = {
            name: count
            for name in ("inflight_pages", "quarantined_pages", "pins", "pending_offloads")
            if (count := getattr(stats, name))
        }
        if kept:
            found.append(f"{engine_id}: {kept}")
    return found
