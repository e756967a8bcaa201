"""`antiphon counterfactual`: recorded rounds under another policy, and how far the simulation is off."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from antiphon.engines.cluster import Cluster, EngineEvent, EngineGroup, Slo, load_cluster
from antiphon.eval.cluster_toml import write_cluster
from antiphon.eval.counterfactual import (
    Counterfactual,
    CounterfactualOptions,
    closing_lines,
    counterfactual,
    run_counterfactual,
)
from antiphon.eval.recorded_fleet import (
    RecordingError,
    load_facts,
    measured_records,
    recorded_cluster,
    recorded_policy,
)
from antiphon.eval.simulate import SimulateOptions, run_simulation
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler.messages import EngineDown, EngineUp
from antiphon.scheduler.recorded_facts import ReplicaFacts
from antiphon.scheduler.round_log import RoundLog
from tests.replica_helpers import Cluster as Live
from tests.replica_helpers import cluster
from tests.simulated_helpers import make_prompt

PROFILE = load_latency_model("tiny-cpu")


@pytest.fixture(scope="module")
def recording(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sessions of three growing rounds each, under `remote`, on a prefill and a decode engine."""
    directory = tmp_path_factory.mktemp("recording")

    async def session(made: Live, name: str) -> None:
        ids = make_prompt(name, 400)
        for number in range(3):
            _, out = await made.run(name, ids)
            ids = [*ids, *out, *make_prompt(f"{name} {number}", 60)]
            await made.recorded()

    async def run() -> None:
        async with cluster(valkey_url, "remote", record=str(directory)) as made:
            await asyncio.gather(*(session(made, name) for name in ("a", "b", "c")))

    asyncio.run(run())
    return directory


def ask(recording: Path, policy: str, **more: object) -> Counterfactual:
    return counterfactual(CounterfactualOptions(recording, policy, **more))  # type: ignore[arg-type]


def test_another_policy_moves_the_rounds(recording: Path) -> None:
    """`local` instead of `remote`: every arm differs, no KV moves, and both columns have all rounds."""
    found = ask(recording, "local")
    assert found.measured.arms == found.simulated.arms == {"remote_recompute": 9}
    assert found.other.arms == {"local": 9} and found.other_arm == found.rounds_compared == 9
    assert found.measured.bytes_moved > 0 and found.simulated.bytes_moved > 0 == found.other.bytes_moved
    assert found.measured.rounds == found.simulated.rounds == found.other.rounds == 9
    assert found.wins or found.losses
    assert all(item.other_ttft_s < item.recorded_ttft_s for item in found.wins)
    assert all(item.other_ttft_s > item.recorded_ttft_s for item in found.losses)


def test_the_same_policy_changes_nothing(recording: Path) -> None:
    """Under the recorded policy both simulations are one: no round has another arm, none wins or loses."""
    found = ask(recording, "remote")
    assert found.simulated == found.other
    assert found.other_arm == 0 and not found.wins and not found.losses


def test_the_gap_to_what_was_measured_is_shown(recording: Path) -> None:
    """The engines ran 20 times faster than their profile says: so much too slow is the simulation."""
    found = ask(recording, "local")
    assert found.measured.ttft_p50_s is not None and found.simulated.ttft_p50_s is not None
    gap = found.simulated.ttft_p50_s / found.measured.ttft_p50_s - 1
    assert found.model_gap["ttft_p50_s"] == pytest.approx(gap) and gap > 1
    assert "say nothing" in closing_lines(found)[-1]


def test_the_command_writes_and_shows(recording: Path, tmp_path: Path) -> None:
    """The JSON reads back as the answer; the table has all three columns; a bad folder is status 2."""
    path = tmp_path / "out.json"
    console = Console(record=True, width=200)
    options = CounterfactualOptions(recording, "ampd", json_path=path)
    assert run_counterfactual(options, console) == 0
    read = msgspec.json.decode(path.read_bytes(), type=Counterfactual)
    assert read == counterfactual(options)
    said = console.export_text()
    assert all(name in said for name in ("remote, measured", "remote, simulated", "ampd, simulated"))
    assert run_counterfactual(dataclasses.replace(options, directory=tmp_path), console) == 2
    assert run_counterfactual(dataclasses.replace(options, policy="amdp"), console) == 2
    said = console.export_text()
    assert "not a recording" in said and "amdp" in said


def test_another_fleet_can_be_asked_about(recording: Path, tmp_path: Path) -> None:
    """--cluster: the recorded rounds on engines that were not there."""
    group = EngineGroup(
        count=3,
        pool="decode",
        profile="profile.json",
        device_tokens=65536,
        store_tokens=0,
        link_bytes_per_s=1e9,
    )
    path = write_cluster(tmp_path, Cluster("three", Slo(1.0, 0.1), (group,), page_tokens=16), PROFILE)
    found = ask(recording, "local", cluster=path)
    assert found.other.rounds == 9 and found.cluster == str(path)


def test_a_recording_is_simulated_as_it_is(recording: Path, tmp_path: Path) -> None:
    """`simulate DIR`: the recorded sessions at their recorded starts, by the same reader as any trace."""
    found = recorded_cluster(load_facts(recording), [], began_s=0.0)
    path = write_cluster(tmp_path, msgspec.structs.replace(found, events=()), PROFILE)
    result = run_simulation(SimulateOptions(recording, path, "local", as_recorded=True))
    assert (result.rounds_completed, result.trace.sessions) == (9, 3)


def test_rounds_are_as_the_receipts_say(recording: Path) -> None:
    """Nine measured rounds, numbered within their sessions, with arms, times and bytes."""
    records = measured_records(recording)
    assert sorted(record.round for record in records) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(r.completed and r.receipt and r.ttft_s and r.itl_s and r.push_s for r in records)


def facts(directory: Path, replica: str, policy: str = "ampd") -> ReplicaFacts:
    log = RoundLog(directory, replica)
    made = ReplicaFacts(replica, policy, "fcfs", PROFILE, 2.0, 0.1)
    made.note(EngineUp("d0", "i", "decode", True, 16, 4096, chunk_tokens=512, decode_interval=4), None, 90.0)
    log.describe(made)
    log.close()
    return made


def test_two_policies_in_one_recording_are_an_error(tmp_path: Path) -> None:
    """What was decided by two rules cannot be compared with a third."""
    facts(tmp_path, "a", "ampd")
    assert recorded_policy(load_facts(tmp_path)).policy == "ampd"
    facts(tmp_path, "b", "local")
    with pytest.raises(RecordingError, match=r"several policies \(ampd/fcfs, local/fcfs\)"):
        recorded_policy(load_facts(tmp_path))


def test_an_engine_of_unknown_size_is_named(tmp_path: Path) -> None:
    """An engine without our linker may not tell its pool: then the fleet must be given."""
    made = facts(tmp_path, "a")
    made.note(EngineUp("x7", "i", "decode", False, 16, 0), None, 91.0)
    with pytest.raises(RecordingError, match="engine x7 holds: give --cluster"):
        recorded_cluster([made], [], began_s=100.0)


def test_engines_that_died_die_in_the_cluster(tmp_path: Path) -> None:
    """Changes during the recording become events; what was there at its beginning is just there."""
    made = facts(tmp_path, "a")
    made.note(EngineUp("p0", "i", "prefill", True, 16, 4096), None, 105.0)
    made.note(EngineDown("d0", "i", "gone"), None, 130.0)
    made.note(EngineUp("d0", "j", "decode", True, 16, 4096), None, 150.0)
    made.note(EngineUp("d1", "i", "decode", True, 16, 4096), None, 200.0)
    found = recorded_cluster([made], [], began_s=100.0)
    assert found.events == (
        EngineEvent(0.0, "d1-0", "down"),
        EngineEvent(30.0, "d0-0", "down"),
        EngineEvent(50.0, "d0-0", "up"),
        EngineEvent(100.0, "d1-0", "up"),
    )
    assert load_cluster(write_cluster(tmp_path, found, PROFILE)) == found


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(min_size=1, max_size=12),
    chunk=st.just(0) | st.integers(64, 10_000),
    price=st.none() | st.floats(0, 10),
    link=st.floats(1.0, 1e12),
    events=st.lists(st.floats(0, 1e6), max_size=3),
)
def test_a_written_cluster_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    chunk: int,
    price: float | None,
    link: float,
    events: list[float],
) -> None:
    """Whatever is in a cluster, its file means the same."""
    group = EngineGroup(
        2, "decode", "profile.json", 4096, 0, link, chunk_tokens=chunk, price_per_gpu_hour=price
    )
    died = tuple(EngineEvent(at, "decode-0", "down") for at in events)
    made = Cluster(name, Slo(1.0, 0.5), (group,), description=f'"{name}"', events=died)
    folder = tmp_path_factory.mktemp("cluster")
    assert load_cluster(write_cluster(folder, made, PROFILE)) == made
