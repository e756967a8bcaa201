"""The planner's evaluation: what is asked, what counts as met, and the page."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.pool import ScorePool
from antiphon.eval.planner.score import Score
from antiphon.eval.planner.standard import compared, main, read_case, write
from antiphon.eval.planner.standard_ask import Question as Asked
from antiphon.eval.planner.standard_ask import busy_rate
from antiphon.eval.planner.standard_page import Case, Results, Row, Timed, page, verdict
from antiphon.eval.planner.workload import Workload
from tests.test_planner_workload import H200, SESSIONS, WINDOW_TOKENS, fleet

SLO = Slo(2.0, 0.05)


def row(name: str, attained: int, price: float) -> Row:
    scored = Score(1000, attained, 1000 - attained, 0, 0, 0.5, 0.5, 1200)
    return Row(name, f"co-located {name}", ((2048, 4),), {"h200": 4}, price, price / 10, scored, scored)


def case(*rows: Row) -> Case:
    timed = Timed(8, 50.0, 12.0, 0.5, 200_000)
    long = Score(20_000, 19_000, 1000, 0, 0, 0.5, 0.5, 25_000)
    return Case("agents", {"h200": 8}, SLO, 0.005, 0.02, 1.5, 30.0, 0.4, 50, 100, rows, timed, long)


def results(*cases: Case) -> Results:
    return Results("qwen3-32b", "abc", {"agents": "generated"}, 2000, 3, 0.005, cases, 3, 60.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome", "words"),
    [
        ((950, 10.0), (955, 10.0), "met", "0.50 points behind, at the same cost"),
        ((950, 10.0), (961, 10.0), "**missed**", "1.10 points behind, at the same cost"),
        ((960, 12.0), (950, 10.0), "met, dearer", "1.00 points ahead, +2.00 USD/h"),
        ((955, 8.0), (955, 10.0), "met", "0.00 points ahead, -2.00 USD/h"),
        ((900, 8.0), (955, 10.0), "**missed**", "5.50 points behind, -2.00 USD/h"),
    ],
)
def test_the_goal(ours: tuple[int, float], theirs: tuple[int, float], outcome: str, words: str) -> None:
    found = verdict(case(row("the plan", *ours), row("brute force", *theirs)))
    assert found is not None and found.outcome == outcome and found.words() == words


def test_no_brute_force_no_verdict() -> None:
    assert verdict(case(row("the plan", 950, 10.0))) is None


def test_the_page_says_what_was_missed() -> None:
    good = case(row("the plan", 950, 10.0), row("brute force", 955, 10.0), row("equal split", 800, 10.0))
    bad = case(row("the plan", 900, 10.0), row("brute force", 955, 10.0))
    text = page(results(good, bad, case(row("the plan", 990, 20.0))))
    assert "Met in 1 of 2 cases, in 0 of them at a higher cost" in text and "cases are done" not in text
    assert "**1 of 3 cases are done**" in page(results(good))
    assert text.count("**missed**") == 1 and text.count("## agents on 8 x h200") == 3
    assert "| agents | 8 x h200 | co-located the plan | 95.0% ± 0.7% | 20,000 | 95.0% |" in text
    assert "| equal split | co-located equal split | 2048, 4 | 80.0% | 80.0% |" in text


def test_the_files(tmp_path: Path) -> None:
    known = results(case(row("the plan", 950, 10.0)))
    write(known, tmp_path / "planner_results.md")
    assert (tmp_path / "planner_results.md").read_text() == page(known)
    kept = (tmp_path / "results" / "planner.json").read_bytes()
    assert msgspec.json.decode(kept, type=Results) == known


def test_a_case_is_read_as_it_was_written() -> None:
    """Also where so few rounds were answered that a percentile is infinite, which JSON cannot say."""
    drowned = replace(row("Eq. 5", 10, 10.0).asked, ttft_p95=float("inf"))
    known = case(row("the plan", 950, 10.0), replace(row("Eq. 5", 10, 10.0), more=drowned))
    assert read_case(msgspec.json.encode(known)) == known


def test_what_is_compared_is_compared_on_equal_windows() -> None:
    workload = Workload.of(SESSIONS["hotpotqa"], 2.0, H200.latency)
    ask = Ask(
        model="qwen3-32b", budget={"h200": 8}, slo=SLO, session_rate_per_s=2.0, window_tokens=WINDOW_TOKENS
    )  # fmt: skip
    asked = Asked(ask, (H200,), workload, 0.5)
    one, two = fleet(0, 1, "local"), fleet(1, 1)
    with ScorePool(workload, SLO, WINDOW_TOKENS, 1) as pool:
        rows = compared({"a": one, "b": two, "c": one}, asked, pool, rounds=60, windows=2)
    assert [each.name for each in rows] == ["a", "b", "c"]
    assert rows[0] == replace(rows[2], name="a")
    assert rows[0].asked.rounds == pytest.approx(rows[1].asked.rounds, rel=0.03)  # the slower is sent fewer
    assert rows[0].more.rounds != rows[0].asked.rounds
    assert rows[0].per_1k_rounds == pytest.approx(14.0 / 3600 / workload.rounds_per_s * 1000)


def test_a_budget_that_is_twice_as_large_takes_twice_the_load() -> None:
    workload = Workload.of(SESSIONS["claude-code"], 1.0, H200.latency)
    rates = []
    for gpus in (8, 16):
        ask = Ask(
            model="qwen3-32b",
            budget={"h200": gpus},
            slo=SLO,
            session_rate_per_s=1,
            window_tokens=WINDOW_TOKENS,
        )
        rates.append(busy_rate(ask, (H200,), workload))
    assert rates[1] == pytest.approx(2 * rates[0])


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--traces", str(tmp_path / "nowhere")]) == 2
    assert "no folder of traces" in capsys.readouterr().err
