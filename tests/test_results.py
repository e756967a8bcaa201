"""Adding up a replay: percentiles, attainment, receipts, the result file."""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.traces import provenance
from antiphon.traces.display import result_table
from antiphon.traces.results import (
    Conditions,
    Distribution,
    ReplayResult,
    RoundRecord,
    TraceInfo,
    add_receipts,
    attainment,
    distribution,
    percentile,
    summarise,
    write_result,
)


def record(session: str, number: int, **fields: Any) -> RoundRecord:
    fields = {"prompt_tokens": 100, "kept_tokens": 0, "status": "completed", **fields}
    return RoundRecord(session=session, round=number, **fields)


def result_of(records: list[RoundRecord], session_rounds: dict[str, int]) -> ReplayResult:
    return summarise(
        trace=TraceInfo("t.jsonl", "0" * 64, len(session_rounds), sum(session_rounds.values()), 0, 0, 0, 0),
        conditions=Conditions(
            url="http://127.0.0.1:1", model="m", run_id="r", arrivals="all at once", concurrency=None,
            divide=1, max_gap_s=60.0, window_tokens=None, timeout_s=120.0, retries=1, started_at="",
            commit=None, machine={},
        ),
        policy=None,
        seed=0,
        slo={"ttft_s": None, "itl_s": None},
        session_rounds=session_rounds,
        records=records,
        wall_s=2.0,
        interrupted=False,
    )  # fmt: skip


def test_percentiles_worked_by_hand() -> None:
    """Linear between the nearest ranks: of 1, 2, 4 the 25th percentile is 1.5 and the 90th 3.6."""
    assert percentile([1.0, 2.0, 4.0], 0.25) == 1.5
    assert percentile([1.0, 2.0, 4.0], 0.9) == pytest.approx(3.6)
    assert percentile([7.0], 0.99) == 7.0


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_agree_with_the_standard_library(values: list[float]) -> None:
    """The inclusive quantiles of `statistics` are the same definition."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for share, cut in ((0.5, cuts[49]), (0.9, cuts[89]), (0.99, cuts[98])):
        assert percentile(sorted(values), share) == pytest.approx(cut, abs=1e-6)


def test_distribution_leaves_out_what_is_not_known() -> None:
    """Rounds without a value (one token has no ITL) do not count; without any there is none."""
    assert distribution([None, 2.0, None, 1.0, 3.0]) == Distribution(3, 2.0, 2.0, 2.8, 2.98)
    assert distribution([None]) is None


@pytest.mark.parametrize(
    ("fields", "attained"),
    [
        ({"ttft_s": 1.0, "itl_s": 0.1}, True),
        ({"ttft_s": 1.1, "itl_s": 0.1}, False),
        ({"ttft_s": 1.0, "itl_s": 0.11}, False),
        ({"ttft_s": 1.0, "itl_s": None}, True),
        ({"ttft_s": 1.0, "itl_s": 0.1, "status": "failed"}, False),
    ],
)
def test_round_attains_within_both_targets(fields: dict[str, Any], attained: bool) -> None:
    """TTFT and mean ITL within; a single token's ITL is; a failed round does not attain."""
    assert record("a", 1, slo_ttft_s=1.0, slo_itl_s=0.1, **fields).attained is attained


def test_attainment_is_of_all_that_was_to_be_sent() -> None:
    """Rounds never sent count against it; a session attains when all of its rounds do."""
    records = [record("a", 1), record("a", 2), record("b", 1), record("b", 2, status="failed")]
    assert attainment(records, {"a": 2, "b": 3, "c": 1}) == {"rounds": 3 / 6, "sessions": 1 / 3}


def test_receipts_are_joined_by_round_id() -> None:
    """A receipt fills the record of its round and no other; unknown fields and null figures do no harm."""
    first, second, failed = record("a", 1, round_id="r1"), record("a", 2, round_id="r2"), record("b", 1)
    receipts: list[dict[str, Any]] = [
        {
            "round_id": "r2",
            "bytes_decode_to_prefill": 7,
            "bytes_prefill_to_decode": None,
            "reason": "why",
            "x": 1,
        },
        {"round_id": "other", "bytes_decode_to_prefill": 100},
        {"round_id": ""},
    ]
    add_receipts([first, second, failed], receipts)
    assert [item.receipt for item in (first, second, failed)] == [False, True, False]
    assert (second.bytes_decode_to_prefill, second.bytes_prefill_to_decode, second.reason) == (7, 0, "why")


def test_summary_separates_first_and_later_rounds() -> None:
    """TTFT of first and later rounds apart; failed rounds are in no figure but their own count."""
    records = [
        record("a", 1, ttft_s=4.0, arm="local", output_tokens=3, tries=2),
        record("a", 2, ttft_s=1.0, arm="remote_pull", cached_tokens=60, output_tokens=3, tries=1),
        record("b", 1, ttft_s=9.0, status="failed", arm="local", tries=2),
    ]
    result = result_of(records, {"a": 2, "b": 2})
    assert result.ttft_first_s == Distribution(1, 4.0, 4.0, 4.0, 4.0)
    assert result.ttft_later_s == Distribution(1, 1.0, 1.0, 1.0, 1.0)
    assert result.arms == {"local": 1, "remote_pull": 1}
    assert (result.rounds_total, result.rounds_completed, result.rounds_failed, result.rounds_not_sent) == (
        4,
        2,
        1,
        1,
    )
    assert (result.rounds_retried, result.sessions_completed) == (2, 1)
    assert (result.prompt_tokens_total, result.cached_tokens_total, result.output_tokens_total) == (
        200,
        60,
        6,
    )
    assert result.attainment is None


def test_result_is_written_whole_and_reads_back(tmp_path: Path) -> None:
    """The file is the result; an old one is replaced, and nothing else is left in its folder."""
    result = result_of([record("a", 1, ttft_s=1.0)], {"a": 1})
    path = tmp_path / "deep" / "result.json"
    for _ in range(2):
        write_result(result, path)
    assert msgspec.json.decode(path.read_bytes(), type=ReplayResult) == result
    assert list(path.parent.iterdir()) == [path]


def test_table_has_a_row_for_whatever_happened() -> None:
    """A result without times or with failures is shown too."""
    table = result_table(result_of([record("a", 1, status="failed")], {"a": 3}))
    cells = [list(column.cells) for column in table.columns]
    rows = dict(zip(cells[0], cells[1], strict=True))
    assert rows["rounds completed"] == "0 of 3"
    assert rows["rounds failed, not sent"] == "1, 2"
    assert not any("TTFT" in str(name) for name in rows)


def test_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout it is the commit, with "-dirty" if changed; elsewhere there is none."""
    source = tmp_path / "traces" / "provenance.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.commit() is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "--no-verify", "-m", "x")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert provenance.commit() == head
    source.write_text("changed")
    assert provenance.commit() == f"{head}-dirty"


def test_machine_does_not_name_the_host() -> None:
    """Conditions say what the machine is like, never which one it is."""
    import platform

    assert set(provenance.machine()) == {"system", "release", "architecture", "cpus", "python"}
    assert platform.node() not in provenance.machine().values()
