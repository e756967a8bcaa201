"""`serve --record`: what is written, what is not, and that it reads back as the sessions that ran."""

from __future__ import annotations

import asyncio
import logging
import resource
import stat
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines.page_hash import page_hashes
from antiphon.engines.prompt import Prompt
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler import round_log
from antiphon.scheduler.gateway.requests import parse_chat, tool_answered
from antiphon.scheduler.known_prefixes import KnownPrefixes, SaidRound
from antiphon.scheduler.messages import (
    EngineDown,
    EngineUp,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.recorded_facts import ReplicaFacts, read_facts
from antiphon.scheduler.round_log import EndedRound, RoundLog
from antiphon.scheduler.rounds import RoundRequest
from antiphon.traces.readers import read_trace
from antiphon.traces.recording import join_rounds, read_recording, recorded_rounds
from antiphon.traces.schema import RECORDED_ROUND_SCHEMA, RecordedRound, TraceError, session_fault
from tests.gateway_helpers import make_receipt
from tests.replica_helpers import cluster
from tests.simulated_helpers import make_prompt

PAGE = 16


def request(session_id: str, ids: list[int], tenant: str = "default") -> RoundRequest:
    body = {"text": "a secret that was said"}
    return RoundRequest("r-1", session_id, tenant, "/v1/x", Prompt(ids), body, 8, 2.0, 0.1, tool="bash")


def ended(session_id: str, ids: list[int], number: int = 1, **receipt: object) -> EndedRound:
    asked = request(session_id, ids)
    made = make_receipt(asked, session_id=session_id, round_number=number, **receipt)
    return EndedRound(asked, made, None, [7, 8, 9], (), (), PAGE, 100.0 * number, 100.0 * number + 1.5)


def content(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.iterdir()))


# ---------------------------------------------------------------- through a replica


def test_a_replica_records_what_ran(valkey_url: str, tmp_path: Path) -> None:
    """Lengths, kept prefixes, gaps and shared beginnings of real rounds, and one receipt for each."""
    trunk = make_prompt("system", 5 * PAGE)
    first = [*trunk, *make_prompt("one", 37)]
    other = [*trunk, *make_prompt("two", 50)]

    async def run() -> None:
        async with cluster(valkey_url, "ampd", record=str(tmp_path)) as made:
            _, out = await made.run("alpha", first)
            grown = [*first, *out, *make_prompt("more", 21)]
            await asyncio.sleep(0.05)
            await made.recorded()
            _, out = await made.run("alpha", grown)
            await made.run("beta", other)
            await made.recorded()
            await made.run("alpha", [*grown[: 6 * PAGE + 5], *make_prompt("compacted", 30)])

    asyncio.run(run())
    alpha, beta = read_recording(tmp_path)
    assert list(read_trace(tmp_path)) == [alpha, beta], "every command that takes a trace takes a recording"
    assert [session_fault(session) for session in (alpha, beta)] == [None, None]
    assert [turn.prompt_tokens for turn in alpha.rounds] == [117, 117 + 8 + 21, 6 * PAGE + 5 + 30]
    assert [turn.kept_tokens for turn in alpha.rounds] == [0, 117 + 8, 6 * PAGE]
    assert [turn.output_tokens for turn in alpha.rounds] == [8, 8, 8]
    assert alpha.rounds[0].gap_s == 0 and 0.05 <= alpha.rounds[1].gap_s < 1
    assert beta.shared_tokens == alpha.shared_tokens == 5 * PAGE
    assert beta.shared_prefix == alpha.shared_prefix == alpha.session_id
    assert alpha.start_s == 0 and beta.start_s is not None and beta.start_s > 0
    rounds = recorded_rounds(tmp_path)
    receipts = [
        msgspec.json.decode(line)
        for path in tmp_path.glob("receipts-*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    assert {item.round_id for item in rounds} == {receipt["round_id"] for receipt in receipts}
    assert {item.session for item in rounds} == {receipt["session_id"] for receipt in receipts}
    assert all(receipt["outcome"] == "completed" and receipt["tries"] for receipt in receipts)
    (facts,) = read_facts(tmp_path)
    assert facts.policy == "ampd" and facts.profile.name == "tiny-cpu"
    assert {(e.engine_id, e.pool, e.page_tokens) for e in facts.engines.values()} == {
        ("p0", "prefill", PAGE),
        ("d0", "decode", PAGE),
    }
    assert all(engine.store_tokens and engine.device_tokens for engine in facts.engines.values())


def test_a_client_that_left_is_recorded_and_no_round_of_the_trace(valkey_url: str, tmp_path: Path) -> None:
    """A cancelled round has its line and its receipt; a session without a completed round is none."""

    async def run() -> None:
        async with cluster(valkey_url, "local", record=str(tmp_path), speed=1.0) as made:
            async with made.replica.submit(made.request("gone", make_prompt("x", 40), 200)) as handle:
                await handle.start()
            await made.run("stayed", make_prompt("y", 40))

    asyncio.run(run())
    assert sorted(item.outcome for item in recorded_rounds(tmp_path)) == ["cancelled", "completed"]
    assert len(read_recording(tmp_path)) == 1


# ---------------------------------------------------------------- what is not written


def test_nothing_that_was_said_is_written(tmp_path: Path) -> None:
    """No session id, body, token id or page hash, and no message of an engine, is in any file."""
    ids = [400_001 + index for index in range(3 * PAGE)]
    log = RoundLog(tmp_path, "a")
    made = ended("my-session", ids)
    attempt = made.receipt.tries[0]
    failure = "p0: bad_request: it said: a secret that was said"
    tries = (type(attempt)(attempt.placement, failure),)
    receipt = make_receipt(made.request, session_id="my-session", tries=tries)
    log.add(made._replace(receipt=receipt))
    log.close()
    written = content(tmp_path)
    assert b"bad_request" in written and written.count(b'"prompt_tokens":48') == 2
    for secret in (b"my-session", b"secret", b"400001", page_hashes(ids, PAGE)[0].hex().encode()):
        assert secret not in written


def test_names_are_of_the_folder(tmp_path: Path) -> None:
    """Replicas that record into one folder call a session alike; another folder calls it otherwise."""
    for directory, replica in (("x", "a"), ("x", "b"), ("y", "a")):
        log = RoundLog(tmp_path / directory, replica)
        log.add(ended("s", [1, 2, 3]))
        log.close()
    assert len({item.session for item in recorded_rounds(tmp_path / "x")}) == 1
    assert recorded_rounds(tmp_path / "x")[0].session != recorded_rounds(tmp_path / "y")[0].session
    assert stat.S_IMODE((tmp_path / "x" / "recording.json").stat().st_mode) == 0o600


def test_plain_ids_are_written_when_asked_for(tmp_path: Path) -> None:
    """`session_ids = "plain"`: the id as the client gave it, so that a recording can be joined with logs."""
    log = RoundLog(tmp_path, "a", plain_ids=True)
    log.add(ended("s-1", [1, 2, 3]))
    log.close()
    assert recorded_rounds(tmp_path)[0].session == "s-1"


# ---------------------------------------------------------------- when the disk fails


def test_a_full_disk_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounds that cannot be written are counted, and said once; the recording goes on being offered them."""
    (tmp_path / "rounds-a.jsonl").symlink_to("/dev/full")
    lost: list[int] = []
    log = RoundLog(tmp_path, "a", on_lost=lambda: lost.append(1))
    with caplog.at_level(logging.ERROR):
        for number in (1, 2, 3):
            log.add(ended("s", [1, 2, 3], number))
        log.close()
    assert log.lost == len(lost) == 3
    assert [record.message for record in caplog.records if "not recorded" in record.message] == [
        "a round is not recorded: [Errno 28] No space left on device; further ones are only counted"
    ]


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A line for which there was no room leaves the file whole, and the next one follows."""
    file = round_log._AppendOnly(tmp_path / "lines")
    file.append(b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError):
            file.append(b"far too long for what is left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.append(b"third")
    file.close()
    assert (tmp_path / "lines").read_bytes() == b"first\nthird\n"


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`add` returns at once; rounds beyond the bound are lost and counted; the end has a deadline."""
    monkeypatch.setattr(round_log, "MAX_WAITING", 5)
    disk = threading.Event()
    monkeypatch.setattr(round_log._AppendOnly, "append", lambda self, line: disk.wait(10))
    log = RoundLog(tmp_path, "a")
    began = time.monotonic()
    for number in range(20):
        log.add(ended("s", [1, 2, 3], number))
    log.close(0.1)
    assert time.monotonic() - began < 2 and log.lost >= 14
    disk.set()
    log._thread.join(10)
    assert not log._thread.is_alive()


def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    """A recording that was asked for and cannot be is an error at the start, not a silence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot record in"):
        RoundLog(tmp_path / "file", "a")


# ---------------------------------------------------------------- kept prefixes

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=70)


@settings(max_examples=60, deadline=None)
@given(
    first=IDS,
    output=IDS,
    keep=st.integers(0, 200),
    more=IDS,
    size=st.sampled_from([1, 4, 16]),
    hashed=st.booleans(),
)
def test_kept_tokens_are_those_of_a_plain_comparison(
    first: list[int], output: list[int], keep: int, more: list[int], size: int, hashed: bool
) -> None:
    """Exact when all that was there was kept, else cut to whole pages; hashed by the driver or not."""
    there = [*first, *output]
    second = [*there[:keep], *more]
    known = KnownPrefixes()

    def said(ids: list[int], answer: list[int], number: int) -> SaidRound:
        prompt = page_hashes(ids, size) if hashed else ()
        final = page_hashes([*ids, *answer[:-1]], size) if hashed else ()
        return SaidRound(("t", "s"), "n", number, request("s", ids), answer, prompt, final, size, True)

    assert known.take(said(first, output, 1)).kept_tokens == 0
    common = next((i for i, (a, b) in enumerate(zip(there, second, strict=False)) if a != b), None)
    common = min(len(there), len(second)) if common is None else common
    found = known.take(said(second, [1], 2)).kept_tokens
    assert found is not None and found <= common
    if common == len(there):
        assert found == common
    else:
        assert found >= common // size * size


def test_a_round_that_was_not_seen_leaves_the_next_one_unknown(tmp_path: Path) -> None:
    """Another replica ran round 2: what round 3 kept is not guessed. A failed round changes nothing."""
    log = RoundLog(tmp_path, "a")
    ids = list(range(40))
    log.add(ended("s", ids, 1))
    log.add(ended("s", ids, 3))
    log.add(ended("s", ids, 4, outcome=Outcome.FAILED))
    log.add(ended("s", [*ids, 7, 8, 9, 10], 5))
    log.close()
    assert [item.kept_tokens for item in recorded_rounds(tmp_path)] == [0, None, 40, 43]


def test_forgetting_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unseen sessions are forgotten when their pages exceed the bound."""
    monkeypatch.setattr("antiphon.scheduler.known_prefixes.MAX_DIGEST_BYTES", 5 * 8)
    known = KnownPrefixes()
    for name in ("a", "b", "c"):
        ids = make_prompt(name, 2 * PAGE)
        known.take(SaidRound(("t", name), name, 1, request(name, ids), [1], (), (), PAGE, True))
    assert known._digest_bytes <= 5 * 8 and list(known._sessions) == [("t", "b"), ("t", "c")]


# ---------------------------------------------------------------- reading


def line(session: str, number: int, arrived_s: float, **more: object) -> RecordedRound:
    values: dict[str, object] = {
        "prompt_tokens": 100,
        "output_tokens": 10,
        "kept_tokens": 0,
        "ended_s": arrived_s + 2,
    } | more
    return msgspec.convert(
        {
            "schema": RECORDED_ROUND_SCHEMA,
            "session": session,
            "round": number,
            "round_id": "r",
            "arrived_s": arrived_s,
        }
        | values,
        RecordedRound,
    )


def test_rounds_of_several_replicas_join(tmp_path: Path) -> None:
    """Order is by arrival, whoever wrote it; gaps follow the end of the last response; unknown = all kept."""
    written = {
        "a": [line("s", 1, 50.0), line("u", 1, 55.0)],
        "b": [
            line("s", 2, 52.5, outcome="failed", ended_s=53.0),
            line("s", 3, 54.0, prompt_tokens=130, kept_tokens=None),
        ],
    }
    (tmp_path / "recording.json").write_text("{}")
    for replica, lines in written.items():
        text = b"".join(msgspec.json.encode(item) + b"\n" for item in lines)
        (tmp_path / f"rounds-{replica}.jsonl").write_bytes(text + b'{"schema":"antiphon.round/1","se')
    session, other = read_recording(tmp_path)
    assert [turn.prompt_tokens for turn in session.rounds] == [100, 130]
    assert session.rounds[1].kept_tokens == 110 and session.rounds[1].gap_s == 1.0
    assert (session.start_s, other.start_s) == (0.0, 5.0)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    """File, line and fault; or counted, where the caller counts."""
    (tmp_path / "recording.json").write_text("{}")
    good = msgspec.json.encode(line("s", 1, 1.0))
    (tmp_path / "rounds-a.jsonl").write_bytes(
        b"{}\n" + good + b"\n" + good.replace(b"round/1", b"round/9") + b"\n"
    )
    with pytest.raises(TraceError, match=r"rounds-a.jsonl, line 1: .*required field"):
        read_recording(tmp_path)
    bad: list[str] = []
    assert len(read_recording(tmp_path, bad.append)) == 1
    assert len(bad) == 2 and "line 3: schema 'antiphon.round/9'" in bad[1]


def test_no_recording_is_said(tmp_path: Path) -> None:
    """A folder without the marker, and one without a completed round, are errors."""
    with pytest.raises(TraceError, match="not a recording"):
        read_recording(tmp_path)
    (tmp_path / "recording.json").write_text("{}")
    with pytest.raises(TraceError, match="no completed round"):
        read_recording(tmp_path)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            line,
            st.sampled_from("abc"),
            st.integers(1, 4),
            st.floats(0, 100),
            prompt_tokens=st.integers(1, 50),
            output_tokens=st.integers(0, 20),
            kept_tokens=st.none() | st.integers(0, 90),
            ended_s=st.floats(0, 120),
            outcome=st.sampled_from(["completed", "completed", "cancelled"]),
            shared_with=st.none() | st.sampled_from("abcd"),
            shared_tokens=st.integers(0, 99),
        ),
        max_size=12,
    )
)
def test_whatever_was_recorded_joins_into_sound_sessions(lines: list[RecordedRound]) -> None:
    """No recording, however odd, makes a session that the schema forbids; no completed round is lost."""
    sessions = join_rounds(lines)
    assert [session_fault(session) for session in sessions] == [None] * len(sessions)
    assert sum(len(s.rounds) for s in sessions) == sum(item.outcome == "completed" for item in lines)


# ---------------------------------------------------------------- small parts


def test_the_tool_is_that_of_the_last_message() -> None:
    """By its own name, or by the call that it answers; nothing for a user's message."""
    call = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]

    def tool(messages: list[dict[str, object]]) -> str:
        return tool_answered(parse_chat(msgspec.json.encode({"model": "m", "messages": messages})))

    assert tool(messages) == "bash"
    assert tool(messages[:1]) == ""
    assert tool([*messages, {"role": "tool", "tool_call_id": "c9", "content": "x"}]) == ""
    assert tool([*messages, {"role": "tool", "name": "search", "content": "x"}]) == "search"


def test_engines_that_come_and_go_are_facts() -> None:
    """The last state of each engine, and every change with its time."""
    facts = ReplicaFacts("r", "ampd", "fcfs", load_latency_model("tiny-cpu"), 2.0, 0.1)
    facts.note(EngineUp("d0", "i", "decode", True, 16, 4096, chunk_tokens=512), None, 10.0)
    facts.note(EngineDown("d0", "i", "gone"), None, 20.0)
    assert facts.engines["d0"].device_tokens == 4096 and facts.engines["d0"].store_tokens == 0
    assert [(change.at_s, change.kind) for change in facts.changes] == [(10.0, "up"), (20.0, "down")]
