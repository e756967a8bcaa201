"""Writers: what each format can say of a session is read back the same, and blocks are named alike."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.traces import format_agentic, format_own
from antiphon.traces.formats import Format, Line, ReadOptions
from antiphon.traces.generate import generate, take
from antiphon.traces.profiles import load_profile
from antiphon.traces.readers import read_trace
from antiphon.traces.schema import SCHEMA, RoundTrace, SessionTrace, session_fault
from antiphon.traces.writers import BLOCK_TOKENS, MOONCAKE_BLOCK_TOKENS, WRITERS

OWN, AGENTIC = format_own.FORMATS[0], format_agentic.FORMAT


def written(name: str, sessions: Iterable[SessionTrace]) -> list[bytes]:
    out = io.BytesIO()
    WRITERS[name](sessions, out)
    assert out.getvalue().endswith(b"\n")
    return out.getvalue().splitlines()


def rows(name: str, sessions: Iterable[SessionTrace]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(name, sessions)]


def read_back(form: Format, lines: list[bytes]) -> list[SessionTrace]:
    numbered = iter([Line(number, text) for number, text in enumerate(lines, 1)])
    found = [item for _, item in form.read(numbered, ReadOptions())]
    assert not [item for item in found if isinstance(item, str)]
    sound = [item for item in found if isinstance(item, SessionTrace)]
    assert not [fault for session in sound if (fault := session_fault(session))]
    return sound


def in_blocks(
    session: SessionTrace, block_tokens: int, resets: bool = False
) -> list[tuple[int, int, int, float]]:
    """The rounds as hashed blocks tell of them: the rule in the writers' docstring, said once more.

    With `resets` the format says itself that nothing was kept.
    """
    told: list[tuple[int, int, int, float]] = []
    previous: RoundTrace | None = None
    for turn in session.rounds:
        kept, gap_s = 0, 0.0
        if previous is not None:
            gap_s = turn.gap_s
            kept = turn.kept_tokens // block_tokens * block_tokens
            told_nothing = resets and turn.kept_tokens == 0
            if not told_nothing and kept >= previous.prompt_tokens // block_tokens * block_tokens:
                fits = turn.prompt_tokens > previous.total_tokens
                kept = previous.total_tokens if fits else min(previous.prompt_tokens, turn.prompt_tokens - 1)
        told.append((turn.prompt_tokens, turn.output_tokens, kept, gap_s))
        previous = turn
    return told


def shape(session: SessionTrace) -> list[tuple[int, int, int, float]]:
    return [(r.prompt_tokens, r.output_tokens, r.kept_tokens, r.gap_s) for r in session.rounds]


@st.composite
def traces(draw: st.DrawFn) -> list[SessionTrace]:
    """Sound sessions, some of them sub-agents of earlier ones, gaps in whole milliseconds."""
    sessions: list[SessionTrace] = []
    for number in range(draw(st.integers(1, 4))):
        rounds: list[RoundTrace] = []
        there = 0
        for _ in range(draw(st.integers(1, 5))):
            kept = draw(st.sampled_from([0, there, draw(st.integers(0, there))]))
            turn = RoundTrace(
                prompt_tokens=kept + draw(st.integers(1, 700)),
                output_tokens=draw(st.integers(1, 200)),
                kept_tokens=kept,
                gap_s=draw(st.integers(0, 100_000)) / 1000 if rounds else 0.0,
                tool=draw(st.sampled_from(["", "shell"])) if rounds else "",
            )
            rounds.append(turn)
            there = turn.total_tokens
        parent = draw(st.sampled_from([None, *sessions]))
        sessions.append(
            SessionTrace(
                session_id=f"s{number}",
                rounds=tuple(rounds),
                start_s=draw(st.sampled_from([None, 0.0, 12.25])) if parent is None else None,
                parent=parent.session_id if parent else None,
                after_round=draw(st.integers(1, len(parent.rounds))) if parent else 0,
                shared_prefix=draw(st.sampled_from(["", "p", "q"])),
            )
        )
        if sessions[-1].shared_prefix:
            shared = draw(st.integers(1, rounds[0].prompt_tokens))
            sessions[-1] = msgspec.structs.replace(sessions[-1], shared_tokens=shared)
    return sessions


@pytest.mark.parametrize("name", [SCHEMA, "antiphon"])
@given(traces())
@settings(max_examples=30, deadline=None)
def test_our_own_form_says_everything(name: str, sessions: list[SessionTrace]) -> None:
    """What is written in our own form is read back equal."""
    assert read_back(OWN, written(name, sessions)) == sessions


@given(traces())
@settings(max_examples=80, deadline=None)
def test_agentic_mooncake_says_all_but_prefix_names(sessions: list[SessionTrace]) -> None:
    """Rounds, gaps, tools, parents and starts come back; kept in blocks of 64 tokens."""
    back = read_back(AGENTIC, written("agentic-mooncake", sessions))
    assert [shape(s) for s in back] == [in_blocks(s, BLOCK_TOKENS, resets=True) for s in sessions]
    for was, now in zip(sessions, back, strict=True):
        assert (now.session_id, now.parent, now.after_round) == (was.session_id, was.parent, was.after_round)
        assert [turn.tool for turn in now.rounds] == [turn.tool for turn in was.rounds]
        assert now.start_s == (None if was.parent else was.start_s or 0.0)


@given(traces())
@settings(max_examples=40, deadline=None)
def test_sessions_share_the_blocks_of_their_prefix_and_no_others(sessions: list[SessionTrace]) -> None:
    """Two first prompts share ids just as far as both lie in the same named prefix."""
    first = {row["session_id"]: row["hash_ids"] for row in reversed(rows("mooncake-sessions", sessions))}
    for one in sessions:
        for other in sessions:
            ids, theirs = first[one.session_id], first[other.session_id]
            common = {place for place, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a == b}
            tokens = 0
            if one is other:
                tokens = BLOCK_TOKENS * len(ids)
            elif one.shared_prefix == other.shared_prefix:
                tokens = min(one.shared_tokens, other.shared_tokens)
            assert common == set(range(tokens // BLOCK_TOKENS))
            if one is not other:
                assert len(set(ids) & set(theirs)) == len(common)


def agents() -> list[SessionTrace]:
    """Generated sessions with sub-agents, tools, compactions and shared prefixes."""
    return list(take(generate("claude-code", load_profile("claude-code"), 3, 131_072), 12))


def read_file(path: Path, lines: list[bytes]) -> Iterator[SessionTrace]:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return read_trace(path)


def test_generated_agents_go_through_agentic_mooncake(tmp_path: Path) -> None:
    """A generated trace with sub-agents comes back with its rounds, parents and shared prefixes."""
    sessions = agents()
    assert any(session.parent for session in sessions)
    back = list(read_file(tmp_path / "t.jsonl", written("agentic-mooncake", sessions)))
    assert [shape(s) for s in back] == [in_blocks(s, BLOCK_TOKENS, resets=True) for s in sessions]
    assert [(s.session_id, s.parent, s.after_round) for s in back] == [
        (s.session_id, s.parent, s.after_round) for s in sessions
    ]
    shared = [
        max(
            min(one.shared_tokens, other.shared_tokens)
            for other in (*sessions, SessionTrace("none", ()))
            if other is not one and other.shared_prefix in ("", one.shared_prefix)
        )
        for one in sessions
    ]
    assert any(shared)
    assert [s.shared_tokens for s in back] == [tokens // BLOCK_TOKENS * BLOCK_TOKENS for tokens in shared]


def test_generated_agents_go_through_mooncake_sessions(tmp_path: Path) -> None:
    """Sessions with delays come back with rounds, gaps and kept; parents are lost."""
    sessions = agents()
    back = list(read_file(tmp_path / "t.jsonl", written("mooncake-sessions", sessions)))
    assert [(s.session_id, shape(s)) for s in back] == [
        (s.session_id, in_blocks(s, BLOCK_TOKENS)) for s in sessions
    ]
    assert not [s for s in back if s.parent]


def test_sessions_are_recovered_from_plain_mooncake(tmp_path: Path) -> None:
    """Of rows without sessions the reader finds the same rounds again, in blocks of 512 tokens."""
    sessions = [
        SessionTrace(
            "a",
            (
                RoundTrace(3000, 100),
                RoundTrace(4000, 50, 3100, 2.0),
                RoundTrace(6000, 10, 4050, 0.25, "shell"),
            ),
            start_s=1.0,
        ),
        SessionTrace("b", (RoundTrace(2048, 9), RoundTrace(2500, 9, 2057, 4.5)), start_s=1.5),
        SessionTrace("c", (RoundTrace(700, 1),), start_s=2.0),
    ]
    lines = rows("mooncake", sessions)
    assert [row["timestamp"] for row in lines] == [1000, 3000, 3250, 1500, 6000, 2000]
    assert all(row.keys() == {"timestamp", "input_length", "output_length", "hash_ids"} for row in lines)
    assert [len(row["hash_ids"]) for row in lines] == [6, 8, 12, 4, 5, 2]
    back = list(read_file(tmp_path / "t.jsonl", written("mooncake", sessions)))
    assert [shape(s) for s in back] == [in_blocks(s, MOONCAKE_BLOCK_TOKENS) for s in sessions]
    assert [s.start_s for s in back] == [0.0, 0.5, 1.0]


def test_ids_follow_answers_and_compactions() -> None:
    """Ids go on over a kept answer; are new behind a cut and in a part of a block at the end."""
    session = SessionTrace(
        "a",
        (RoundTrace(130, 62), RoundTrace(300, 20, 192), RoundTrace(330, 1, 320), RoundTrace(200, 1, 127)),
    )
    a, b, c, d = (row["hash_ids"] for row in rows("mooncake-sessions", [session]))
    assert [len(ids) for ids in (a, b, c, d)] == [3, 5, 6, 4]
    assert b[:2] == a[:2] and c[:4] == b[:4] and d[:1] == c[:1]
    fresh = [a[2], *b[2:], c[4], c[5], *d[1:]]
    assert len(set(fresh + a[:2])) == len(fresh) + 2


def test_sub_agents_wait_for_their_parents_round() -> None:
    """A sub-agent waits for its parent's round; with no parent before it, or from its start, for nothing."""
    turn = RoundTrace(10, 1)
    sessions = [
        SessionTrace("m", (turn, RoundTrace(20, 2, 11, 1.5, "shell"), RoundTrace(30, 2, 22, 0.0015))),
        SessionTrace("kid", (turn,), parent="m", after_round=2),
        SessionTrace("with", (turn,), parent="m", after_round=0),
        SessionTrace("orphan", (turn,), parent="gone", after_round=1),
    ]
    lines = rows("agentic-mooncake", sessions)
    assert [row["request_id"] for row in lines] == ["m#1", "m#2", "m#3", "kid#1", "with#1", "orphan#1"]
    assert [row.get("wait_for", []) for row in lines] == [[], ["m#1"], ["m#2"], ["m#2"], [], []]
    assert [row.get("timestamp") for row in lines] == [0, None, None, None, 0, 0]
    assert [(row.get("delay"), row.get("tool_wait_ms")) for row in lines[:3]] == [
        (None, None),
        (None, 1500),
        (1.5, None),
    ]
    (event,) = lines[1]["tool_events"]
    assert event["tool_class"] == "shell" and event["duration_ms"] == 1500
    assert event["ended_at_unix_ms"] - event["started_at_unix_ms"] == 1500


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_writing_is_a_stream(name: str) -> None:
    """A session is written before the next one is asked for."""
    out = io.BytesIO()
    sizes: list[int] = []

    def sessions() -> Iterator[SessionTrace]:
        for number in range(3):
            sizes.append(out.tell())
            yield SessionTrace(str(number), (RoundTrace(100, 1), RoundTrace(200, 1, 101, 1.0)))

    WRITERS[name](sessions(), out)
    assert 0 == sizes[0] < sizes[1] < sizes[2] < out.tell()


def test_the_demo_trace_is_told_as_what_it_was_written_as(tmp_path: Path) -> None:
    """Each written file is known by its content and gives the demo's rounds, or at least their number."""
    demo = Path(str(files("antiphon.traces") / "data" / "demo.jsonl"))
    sessions = list(read_trace(demo))
    for name in (SCHEMA, "mooncake-sessions", "agentic-mooncake"):
        back = list(read_file(tmp_path / "t.jsonl", written(name, sessions)))
        lengths = [[turn.total_tokens for turn in session.rounds] for session in back]
        assert lengths == [[turn.total_tokens for turn in session.rounds] for session in sessions]
    plain = list(read_file(tmp_path / "t.jsonl", written("mooncake", sessions)))
    assert sum(len(s.rounds) for s in plain) == sum(len(s.rounds) for s in sessions)
