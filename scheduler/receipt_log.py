"""Receipts as JSON, and the newest of them in memory: what /v1/receipts shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from antiphon.policies.base import Candidate
from antiphon.scheduler.outcomes import Receipt

DEFAULT_CAPACITY = 10_000


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """All fields, enums by value; a placement's predictions carry their sum as `ttft_s`."""
    record: dict[str, Any] = msgspec.to_builtins(receipt)
    for entry, attempt in zip(record["tries"], receipt.tries, strict=True):
        placement, shown = attempt.placement, entry["placement"]
        shown["predicted"] = candidate_json(placement.predicted)
        shown["considered"] = [candidate_json(candidate) for candidate in placement.considered]
    return record


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """All fields, and `ttft_s`, their sum."""
    shown: dict[str, Any] = msgspec.to_builtins(candidate)
    return shown | {"ttft_s": candidate.ttft_s}


class ReceiptLog:
    """The newest `capacity` receipts of this replica. For one event loop."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._receipts: deque[tuple[Receipt, str]] = deque(maxlen=capacity)

    def add(self, receipt: Receipt, tenant: str = "default") -> None:
        self._receipts.append((receipt, tenant))

    def newest(
        self, limit: int, session_id: str | None = None, tenant: str | None = None
    ) -> Sequence[dict[str, Any]]:
        """At most `limit`, newest first, of one session and of one tenant if they are named."""
        found: list[dict[str, Any]] = []
        for receipt, owner in reversed(self._receipts):
            if len(found) >= limit:
                break
            if session_id in (None, receipt.session_id) and tenant in (None, owner):
                found.append(receipt_json(receipt) | {"tenant": owner})
        return found
