"""A bucket of tokens that fills by the minute: pure. data/limit.lua does the same sums in the ledger.

What is asked for is let in when the bucket holds it, or is full where more is asked for than it can hold: a
long prompt waits for a full bucket and is not refused for ever. What is known only afterwards (output) is
taken with the next request and may leave less than nothing.
"""

from __future__ import annotations

from typing import NamedTuple

MINUTE_S = 60.0


class Bucket(NamedTuple):
    level: float
    """Tokens in it at `at_s`; below 0 = owed."""
    at_s: float


class Taken(NamedTuple):
    bucket: Bucket
    wait_s: float
    """0 = let in; else when to ask again: nothing was taken but what was owed."""


def level(bucket: Bucket | None, per_minute: int, now_s: float, owed: float = 0.0) -> float:
    """What is in it now, less what came to be owed; it begins full. A clock that goes back fills nothing."""
    there, filled = float(per_minute), 0.0
    if bucket is not None:
        there, filled = bucket.level, max(0.0, now_s - bucket.at_s) * per_minute / MINUTE_S
    return min(float(per_minute), there - owed + filled)


def take(bucket: Bucket | None, per_minute: int, asked: int, owed: float, now_s: float) -> Taken:
    """Take what is owed, and what is asked for if it is there. `owed` < 0 gives back."""
    there = level(bucket, per_minute, now_s, owed)
    lacks = min(asked, per_minute) - there
    if lacks > 0:
        return Taken(Bucket(there, now_s), lacks * MINUTE_S / per_minute)
    return Taken(Bucket(there - asked, now_s), 0.0)
