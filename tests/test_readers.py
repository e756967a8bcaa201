"""Trace files to sessions: formats by content, faults with file and line, real traces where they are."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.traces.readers import FORMATS, BadLines, read_trace
from antiphon.traces.schema import RECORDED_ROUND_SCHEMA, RoundTrace, SessionTrace, TraceError, session_fault


def write(path: Path, *lines: Any) -> Path:
    """A JSON-lines file; strings go in as they are."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode(errors="surrogateescape") + b"\n")
    return path


def own(session_id: str, *rounds: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"schema": "antiphon.trace/1", "session_id": session_id, "rounds": list(rounds), **fields}


def rounds_of(tmp_path: Path, *rounds: dict[str, Any]) -> tuple[RoundTrace, ...]:
    path = write(tmp_path / "rounds.jsonl", {"session": "s", "rounds": list(rounds)})
    return next(iter(read_trace(path))).rounds


def shared_trace(name: str) -> Path:
    """A file or folder of the shared traces; skips the test, saying so, where they are not."""
    beside = Path(__file__).resolve().parents[1] / ".." / "shared" / "traces"
    folder = Path(os.environ.get("ANTIPHON_TRACES") or beside)
    if not (folder / name).exists():
        pytest.skip(f"no {name}: set ANTIPHON_TRACES to the folder of the shared traces")
    return folder / name


def test_own_form_is_read_as_written(tmp_path: Path) -> None:
    """Our own JSON lines give back every field."""
    session = own(
        "a",
        {"prompt_tokens": 10, "output_tokens": 3},
        {"prompt_tokens": 20, "output_tokens": 4, "kept_tokens": 13, "gap_s": 0.5, "tool": "bash"},
        start_s=2.5, shared_prefix="p", shared_tokens=4, slo_ttft_s=1.0,
    )  # fmt: skip
    (read,) = read_trace(write(tmp_path / "t.jsonl", session))
    assert read == SessionTrace(
        "a",
        (RoundTrace(10, 3), RoundTrace(20, 4, kept_tokens=13, gap_s=0.5, tool="bash")),
        start_s=2.5, shared_prefix="p", shared_tokens=4, slo_ttft_s=1.0,
    )  # fmt: skip


def test_gzip_is_told_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    """A gzipped file reads like a plain one, whatever it is called."""
    plain = write(tmp_path / "t.jsonl", own("a", {"prompt_tokens": 1, "output_tokens": 1}))
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_trace(zipped)) == list(read_trace(plain))


def test_block_counted_prefix_keeps_prompt_and_output(tmp_path: Path) -> None:
    """Where `cached` covers the previous prompt but for a part of a block, its output is kept too (Weka)."""
    _, second = rounds_of(
        tmp_path,
        {"t": 0.0, "prompt": 15818, "cached": 0, "new": 15818, "out": 154, "gap_s": 0.0},
        {"t": 9.0, "prompt": 16003, "cached": 15808, "new": 195, "out": 99, "gap_s": 3.77},
    )
    assert second == RoundTrace(16003, 99, kept_tokens=15818 + 154, gap_s=3.77)


def test_output_that_was_not_sent_again_is_not_kept(tmp_path: Path) -> None:
    """A prompt that grew less than the previous output keeps the previous prompt alone (unsent thinking)."""
    _, second = rounds_of(
        tmp_path,
        {"prompt": 1000, "cached": 0, "out": 500},
        {"prompt": 1300, "cached": 960, "out": 5},
    )
    assert second.kept_tokens == 1000


def test_compaction_keeps_what_was_shared(tmp_path: Path) -> None:
    """Where less than the previous prompt was shared, just that is kept."""
    _, _, third = rounds_of(
        tmp_path,
        {"prompt": 640, "cached": 0, "out": 50},
        {"prompt": 2000, "cached": 640, "out": 50},
        {"prompt": 900, "cached": 64, "out": 5},
    )
    assert third.kept_tokens == 64


def test_observation_only_rounds_keep_all_that_was_said(tmp_path: Path) -> None:
    """Without `cached`, `new` is the observation alone: prompt and output are kept (HotpotQA, tau)."""
    rounds = rounds_of(
        tmp_path,
        {"prompt": 1680, "new": 1680, "out": 47},
        {"prompt": 1845, "new": 118, "out": 44},
        {"prompt": 1982, "new": 93, "out": 34},
    )
    assert [turn.kept_tokens for turn in rounds] == [0, 1727, 1889]
    assert [turn.new_tokens for turn in rounds] == [1680, 118, 93]


def test_gap_is_recorded_or_computed_or_zero(tmp_path: Path) -> None:
    """gap_s as recorded; else start minus end of the previous answer; else 0: never start to start."""
    rounds = rounds_of(
        tmp_path,
        {"prompt": 10, "out": 1, "t": 0.0, "llm_s": 4.0, "gap_s": 9.0},
        {"prompt": 20, "out": 1, "t": 10.0, "gap_s": 2.5, "llm_s": 1.0},
        {"prompt": 30, "out": 1, "t": 14.0},
        {"prompt": 40, "out": 1, "t": 20.0},
        {"prompt": 50, "out": 1, "gap_s": -3.0},
    )
    assert [turn.gap_s for turn in rounds] == [0.0, 2.5, 3.0, 0.0, 0.0]


def test_arrivals_of_a_whole_service_are_gaps(tmp_path: Path) -> None:
    """In a recording of the whole service (rows) gaps are arrival to arrival, less known LLM times."""
    rounds = rounds_of(
        tmp_path,
        {"row": 0, "prompt": 10, "out": 1, "t": 50.0},
        {"row": 9, "prompt": 20, "out": 1, "t": 170.0, "llm_s": 4.0},
        {"row": 11, "prompt": 30, "out": 1, "t": 200.0},
    )
    assert [turn.gap_s for turn in rounds] == [0.0, 120.0, 26.0]


def test_absolute_times_become_the_start_of_a_session(tmp_path: Path) -> None:
    """Only a recording of the whole service (rows) says when sessions started; integer ids become text."""
    path = write(
        tmp_path / "t.jsonl",
        {"session": 7, "rounds": [{"row": 3, "t": 48.0, "prompt": 9, "out": 2}]},
        {"session": "b", "rounds": [{"t": 48.0, "prompt": 9, "out": 2}]},
    )
    assert [(session.session_id, session.start_s) for session in read_trace(path)] == [
        ("7", 48.0),
        ("b", None),
    ]


GOOD = own("good", {"prompt_tokens": 5, "output_tokens": 2})
ROUND = {"prompt_tokens": 5, "output_tokens": 2}
FAULTS = [
    ("{", "truncated"),
    ('{"schema": "antiphon.trace/1", "session_id": "\udcff", "rounds": []}', "can't decode byte 0xff"),
    (own("x", ROUND | {"prompt_tokens": -5}), "rounds[0].prompt_tokens"),
    (own("x", ROUND | {"extra": 1}), "extra"),
    (own("x"), "at least one round"),
    (own("x", ROUND | {"kept_tokens": 1}), "round 1 keeps 1 tokens of 0"),
    (
        own("x", ROUND, {"prompt_tokens": 7, "output_tokens": 1, "kept_tokens": 7}),
        "round 2 brings no new token",
    ),
    (own("x", ROUND, shared_tokens=6, shared_prefix="p"), "shared_tokens 6"),
    (own("x", ROUND, shared_tokens=4), "without a shared_prefix"),
    (own("good", ROUND), "already in line 1"),
    (own("x", ROUND, start_s=2e9), "start_s"),
    ({"schema": "antiphon.trace/9", "session_id": "x", "rounds": []}, "antiphon.trace/9"),
]


@pytest.mark.parametrize(("line", "fault"), FAULTS, ids=[fault for _, fault in FAULTS])
def test_bad_line_is_named_or_counted(tmp_path: Path, line: Any, fault: str) -> None:
    """A bad line ends the reading with file, line and fault; with `BadLines` it is left out and counted."""
    path = write(tmp_path / "t.jsonl", GOOD, "", line, own("after", {"prompt_tokens": 1, "output_tokens": 1}))
    with pytest.raises(TraceError) as raised:
        list(read_trace(path))
    assert f"{path}, line 3: " in str(raised.value)
    assert fault.lower() in str(raised.value).lower()
    bad = BadLines()
    assert [session.session_id for session in read_trace(path, bad)] == ["good", "after"]
    assert bad.count == 1
    assert "line 3" in bad.first[0]


@pytest.mark.parametrize("line", ["# made by hand", "[]", '{"a": "\udcff"}', '{"deep":' + "[" * 100_000])
def test_bad_first_lines_do_not_hide_the_format(tmp_path: Path, line: str) -> None:
    """The format is told by the first line that is a JSON object; what came before is a bad line."""
    path = write(tmp_path / "t.jsonl", line, GOOD)
    with pytest.raises(TraceError, match="line 1: not a JSON object"):
        list(read_trace(path))
    bad = BadLines()
    assert len(list(read_trace(path, bad))) == 1
    assert bad.count == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "holds no session"),
        (b'{"timestamp": 0, "hash_ids": []}\n', "no known trace format .keys: hash_ids, timestamp"),
        (gzip.compress(b'{"session": 1, "rounds": []}\n' * 100)[:-9], "cannot be read"),
        (b"\x1f\x8b\x08\x00garbage", "cannot be read"),
    ],
)
def test_unusable_file_is_a_trace_error(tmp_path: Path, content: bytes, fault: str) -> None:
    """An empty, foreign, cut or corrupt file is refused in words, even when bad lines are skipped."""
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=fault):
        list(read_trace(path, BadLines()))


def test_absent_file_is_a_trace_error(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(TraceError, match=r"nowhere.*cannot be read"):
        list(read_trace(tmp_path / "nowhere"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("session", "session_id", "rounds", "schema", "prompt", "out", "new", "cached", "t"),
                    *("timestamp", "input_length", "output_length", "hash_ids", "delay", "turns", "id"),
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
numbers = st.integers(-3, 300) | st.floats(-10, 1e12) | st.none()
almost_rounds = st.fixed_dictionaries(
    {"session": st.text(max_size=3) | st.integers()},
    optional={
        "rounds": st.lists(
            st.fixed_dictionaries(
                {"prompt": st.integers(1, 300), "out": st.integers(0, 50)},
                optional={name: numbers for name in ("new", "cached", "gap_s", "t", "llm_s", "row")},
            ),
            max_size=5,
        )
    },
)
any_line = (
    st.binary(max_size=60)
    | st.just(b"TIMESTAMP,ContextTokens,GeneratedTokens")
    | st.builds(lambda value: json.dumps(value).encode(), json_values | almost_rounds | st.just(GOOD))
)


@settings(max_examples=300, deadline=None)
@given(st.lists(any_line, max_size=6), st.booleans(), st.booleans())
def test_any_bytes_give_sound_sessions_or_a_trace_error(
    lines: Sequence[bytes], zipped: bool, skip: bool
) -> None:
    """Whatever a file holds, reading it yields sound sessions with distinct ids, or raises TraceError."""
    content = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(gzip.compress(content) if zipped else content)
        sessions: list[SessionTrace] = []
        try:
            sessions.extend(read_trace(path, BadLines() if skip else None))
        except TraceError as error:
            assert str(path) in str(error)
    assert all(session_fault(session) is None for session in sessions)
    assert len({session.session_id for session in sessions}) == len(sessions)


@pytest.mark.parametrize(
    ("name", "sessions", "rounds"),
    [
        ("weka/rounds.jsonl.gz", 173, 6_719),
        ("hotpotqa_react/rounds.jsonl.gz", 1_010, 3_763),
        ("tau_airline/rounds.jsonl.gz", 200, 2_454),
        ("lmcache_agent/miniswe_rounds.jsonl.gz", 20, 402),
        ("mooncake/conversation_sessions.jsonl.gz", 8_130, 12_031),
        ("mooncake/conversation_trace.jsonl.gz", 8_130, 12_031),
        ("aiperf_agentic_code", 1_205, 14_056),
        ("weka/weka.tar.xz", 182, 6_823),
        ("lmcache_agent", 20, 402),
    ],
)
def test_shared_traces_are_read_whole(name: str, sessions: int, rounds: int) -> None:
    """Every session and round of the shared traces is read, none is bad."""
    read = list(read_trace(shared_trace(name)))
    assert (len(read), sum(len(session.rounds) for session in read)) == (sessions, rounds)


@pytest.mark.parametrize("name", ["weka", "mooncake"])
def test_the_same_sessions_twice_in_a_folder_are_refused(name: str) -> None:
    """A folder with original and derived form of the same sessions says to give one of them."""
    folder = shared_trace(name)
    with pytest.raises(TraceError, match="give one of them"):
        list(read_trace(folder, BadLines()))


def test_a_recording_is_read_as_one(tmp_path: Path) -> None:
    """A folder of `serve --record` is joined over its files; one of them reads alone; faults are said."""
    (tmp_path / "recording.json").write_text("{}")
    turn = {"schema": RECORDED_ROUND_SCHEMA, "session": "s", "prompt_tokens": 9, "output_tokens": 4}
    first = turn | {"round": 1, "round_id": "a", "arrived_s": 100.0, "ended_s": 101.0}
    later = turn | {"round": 2, "round_id": "b", "arrived_s": 104.0, "ended_s": 105.0, "prompt_tokens": 20}
    one = write(tmp_path / "rounds-1.jsonl", first)
    other = write(tmp_path / "rounds-2.jsonl", later, "{}")
    bad = BadLines()
    (joined,) = read_trace(tmp_path, bad)
    assert joined.rounds == (RoundTrace(9, 4), RoundTrace(20, 4, kept_tokens=13, gap_s=3.0))
    assert bad.count == 1 and "rounds-2.jsonl, line 2" in bad.first[0]
    (alone,) = read_trace(one)
    assert (alone.session_id, alone.start_s, alone.rounds) == ("s", 0.0, (RoundTrace(9, 4),))
    with pytest.raises(TraceError, match=r"rounds-2.jsonl, line 2"):
        list(read_trace(other))
    failed = write(tmp_path / "failed.jsonl", first | {"outcome": "failed"})
    with pytest.raises(TraceError, match="no round of this recording was completed"):
        list(read_trace(failed))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_document_may_span_lines(tmp_path: Path, indent: int | None) -> None:
    """One JSON object a file is read however it is laid out, also of a format that has a session a line."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps(GOOD, indent=indent))
    assert [session.session_id for session in read_trace(path)] == ["good"]


def test_every_format_has_a_name_of_its_own() -> None:
    """Formats can be told apart by name, and none hides behind one that is asked before it."""
    heads: list[dict[str, object]] = [
        {"session_id": "s", "rounds": []},
        {"schema": RECORDED_ROUND_SCHEMA},
        {"session": 1, "rounds": []},
        {"id": "s", "requests": [], "block_size": 64},
        {"request_id": "r", "session_id": "s", "input_length": 1, "output_length": 1, "timestamp": 0},
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0, "input_length": 1, "output_length": 1},
        {"session_id": "s", "turns": []},
        {"session_id": "s", "input_length": 1, "output_length": 1, "timestamp": 0},
        {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]},
        {"TIMESTAMP": None, "ContextTokens": None, "GeneratedTokens": None},
    ]
    asked = [next(form.name for form in FORMATS if form.matches(head)) for head in heads]
    assert asked == [form.name for form in FORMATS] and len(set(asked)) == len(asked)


def test_weka_mostly_extends_itself() -> None:
    """In Weka most later rounds extend prompt and output; prompts are as long as its source says."""
    read = list(read_trace(shared_trace("weka/rounds.jsonl.gz")))
    pairs = [pair for session in read for pair in pairwise(session.rounds)]
    extending = sum(after.kept_tokens == before.total_tokens for before, after in pairs)
    assert 0.8 < extending / len(pairs) < 0.9
    assert read[0].rounds[0].prompt_tokens == 15_818


def test_demo_trace_is_small_and_varied() -> None:
    """The trace that ships fits a small window, shares a system prompt and has a compaction."""
    with_path = Path(str(files("antiphon.traces") / "data" / "demo.jsonl"))
    sessions = list(read_trace(with_path))
    assert len(sessions) == 8
    assert all(turn.total_tokens < 4_000 and turn.gap_s <= 0.5 for s in sessions for turn in s.rounds)
    assert len({session.shared_prefix for session in sessions}) == 2
    assert any(
        turn.kept_tokens < before.prompt_tokens for s in sessions for before, turn in pairwise(s.rounds)
    )
