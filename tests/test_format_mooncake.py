"""Mooncake's traces: recovered sessions, both forms with sessions, block sizes, shared beginnings; Azure."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from antiphon.traces.format_mooncake import FORMAT as MOONCAKE
from antiphon.traces.format_mooncake_sessions import FORMAT as SESSIONS
from antiphon.traces.formats import Format, Line, ReadOptions
from antiphon.traces.readers import BadLines, read_trace
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError, session_fault
from antiphon.traces.shared_blocks import BlockSize, shared_beginnings
from tests.test_readers import shared_trace

Form = Literal["auto", "cumulative", "delta"]


def row(at_ms: float, prompt: int, output: int, ids: list[int], **more: Any) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": ids, **more}


def turn(session_id: Any, prompt: int, output: int, ids: list[int], **more: Any) -> dict[str, Any]:
    named = {"session_id": session_id, "input_length": prompt, "output_length": output, **more}
    return named | ({"hash_ids": ids} if ids else {})


def items(
    form: Format, *rows: Any, options: ReadOptions | None = None
) -> list[tuple[int, SessionTrace | str]]:
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    lines = iter([Line(number, text) for number, text in enumerate(texts, 1)])
    return [(line.number, item) for line, item in form.read(lines, options or ReadOptions())]


def sessions(form: Format, *rows: Any, as_form: Form = "auto") -> list[SessionTrace]:
    found = [item for _, item in items(form, *rows, options=ReadOptions(form=as_form))]
    assert not [item for item in found if isinstance(item, str)]
    return [item for item in found if isinstance(item, SessionTrace)]


def ids(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


# ---------------------------------------------------------------- without sessions


def test_a_request_continues_the_one_whose_last_full_block_it_has() -> None:
    """Later prompts that have an earlier one's last full block are its rounds; gaps are between arrivals."""
    first, second = sessions(
        MOONCAKE,
        row(1000, 1200, 100, [0, 1, 2]),
        row(2000, 1100, 7, [0, 8, 9]),
        row(4500, 1600, 0, [0, 1, 3, 4]),
        row(9000, 2200, 5, [0, 1, 3, 5, 6]),
    )
    assert first.session_id == "0" and first.start_s == 0.0
    assert first.rounds == (
        RoundTrace(1200, 100),
        RoundTrace(1600, 1, kept_tokens=1300, gap_s=3.5),
        RoundTrace(2200, 5, kept_tokens=1601, gap_s=4.5),
    )
    assert (second.session_id, second.start_s, second.rounds) == ("1", 1.0, (RoundTrace(1100, 7),))


def test_one_common_block_makes_no_session() -> None:
    """The system prompt of one block, shared by all, links nothing: it is their shared beginning."""
    found = sessions(MOONCAKE, row(0, 700, 5, [0, 1]), row(1, 1300, 5, [0, 2, 3]), row(2, 600, 5, [0, 4]))
    assert [len(session.rounds) for session in found] == [1, 1, 1]
    assert [session.shared_tokens for session in found] == [512, 512, 512]
    assert len({session.shared_prefix for session in found}) == 1


def test_prompt_and_output_of_a_parent_have_to_fit() -> None:
    """A prompt shorter than prompt and output before it, by more than a template's 64, continues nothing."""
    rows = [row(0, 1100, 500, [0, 1, 2]), row(1, 1535, 5, [0, 1, 9])]
    assert len(sessions(MOONCAKE, *rows)) == 2
    rows[1] |= {"input_length": 1536}
    assert len(sessions(MOONCAKE, *rows)) == 1


def test_the_deepest_parent_wins_then_one_without_a_child_then_the_longest() -> None:
    """Of possible parents: most shared blocks; of these one not yet continued; of these the longest."""
    deep = sessions(
        MOONCAKE,
        row(0, 1100, 5, [0, 1, 2]),
        row(
            1,
            1700,
            5,
            [0, 1, 7, 8],
        ),
        row(2, 2100, 5, [0, 1, 7, 8, 9]),
    )
    assert [[turn.prompt_tokens for turn in each.rounds] for each in deep] == [[1100, 1700, 2100]]
    same = sessions(
        MOONCAKE,
        row(0, 1100, 100, [0, 1, 2]),
        row(1, 1110, 200, [0, 1, 3]),
        row(2, 1400, 99, [0, 1, 4]),
        row(3, 1401, 99, [0, 1, 5]),
        row(4, 1402, 99, [0, 1, 6]),
    )
    prompts = [[turn.prompt_tokens for turn in each.rounds] for each in same]
    assert prompts == [[1100, 1401], [1110, 1400, 1402]]


def test_requests_are_joined_in_order_of_arrival() -> None:
    """Rows out of order are sorted by time; times count from the first arrival."""
    (found,) = sessions(MOONCAKE, row(9_000, 1700, 5, [0, 1, 2, 3]), row(5_000, 1100, 5, [0, 1, 4]))
    assert [each.prompt_tokens for each in found.rounds] == [1100, 1700]
    assert found.start_s == 0.0 and found.rounds[1].gap_s == 4.0


def test_rows_that_cannot_be_are_faults() -> None:
    """Ids that do not go with the length, or are no ids, are bad lines; the rest is read."""
    found = items(
        MOONCAKE,
        row(0, 1100, 5, [0, 1, 2]),
        row(1, 1100, 5, [0, 1]),
        row(2, 1700, 5, [0, 1, 2, -1]),
        row(-1, 5, 5, [1]),
        b"{",
    )
    bad = {number: item for number, item in found if isinstance(item, str)}
    assert sorted(bad) == [2, 3, 4, 5]
    assert "2 hash_ids for 1100 tokens" in bad[2] and "whole number" in bad[3] and "timestamp" in bad[4]
    assert sum(isinstance(item, SessionTrace) for _, item in found) == 1


def test_conversation_trace_agrees_with_its_derived_sessions() -> None:
    """Mooncake's conversation trace gives the sessions and lengths published with it, and their prefixes."""
    found = list(read_trace(shared_trace("mooncake/conversation_trace.jsonl.gz")))
    derived = list(read_trace(shared_trace("mooncake/conversation_sessions.jsonl.gz")))
    lengths = Counter(len(session.rounds) for session in found)
    assert (len(found), len(found) - lengths[1], sum(len(s.rounds) for s in found)) == (8_130, 1_979, 12_031)
    assert [lengths[rounds] for rounds in range(2, 10)] == [1209, 378, 163, 96, 46, 23, 17, 6]
    assert max(lengths) == 43
    assert lengths == Counter(len(session.rounds) for session in derived)
    ours, theirs = (
        Counter(
            (
                session.start_s,
                *((t.prompt_tokens, t.output_tokens, round(t.gap_s, 2)) for t in session.rounds),
            )
            for session in each
        )
        for each in (found, derived)
    )
    assert (ours & theirs).total() == 8_110, "the other 20 differ in which of equal parents they continue"
    shared = Counter(session.shared_tokens for session in found)
    assert shared[0] == 0 and shared[512] > 7_000


# ---------------------------------------------------------------- with sessions


CUMULATIVE = [
    turn("a", 1100, 50, [1, 2, 3], timestamp=0),
    turn("b", 600, 10, [1, 9], timestamp=2000),
    turn("a", 1300, 20, [1, 2, 4], delay=1500),
    turn("b", 1700, 10, [1, 9, 10, 11], delay_ms=250.0),
]
DELTA = [
    turn("a", 1100, 50, [1, 2, 3], timestamp=0),
    turn("b", 600, 10, [1, 9], timestamp=2000),
    turn("a", 150, 20, [4], delay=1500),
    turn("b", 1090, 10, [10, 11, 12], delay_ms=250.0),
]
WHOLE = {
    "a": (RoundTrace(1100, 50), RoundTrace(1300, 20, kept_tokens=1150, gap_s=1.5)),
    "b": (RoundTrace(600, 10), RoundTrace(1700, 10, kept_tokens=610, gap_s=0.25)),
}


@pytest.mark.parametrize("rows", [CUMULATIVE, DELTA], ids=["cumulative", "delta"])
@pytest.mark.parametrize("grouped", [False, True])
def test_both_forms_give_the_same_sessions(rows: list[dict[str, Any]], grouped: bool) -> None:
    """Whole prompts or only what is new, interleaved or grouped: the same sessions, told apart by content."""
    ordered = sorted(rows, key=lambda each: each["session_id"]) if grouped else rows
    found = sessions(SESSIONS, *ordered)
    assert {session.session_id: session.rounds for session in found} == WHOLE
    assert [session.start_s for session in found] == [0.0, 2.0]
    assert {(session.shared_prefix != "", session.shared_tokens) for session in found} == {(True, 512)}


def test_timestamps_alone_give_gaps_and_order() -> None:
    """Where all rows of a session have a time, they are sorted by it and gaps are arrival to arrival."""
    (found,) = sessions(
        SESSIONS, turn(7, 1300, 9, [1, 2, 3], timestamp=5000), turn(7, 1100, 9, [1, 2, 4], timestamp=3000)
    )
    assert found.session_id == "7" and found.start_s == 0.0
    assert [(each.prompt_tokens, each.gap_s) for each in found.rounds] == [(1100, 0.0), (1300, 2.0)]


def test_starts_that_are_all_the_same_are_not_recorded() -> None:
    """Generated sessions all say time 0: no arrivals, rather than all at once; a time has bounds."""
    found = sessions(SESSIONS, *(turn(name, 600, 9, [1, n], timestamp=0) for n, name in enumerate("ab")))
    assert [session.start_s for session in found] == [None, None]
    *_, late = sessions(SESSIONS, *(turn(name, 9, 9, [], timestamp=1e13 * n) for n, name in enumerate("ab")))
    assert (session_fault(late) or "").startswith("start_s 10000000000.0")


def test_a_compaction_keeps_the_blocks_that_are_shared() -> None:
    """In the cumulative form a prompt that left the previous one's track keeps their common blocks."""
    (found,) = sessions(
        SESSIONS,
        turn("a", 2000, 50, [1, 2, 3, 4]),
        turn("a", 1500, 50, [1, 8, 9]),
        turn("a", 1600, 1, [1, 8, 9, 10]),
    )
    assert [each.kept_tokens for each in found.rounds] == [0, 512, 1550]


@pytest.mark.parametrize(
    "rows",
    [
        [turn("a", 900, 5, []), turn("a", 1000, 5, [])],
        [turn("a", 90, 5, [1]), turn("a", 100, 5, [2])],
        [turn("a", 600, 5, [1, 2]), turn("a", 1100, 5, [1, 2, 3]), turn("a", 1200, 5, [7, 8, 9])],
    ],
    ids=["no ids", "no full block", "both"],
)
def test_a_form_that_cannot_be_told_has_to_be_given(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Undecidable rows are refused in words that name file, a line and the option; with it they are read."""
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TraceError, match=r"t\.jsonl: .*line \d.*--form cumulative or --form delta"):
        list(read_trace(path, BadLines()))
    (delta,) = read_trace(path, options=ReadOptions(form="delta"))
    assert delta.rounds[-1].prompt_tokens == sum(r["input_length"] for r in rows) + 5 * (len(rows) - 1)
    (cumulative,) = read_trace(path, options=ReadOptions(form="cumulative"))
    assert cumulative.rounds[-1].prompt_tokens == rows[-1]["input_length"]


def test_sessions_of_one_round_need_no_form() -> None:
    """Rows that each are a session are the same in both forms."""
    found = sessions(SESSIONS, turn("a", 90, 5, []), turn("b", 80, 5, []))
    assert [session.rounds for session in found] == [(RoundTrace(90, 5),), (RoundTrace(80, 5),)]


def test_a_session_that_grows_beyond_reason_is_a_fault() -> None:
    """Deltas that add up to more tokens than a trace may hold are a bad line, not an impossible session."""
    rows = [turn("a", 60_000_000, 5, []), turn("a", 60_000_000, 5, []), turn("b", 9, 5, [])]
    found = items(SESSIONS, *rows, options=ReadOptions(form="delta"))
    assert [number for number, item in found if isinstance(item, str)] == [2]


def test_aiperf_agentic_code_is_read_whole() -> None:
    """AIPerf's generated sessions are deltas: all is kept, and groups share their 82 first blocks."""
    found = list(read_trace(shared_trace("aiperf_agentic_code/dataset.jsonl.gz")))
    assert (len(found), sum(len(session.rounds) for session in found)) == (1_205, 14_056)
    assert all(turn.kept_tokens == before.total_tokens for s in found for before, turn in pairwise(s.rounds))
    first = found[0]
    assert first.rounds[1] == RoundTrace(42_773 + 335 + 1_855, 1_345, 42_773 + 335, 12.1901)
    shared = Counter((session.shared_prefix, session.shared_tokens) for session in found)
    assert shared.most_common(1)[0][1] > 80 and min(tokens for _, tokens in shared) >= 63 * 512


# ---------------------------------------------------------------- block sizes


@given(st.integers(4, 11), st.lists(st.integers(1, 200_000), min_size=1, max_size=30), st.booleans())
def test_block_size_is_recovered(power: int, prompts: list[int], full_only: bool) -> None:
    """Rows counted in blocks of a size always fit, whether or not the last part of a block is named."""
    tokens = 1 << power
    size = BlockSize()
    counts = [prompt // tokens if full_only else -(-prompt // tokens) for prompt in prompts]
    assert all(size.fits(prompt, count) for prompt, count in zip(prompts, counts, strict=True))
    found = size.tokens()
    named = [prompt // found for prompt in prompts], [-(-prompt // found) for prompt in prompts]
    seen = [place for place, count in enumerate(counts) if count]
    assert any([each[place] for place in seen] == [counts[place] for place in seen] for each in named)
    if max(prompts) > 64 * tokens and not full_only:
        assert found == tokens


def test_a_block_size_that_cannot_be_told_is_refused() -> None:
    """Where no power of two fits and several sizes do, the trace is refused."""
    size = BlockSize()
    assert size.fits(1000, 10)
    with pytest.raises(TraceError, match=r"100 to 111"):
        size.tokens()


def test_other_block_sizes_are_used() -> None:
    """Blocks of 64 tokens are told by their number, and kept prefixes counted in them."""
    (found,) = sessions(
        SESSIONS,
        turn("a", 200, 9, [1, 2, 3, 4]),
        turn("a", 190, 9, [1, 2, 5]),
        turn("a", 300, 9, [1, 2, 5, 6, 7]),
    )
    assert [each.kept_tokens for each in found.rounds] == [0, 128, 199]


# ---------------------------------------------------------------- shared beginnings


def test_the_deepest_group_wins_where_it_saves_more() -> None:
    """Groups that share much have a prefix each; what they share with each other is lost."""
    system = ids(0, 4)
    prompts = [[*system, *ids(100 * group, 9), 1000 * group + n] for group in (1, 2) for n in range(5)]
    found = shared_beginnings(prompts, 512)
    assert {tokens for _, tokens in found} == {13 * 512}
    assert Counter(prefix for prefix, _ in found).most_common() == [(found[0][0], 5), (found[5][0], 5)]


def test_a_pair_does_not_leave_the_crowd_for_a_little_more() -> None:
    """Two sessions that share less behind the fork than there is before it stay with the others."""
    system = ids(0, 10)
    pair = [[*system, 50, 51], [*system, 50, 52]]
    others = [[*system, 60, 61, 90], [*system, 60, 61, 91], [*system, 70]]
    found = shared_beginnings([*pair, *others], 10)
    assert len({prefix for prefix, _ in found}) == 1
    assert [tokens for _, tokens in found] == [100, 100, 120, 120, 100]


def common(one: list[int], other: list[int]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def most_saved(prompts: list[list[int]]) -> int:
    """By trying all groups, each of which follows the prompt of one of its own."""
    if not prompts:
        return 0
    best = 0
    for chosen in range(1 << (len(prompts) - 1)):
        group = [prompts[0], *(p for n, p in enumerate(prompts[1:]) if chosen >> n & 1)]
        rest = [p for n, p in enumerate(prompts[1:]) if not chosen >> n & 1]
        saved = max(sum(common(p, path) for p in group) - len(path) for path in group)
        best = max(best, saved + most_saved(rest))
    return best


SYSTEM = [0, 0, 0, 0, 0, 0]
blocks = st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=7), max_size=6)


@settings(max_examples=200, deadline=None)
@given(blocks)
@example([[*SYSTEM, 1, 2, 2]] * 2 + [[*SYSTEM, 1, 3, 3]] * 2 + [[*SYSTEM, *ids(9, 9)]] * 2)
def test_shared_beginnings_are_true_and_the_best_there_are(prompts: list[list[int]]) -> None:
    """Sessions of one prefix begin alike, and no other choice of prefixes saves more blocks."""
    found = shared_beginnings(prompts, 1)
    by_name: dict[str, list[list[int]]] = {}
    for (name, count), prompt in zip(found, prompts, strict=True):
        assert bool(name) == bool(count) and count <= len(prompt)
        by_name.setdefault(name, []).append(prompt[:count])
    total = 0
    for name, beginnings in by_name.items():
        longest = max(beginnings, key=len)
        assert all(each == longest[: len(each)] for each in beginnings)
        assert not name or len(beginnings) > 1
        total += sum(map(len, beginnings)) - len(longest)
    assert total == most_saved(prompts)


# ---------------------------------------------------------------- Azure


def test_azure_rows_are_sessions_of_one_round(tmp_path: Path) -> None:
    """Rows of the CSV file are sessions that start as long after the first as they were recorded."""
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"\xef\xbb\xbfTIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,0\r\n"
    )
    first, second = read_trace(path)
    assert first == SessionTrace("0", (RoundTrace(4808, 10),), start_s=0.0)
    assert second == SessionTrace("1", (RoundTrace(3180, 1),), start_s=0.052)


def test_azure_faults_name_their_line(tmp_path: Path) -> None:
    """Rows with too few columns, no number, no time or an earlier one are bad lines; columns may be moved."""
    path = tmp_path / "t.csv"
    path.write_text(
        "GeneratedTokens,TIMESTAMP,ContextTokens\n5,2024-05-10 00:00:01+00:00,9\n5\n"
        "x,2024-05-10 00:00:01,9\n5,soon,9\n5,2024-05-10 00:00:00,9\n5,2024-05-10 00:00:02,0\n"
        '"7","2024-05-10 02:00:02+02:00","8"\n'
    )
    bad = BadLines()
    found = list(read_trace(path, bad))
    assert [(s.session_id, s.start_s, s.rounds) for s in found] == [
        ("0", 0.0, (RoundTrace(9, 5),)),
        ("6", 1.0, (RoundTrace(8, 7),)),
    ]
    assert [text.split(": ")[0].rpartition(" ")[2] for text in bad.first] == ["3", "4", "5", "6", "7"]
    assert "generatedtokens 'x' is no number of tokens" in bad.first[1]


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b'a,"TIMESTAMP,ContextTokens,GeneratedTokens', "line 2: 3 columns, the header has 4"),
        (b"caf\xe9,TIMESTAMP,ContextTokens,GeneratedTokens", "line 2: the header was not text"),
    ],
)
def test_odd_headers_are_faults_in_words(tmp_path: Path, header: bytes, fault: str) -> None:
    """A header with an open quote, or that is no text, costs bad lines: nothing else is raised."""
    path = tmp_path / "t.csv"
    path.write_bytes(header + b"\n2023-11-16 18:17:03.9799600,4808,10\n")
    bad = BadLines()
    assert list(read_trace(path, bad)) == []
    assert fault in bad.first[-1]


# ---------------------------------------------------------------- anything

numbers = st.one_of(st.integers(-2, 3000), st.floats(0, 1e9), st.none(), st.just(2**64))
almost = st.fixed_dictionaries(
    {"input_length": st.integers(0, 3000) | numbers, "output_length": st.integers(0, 99) | numbers},
    optional={
        "session_id": st.text(max_size=1) | st.integers(0, 1),
        "hash_ids": st.lists(st.integers(-1, 4), max_size=6) | st.just([2**70]),
        "timestamp": numbers,
        "delay": numbers,
        "delay_ms": numbers,
    },
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([MOONCAKE, SESSIONS]), st.lists(almost, max_size=8), st.sampled_from(["auto", "delta"])
)
def test_any_rows_give_sound_sessions_or_faults(
    form: Format, rows: list[dict[str, Any]], as_form: Form
) -> None:
    """Whatever rows say, every session is sound, ids differ, and only TraceError is raised."""
    try:
        found = [item for _, item in items(form, *rows, options=ReadOptions(form=as_form))]
    except TraceError:
        return
    sound = [item for item in found if isinstance(item, SessionTrace)]
    assert all(session_fault(session) is None for session in sound)
    assert len({session.session_id for session in sound}) == len(sound)
