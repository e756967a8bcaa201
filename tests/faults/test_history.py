"""The checker finds what is planted, and nothing where nothing is; the table adds up what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.faults.cells import PHASES, Cell, chosen, matrix, real_cells, seed_of
from tests.faults.history import Attempt, End, LogicalRound, Verdict, doubled, judge
from tests.faults.results import TrialResult
from tests.faults.table import BEGIN, END, findings_of, markdown, merged, rows_of, with_table

PROMPT, ANSWER = (1, 2, 3), (7, 8)
RIGHT = {"s/1": frozenset([ANSWER])}


def a_round(*ends: End, answer: tuple[int, ...] | None = ANSWER, elapsed_s: float = 1.0) -> LogicalRound:
    attempts = [Attempt(number % 2, end, elapsed_s / len(ends)) for number, end in enumerate(ends)]
    return LogicalRound("s", 1, 10.0, [PROMPT], attempts, answer, elapsed_s=elapsed_s)


def receipt(session_id: str = "s", outcome: str = "completed", tokens: int = 3) -> Mapping[str, Any]:
    return {"session_id": session_id, "outcome": outcome, "prompt_tokens": tokens}


def test_answered_at_once_and_after_a_retry_are_clean() -> None:
    tries: list[list[End]] = [["answered"], ["broken", "answered"], ["deadline", "answered"]]
    for ends in tries:
        verdict = judge([a_round(*ends)], [receipt(), receipt(outcome="failed")], RIGHT)
        assert verdict.clean and verdict.answered == 1 and verdict.retried == len(ends) - 1
    assert verdict.worst_s == 1.0


def test_refused_in_time_is_no_loss() -> None:
    """With a time to come back; an error that names none, a broken stream, silence are losses."""
    verdict = judge([a_round("error", "refused", answer=None)], [], RIGHT)
    assert verdict.clean and (verdict.refused, verdict.answered) == (1, 0)
    late = judge([a_round("error", "refused", answer=None, elapsed_s=11.0)], [], RIGHT)
    assert late.lost and late.hung
    bad: list[End] = ["error", "broken", "deadline"]
    for end in bad:
        verdict = judge([a_round("refused", end, answer=None)], [], RIGHT)
        assert len(verdict.lost) == 1 and verdict.refused == 0 and not verdict.clean


def test_an_answer_after_the_deadline_hung() -> None:
    verdict = judge([a_round("answered", elapsed_s=10.5)], [], RIGHT)
    assert verdict.hung and not verdict.lost and not verdict.clean and verdict.worst_s == 10.5


@pytest.mark.parametrize("answer", [(7, 9), (7,), (7, 8, 9), ()])
def test_other_tokens_are_wrong(answer: tuple[int, ...]) -> None:
    verdict = judge([a_round("answered", answer=answer)], [], RIGHT)
    assert len(verdict.wrong) == 1 and not verdict.clean


def test_two_completions_of_one_round_are_doubled() -> None:
    """In its session, or one of them in the fork that a retry became; other rounds and outcomes are not."""
    one = a_round("broken", "answered")
    assert doubled([one], [receipt(), receipt()])
    assert doubled([one], [receipt(), receipt("s~1f")])
    assert not doubled([one], [receipt()])
    assert not doubled([one], [receipt(), receipt(outcome="cancelled")])
    assert not doubled([one], [receipt(), receipt(tokens=4), receipt("other")])


def test_the_matrix_is_whole() -> None:
    """Four components by five faults and a link by three, each in four phases; seeds differ by cell."""
    cells = matrix()
    assert len(cells) == len(set(cells)) == 92
    assert {cell.phase for cell in cells} == set(PHASES)
    assert len({seed_of(cell.name, 1) for cell in cells}) == 92
    assert len(real_cells()) == 13
    assert [cell.name for cell in chosen(cells, "redis.kill.*, link.cut.idle")] == [
        *(f"redis.kill.{phase}" for phase in PHASES), "link.cut.idle",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"redis\.kill\.idle"):
        chosen(cells, "radish.*")


def test_the_table_says_what_the_runs_showed() -> None:
    def result(verdict: Verdict, *, hit: bool = True, leaks: tuple[str, ...] = ()) -> TrialResult:
        cell = Cell("redis", "restart", "idle")
        return TrialResult(cell, "aof", "simulated", 3, hit, verdict, list(leaks), "", 0, 1.0, [])

    good = result(Verdict(rounds=4, answered=3, refused=1, worst_s=1.26))
    bad = result(Verdict(rounds=2, answered=1, lost=["s/1: .."], worst_s=3.0), hit=False, leaks=("a pin",))
    (row,) = rows_of([good, bad])
    assert row == {
        "cell": "redis.restart.idle", "engines": "simulated", "runs": 2, "phase hit": 1, "rounds": 6,
        "answered": 4, "retried": 0, "refused": 1, "lost": 1, "doubled": 0, "wrong": 0, "hung": 0, "forks": 0,
        "leaks": 1, "worst s": 3.0,
    }  # fmt: skip
    (finding,) = findings_of([good, bad])
    assert finding["seed"] == 3 and finding["lost"] == ["s/1: .."] and finding["leaks"] == ["a pin"]
    told = {"rows": [row], "date": "d", "commits": ["c"], "seed": 3, "machine": "two cores", "took_s": 60,
            "findings": [finding]}  # fmt: skip
    assert markdown(told).splitlines()[-1].startswith("| all |  | 2 | 1 | 6 | 4 | 0 | 1 | 1 |")
    page = with_table(f"head\n{BEGIN}\nold\n{END}\ntail", told)
    assert page.startswith("head\n") and page.endswith("\ntail") and "old" not in page
    assert with_table(page, told) == page
    other = {**told, "rows": [{**row, "cell": "redis.kill.idle"}], "commits": ["e"], "findings": []}
    both = merged(told, other)
    assert [each["cell"] for each in both["rows"]] == ["redis.kill.idle", "redis.restart.idle"]
    assert (both["commits"], both["took_s"], both["findings"]) == (["c", "e"], 120, [finding])
    assert merged(both, {**other, "rows": [row], "findings": []})["findings"] == []
