"""Adding up a run: percentiles, attainment, receipts, the result and rounds files."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from antiphon.traces import provenance
from antiphon.traces.display import result_table
from antiphon.traces.results import (
    ClusterInfo,
    Conditions,
    Distribution,
    Load,
    ResultError,
    RoundRecord,
    RunResult,
    TraceInfo,
    add_receipts,
    attainment,
    distribution,
    percentile,
    read_result,
    read_rounds,
    summarise,
    weighted_distribution,
    write_result,
    write_rounds,
)


def record(session: str, number: int, **fields: Any) -> RoundRecord:
    fields = {"prompt_tokens": 100, "kept_tokens": 0, "status": "completed", **fields}
    return RoundRecord(session=session, round=number, **fields)


def result_of(records: list[RoundRecord], session_rounds: dict[str, int], **more: Any) -> RunResult:
    return summarise(
        trace=TraceInfo("t.jsonl", "0" * 64, len(session_rounds), sum(session_rounds.values())),
        conditions=Conditions(arrivals="all at once", max_gap_s=60.0, commit=None, machine={}),
        policy=None,
        seed=0,
        slo={"ttft_s": None, "itl_s": None},
        session_rounds=session_rounds,
        records=records,
        wall_s=2.0,
        **more,
    )


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


def test_weighted_percentiles_worked_by_hand() -> None:
    """Of 1, 1, 1, 4: the median is 1, the 90th percentile lies 0.7 of the way from the last 1 to 4."""
    found = weighted_distribution([(4.0, 1), (1.0, 2), (9.0, 0), (1.0, 1)])
    assert found is not None
    assert (found.count, found.mean, found.p50) == (4, 7 / 4, 1.0)
    assert found.p90 == pytest.approx(1.0 + 0.7 * 3.0)
    assert weighted_distribution([(1.0, 0)]) is None


@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 9)), max_size=20))
def test_weights_are_repetitions(runs: list[tuple[float, int]]) -> None:
    """A weighted run stands for as many equal values."""
    flat = distribution(value for value, weight in runs for _ in range(weight))
    found = weighted_distribution(runs)
    assert (found is None) == (flat is None)
    if found is not None and flat is not None:
        assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(flat))


@pytest.mark.parametrize(
    ("fields", "attained"),
    [
        ({"ttft_s": 1.0, "itl_s": 0.1}, True),
        ({"ttft_s": 1.1, "itl_s": 0.1}, False),
        ({"ttft_s": 1.0, "itl_s": 0.11}, False),
        ({"ttft_s": 1.0, "itl_s": None}, True),
        ({"ttft_s": 1.0, "itl_s": 0.1, "status": "failed"}, False),
        ({"ttft_s": 1.0, "itl_s": 0.1, "status": "refused"}, False),
        ({"ttft_s": None, "itl_s": 0.1}, False),
        ({"ttft_s": 9.0, "itl_s": 0.1, "slo_ttft_s": None}, True),
    ],
)
def test_round_attains_within_both_targets(fields: dict[str, Any], attained: bool) -> None:
    """TTFT and mean ITL within, the target itself included; a single token's ITL is; a round without a target
    meets it; a failed or refused round never attains."""
    fields = {"slo_ttft_s": 1.0, "slo_itl_s": 0.1, **fields}
    assert record("a", 1, **fields).attained is attained


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
            "queue_s": 0.5,
            "push_s": 0.25,
            "x": 1,
        },
        {"round_id": "other", "bytes_decode_to_prefill": 100},
        {"round_id": ""},
    ]
    add_receipts([first, second, failed], receipts)
    assert [item.receipt for item in (first, second, failed)] == [False, True, False]
    assert (second.bytes_decode_to_prefill, second.bytes_prefill_to_decode, second.reason) == (7, 0, "why")
    assert (second.queue_s, second.pull_s, second.push_s) == (0.5, None, 0.25)


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


def test_a_summary_worked_by_hand() -> None:
    """Four rounds of two sessions, one refused: every count and share of the issue's definitions."""
    target = {"slo_ttft_s": 1.0, "slo_itl_s": 0.1}
    pull = {**target, "bytes_decode_to_prefill": 5, "bytes_prefill_to_decode": 2}
    records = [
        record("a", 1, ttft_s=0.5, itl_s=0.1, unloaded_ttft_s=0.5, arm="remote_recompute", **target),
        record("a", 2, ttft_s=1.0, unloaded_ttft_s=0.2, cached_tokens=90, arm="remote_pull", **pull),
        record("b", 1, ttft_s=3.0, itl_s=0.1, unloaded_ttft_s=1.5, arm="remote_recompute", **target),
        record("b", 2, status="refused", **target),
    ]
    result = result_of(records, {"a": 2, "b": 2}, kind="simulation", simulated_s=9.0, gpu_seconds=36.0)
    assert (result.rounds_total, result.rounds_completed, result.rounds_refused) == (4, 3, 1)
    assert (result.rounds_failed, result.rounds_not_sent, result.sessions_completed) == (0, 0, 1)
    assert result.attainment == {"rounds": 0.5, "sessions": 0.5}
    assert result.attainable == 0.5, "two rounds of four could attain; the refused one could not"
    assert (result.bytes_moved, result.bytes_decode_to_prefill, result.bytes_prefill_to_decode) == (7, 5, 2)
    assert (result.prefill_tokens_computed, result.prefill_tokens_reused) == (210, 90)
    assert result.ttft_s is not None
    assert msgspec.structs.astuple(result.ttft_s) == pytest.approx((3, 1.5, 1.0, 2.6, 2.96))
    assert result.itl_s is not None and result.itl_s.count == 2
    assert (result.simulated_s, result.gpu_seconds, result.cost_per_1k_rounds) == (9.0, 36.0, None)


def test_bytes_of_moves_are_in_the_sums(tmp_path: Path) -> None:
    """What new homes fetched counts apart and in the total; a file from before there were moves has none."""
    moved = record("a", 2, round_id="r2", arm="move", bytes_decode_to_prefill=1)
    add_receipts([moved], [{"round_id": "r2", "arm": "move", "bytes_home_to_home": 40}])
    result = result_of([record("a", 1), moved], {"a": 2})
    assert (result.bytes_home_to_home, result.bytes_moved, result.arms["move"]) == (40, 40, 1)
    write_result(result, tmp_path / "new.json")
    old = json.loads((tmp_path / "new.json").read_bytes())
    assert old.pop("bytes_home_to_home") == 40
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_result(tmp_path / "old.json").bytes_home_to_home == 0
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(result_table(result))
    assert "moved home -> home" in shown.export_text()


def test_counts_add_up_to_the_total() -> None:
    """Completed, refused, failed and not sent are apart and are all there is."""
    records = [record("a", 1), record("a", 2, status="refused"), record("b", 1, status="failed")]
    result = result_of(records, {"a": 3, "b": 2})
    assert (result.rounds_completed, result.rounds_refused, result.rounds_failed) == (1, 1, 1)
    assert result.rounds_not_sent == 2


def test_what_the_caller_knows_better_is_taken() -> None:
    """A simulator's own count of computed tokens and attainable rounds replaces what records would give."""
    more: dict[str, Any] = {
        "attainable": 0.75, "prefill_tokens_computed": 7, "prefill_tokens_reused": 0, "ordering": "fcfs",
        "load": Load("rho", 0.8, 0.2), "cluster": ClusterInfo("two", "two.toml", "", [{"pool": "decode"}]),
    }  # fmt: skip
    result = result_of([record("a", 1, unloaded_ttft_s=1.0, cached_tokens=3)], {"a": 1}, **more)
    assert {name: getattr(result, name) for name in more} == more


REQUIRED = {
    "schema", "trace", "cluster", "policy", "ordering", "seed", "slo", "load", "rounds_total",
    "rounds_completed", "rounds_refused", "attainment", "attainable", "ttft_s", "ttft_first_s",
    "ttft_later_s", "itl_s", "e2e_s", "arms", "bytes_moved", "bytes_decode_to_prefill",
    "bytes_prefill_to_decode", "prefill_tokens_computed", "prefill_tokens_reused", "gpu_seconds",
    "cost_per_1k_rounds", "simulated_s", "wall_s",
}  # fmt: skip
"""Keys that scripts depend on."""


def test_result_is_written_whole_and_reads_back(tmp_path: Path) -> None:
    """The file is the result without its rounds; an old one is replaced, and nothing else is left there."""
    result = result_of([record("a", 1, ttft_s=1.0, slo_ttft_s=1.0)], {"a": 1})
    path = tmp_path / "deep" / "result.json"
    for _ in range(2):
        write_result(result, path)
    assert list(path.parent.iterdir()) == [path]
    assert read_result(path) == msgspec.structs.replace(result, rounds=[])
    written = json.loads(path.read_bytes())
    assert set(written) >= REQUIRED and "rounds" not in written
    assert written["schema"] == "antiphon.result/1"
    assert written["attainment"] == {"rounds": 1.0, "sessions": 1.0}
    assert set(written["ttft_s"]) == {"count", "mean", "p50", "p90", "p99"}
    assert set(written["trace"]) >= {"path", "sha256", "sessions", "rounds"}


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema": "antiphon.result/1"}', b"\xff", None])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: bytes | None) -> None:
    """Whatever is wrong with a file, the error says which file it is."""
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultError, match=r"result\.json"):
        read_result(path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    """A file of a later form is not read as if it were of this one."""
    path = tmp_path / "result.json"
    write_result(msgspec.structs.replace(result_of([], {}), schema="antiphon.result/2"), path)
    with pytest.raises(ResultError, match=r"antiphon\.result/2"):
        read_result(path)


def test_a_broken_write_leaves_the_old_file(tmp_path: Path) -> None:
    """When the rounds end in an error midway, the file of before is whole and nothing lies beside it."""
    path = tmp_path / "rounds.jsonl"
    write_rounds([record("a", 1)], path)

    def broken() -> Iterator[RoundRecord]:
        yield record("b", 1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_rounds(broken(), path)
    assert [item.session for item in read_rounds(path)] == ["a"]
    assert list(tmp_path.iterdir()) == [path]


ROUNDS = st.lists(
    st.builds(
        record, st.text(max_size=5), st.integers(1, 9), status=st.sampled_from(["completed", "refused"]),
        ttft_s=st.none() | st.floats(0, 1e6), itl_s=st.none() | st.floats(0, 1e3), reason=st.text(max_size=9),
        cached_tokens=st.integers(0, 100),
    ),
    max_size=20,
)  # fmt: skip


@settings(max_examples=30)
@given(ROUNDS, st.sampled_from([".jsonl", ".jsonl.gz"]))
def test_rounds_read_back_as_written(records: list[RoundRecord], suffix: str) -> None:
    """Every field of every round survives the file; equal rounds give equal bytes, gzipped or not."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, f"a{suffix}"), Path(folder, f"b{suffix}")
        for path in (first, second):
            write_rounds(records, path)
        assert list(read_rounds(first)) == records
        assert first.read_bytes() == second.read_bytes()


def test_cut_off_rounds_are_an_error(tmp_path: Path) -> None:
    """A gzipped file that ends early is reported with its name, not taken for a shorter run."""
    path = tmp_path / "rounds.jsonl.gz"
    write_rounds([record("a", n + 1) for n in range(50)], path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResultError, match=r"rounds\.jsonl\.gz"):
        list(read_rounds(path))


def test_table_has_a_row_for_whatever_happened() -> None:
    """A result without times or with failures is shown too, and one of a simulation with all it knows."""
    table = result_table(result_of([record("a", 1, status="failed")], {"a": 3}))
    cells = [list(column.cells) for column in table.columns]
    rows = dict(zip(cells[0], cells[1], strict=True))
    assert rows["rounds completed"] == "0 of 3"
    assert rows["rounds failed, not sent"] == "1, 2"
    assert not any("TTFT" in str(name) for name in rows)
    more = {"gpu_seconds": 3600.0, "simulated_s": 90.0, "load": Load("rho", 0.8, 0.25), "attainable": 0.5}
    table = result_table(result_of([record("a", 1, status="refused")], {"a": 1}, **more))
    cells = [list(column.cells) for column in table.columns]
    rows = dict(zip(cells[0], cells[1], strict=True))
    assert (rows["rounds refused"], rows["GPU time"], rows["sessions offered"]) == ("1", "3,600 s", "0.25 /s")
    assert (rows["simulated time"], rows["  attainable without load"]) == ("90.0 s", "50.0%")


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
