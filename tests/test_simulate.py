"""`antiphon simulate`: the result file, its exact keys, equal bytes, loads and errors, by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from antiphon.engines.cluster import load_cluster, resolve_engines
from antiphon.eval.load import Workbench
from antiphon.eval.simulate import SimulateOptions, SimulationError, prepare, run_simulation
from antiphon.scheduler.cli import app
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.simulation import Simulation
from antiphon.traces.results import read_rounds
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError
from tests.simulation_helpers import agent_sessions, cluster_file

ONE = (RoundTrace(100, 1),)
ASKED = {
    "schema", "trace", "cluster", "policy", "ordering", "seed", "slo", "load", "rounds_total",
    "rounds_completed", "rounds_refused", "attainment", "attainable", "ttft_s", "ttft_first_s",
    "ttft_later_s", "itl_s", "e2e_s", "arms", "bytes_moved", "bytes_decode_to_prefill",
    "bytes_prefill_to_decode", "prefill_tokens_computed", "prefill_tokens_reused", "gpu_seconds",
    "cost_per_1k_rounds", "simulated_s", "wall_s",
}  # fmt: skip
"""Keys that scripts rely on."""


def write_trace(folder: Path, sessions: list[SessionTrace]) -> Path:
    path = folder / "trace.jsonl"
    path.write_bytes(msgspec.json.Encoder().encode_lines(sessions))
    return path


def simulate(folder: Path, *more: str, sessions: list[SessionTrace] | None = None) -> dict[str, Any]:
    """One run of the command; the result object."""
    trace = write_trace(folder, agent_sessions(20, 1) if sessions is None else sessions)
    out = folder / "out.json"
    command = ["simulate", str(trace), "--cluster", str(cluster_file(folder)), "--json", str(out), *more]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(out.read_bytes())
    return result


def test_the_result_has_every_key_and_adds_up(tmp_path: Path) -> None:
    """The object that replay writes too; arms, bytes and rounds are consistent with the rounds file."""
    rounds_path = tmp_path / "rounds.jsonl.gz"
    result = simulate(tmp_path, "--policy", "ampd", "--session-rate", "5", "--rounds", str(rounds_path))
    assert set(result) >= ASKED and result["schema"] == "antiphon.result/1"
    rounds = list(read_rounds(rounds_path))
    assert len(rounds) == result["rounds_total"] == result["rounds_completed"] == sum(result["arms"].values())
    assert result["trace"]["rounds"] == len(rounds) and len(result["trace"]["sha256"]) == 64
    moved = sum(r.bytes_decode_to_prefill + r.bytes_prefill_to_decode for r in rounds)
    assert moved == result["bytes_moved"] > 0
    attained = sum(r.attained for r in rounds) / len(rounds)
    assert result["attainment"]["rounds"] == pytest.approx(attained)
    assert result["attainment"]["rounds"] <= result["attainable"] <= 1
    for name in ("ttft_s", "ttft_first_s", "ttft_later_s", "itl_s", "e2e_s"):
        assert result[name].keys() >= {"mean", "p50", "p90", "p99"}
    assert result["slo"] == {"ttft_s": 0.6, "itl_s": 0.03}
    assert result["gpu_seconds"] == pytest.approx(4 * result["simulated_s"])
    assert result["cost_per_1k_rounds"] is None, "half of the engines have no price"


def test_pools_change_where_that_is_asked_for(tmp_path: Path) -> None:
    """And each change is told, in the result too; without it the result has no such key."""
    sessions = [
        SessionTrace(f"s{n}", (RoundTrace(6000, 4), RoundTrace(7000, 4, 6004, 2.0))) for n in range(300)
    ]
    options = ("--policy", "remote", "--session-rate", "2")
    assert "flips" not in simulate(tmp_path, *options, sessions=sessions)
    result = simulate(tmp_path, *options, "--repool", sessions=sessions)
    assert result["rounds_completed"] == 600
    assert result["flips"] and "to prefill, done after" in result["flips"][0]


def test_equal_runs_are_equal_bytes_but_for_the_wall_time(tmp_path: Path) -> None:
    """Result and rounds; another seed is another run."""
    rounds = tmp_path / "rounds.jsonl.gz"

    def run(seed: int) -> tuple[dict[str, Any], bytes]:
        result = simulate(
            tmp_path, "--policy", "ampd", "--load", "0.8", "--seed", str(seed), "--rounds", str(rounds)
        )
        assert result.pop("wall_s") > 0
        return result, rounds.read_bytes()

    assert run(3) == run(3)
    assert run(3)[1] != run(4)[1]


def test_a_load_is_a_rate_and_is_said(tmp_path: Path) -> None:
    """Twice the load is twice the rate; without any, the load is 0.7."""
    one = simulate(tmp_path, "--policy", "local", "--load", "0.4")["load"]
    two = simulate(tmp_path, "--policy", "local", "--load", "0.8")["load"]
    none = simulate(tmp_path, "--policy", "local")["load"]
    assert one["kind"] == "rho" and two["sessions_per_s"] == pytest.approx(2 * one["sessions_per_s"])
    assert none["value"] == 0.7


def test_the_rate_of_a_load_by_hand(tmp_path: Path) -> None:
    """One round of 1,000 + 101 tokens: two passes; B = 36 by the ITL target; 4 engines."""
    path = cluster_file(tmp_path, device=10_000_000)
    cluster = load_cluster(path)
    bench = Workbench.of(cluster, resolve_engines(cluster, path.parent))
    context = 1000 + 101 / 2
    batch = int((0.03 - 0.008) / (0.0005 + context * 1e-7))
    assert bench.batch_within(0.03, context) == batch == 36
    step_s = 0.008 + batch * 0.0005 + batch * context * 1e-7
    # two passes: 512 tokens, then 488 over those
    prefill_s = (0.01 + 0.0512 + 512**2 * 1e-9) + (0.01 + 0.0488 + 488 * 512 * 1e-9 + 488**2 * 1e-9)
    expected = prefill_s + 100 * step_s / batch
    session = SessionTrace("s", (RoundTrace(1000, 101),))
    assert bench.session_seconds(session, 0.03) == pytest.approx(expected, rel=1e-4)
    assert bench.session_rate(0.5, [session], 0.03) == pytest.approx(0.5 * 4 / expected, rel=1e-4)
    child = SessionTrace("c", (RoundTrace(1000, 101),), parent="s")
    assert bench.session_rate(0.5, [session, child], 0.03) == pytest.approx(0.25 * 4 / expected, rel=1e-4)


def test_a_prompt_over_the_window_is_refused_and_counted(tmp_path: Path) -> None:
    """The session ends there; what it would have sent afterwards was not sent; neither attains."""
    rounds = (RoundTrace(400, 5), RoundTrace(40_000, 5, 405), RoundTrace(40_100, 5, 40_005))
    sessions = [SessionTrace("long", rounds), SessionTrace("short", (RoundTrace(300, 4),))]
    result = simulate(tmp_path, "--policy", "local", "--session-rate", "1", sessions=sessions)
    assert (result["rounds_total"], result["rounds_completed"]) == (4, 2)
    assert (result["rounds_refused"], result["rounds_not_sent"]) == (1, 1)
    assert result["attainment"] == {"rounds": 0.5, "sessions": 0.5}


def test_targets_of_the_command_win_over_the_sessions_and_those_over_the_clusters(tmp_path: Path) -> None:
    """A session's own TTFT target of 1 microsecond cannot be met, unless the command says otherwise."""
    own = SessionTrace("s", (RoundTrace(400, 5),), slo_ttft_s=1e-6)
    strict = simulate(tmp_path, "--policy", "local", "--session-rate", "1", sessions=[own])
    assert strict["attainment"]["rounds"] == 0.0 and strict["attainable"] == 0.0
    loose = simulate(tmp_path, "--policy", "local", "--session-rate", "1", "--slo-ttft", "5", sessions=[own])
    assert loose["attainment"]["rounds"] == 1.0


def test_recorded_starts_and_gaps_are_used_as_they_are(tmp_path: Path) -> None:
    """--as-recorded starts sessions by `start_s`; --max-gap caps a gap and the cap is counted."""
    rounds = (RoundTrace(100, 1), RoundTrace(200, 1, 101, gap_s=500.0))
    sessions = [SessionTrace(f"s{n}", rounds, start_s=10.0 * n) for n in range(3)]
    out = tmp_path / "r.jsonl"
    more = ("--as-recorded", "--max-gap", "2", "--rounds", str(out))
    result = simulate(tmp_path, "--policy", "local", *more, sessions=sessions)
    assert [r.sent_s for r in read_rounds(out) if r.round == 1] == [0.0, 10.0, 20.0]
    assert result["trace"]["capped_gaps"] == 3 and result["simulated_s"] < 30
    assert result["load"]["kind"] == "as_recorded"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "nonsense"], "unknown policy 'nonsense'"),
        (["--policy", "ampd", "--ordering", "no"], "unknown ordering 'no'"),
        (["--policy", "ampd", "--load", "0.5", "--session-rate", "1"], "exclude each other"),
        (["--policy", "ampd", "--load", "0"], "--load must be above 0"),
        (["--policy", "ampd", "--load", "1e-12"], "--load is too low"),
        (["--policy", "ampd", "--session-rate", "1e-9"], "--session-rate is too low"),
        (["--policy", "ampd", "--slo-ttft", "-1"], "--slo-ttft must be above 0"),
        (["--policy", "ampd", "--max-sessions", "0"], "at least 1"),
        (["--policy", "ampd", "--as-recorded"], "no recorded start"),
        (["--policy", "ampd", "--cluster", "nowhere"], "neither a file nor one of"),
    ],
)
def test_bad_options_are_said_in_one_line(more: list[str], said: str, tmp_path: Path) -> None:
    """What, and what to do; no traceback, nothing written."""
    trace = write_trace(tmp_path, agent_sessions(2, 1))
    out = tmp_path / "out.json"
    cluster = [] if "--cluster" in more else ["--cluster", str(cluster_file(tmp_path))]
    done = CliRunner().invoke(app, ["simulate", str(trace), *cluster, "--json", str(out), *more])
    assert isinstance(done.exception, UserError) and said in str(done.exception)
    assert "\n" not in str(done.exception) and not out.exists()


def test_a_bad_cluster_file_names_the_key(tmp_path: Path) -> None:
    """An unknown key, a missing profile, an event of no engine."""
    trace = write_trace(tmp_path, agent_sessions(2, 1))
    whole = cluster_file(tmp_path).read_text()
    event = '\n[[events]]\nat_s = 1.0\nengine = "prefill-9"\nkind = "down"\n'
    for text, said in (
        (whole.replace("page_tokens", "page_size"), "page_size"),
        (whole.replace("profile.json", "no-such-profile"), "no-such-profile"),
        (whole + event, "prefill-9"),
        (whole.replace('"decode"', '"prefill"'), "decode pool"),
    ):
        bad = tmp_path / "bad.toml"
        bad.write_text(text)
        done = CliRunner().invoke(app, ["simulate", str(trace), "--cluster", str(bad), "--policy", "ampd"])
        assert isinstance(done.exception, UserError) and said in str(done.exception), done.exception
        assert str(bad) in str(done.exception) or "cluster" in str(done.exception)


def test_prices_become_a_cost(tmp_path: Path) -> None:
    """4 engines of one GPU at 2 an hour for the simulated time, for 1,000 completed rounds."""
    path = cluster_file(tmp_path)
    priced = path.read_text().replace("request_fixed_s = 0.001\n\n", "price_per_gpu_hour = 2.0\n\n", 1)
    path.write_text(priced)
    trace = write_trace(tmp_path, agent_sessions(5, 1))
    result = run_simulation(SimulateOptions(trace=trace, cluster=path, policy="local", session_rate=2.0))
    assert result.simulated_s is not None
    expected = 4 * 2.0 * result.simulated_s / 3600 / result.rounds_completed * 1000
    assert result.cost_per_1k_rounds == pytest.approx(expected)


def test_what_a_run_is_about_to_do_is_said(tmp_path: Path) -> None:
    """Sessions, rounds, engines, arrivals, in one line."""
    trace = write_trace(tmp_path, agent_sessions(3, 1))
    ready = prepare(SimulateOptions(trace=trace, cluster=cluster_file(tmp_path), policy="local", load=0.5))
    said = ready.describe()
    assert "3 sessions" in said and "2 prefill, 2 decode" in said and "sessions/s" in said


def test_nothing_is_faster_than_unloaded(tmp_path: Path) -> None:
    """One session alone under `local`, prompts of many chunks: exactly the unloaded TTFT, or a part of a page
    more; and `attainable` is the same whatever the policy did."""
    rounds = (RoundTrace(16_000, 3), RoundTrace(17_603, 3, 16_003, 1.0), RoundTrace(19_000, 3, 17_606, 1.0))
    out = tmp_path / "r.jsonl"
    alone = [SessionTrace("s", rounds)]
    result = simulate(
        tmp_path, "--policy", "local", "--session-rate", "1", "--rounds", str(out), sessions=alone
    )
    first, *later = read_rounds(out)
    assert first.ttft_s == pytest.approx(first.unloaded_ttft_s, abs=1e-9)
    for record in later:
        assert record.ttft_s is not None and record.unloaded_ttft_s is not None
        assert record.unloaded_ttft_s <= record.ttft_s <= record.unloaded_ttft_s + 16 * 1.5e-4
    many = agent_sessions(30, 2)
    shares = {
        simulate(tmp_path, "--policy", policy, "--session-rate", "30", sessions=many)["attainable"]
        for policy in ("local", "remote", "ampd")
    }
    assert len(shares) == 1 and result["attainable"] < 1.0


@pytest.mark.parametrize(
    ("sessions", "said"),
    [
        ([SessionTrace("a", ONE, parent="b"), SessionTrace("b", ONE, parent="a")], "among its own parents"),
        ([SessionTrace("a", ONE), SessionTrace("b", ONE, parent="a", after_round=2)], "which has 1"),
    ],
)  # fmt: skip
def test_a_session_that_could_never_start_is_an_error(
    sessions: list[SessionTrace], said: str, tmp_path: Path
) -> None:
    """A cycle of parents; a round that the parent does not have."""
    trace = write_trace(tmp_path, sessions)
    with pytest.raises(TraceError, match=said):
        prepare(SimulateOptions(trace=trace, cluster=cluster_file(tmp_path), policy="local"))


def test_a_result_never_takes_the_place_of_the_trace(tmp_path: Path) -> None:
    """Equal paths are refused before anything is read or written."""
    trace = write_trace(tmp_path, agent_sessions(2, 1))
    before = trace.read_bytes()
    with pytest.raises(SimulationError, match="different files"):
        prepare(
            SimulateOptions(trace=trace, cluster=cluster_file(tmp_path), policy="local", rounds_path=trace)
        )
    assert trace.read_bytes() == before


def test_a_file_that_cannot_be_written_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, or below a file: named, with its option, and no event has run; nothing is left."""
    trace = write_trace(tmp_path, agent_sessions(2, 1))
    asked = SimulateOptions(trace=trace, cluster=cluster_file(tmp_path), policy="local")
    monkeypatch.delattr(Simulation, "run")
    before = sorted(tmp_path.iterdir())
    below = trace / "rounds.jsonl"
    with pytest.raises(SimulationError, match=f"--json {tmp_path}: cannot be written"):
        run_simulation(replace(asked, json_path=tmp_path))
    with pytest.raises(SimulationError, match=f"--rounds {below}: cannot be written"):
        run_simulation(replace(asked, rounds_path=below))
    assert sorted(tmp_path.iterdir()) == before


def test_names_are_looked_up_before_the_trace_is_read(tmp_path: Path) -> None:
    """A misspelt policy costs no reading: the trace is not even there."""
    asked = SimulateOptions(trace=tmp_path / "none", cluster=cluster_file(tmp_path), policy="amdp")
    with pytest.raises(SimulationError, match="unknown policy 'amdp'"):
        prepare(asked)


def test_a_refused_round_says_why(tmp_path: Path) -> None:
    """No engine can hold the prompt: the record has the words that a client would get."""
    path = cluster_file(tmp_path, device=4_000)
    trace = write_trace(tmp_path, [SessionTrace("s", (RoundTrace(9_000, 5),))])
    text = path.read_text().replace("device_tokens = 40000", "device_tokens = 4000")
    path.write_text(text)
    result = run_simulation(SimulateOptions(trace=trace, cluster=path, policy="local", session_rate=1.0))
    assert result.rounds_refused == 1 and "fit no KV pool" in result.rounds[0].message
