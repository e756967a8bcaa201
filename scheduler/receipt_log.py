"""Receipts as JSON, and the newest of them in memory: what /v1/receipts shows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from antiphon.policies.base import Candidate
from antiphon.scheduler.outcomes import Receipt

PENDING, NOT_CLAIMED, NEVER = "pending", "not_claimed", "never"
"""What a receipt says of the ledger: its answer is to come, it was not asked, it never answered. Else "yes",
"fenced" (a later try had the round) or "repeated" (another try was recorded as completed before)."""
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


@dataclass(slots=True, eq=False)
class _Kept:
    receipt: Receipt
    tenant: str
    recorded: str


class ReceiptLog:
    """The newest `capacity` receipts of this replica. For one event loop."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        """By round."""

    def add(self, receipt: Receipt, tenant: str = "default", recorded: str = PENDING) -> None:
        """`recorded`: what is known of that yet, as `settle` has it."""
        self._kept[receipt.round_id] = _Kept(receipt, tenant, recorded)
        self._kept.move_to_end(receipt.round_id)
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def settle(self, round_id: str, recorded: str) -> None:
        """Whether the ledger has recorded a round is known now."""
        kept = self._kept.get(round_id)
        if kept is not None:
            kept.recorded = recorded

    def newest(
        self, limit: int, session_id: str | None = None, tenant: str | None = None
    ) -> Sequence[dict[str, Any]]:
        """At most `limit`, newest first, of one session and of one tenant if they are named."""
        found: list[dict[str, Any]] = []
        for kept in reversed(self._kept.values()):
            if len(found) >= limit:
                break
            if session_id in (None, kept.receipt.session_id) and tenant in (None, kept.tenant):
                told = {"tenant": kept.tenant, "recorded": kept.recorded}
                found.append(receipt_json(kept.receipt) | told)
        return found
