"""What a simulated engine answers beyond plain text: choices, log probabilities, reasoning, forced JSON."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.scripts import ScriptLine, cut_at_stop
from antiphon.engines.simulated_request import expected_tokens
from antiphon.engines.simulated_schema import forced_line, smallest
from tests.simulated_helpers import FAST, answer, engine, make_prompt, make_request, post

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"q": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["q", "days"]}}}  # fmt: skip


def ask(path: str, body: dict[str, Any], script: Path | None = None) -> tuple[int, Any]:
    """One whole answer."""

    async def main() -> tuple[int, Any]:
        async with engine(replace(FAST, script=script)) as (simulated, _):
            return await post(simulated.record, path, body)

    return asyncio.run(main())


def chat_body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ""}], "input_ids": make_prompt("p", 40), **more}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_choices_differ_and_share_the_prompt(path: str) -> None:
    """Three answers to one prompt: the first is what n = 1 gives, the prompt is computed once."""

    async def main() -> None:
        prompt = make_prompt("choices", 64)
        async with engine() as (simulated, adapter):
            got = await answer(adapter, make_request(prompt, 6, path=path, more={"n": 3}))
            computed = simulated.loop.totals.prefill_uncached_tokens
        texts = {0: "", 1: "", 2: ""}
        ends = []
        for chunk in got.chunks:
            for choice in (chunk.data or {}).get("choices", ()):
                said = choice.get("delta", {}).get("content") if path == CHAT else choice["text"]
                texts[choice["index"]] += said or ""
                ends += [choice["index"]] if choice["finish_reason"] else []
        assert texts[0] == "".join(f" {token}" for token in expected_tokens(prompt, 6, 512))
        assert len(set(texts.values())) == 3
        assert sorted(ends) == [0, 1, 2]
        assert got.token_ids == expected_tokens(prompt, 6, 512), "ids are the first choice's"
        assert computed < 64 + 3 * 17, "the prompt was computed once, then only what no page holds"
        usage = [chunk.usage for chunk in got.chunks if chunk.usage is not None][-1]
        assert usage.completion_tokens == 18 and usage.prompt_tokens == 64

    asyncio.run(main())


def test_logprobs_of_both_routes() -> None:
    """As many as tokens, alternatives as many as asked; an echoed prompt has them too."""
    status, chat = ask(CHAT, chat_body(max_tokens=5, logprobs=True, top_logprobs=3))
    content = chat["choices"][0]["logprobs"]["content"]
    assert status == 200 and len(content) == 5
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0 for entry in content)
    assert "".join(entry["token"] for entry in content) == chat["choices"][0]["message"]["content"]
    status, text = ask(TEXT, {"prompt": [1, 2, 3], "max_tokens": 4, "logprobs": 2, "echo": True})
    logprobs = text["choices"][0]["logprobs"]
    assert status == 200 and text["choices"][0]["text"].startswith(" 1 2 3")
    assert {len(values) for values in logprobs.values()} == {7}
    assert logprobs["token_logprobs"][0] is None and logprobs["token_logprobs"][1] < 0


def test_reasoning_comes_before_the_text(tmp_path: Path) -> None:
    """In deltas of its own, streamed; in the message, whole; counted in the usage."""
    script = tmp_path / "script.jsonl"
    line = json.dumps({"reasoning": "Let me think.", "text": "It is so."})
    script.write_text(f"{line}\n{line}\n")

    async def main() -> None:
        async with engine(replace(FAST, script=script)) as (simulated, adapter):
            got = await answer(adapter, make_request(make_prompt("r", 20), 50, path=CHAT))
            _, whole = await post(simulated.record, CHAT, chat_body(max_tokens=50))
        deltas = [c.data["choices"][0]["delta"] for c in got.chunks if c.data and c.data["choices"]]
        named = [name for d in deltas for name in ("reasoning_content", "content") if d.get(name)]
        assert named == sorted(named, reverse=True), "no text before the reasoning has ended"
        assert "".join(d.get("reasoning_content") or "" for d in deltas) == "Let me think."
        assert "".join(d.get("content") or "" for d in deltas) == "It is so."
        message = whole["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Let me think.", "It is so.")
        assert whole["usage"]["reasoning_tokens"] == 3

    asyncio.run(main())


def test_a_stop_string_cuts_a_scripted_text(tmp_path: Path) -> None:
    """The text ends before it, and the choice says which one it was."""
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"text": "one two END three"}) + "\n")
    _, got = ask(TEXT, {"prompt": [1, 2], "max_tokens": 50, "stop": ["zzz", "END"]}, script)
    choice = got["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("one two ", "stop", "END")


def test_forced_answers() -> None:
    """What a grammar would force is said: JSON of the schema, a call of the tool that must be called."""
    schema = TOOL["function"]["parameters"]  # type: ignore[index]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    _, got = ask(CHAT, chat_body(response_format=wanted))
    jsonschema.validate(json.loads(got["choices"][0]["message"]["content"]), schema)
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        _, got = ask(CHAT, chat_body(tools=[TOOL], tool_choice=choice))
        (call,) = got["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "look" and got["choices"][0]["finish_reason"] == "tool_calls"
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    for bad in (
        {},
        5,
        {"schema": {"type": "object", "properties": 5}},
        {"schema": {"type": "array", "minItems": 10**9}},
    ):
        status, _ = ask(CHAT, chat_body(response_format={"type": "json_schema", "json_schema": bad}))
        assert status == 400, bad
    assert forced_line(None, None, [TOOL], "auto") is None


SCHEMAS = st.recursive(
    st.sampled_from([
        {"type": "string"}, {"type": "string", "minLength": 4}, {"type": "integer", "minimum": 7},
        {"type": "number", "exclusiveMinimum": 2}, {"type": "boolean"}, {"type": "null"},
        {"enum": ["a", 3]}, {"const": {"k": 1}}, {"type": ["string", "null"]}, {}, True,
    ]),
    lambda inner: st.one_of(
        st.builds(lambda item, n: {"type": "array", "items": item, "minItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda several: {"anyOf": several}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda fields: {"type": "object", "properties": fields, "required": list(fields)},
            st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
        ),
    ),
    max_leaves=8,
)  # fmt: skip


@given(SCHEMAS)
def test_the_smallest_value_is_allowed(schema: Any) -> None:
    """Whatever the schema, its value validates."""
    jsonschema.validate(smallest(schema), schema)


def test_recursive_schemas_end() -> None:
    """A list of nodes that hold nodes: the value is finite."""
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
    assert isinstance(smallest({"$ref": "#/$defs/node", "$defs": {"node": node}}), dict)


@given(st.text("ab "), st.lists(st.text("ab", min_size=1, max_size=2), max_size=3))
def test_cutting_ends_before_every_stop(text: str, stops: list[str]) -> None:
    """No stop string is left, and what is left is how the text began."""
    line, matched = cut_at_stop(ScriptLine(text=text), stops)
    assert text.startswith(line.text) and not any(stop in line.text for stop in stops)
    assert (matched is None) == (line.text == text) or text.startswith(line.text + (matched or ""))
