"""Receipts as JSON, and the newest of them in memory: what /v1/receipts shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from antiphon.policies.base import Candidate
from antiphon.scheduler.messages import Receipt

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
        self._receipts: deque[Receipt] = deque(maxlen=capacity)

    def add(self, receipt: Receipt) -> None:
        self._receipts.append(receipt)

    def newest(self, limit: int, session_id: str | None = None) -> Sequence[dict[str, Any]]:
        """At most `limit`, newest first, of one session if it is named."""
        found: list[dict[str, Any]] = []
        for receipt in reversed(self._receipts):
            if len(found) >= limit:
                break
            if session_id is None or receipt.session_id == session_id:
                found.append(receipt_json(receipt))
        return found
