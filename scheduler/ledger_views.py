"""What people look at in the ledger: sessions and receipts, page by page. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from antiphon.scheduler.ledger_connection import LedgerConnection

RECEIPTS_PER_READ = 500
SESSIONS_PER_READ = 500


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One session as the ledger knows it; token counts are sums over its completed rounds."""

    session_id: str
    tenant: str
    parent_id: str | None
    home: str | None
    rounds: int
    in_flight: str | None
    """The round that holds the lease (or held it when its replica died)."""
    context_tokens: int
    """Prompt and output of its last completed round."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    slo_ttft_s: float
    slo_itl_s: float
    created_s: float
    updated_s: float
    """Unix time, by the ledger's clock."""


async def sessions(
    connection: LedgerConnection, limit: int, cursor: int, tenant: str | None = None
) -> tuple[tuple[SessionRecord, ...], int | None]:
    """A page of sessions, those that live longest first, and the next page's cursor (None at the end).

    Of one tenant if it is named.
    """
    names, next_cursor = await _session_keys(connection, limit, cursor, tenant)
    records = await connection.commands([("HGETALL", name) for name in names])
    return tuple(session_record(fields) for fields in records if "session_id" in fields), next_cursor


async def _session_keys(
    connection: LedgerConnection, limit: int, cursor: int, tenant: str | None
) -> tuple[list[str], int | None]:
    (index,) = connection.keys("sessions")
    owned = "" if tenant is None else connection.session_key(tenant, "")
    page = limit if tenant is None else max(limit, SESSIONS_PER_READ)
    found: list[str] = []
    while True:
        names: list[str] = await connection.command("ZREVRANGE", index, cursor, cursor + page - 1)
        for at, name in enumerate(names, cursor):
            if name.startswith(owned):
                found.append(name)
                if len(found) == limit:
                    return found, at + 1
        if len(names) < page:
            return found, None
        cursor += page


async def receipts(
    connection: LedgerConnection, limit: int, session_id: str | None
) -> tuple[dict[str, Any], ...]:
    """Latest first: JSON objects with the fields of `outcomes.Receipt`, the tenant, and `recorded_s`."""
    (stream,) = connection.keys("receipts")
    page = limit if session_id is None else RECEIPTS_PER_READ
    found: list[dict[str, Any]] = []
    last = "+"
    while len(found) < limit:
        rows: list[tuple[str, dict[str, str]]] = await connection.command(
            "XREVRANGE", stream, last, "-", "COUNT", page
        )
        found += [_receipt(at, row) for at, row in rows if session_id in (None, row["session_id"])]
        if len(rows) < page:
            break
        last = f"({rows[-1][0]}"
    return tuple(found[:limit])


def _receipt(at: str, row: Mapping[str, str]) -> dict[str, Any]:
    receipt: dict[str, Any] = msgspec.json.decode(row["receipt"])
    return {**receipt, "tenant": row["tenant"], "recorded_s": int(at.split("-")[0]) / 1000}


def session_record(fields: Mapping[str, str]) -> SessionRecord:
    """Of a session's hash."""
    return SessionRecord(
        session_id=fields["session_id"],
        tenant=fields.get("tenant", ""),
        parent_id=fields.get("parent_id"),
        home=fields.get("home"),
        rounds=int(fields.get("rounds", 0)),
        in_flight=fields.get("lease_round"),
        context_tokens=int(fields.get("context_tokens", 0)),
        prompt_tokens=int(fields.get("prompt_tokens", 0)),
        completion_tokens=int(fields.get("completion_tokens", 0)),
        cached_tokens=int(fields.get("cached_tokens", 0)),
        slo_ttft_s=float(fields.get("slo_ttft_s", 0.0)),
        slo_itl_s=float(fields.get("slo_itl_s", 0.0)),
        created_s=int(fields.get("created_ms", 0)) / 1000,
        updated_s=int(fields.get("updated_ms", 0)) / 1000,
    )


async def counters(connection: LedgerConnection) -> dict[str, int]:
    """Recorded rounds by outcome, and `fenced`."""
    (key,) = connection.keys("counters")
    raw = await connection.command("HGETALL", key)
    return {name: int(count) for name, count in raw.items()}
