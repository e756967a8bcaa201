"""A session as its clients see it: the ledger's record of its rounds, and what it was created with. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from antiphon.scheduler.ledger_views import SessionRecord, session_record

STATUSES = ("active", "waiting_tool", "closing", "closed")
TOOL_START = "tool_start"


@dataclass(frozen=True, slots=True)
class SessionDocument:
    record: SessionRecord
    status: str
    """active | waiting_tool (a tool runs, as its client says) | closing (with its round) | closed."""
    root_id: str
    """The session that its line began with: itself, if it has no parent."""
    forked_at: int | None
    """The parent's round that it goes on from, as far as is known."""
    model: str | None
    ttl_s: float
    """How long it is kept when idle."""
    expires_s: float
    """Unix time."""
    slo_ttft_s: float | None
    slo_itl_s: float | None
    """Of its rounds that name none."""
    priority: int | None
    expected_rounds: int | None
    expected_gap_s: float | None
    """Until its next round, as the client said last."""
    metadata: Mapping[str, str]


def read_document(
    fields: Mapping[str, str], pttl_ms: int, default_ttl_s: float, now_s: float
) -> SessionDocument:
    """Of a session's hash and what is left of its life."""
    record = session_record(fields)
    priority, rounds = fields.get("priority"), fields.get("expected_rounds")
    return SessionDocument(
        record=record,
        status=_status(fields),
        root_id=fields.get("root_id") or record.parent_id or record.session_id,
        forked_at=int(fields["forked_at"]) if record.parent_id and "forked_at" in fields else None,
        model=fields.get("model"),
        ttl_s=int(fields["ttl_ms"]) / 1000 if "ttl_ms" in fields else default_ttl_s,
        expires_s=now_s + max(0, pttl_ms) / 1000,
        slo_ttft_s=_number(fields.get("want_ttft_s")),
        slo_itl_s=_number(fields.get("want_itl_s")),
        priority=int(priority) if priority is not None else None,
        expected_rounds=int(rounds) if rounds is not None else None,
        expected_gap_s=_number(fields.get("expected_gap_s")),
        metadata=msgspec.json.decode(fields["metadata"]) if "metadata" in fields else {},
    )


def resource(document: SessionDocument) -> dict[str, Any]:
    """The object of /v1/sessions, JSON-ready."""
    record = document.record
    return {
        "id": record.session_id,
        "object": "session",
        "created_at": int(record.created_s),
        "last_active_at": int(record.updated_s),
        "status": document.status,
        "parent_id": record.parent_id,
        "root_id": document.root_id,
        "forked_at_round": document.forked_at,
        "round": record.rounds,
        "model": document.model,
        "ttl_s": document.ttl_s,
        "expires_at": int(document.expires_s),
        "usage": {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": record.prompt_tokens + record.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        },
        "slo": {"ttft_ms": _milliseconds(document.slo_ttft_s), "tpot_ms": _milliseconds(document.slo_itl_s)},
        "priority": document.priority,
        "expected_rounds": document.expected_rounds,
        "expected_gap_s": document.expected_gap_s,
        "metadata": dict(document.metadata),
        "tenant": record.tenant,
        "home": record.home,
        "in_flight": record.in_flight,
        "context_tokens": record.context_tokens,
    }


def _status(fields: Mapping[str, str]) -> str:
    if "closed_ms" in fields:
        return "closed"
    if "closing" in fields:
        return "closing"
    heard_ms, active_ms = int(fields.get("event_ms", 0)), int(fields.get("updated_ms", 0))
    waits = fields.get("event") == TOOL_START and heard_ms >= active_ms and "lease_round" not in fields
    return "waiting_tool" if waits else "active"


def _number(text: str | None) -> float | None:
    return float(text) if text is not None else None


def _milliseconds(seconds: float | None) -> float | None:
    return round(seconds * 1000, 3) if seconds is not None else None
