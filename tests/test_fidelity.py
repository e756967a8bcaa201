"""The fidelity page: what is compared, what is written, and that a perfect match has no error."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from antiphon.eval.calibration import Calibration, Measured
from antiphon.eval.fidelity import (
    Fidelity,
    compare,
    conditions,
    fidelity_table,
    live_cluster,
    simulate_case,
)
from antiphon.eval.fidelity_live import CASES, Case, FidelityError, FidelityOptions, Live, LiveRun
from antiphon.eval.gateway_cost import GatewayCost
from antiphon.eval.probe import EngineInfo
from antiphon.policies.latency import load_latency_model
from antiphon.traces.result_types import RoundRecord
from antiphon.traces.results import read_result

CASE = Case("a case", "ampd", 2)


def record(ttft_s: float, itl_s: float | None = 0.01, **more: object) -> RoundRecord:
    values: dict[str, object] = {"session": "s", "round": 1, "prompt_tokens": 10, "kept_tokens": 0} | more
    return RoundRecord(status="completed", arm="local", ttft_s=ttft_s, itl_s=itl_s, **values)  # type: ignore[arg-type]


def live(rounds: list[RoundRecord], window_tokens: int = 8192) -> LiveRun:
    """As if calibration had found the bundled profile."""
    info = EngineInfo("model", 16, 512, 4, 16, 32768, 8192)
    measured = Measured({}, [], {}, {}, 0.001)
    found = Calibration(load_latency_model("tiny-cpu"), 0.004, info, 49152, measured, None, None, ())
    return LiveRun(rounds, window_tokens, found, GatewayCost(0.002, 0.0005), 1.5)


def test_errors_are_shares_of_the_live_figure() -> None:
    """simulated / live - 1, for p50 and p90 of TTFT and ITL, over completed rounds only."""
    failed = RoundRecord(session="s", round=2, prompt_tokens=10, kept_tokens=0, ttft_s=99.0)
    ours = [record(0.1 * n, 0.01 * n) for n in range(1, 12)] + [failed]
    theirs = [record(0.11 * n, 0.005 * n) for n in range(1, 12)]
    found = compare(CASE, live(ours), theirs)
    assert [(row.metric, row.quantile) for row in found.rows] == [
        ("ttft_s", "p50"), ("ttft_s", "p90"), ("itl_s", "p50"), ("itl_s", "p90"),
    ]  # fmt: skip
    assert [row.live for row in found.rows] == pytest.approx([0.6, 1.0, 0.06, 0.1])
    assert [row.error for row in found.rows] == pytest.approx([0.1, 0.1, -0.5, -0.5])


def test_rounds_are_compared_one_by_one_too() -> None:
    """The median error of a round with itself does not hide behind equal distributions."""
    ours = [record(0.1, round=1), record(0.2, round=2)]
    theirs = [record(0.2, round=1), record(0.1, round=2)]
    found = compare(CASE, live(ours), theirs)
    assert found.rows[0].error == 0
    assert found.details["median_round_error"]["ttft_s"] == pytest.approx(0.75)


def test_nothing_to_compare_is_said() -> None:
    """No round with an ITL: an error that names case and metric, not a zero."""
    with pytest.raises(FidelityError, match="a case: no round has a itl_s"):
        compare(CASE, live([record(0.1, None)]), [record(0.1)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_simulation_matches_itself(case: Case, tmp_path: Path) -> None:
    """The simulator as the live side, the bundled trace, every case: all errors are zero."""
    options = FidelityOptions(directory=tmp_path)
    first = live([record(1.0)])
    simulate_case(case, first, options)
    path = tmp_path / f"simulated-{CASES.index(case) + 1}" / "result.json"
    assert read_result(path).rounds_completed == 44
    rounds = [record(row["ttft_s"], row["itl_s"]) for row in _rounds(case, first, options)]
    again = simulate_case(case, live(rounds), options)
    assert [row.error for row in again.rows] == pytest.approx([0.0] * 4, abs=1e-9)


def _rounds(case: Case, measured: LiveRun, options: FidelityOptions) -> list[dict[str, float]]:
    from antiphon.eval.cluster_toml import write_cluster
    from antiphon.eval.simulate import SimulateOptions, run_simulation

    path = write_cluster(
        options.directory / "again", live_cluster(measured, case, options), measured.found.profile
    )
    found = run_simulation(
        SimulateOptions(
            options.trace, path, case.policy, concurrency=case.concurrency,
            slo_ttft_s=options.slo_ttft_s, slo_itl_s=options.slo_itl_s,
        )
    )  # fmt: skip
    return [{"ttft_s": row.ttft_s or 0.0, "itl_s": row.itl_s or 0.0} for row in found.rounds]


def test_the_cluster_is_the_live_stack(tmp_path: Path) -> None:
    """Settings as the engine said, times as measured; the decode engine alone where a case has but one."""
    options = FidelityOptions(directory=tmp_path)
    pair = live_cluster(live([], 4096), CASES[0], options)
    assert [group.pool for group in pair.engines] == ["prefill", "decode"]
    group = pair.engines[1]
    assert (group.chunk_tokens, group.decode_interval, group.device_tokens) == (512, 4, 32768)
    assert (group.store_tokens, group.request_fixed_s, pair.claim_s) == (49152, 0.004, 0.0025)
    assert (pair.page_tokens, pair.window_tokens) == (16, 4096)
    alone = live_cluster(live([], 4096), CASES[-1], options)
    assert [group.pool for group in alone.engines] == ["decode"]


def test_the_file_says_under_what_and_why(tmp_path: Path) -> None:
    """Schema, rows of the first case, flat conditions, and the reason in words; all cases in the table."""
    options = FidelityOptions(directory=tmp_path)
    runs = {case: live([record(0.1)]) for case in CASES}
    cases = [compare(case, runs[case], [record(0.12)]) for case in CASES]
    made = Fidelity(conditions(Live(runs, 60.0), cases, options), cases[0].rows, cases)
    written = msgspec.json.decode(msgspec.json.encode(made))
    assert written["schema"] == "antiphon.fidelity/1"
    assert set(written["rows"][0]) == {"metric", "quantile", "live", "simulated", "error"}
    assert all(isinstance(v, str | int | float | None) for v in written["conditions"].values())
    assert "1.50 times as long" in written["conditions"]["why"]
    assert f"{CASES[1].name}: TTFT p50 +20%" in written["conditions"]["why"]
    console = Console(record=True, width=160)
    console.print(fidelity_table(made))
    said = console.export_text()
    assert all(case.name in said for case in CASES) and "+20.0%" in said
