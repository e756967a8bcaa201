"""The demo's own parts, without engines: what it accepts, what it refuses, what it sends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from antiphon.eval.demo import BUNDLED_TRACE, REPEATS, DemoError, judge, lock_directory, write_trace
from antiphon.eval.verify import Mismatch, VerifyReport
from antiphon.traces.readers import read_trace
from antiphon.traces.results import RunResult

GOOD = {
    "rounds_total": 4,
    "rounds_completed": 4,
    "bytes_decode_to_prefill": 1,
    "bytes_prefill_to_decode": 1,
}


def result(**changes: int) -> RunResult:
    """Just what the verdict looks at."""
    return cast(RunResult, SimpleNamespace(**(GOOD | changes)))


def report(**changes: object) -> VerifyReport:
    made = VerifyReport(rounds_checked=4, tokens_checked=40)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_run_that_shows_everything_passes() -> None:
    """All rounds, bytes both ways, all checked, none wrong: no complaint."""
    judge(result(), report())


@pytest.mark.parametrize(
    ("run", "check", "complaint"),
    [
        ({"rounds_completed": 3}, {"rounds_checked": 3}, "3 of 4 rounds were completed"),
        ({"bytes_decode_to_prefill": 0}, {}, "no KV moved one way: 0 bytes d->p"),
        ({"bytes_prefill_to_decode": 0}, {}, "no KV moved one way"),
        ({}, {"rounds_checked": 2}, "only 2 of 4 rounds were checked"),
        ({}, {"rounds_checked": 0}, "wrong tokens"),
        (
            {},
            {"mismatched_rounds": 1, "mismatches": [Mismatch("s", 2, 0, 1, 5, 0.5, 0.5)]},
            "1 rounds have wrong tokens, first: session s, round 2",
        ),
        ({}, {"broken_prompts": ["round 2 does not extend round 1"]}, "does not extend"),
    ],
)
def test_every_miss_fails_the_demo(run: dict[str, int], check: dict[str, object], complaint: str) -> None:
    """Whatever the demo must show and did not is an error that says so."""
    with pytest.raises(DemoError, match=complaint):
        judge(result(**run), report(**check))


def test_a_directory_in_use_is_not_touched(tmp_path: Path) -> None:
    """A second run on the directory of a live stack is refused; afterwards it is free again."""
    with lock_directory(tmp_path / "demo"), pytest.raises(DemoError, match="in use"):
        lock_directory(tmp_path / "demo")
    lock_directory(tmp_path / "demo").close()


def test_the_trace_is_repeated_as_new_sessions(tmp_path: Path) -> None:
    """Every repeat has ids of its own, so that it is another conversation."""
    sessions = list(read_trace(write_trace(tmp_path / "trace.jsonl", BUNDLED_TRACE)))
    original = list(read_trace(BUNDLED_TRACE))
    assert len(sessions) == REPEATS * len(original)
    assert len({session.session_id for session in sessions}) == len(sessions)
    assert [s.rounds for s in sessions] == [s.rounds for s in original] * REPEATS
