"""AIPerf conversations, Bailian chains and Agentic Mooncake rows: their sessions and their faults."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.traces import format_agentic, format_aiperf, format_bailian
from antiphon.traces.formats import Format, Line, ReadOptions
from antiphon.traces.schema import SessionTrace, session_fault

AIPERF, BAILIAN, AGENTIC = format_aiperf.FORMAT, format_bailian.FORMAT, format_agentic.FORMAT


def items(form: Format, *rows: Any) -> list[tuple[int, SessionTrace | str]]:
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    lines = iter([Line(number, text) for number, text in enumerate(texts, 1)])
    return [(line.number, item) for line, item in form.read(lines, ReadOptions())]


def sessions(form: Format, *rows: Any) -> list[SessionTrace]:
    found = items(form, *rows)
    assert not [item for _, item in found if isinstance(item, str)]
    sound = [item for _, item in found if isinstance(item, SessionTrace)]
    assert not [fault for session in sound if (fault := session_fault(session))]
    return sound


def shape(session: SessionTrace) -> list[tuple[int, int, int, float]]:
    return [(r.prompt_tokens, r.output_tokens, r.kept_tokens, r.gap_s) for r in session.rounds]


# ---------------------------------------------------------------- AIPerf multi_turn


def test_turns_add_to_the_conversation() -> None:
    """A prompt is all turns and answers before it and the new; four characters are a token, rounded up."""
    (session,) = sessions(
        AIPERF,
        {
            "session_id": "s",
            "turns": [
                {"text": "abcde", "output_length": 10, "timestamp": 2500},
                {"texts": ["ab", {"name": "x", "contents": ["cd", "e"]}], "delay": 1500},
                {"input_length": 7, "output_length": 3, "text": "ignored", "image": "x.png", "delay": None},
            ],
        },
    )
    assert session.session_id == "s" and session.start_s == 2.5
    assert shape(session) == [(2, 10, 0, 0.0), (14, 1, 12, 1.5), (22, 3, 15, 0.0)]


def test_timestamps_of_turns_give_gaps() -> None:
    """The difference of two timestamps is the gap, never negative; without an id a line names it."""
    turns = [{"text": "a", "timestamp": stamp} for stamp in (1000, 4000, 3000)]
    (session,) = sessions(AIPERF, {"turns": turns})
    assert session.session_id == "line-1"
    assert [turn.gap_s for turn in session.rounds] == [0.0, 3.0, 0.0]


# ---------------------------------------------------------------- Bailian


def chat(chat_id: int, parent: int, at: float, prompt: int, out: int, ids: list[int]) -> dict[str, Any]:
    return {
        "chat_id": chat_id, "parent_chat_id": parent, "timestamp": at, "input_length": prompt,
        "output_length": out, "type": "text", "turn": 1, "hash_ids": ids,
    }  # fmt: skip


def test_chains_of_chats_are_sessions() -> None:
    """A chain by parent_chat_id is a session; kept is in 16-token blocks, gaps between arrivals."""
    first, second = sessions(
        BAILIAN,
        chat(5, -1, 1.5, 40, 10, [1, 2, 3]),
        chat(6, -1, 2.0, 20, 0, [1, 9]),
        chat(7, 5, 11.75, 60, 5, [1, 2, 4, 5]),
        chat(8, 7, 12.0, 80, 5, [1, 6, 7, 8, 9]),
    )
    assert (first.session_id, first.start_s, first.parent) == ("5", 1.5, None)
    assert shape(first) == [(40, 10, 0, 0.0), (60, 5, 50, 10.25), (80, 5, 16, 0.25)]
    assert (second.session_id, shape(second)) == ("6", [(20, 1, 0, 0.0)])


def test_chats_without_hashes_or_parents_are_read() -> None:
    """Without hash ids all that was said before is kept; a chat that names no parent begins a session."""
    first, second = ({**chat(n, n - 1, n, 100 * n, 10, []), "hash_ids": []} for n in (1, 2))
    bare = {key: first[key] for key in first if key not in ("hash_ids", "parent_chat_id", "type", "turn")}
    (session,) = sessions(BAILIAN, bare, second)
    assert BAILIAN.matches(bare)
    assert shape(session) == [(100, 10, 0, 0.0), (200, 10, 110, 1.0)]


def test_branches_of_a_chat_are_sessions_with_a_parent() -> None:
    """The second continuation of a chat is a session of its own, after the round that it continues."""
    rows = [
        chat(1, -1, 0, 40, 10, []), chat(2, 1, 5, 60, 10, []), chat(3, 1, 6, 70, 10, []),
        chat(4, 3, 9, 90, 10, []), chat(5, 99, 9, 90, 10, []),
    ]  # fmt: skip
    main, branch, unknown = sessions(BAILIAN, *rows)
    assert [turn.prompt_tokens for turn in main.rounds] == [40, 60]
    assert (branch.session_id, branch.parent, branch.after_round, branch.start_s) == ("3", "1", 1, 6.0)
    assert [turn.prompt_tokens for turn in branch.rounds] == [70, 90]
    assert unknown.session_id == "5" and unknown.parent is None
    assert [number for number, _ in items(BAILIAN, *rows)] == [2, 4, 5]


# ---------------------------------------------------------------- Agentic Mooncake v1


def request(request_id: str, prompt: int, out: int, *waits: str, **fields: Any) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "input_length": prompt,
        "output_length": out,
        "wait_for": waits,
        **fields,
    }


def test_a_chain_of_waits_is_a_session() -> None:
    """Waits make rounds; delay and tool wait make the gap; a reset keeps nothing; events name tools."""
    (session,) = sessions(
        AGENTIC,
        request("a", 128, 10, hash_ids=[1, 2], timestamp=1500, session_id="s"),
        request("b", 256, 10, "a", hash_ids=[1, 2, 3, 4], delay=250.5, tool_wait_ms=1000, session_id="s"),
        request(
            "c", 256, 0, "b", hash_ids=[1, 8, 3, 4], session_id="s", tool_events=[{"tool_class": "shell"}]
        ),
        request("d", 320, 1, "c", hash_ids=[1, 8, 3, 4, 5], prefix_reset=True, session_id="s"),
    )
    assert (session.session_id, session.start_s) == ("s", 1.5)
    assert shape(session) == [(128, 10, 0, 0.0), (256, 10, 138, 1.2505), (256, 1, 64, 0.0), (320, 1, 0, 0.0)]
    assert [turn.tool for turn in session.rounds] == ["", "tool", "shell", ""]


def test_second_children_branches_and_other_sessions_are_sub_agents() -> None:
    """What does not continue a row starts after it with its session as parent, and joins are left out."""
    found = sessions(
        AGENTIC,
        request("a", 10, 1, branches=["kid"]),
        request("kid", 20, 1, "a"),
        request("b", 30, 1, "a", "kid"),
        request("second", 40, 1, "a"),
        request("other", 50, 1, "b", session_id="o"),
        request("other2", 60, 1, "b", "other", session_id="o"),
        request("again", 70, 1, "a", session_id="o"),
    )
    assert [(s.session_id, s.parent, s.after_round, [r.prompt_tokens for r in s.rounds]) for s in found] == [
        ("a", None, 0, [10, 30, 50]), ("kid", "a", 1, [20]), ("second", "a", 1, [40]),
        ("o", "a", 2, [60]), ("o/again", "a", 1, [70]),
    ]  # fmt: skip


def test_of_several_waits_the_last_of_its_own_session_is_continued() -> None:
    """A row that waits for older rounds of its session too, and for others, goes on behind the newest."""
    first, other = sessions(
        AGENTIC,
        request("a", 10, 1, session_id="s"),
        request("o", 10, 1, session_id="o"),
        request("b", 20, 1, "a", session_id="s"),
        request("c", 30, 1, "o", "a", "b", session_id="s"),
    )
    assert [turn.prompt_tokens for turn in first.rounds] == [10, 20, 30] and len(other.rounds) == 1


@pytest.mark.parametrize("block_tokens", [16, 64, 512])
@pytest.mark.parametrize("part", [True, False])
def test_the_size_of_a_block_is_told_by_the_rows(block_tokens: int, part: bool) -> None:
    """A prompt's length and how many ids it has give the tokens of a block, its last part counted or not."""
    rows = []
    for number, blocks in enumerate((5, 9), 1):
        ids = list(range(blocks)) + [100 + number] * part
        rows.append(request(str(number), blocks * block_tokens + 3, 2, *["1"][: number - 1], hash_ids=ids))
    rows.append(request("3", 9 * block_tokens, 2, "2", hash_ids=[0, 1, 2, *range(50, 56)]))
    (session,) = sessions(AGENTIC, *rows)
    assert [turn.kept_tokens for turn in session.rounds] == [0, 5 * block_tokens + 5, 3 * block_tokens]


def test_first_prompts_that_begin_alike_share_a_prefix() -> None:
    """Sessions share what their first prompts have in common, in blocks of the source or 512 tokens."""
    a, b = sessions(
        AGENTIC,
        request("a", 200, 1, hash_ids=[1, 2, 3, 4], session_id="a"),
        request("b", 200, 1, hash_ids=[1, 2, 9, 8], session_id="b"),
    )
    assert a.shared_prefix == b.shared_prefix != "" and a.shared_tokens == b.shared_tokens == 128
    ids = list(range(70))
    c, d = sessions(BAILIAN, chat(1, -1, 0, 1120, 1, ids), chat(2, -1, 0, 1120, 1, [*ids[:60], *ids[:10]]))
    assert c.shared_prefix == d.shared_prefix != "" and c.shared_tokens == d.shared_tokens == 512


def test_without_hashes_all_before_is_kept() -> None:
    """Rows without hash ids keep the whole prompt and answer before them, if they fit."""
    (session,) = sessions(
        AGENTIC, request("a", 100, 10), request("b", 150, 10, "a"), request("c", 155, 1, "b")
    )
    assert [turn.kept_tokens for turn in session.rounds] == [0, 110, 150]


# ---------------------------------------------------------------- faults


GOOD_CHAT = chat(1, -1, 0.0, 40, 10, [1, 2, 3])
FAULTS: list[tuple[Format, Any, str]] = [
    (AIPERF, {"session_id": "s", "turns": []}, "turns"),
    (AIPERF, {"session_id": "s", "turns": [{"text": "a"}, {"delay": 5}]}, "turns[1]: neither input_length"),
    (AIPERF, {"session_id": "s", "turns": [{"text": 5}]}, "turns[0].text"),
    (AIPERF, {"session_id": "s", "turns": [{"text": "a", "delay": -1}]}, "delay"),
    (AIPERF, {"session_id": "s", "turns": [{"input_length": 99_999_999}] * 2}, "turns[1]"),
    (BAILIAN, {**GOOD_CHAT, "input_length": 0}, "input_length"),
    (BAILIAN, {**GOOD_CHAT, "timestamp": "now"}, "timestamp"),
    (BAILIAN, {**GOOD_CHAT, "hash_ids": ["x"]}, "hash_ids"),
    (BAILIAN, {**GOOD_CHAT, "hash_ids": [1]}, "hash_ids: 1 for 40 tokens: there are 3 blocks of 16 tokens"),
    (BAILIAN, {**GOOD_CHAT, "hash_ids": [1, 2, 3, 4]}, "hash_ids: 4 for 40 tokens"),
    (AGENTIC, request("", 1, 1), "request_id"),
    (AGENTIC, request("a", 1, 1, "absent"), "wait_for: 'absent'"),
    (AGENTIC, request("a", 1, 1, "a"), "wait_for: 'a'"),
    (AGENTIC, {**request("a", 1, 1), "wait_for": "b"}, "wait_for"),
    (AGENTIC, request("a", 1, 1, hash_ids=[1.5]), "hash_ids"),
    (AGENTIC, request("a", 1, 1, hash_ids=[1, 2, 3]), "hash_ids: 3 for 1 tokens"),
    (AGENTIC, request("a", 1, 1, tool_wait_ms="long"), "tool_wait_ms"),
    (AGENTIC, request("a", 1, 1, tool_events=[{"tool_class": 1}]), "tool_class"),
]


@pytest.mark.parametrize(("form", "row", "named"), FAULTS)
def test_a_fault_names_its_field_and_line(form: Format, row: Any, named: str) -> None:
    """A row that cannot be used is a fault in words at its line; the rows around it are read."""
    good = {
        AIPERF.name: {"session_id": "g", "turns": [{"text": "a"}]},
        BAILIAN.name: {**GOOD_CHAT, "chat_id": 77},
        AGENTIC.name: request("g", 5, 5),
    }[form.name]
    found = items(form, good, row)
    faults = [(number, item) for number, item in found if isinstance(item, str)]
    assert len(faults) == 1 and faults[0][0] == 2 and named in faults[0][1]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("form", "row", "named"), [(BAILIAN, GOOD_CHAT, "chat_id: 1"), (AGENTIC, request("a", 1, 1), "'a'")]
)
def test_a_row_that_was_there_is_a_fault(form: Format, row: Any, named: str) -> None:
    """The same id twice is a fault of the second row."""
    (number, item) = next(pair for pair in items(form, row, row) if isinstance(pair[1], str))
    assert number == 2 and isinstance(item, str) and named in item


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 12),
            st.integers(1, 200),
            st.integers(0, 50),
            st.lists(st.integers(0, 3), max_size=12),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_chain_gives_sound_sessions(rows: list[tuple[int, int, int, list[int]]]) -> None:
    """Whatever rows continue and whatever they hash, sessions are sound and hold every row once."""
    chats = [
        chat(n, parent, n, prompt, out, (ids * 13)[: prompt // 16])
        for n, (parent, prompt, out, ids) in enumerate(rows)
    ]
    assert sum(len(s.rounds) for s in sessions(BAILIAN, *chats)) == len(rows)
    waits = [
        request(
            str(n),
            prompt,
            out,
            *([str(parent)] if 0 <= parent < n else []),
            hash_ids=(ids * 25)[: prompt // 8],
        )
        for n, (parent, prompt, out, ids) in enumerate(rows)
    ]
    found = sessions(AGENTIC, *waits)
    assert sum(len(s.rounds) for s in found) == len(rows)
    by_id = {s.session_id: s for s in found}
    assert all(1 <= s.after_round <= len(by_id[s.parent].rounds) for s in found if s.parent is not None)


def test_formats_are_told_by_their_first_row() -> None:
    """Each first row is known by its own format and by neither of the others."""
    first = {
        AIPERF.name: {"session_id": "g", "turns": []},
        BAILIAN.name: GOOD_CHAT,
        AGENTIC.name: request("g", 5, 5),
    }
    for form in (AIPERF, BAILIAN, AGENTIC):
        assert [name for name, row in first.items() if form.matches(row)] == [form.name]
        assert not form.matches({"session_id": "s", "input_length": 5, "hash_ids": [], "timestamp": 0})
