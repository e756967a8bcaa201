"""Dynamo's replay beside ours: its rows of a trace, its tables, and what comes back from the other Python."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines.cluster import Cluster, EngineSpec, load_cluster, resolve_engines
from antiphon.eval.cluster_files import find_cluster
from antiphon.eval.dynamo_replay import DynamoError, replay_with_dynamo, timing_table, trace_rows
from antiphon.eval.dynamo_script import engine_args
from antiphon.traces.schema import RoundTrace, SessionTrace

SESSION = SessionTrace(
    "s",
    (
        RoundTrace(100, 20),
        # keeps prompt and output; the 20 of the output and all after them are new to Dynamo
        RoundTrace(200, 10, kept_tokens=120, gap_s=1.5),
        # compacted
        RoundTrace(150, 10, kept_tokens=64, gap_s=0.25),
    ),
)
SUMMARY: dict[str, Any] = {
    "completed_requests": 3,
    "goodput_completed_requests": 2,
    "wall_time_ms": 1500.0,
    "duration_ms": 9000.0,
}
for _name in ("ttft", "tpot"):
    for _number, _key in enumerate(("mean", "median", "p90", "p99"), 1):
        SUMMARY[f"{_key}_{_name}_ms"] = 100.0 * _number * (1 if _name == "ttft" else 2)


def cluster_of(name: str) -> tuple[Cluster, tuple[EngineSpec, ...]]:
    path = find_cluster(name)
    cluster = load_cluster(path)
    return cluster, resolve_engines(cluster, path.parent)


def script(tmp_path: Path, body: str) -> Path:
    """A program that stands where the other Python is named."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- rows


def test_rows_by_hand() -> None:
    """Times in ms, cumulative inputs, an id per started block of 32; kept whole blocks keep theirs."""
    first, second, third = trace_rows([(2.0, SESSION)], 32)
    assert first == {
        "session_id": "s", "timestamp": 2000.0, "input_length": 100, "output_length": 20,
        "hash_ids": [0, 1, 2, 3],
    }  # fmt: skip
    assert second == {
        "session_id": "s", "delay": 1500.0, "input_length": 200, "output_length": 10,
        "hash_ids": [0, 1, 2, 4, 5, 6, 7],
    }  # fmt: skip
    assert (third["delay"], third["hash_ids"]) == (250.0, [0, 1, 8, 9, 10])


def test_shared_prefixes_share_ids() -> None:
    """Whole blocks of a shared prefix have one id in all sessions of that name, however much each shares."""
    turns = (RoundTrace(100, 1),)
    sessions = [
        SessionTrace("a", turns, shared_prefix="p", shared_tokens=70),
        SessionTrace("b", turns, shared_prefix="p", shared_tokens=100),
        SessionTrace("c", turns, shared_prefix="q", shared_tokens=70),
        SessionTrace("d", turns, shared_prefix="p", shared_tokens=40),
    ]
    a, b, c, d = (row["hash_ids"] for row in trace_rows([(0.0, session) for session in sessions], 32))
    assert a[:2] == b[:2] and d[:1] == a[:1]
    assert len({*a, *b, *c, *d}) == 4 * 4 - 2 - 1


@st.composite
def sessions(draw: st.DrawFn) -> SessionTrace:
    rounds: list[RoundTrace] = []
    for _ in range(draw(st.integers(1, 6))):
        kept = draw(st.integers(0, rounds[-1].total_tokens)) if rounds else 0
        rounds.append(
            RoundTrace(kept + draw(st.integers(1, 300)), draw(st.integers(1, 90)), kept_tokens=kept)
        )
    return SessionTrace(f"s{draw(st.integers(0, 10**9))}", tuple(rounds))


@given(st.lists(sessions(), min_size=1, max_size=3), st.sampled_from([1, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_rows_share_what_the_rounds_share(traces: list[SessionTrace], block: int) -> None:
    """An id per started block, none twice; common with the row before is what the round keeps of its
    prompt, in whole blocks; nothing is common with another session."""
    rows = list(trace_rows([(0.0, session) for session in traces], block))
    assert len(rows) == sum(len(session.rounds) for session in traces)
    left = iter(rows)
    seen: set[int] = set()
    for session in traces:
        ids: list[int] = []
        own: set[int] = set()
        for number, turn in enumerate(session.rounds):
            row = next(left)
            last, ids = ids, row["hash_ids"]
            assert len(ids) == len(set(ids)) == -(-turn.prompt_tokens // block)
            if number:
                kept = min(turn.kept_tokens, session.rounds[number - 1].prompt_tokens) // block
                assert ids[:kept] == last[:kept] and not set(ids[kept:]) & own
            own |= set(ids)
        assert not own & seen
        seen |= own


# ---------------------------------------------------------------- tables


def test_the_table_is_the_profile() -> None:
    """Prefill without history and decode steps at the grid's batch, in ms, from page to window and device."""
    cluster, specs = cluster_of("2p2d-qwen3-32b-h200")
    group, latency = specs[0].group, specs[0].latency
    table = timing_table(specs[:2], cluster)
    assert table["workers"] == 2 and table["batch_tokens"] == group.chunk_tokens
    tokens, ms = zip(*table["prefill"], strict=True)
    assert (tokens[0], tokens[-1]) == (64, 131_072)
    assert ms[tokens.index(1024)] == pytest.approx(latency.prefill_s(1024, 0) * 1e3)
    row, column = table["kv_tokens"].index(262_144), table["context_tokens"].index(8192)
    assert table["itl_ms"][row][column] == pytest.approx(latency.decode_step_s(32, 262_144) * 1e3)
    assert table["kv_tokens"][-1] == group.device_tokens
    assert all(now < then for now, then in pairwise(tokens))


def test_workers_are_told_of_memory_and_links() -> None:
    """Blocks that fit, bandwidth in GB/s, and transfers of what is missing only."""
    asked = {"block_tokens": 64, "link_bytes_per_s": 25e9, "kv_bytes_per_token": 262_144}
    pool = {"device_tokens": 1_039_104, "max_running": 256, "batch_tokens": 4096}
    engine = engine_args("decode", pool, asked, Path("decode.npz"))["engine"]
    assert (engine["num_gpu_blocks"], engine["worker_type"]) == (16_236, "decode")
    assert (engine["kv_transfer_bandwidth"], engine["kv_transfer_bytes_per_token"]) == (25.0, 262_144)
    assert engine["kv_transfer_timing_mode"] == "destination_missing"


def test_only_pools_of_one_kind_can_be_told() -> None:
    """A fleet without prefill engines, or with two kinds in a pool, is refused in words."""
    cluster, specs = cluster_of("2p2d-qwen3-32b-h200")
    nobody = Path("/nonexistent/python")
    with pytest.raises(DynamoError, match="needs a prefill engine"):
        replay_with_dynamo(nobody, [(0.0, SESSION)], cluster, specs[2:])
    small = msgspec.structs.replace(specs[3].group, device_tokens=200_000)
    mixed = [*specs[:3], msgspec.structs.replace(specs[3], group=small)]
    with pytest.raises(DynamoError, match="one kind of decode engine"):
        replay_with_dynamo(nobody, [(0.0, SESSION)], cluster, mixed)


# ---------------------------------------------------------------- the other Python


def test_an_answer_becomes_a_run(tmp_path: Path) -> None:
    """Seconds from Dynamo's milliseconds; requests per second of its own wall time; what it was asked."""
    answer = {"version": "1.6.1", "call_s": 1.75, "summary": SUMMARY}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    python = script(tmp_path, f"cat > {tmp_path}/asked.json; cat {tmp_path}/answer.json")
    cluster, specs = cluster_of("ampd-32xh20")
    run = replay_with_dynamo(python, [(0.0, SESSION)], cluster, specs)
    assert (run.requests, run.requests_within_slo, run.wall_s, run.call_s) == (3, 2, 1.5, 1.75)
    assert (run.requests_per_s, run.simulated_s, run.version) == (2.0, 9.0, "1.6.1")
    assert run.ttft_s == pytest.approx({"mean": 0.1, "p50": 0.2, "p90": 0.3, "p99": 0.4})
    assert run.itl_s == pytest.approx({"mean": 0.2, "p50": 0.4, "p90": 0.6, "p99": 0.8})
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert {kind: pool["workers"] for kind, pool in asked["pools"].items()} == {"prefill": 4, "decode": 4}
    assert (asked["link_bytes_per_s"], asked["kv_bytes_per_token"]) == (25e9, 262_144)
    assert (asked["slo_ttft_s"], asked["slo_itl_s"], asked["block_tokens"]) == (5.0, 0.1, 64)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("nonsense", "answered no JSON"),
        (json.dumps({"version": "2", "call_s": 1.0, "summary": {}}), "not as in 1.6.1"),
        (
            json.dumps({"version": "1", "call_s": 1.0, "summary": SUMMARY | {"completed_requests": 2}}),
            "completed 2 of 3 requests",
        ),
    ],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: str, message: str) -> None:
    """A replay that lost requests, or a summary of another version, is not a figure."""
    (tmp_path / "answer").write_text(answer)
    cluster, specs = cluster_of("2p2d-qwen3-32b-h200")
    with pytest.raises(DynamoError, match=message):
        replay_with_dynamo(
            script(tmp_path, f"cat > /dev/null; cat {tmp_path}/answer"), [(0.0, SESSION)], cluster, specs
        )


def test_a_python_without_dynamo_is_named(tmp_path: Path) -> None:
    """What must be installed is said, with what Python itself said; a replay has a deadline."""
    cluster, specs = cluster_of("2p2d-qwen3-32b-h200")
    with pytest.raises(DynamoError, match=r"ai-dynamo 1\.6\.1 and numpy must be there.*dynamo") as caught:
        replay_with_dynamo(Path(sys.executable), [(0.0, SESSION)], cluster, specs)
    assert sys.executable in str(caught.value)
    with pytest.raises(DynamoError, match="cannot be run"):
        replay_with_dynamo(tmp_path / "none", [(0.0, SESSION)], cluster, specs)
    with pytest.raises(DynamoError, match=r"not done within 0\.2 s"):
        replay_with_dynamo(script(tmp_path, "exec sleep 30"), [(0.0, SESSION)], cluster, specs, 0.2)


@pytest.mark.skipif(
    "ANTIPHON_DYNAMO_PYTHON" not in os.environ, reason="ANTIPHON_DYNAMO_PYTHON names no Python with ai-dynamo"
)
def test_dynamo_itself() -> None:
    """One session on 1P1D: prefill, transfer and a step by our profile, and a kept prompt is found."""
    cluster, specs = cluster_of("2p2d-qwen3-32b-h200")
    specs, latency = specs[1:3], specs[0].latency
    session = SessionTrace("s", (RoundTrace(8192, 20), RoundTrace(9216, 20, kept_tokens=8212, gap_s=1.0)))
    run = replay_with_dynamo(Path(os.environ["ANTIPHON_DYNAMO_PYTHON"]), [(0.0, session)], cluster, specs)
    assert run.requests == run.requests_within_slo == 2
    step_s = latency.decode_step_s(1, 8700)
    work_s = sum(latency.prefill_s(new, 0) + new * 262_144 / 50e9 + step_s for new in (8192, 1024))
    assert run.ttft_s["mean"] == pytest.approx(work_s / 2, rel=0.01)
    assert run.itl_s["mean"] == pytest.approx(step_s, rel=0.01)
