"""Scripted answers of the simulated engine: text, tool calls, sessions, lengths."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from antiphon.engines.base import EngineError
from antiphon.engines.scripts import Script, ScriptLine, load_script
from antiphon.engines.simulated_request import expected_tokens
from tests.simulated_helpers import (
    FAST,
    answer,
    engine,
    make_prompt,
    make_request,
    make_rid,
    post,
)

CHAT = "/v1/chat/completions"


def write_script(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_script_answers_with_text_and_tool_calls(tmp_path: Path) -> None:
    """A scripted tool call streams as SGLang's parsers would: name first, then fragments of its arguments."""
    arguments = '{"query": "weather in Zürich", "days": 3}'
    script = write_script(
        tmp_path / "script.jsonl",
        {"text": "Let me look that up.", "tool_calls": [{"name": "search", "arguments": arguments}]},
        {"text": "It rains.", "finish_reason": "length"},
    )

    async def main() -> None:
        async with engine(replace(FAST, script=script)) as (_, adapter):
            prompt = make_prompt("tools", 30)
            called = await answer(adapter, make_request(prompt, 500, path=CHAT))
            said = await answer(adapter, make_request(prompt, 500, path=CHAT))
            free = await answer(adapter, make_request(prompt, 7, path=CHAT))
        assert called.finish_reason == "tool_calls"
        deltas = [c.data["choices"][0]["delta"] for c in called.chunks if c.data and c.data["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look that up."
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert calls[0]["function"] == {"name": "search", "arguments": ""}
        assert calls[0]["id"] and not any(call["id"] for call in calls[1:])
        assert len(calls) > 3
        assert "".join(call["function"]["arguments"] for call in calls) == arguments
        assert len(called.token_ids) == len(deltas) - 2, "one token per piece; role and finish have none"
        assert said.finish_reason == "length"
        assert free.token_ids == expected_tokens(prompt, 7, 512), "used up: hashed tokens again"

    asyncio.run(main())


def test_tool_call_that_is_cut_ends_by_length(tmp_path: Path) -> None:
    """A tool call that did not come to its end is not reported as one."""
    call = {"name": "search", "arguments": '{"query": "a long question"}'}
    script = write_script(tmp_path / "script.jsonl", {"tool_calls": [call]})

    async def main() -> None:
        async with engine(replace(FAST, script=script)) as (_, adapter):
            got = await answer(adapter, make_request(make_prompt("cut call", 30), 3, path=CHAT))
            assert got.finish_reason == "length"

    asyncio.run(main())


def test_script_lines_go_to_their_sessions(tmp_path: Path) -> None:
    """A session gets its own lines in order and only then the common ones; prefills take none."""
    script = write_script(
        tmp_path / "script.jsonl",
        {"session_id": "s", "token_ids": [7, 8, 9]},
        {"token_ids": [1]},
        {"session_id": "s", "token_ids": [10]},
    )

    async def main() -> None:
        async with engine(replace(FAST, script=script)) as (_, adapter):
            prompt = make_prompt("sessions", 30)
            rid = make_rid()
            await adapter.prefill(prompt, rid, session_id="s", cache_salt=None, deadline_s=5.0)
            got = [
                (await answer(adapter, make_request(prompt, 5, session_id=session))).token_ids
                for session in ("s", "t", "s")
            ]
            assert got == [(7, 8, 9), (1,), (10,)]

    asyncio.run(main())


def test_script_line_that_was_aborted_is_said_again(tmp_path: Path) -> None:
    """The retry of an answer that did not come to its end gets the same line."""
    script = write_script(tmp_path / "script.jsonl", {"token_ids": [5, 6]}, {"token_ids": [7]})

    async def main() -> None:
        async with engine(replace(FAST, script=script)) as (simulated, adapter):
            await post(simulated.record, "/antiphon/faults", {"fault": "abort"})
            prompt = make_prompt("again", 30)
            with pytest.raises(EngineError):
                await answer(adapter, make_request(prompt, 5))
            assert (await answer(adapter, make_request(prompt, 5))).token_ids == (5, 6)

    asyncio.run(main())


def test_script_is_cut_at_max_tokens(tmp_path: Path) -> None:
    """A scripted answer longer than the client allows ends by length."""
    script = write_script(tmp_path / "script.jsonl", {"text": "one two three four", "tokens": 8})

    async def main() -> None:
        async with engine(replace(FAST, script=script)) as (_, adapter):
            got = await answer(adapter, make_request(make_prompt("cut", 30), 4))
            texts = [c.data["choices"][0]["text"] for c in got.chunks if c.data and c.data["choices"]]
            assert (got.finish_reason, len(got.token_ids), "".join(texts)) == ("length", 4, "one two")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"txt": "x"}', "txt"),
        ('{"tokens": 0}', "at least 1"),
        ('{"tokens": 3, "token_ids": [1]}', "not both"),
        ('{"token_ids": []}', "non-empty"),
    ],
)
def test_bad_script_names_its_line(tmp_path: Path, line: str, says: str) -> None:
    """A script that cannot be read is refused at the start, with file, line and reason."""
    path = tmp_path / "script.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=says) as caught:
        load_script(path)
    assert "line 2" in str(caught.value)


def test_script_length() -> None:
    """Length of an answer: its ids, else what it says, else a token per piece, never 0."""
    assert ScriptLine(token_ids=(1, 2, 3)).output_tokens == 3
    assert ScriptLine(text="a b", tokens=9).output_tokens == 9
    assert ScriptLine(text="a b").output_tokens == 2
    assert ScriptLine().output_tokens == 1


def test_script_lines_for_sessions_by_the_beginning_of_their_ids() -> None:
    """Each such session gets all of the lines; a session with lines of its own has those."""
    script = Script([ScriptLine(text=text, session_id="s/*") for text in ("a", "b")] + [ScriptLine(text="c")])
    taken = [script.take(session_id) for session_id in ("s/1", "s/2", "s/1", "s", "s/2", "s/1")]
    assert [line and line.text for line in taken] == ["a", "a", "b", "c", "b", None]
    last = taken[4]
    assert last is not None
    script.give_back(last)
    again = script.take("s/2")
    assert again is not None and again.text == "b"
