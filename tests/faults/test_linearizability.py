"""The ledger's leases are linearizable; and a ledger whose leases are not is found out."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.lease_model import Op, linearized
from tests.faults.linearizability import check


def test_every_history_has_an_order(valkey_url: str) -> None:
    """Concurrent replicas, delays, deaths, retries, lost answers: as if one call came after the other."""
    report = asyncio.run(check(valkey_url, 200, seed=7))
    assert not report.violation, report.violation
    assert report.histories == 200
    assert report.ops > 2000


BROKEN = {
    "an old claim's completion is recorded": (
        "complete", "gone or claimed and lease.newest > tonumber(fence)", "false",
    ),
    "a completion that is repeated counts twice": ("complete", "round[1] == fence", "false"),
    "a retry does not take the lease": ("claim", "lease.round == replaced", "false"),
    "a retry gets a number of its own": ("claim", "before[5] or '', before[1]", "'', before[1]"),
    "a call counts as often as it is answered": (
        "complete", "outcome == 'completed' and try.completed", "false",
    ),
    "the first try may go on after its retry": ("claim", "'gone', REPLACED", "'x', ''"),
    "a busy session is given twice": ("claim", "lease.state == HELD and not", "false and not"),
    "a fence is given twice": ("claim", "math.max(now_us, (tonumber", "math.max(0, 0 * (tonumber"),
    "an old claim's completion is recorded when the newer claim was given back": (
        "complete", "round[4] == fence and not round[1] and not round[3]", "false",
    ),
    "an old claim moves the home": ("rehome", "or lease.fence ~= fence", ""),
    "a claim that comes after its release stands": ("claim", "if known[8] then", "if false then"),
    "a session is closed under its round": ("session_close", "read_lease(KEYS[1]).state == HELD", "false"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ledger_is_found_out(valkey_url: str, name: str) -> None:
    script, was, instead = BROKEN[name]
    report = asyncio.run(check(valkey_url, 400, seed=3, broken=(script, was, instead)))
    assert report.violation, "400 histories told nothing"


def _op(kind: str, asked: tuple[object, ...], answer: object, at: tuple[float, float]) -> Op:
    return Op(kind, asked, answer, *at)


def _claim(round_id: str, fence: int, session: str, parent: str | None, at: tuple[float, float]) -> Op:
    asked = ("A", round_id, "s", "", "", False)
    return _op("claim", asked, (fence, session, 1, parent, ""), at)


@pytest.mark.parametrize(
    ("first", "second", "possible"),
    [((0, 1), (2, 3), True), ((2, 3), (0, 1), False), ((0, 2), (1, 3), True), ((1, 3), (0, 2), True)],
)
def test_fences_grow_over_real_time(
    first: tuple[float, float], second: tuple[float, float], possible: bool
) -> None:
    """Calls that overlap may have any order; one that was over stands before the next."""
    history = [_claim("r1", 5, "s", None, first), _claim("r2", 6, "s~6", "s", second)]
    assert (linearized(history) is not None) == possible
