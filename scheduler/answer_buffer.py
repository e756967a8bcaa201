"""What engines have answered and clients have not read yet: one budget for all answers of a replica.

An engine goes at its own speed while the budget lasts, so a slow reader holds neither its batch slot nor the
session's lease. Readers that keep up cost nothing here: only what lies further behind is counted.
"""

from __future__ import annotations

import msgspec

from antiphon.engines.base import Chunk

PER_CHUNK_BYTES = 1024
PER_JSON_BYTE = 7
"""Parsed, an event takes up to so much memory; tests measure it."""


class AnswerBudget:
    """For one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """False: there is no room, and nothing was taken."""
        if self.used_bytes + size_bytes > self._limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes


def size_of(chunk: Chunk) -> int:
    """Bytes of memory that the chunk takes, about."""
    written = len(msgspec.json.encode(chunk.data)) if chunk.data is not None else 0
    return PER_CHUNK_BYTES + PER_JSON_BYTE * written + 40 * len(chunk.token_ids)
