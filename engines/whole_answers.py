"""What engines answer in one piece, as our types. Pure: every parser raises ValueError and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec

from antiphon.engines.base import LoadReport, PrefillResult

MAX_LOADS = 1024
"""Data-parallel ranks."""
MAX_COUNT = 2**53
"""Of tokens and requests: what is more is no count."""


class Aborted(ValueError):
    """The engine says that it aborted the prompt."""


def read_load(answer: bytes) -> LoadReport:
    """/v1/loads: sums over data-parallel ranks."""
    loads = _object(answer).get("loads")
    if not isinstance(loads, list) or len(loads) > MAX_LOADS:
        raise ValueError("no list of loads")

    def total(name: str) -> int:
        return sum(count(load[name]) for load in loads)

    try:
        return LoadReport(
            running_requests=total("num_running_reqs"),
            waiting_requests=total("num_waiting_reqs"),
            waiting_uncached_tokens=total("num_waiting_uncached_tokens"),
            used_tokens=total("num_used_tokens"),
            pool_tokens=total("max_total_num_tokens"),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a load without {error}") from error


def read_prefill(answer: bytes) -> PrefillResult:
    """/generate without output. Raises `Aborted`."""
    meta = _object(answer).get("meta_info")
    if not isinstance(meta, dict):
        raise ValueError("no meta_info")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise Aborted(str(reason)[:500])
    return PrefillResult(count(meta.get("prompt_tokens")), count(meta.get("cached_tokens")))


def count(value: Any) -> int:
    """A number of tokens or requests that came from outside."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return int(value)


def _object(answer: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(answer, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(f"not a JSON object: {error}") from error
