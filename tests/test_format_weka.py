"""Weka documents: main thread and sub-agents, what was kept, and the real files against their digest."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from antiphon.traces.format_weka import FORMAT
from antiphon.traces.formats import Line, ReadOptions
from antiphon.traces.readers import read_trace
from antiphon.traces.schema import SessionTrace, session_fault


def call(t: float, prompt: int, out: int, ids: list[int], **fields: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": prompt, "out": out, "hash_ids": ids, **fields}


def document(*requests: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "d", "block_size": 64, "hash_id_scope": "local", "requests": list(requests), **fields}


def read_all(raw: dict[str, Any] | bytes, share_system: bool = False) -> list[SessionTrace | str]:
    text = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    return [item for _, item in FORMAT.read(iter([Line(1, text)]), ReadOptions(share_system=share_system))]


def sessions(raw: dict[str, Any], share_system: bool = False) -> list[SessionTrace]:
    found = [item for item in read_all(raw, share_system) if isinstance(item, SessionTrace)]
    assert found and not [fault for session in found if (fault := session_fault(session))]
    return found


def fault(raw: dict[str, Any] | bytes) -> str:
    (item,) = read_all(raw)
    assert isinstance(item, str)
    return item


def test_rounds_take_lengths_gaps_and_tools() -> None:
    """A gap is start-to-start less the call's time, never negative; no answer is shorter than a token."""
    (session,) = sessions(
        document(
            call(0.0, 200, 30, [1, 2, 3], api_time=2.5, input_types=["text"]),
            call(10.0, 300, 0, [1, 2, 3, 4], type="s", api_time=9.0, input_types=["tool_result"]),
            call(12.0, 400, 7, [1, 2, 3, 4, 5, 6]),
            call(15.0, 500, 7, [1, 2, 3, 4, 5, 6, 7]),
        )
    )
    assert session.session_id == "d" and session.start_s is None and session.parent is None
    assert [turn.prompt_tokens for turn in session.rounds] == [200, 300, 400, 500]
    assert [turn.output_tokens for turn in session.rounds] == [30, 1, 7, 7]
    assert [turn.gap_s for turn in session.rounds] == [0.0, 7.5, 0.0, 3.0]
    assert [turn.tool for turn in session.rounds] == ["", "tool", "", ""]


@pytest.mark.parametrize(
    ("ids", "prompt", "kept"),
    [
        ([1, 2, 3, 9], 300, 240),  # all whole blocks of the prompt: the answer follows
        ([1, 2, 9, 9], 300, 128),  # compaction
        ([9, 9, 9, 9], 300, 0),
        ([1, 2, 3], 230, 200),  # the answer does not fit: it was not sent again
        ([1, 2, 3], 240, 200),  # nor does one that leaves no room for a new token
        ([1, 2, 3], 195, 194),  # a round brings at least a token
    ],
)
def test_kept_is_the_shared_prefix_of_the_hashes(ids: list[int], prompt: int, kept: int) -> None:
    """Kept is counted in shared leading blocks, and in the answer where the whole prompt is kept."""
    (session,) = sessions(document(call(0, 200, 40, [1, 2, 3]), call(9, prompt, 5, ids)))
    assert session.rounds[1].kept_tokens == kept


def nested(base: float) -> dict[str, Any]:
    inner = [call(base, 100, 5, [70], api_time=1.0), call(base + 4, 200, 5, [70, 71, 72])]
    deeper = {"type": "subagent", "t": base, "requests": [call(base, 90, 1, [80])]}
    return document(
        call(0.0, 200, 30, [1, 2, 3], api_time=2.5),
        {"type": "subagent", "t": 9.0, "agent_id": "agent_001", "requests": [inner[0], deeper, inner[1]]},
        {"type": "subagent", "t": 9.0, "status": "lost"},
        call(20.0, 300, 1, [1, 2, 3, 4]),
        {"type": "subagent", "t": 30.0, "requests": [call(base, 80, 1, [90])]},
    )


def test_sub_agents_are_sessions_after_the_round_before_them() -> None:
    """A sub-agent's id counts within its thread, its parent is that thread; one without requests is none."""
    found = sessions(nested(0.0))
    assert [(s.session_id, s.parent, s.after_round, len(s.rounds)) for s in found] == [
        ("d", None, 0, 2), ("d/1", "d", 1, 2), ("d/1/1", "d/1", 1, 1), ("d/3", "d", 2, 1),
    ]  # fmt: skip
    assert found[1].rounds[1].gap_s == 3.0 and found[1].rounds[1].kept_tokens == 105


def test_nested_times_may_be_relative_or_absolute() -> None:
    """Counted from the document's start or from the sub-agent's, nested times give the same sessions."""
    assert sessions(nested(0.0)) == sessions(nested(9.0))


def test_a_system_prompt_is_shared_only_if_asked_for() -> None:
    """Threads of equal tool and system lengths get one prefix id, no longer than the first prompt."""
    raw = document(
        call(0.0, 200, 30, [1, 2, 3]),
        {
            "type": "subagent",
            "t": 1.0,
            "tool_tokens": 100,
            "system_tokens": 50,
            "requests": [call(0, 90, 1, [7])],
        },
        {"type": "subagent", "t": 1.0, "requests": [call(0, 90, 1, [8])]},
        tool_tokens=100,
        system_tokens=50,
    )
    assert all(s.shared_prefix == "" and s.shared_tokens == 0 for s in sessions(raw))
    main, child, bare = sessions(raw, share_system=True)
    assert main.shared_prefix == child.shared_prefix != ""
    assert (main.shared_tokens, child.shared_tokens) == (150, 90)
    assert (bare.shared_prefix, bare.shared_tokens) == ("", 0)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (document(call(0, 10, 1, []), {**call(1, 10, 1, []), "in": "ten"}), "$.requests[1].in"),
        (document({"type": "n", "t": 0.0, "in": 5, "out": 1}), "hash_ids"),
        (document({**call(0, 10, 1, []), "type": "x"}), "type"),
        (document(call(0, 0, 1, [])), "$.requests[0].in"),
        (document(call(0, 10, 1, []), block_size=0), "block_size"),
        (document(call(0, 10, 1, [], api_time=-1.0)), "api_time"),
        (document({"type": "subagent", "t": 0.0, "requests": [call(0, 5, 1, [])]}), "requests"),
        (document(), "requests"),
        (document(call(0, 200, 1, [1])), "requests[0].hash_ids: 1 for 200 tokens: there are 4 blocks of 64"),
        (document(call(0, 128, 1, [1, 2, 3])), "requests[0].hash_ids: 3 for 128 tokens"),
        (
            document(call(0, 9, 1, []), {"type": "subagent", "requests": [call(0, 64, 1, [])]}),
            "requests[1].requests[0].hash_ids: 0 for 64 tokens",
        ),
        (b'{"id": "d", "requests": [', "truncated"),
        (b'{"id":"d","requests":' + b'[{"type":"subagent","requests":' * 5000 + b"[]", "recursion"),
    ],
)
def test_a_fault_names_its_field(raw: dict[str, Any] | bytes, named: str) -> None:
    """A document that cannot be used is one fault, in words, with the field's name; nothing is raised."""
    assert named in fault(raw)


def test_the_first_document_is_told_from_other_formats() -> None:
    """A Weka document is known by its id, requests and blocks; our own form and rounds files are not it."""
    assert FORMAT.kind == "document" and FORMAT.matches(document())
    assert not FORMAT.matches({"session_id": "a", "rounds": []})
    assert not FORMAT.matches({"id": "a", "requests": []})


# ---------------------------------------------------------------- the real files


def weka_folder() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    folder = Path(os.environ.get("ANTIPHON_TRACES") or beside) / "weka"
    if not (folder / "weka.tar.xz").exists():
        pytest.skip("no weka.tar.xz: set ANTIPHON_TRACES to the folder of the shared traces")
    return folder


def originals(folder: Path) -> Iterator[bytes]:
    with tarfile.open(folder / "weka.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".json") else None
            if file is not None:
                yield file.read()


def test_real_documents_agree_with_their_digest() -> None:
    """The main threads of 173 originals give exactly the rounds that were derived from them independently."""
    folder = weka_folder()
    digest = {session.session_id: session.rounds for session in read_trace(folder / "rounds.jsonl.gz")}
    options = ReadOptions()
    found = [s for raw in originals(folder) for _, s in FORMAT.read(iter([Line(1, raw)]), options)]
    main = {s.session_id: s.rounds for s in found if isinstance(s, SessionTrace) and s.parent is None}
    strip = {
        name: tuple((r.prompt_tokens, r.output_tokens, r.kept_tokens, r.gap_s) for r in rounds)
        for name, rounds in main.items()
    }
    assert sum(map(len, main.values())) == 6719 and len(main) == 173 and len(found) == 173 + 9
    assert strip == {
        name: tuple((r.prompt_tokens, r.output_tokens, r.kept_tokens, r.gap_s) for r in rounds)
        for name, rounds in digest.items()
    }
