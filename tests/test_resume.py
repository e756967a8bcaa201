"""Which answers may go on elsewhere, and the seam: with a detokeniser that holds back text as SGLang's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.base import Chunk, Usage
from antiphon.scheduler.resume import Diverged, Said, is_greedy, is_sure, why_not

# fmt: off
VOCABULARY = [b"a", b"bc", b" ", b" d", b"\n", b"\xc3", b"\xa9", b" \xe2", b"\x82", b"\xac", b"x\xe4",
              b"\xbd\xa0", "好".encode(), "你 ".encode(), b"\xff", b"", b".\xf0\x9f", b"\x98\x80"]
# fmt: on
"""Of a byte-level tokenizer: halves of characters, words with halves, special tokens without text."""
CONTEXT = 5
"""Ids before the first new one that SGLang decodes with it."""


def decoded(ids: list[int]) -> str:
    return b"".join(VOCABULARY[token] for token in ids).decode(errors="replace")


def printable(text: str) -> str:
    """As SGLang's `find_printable_text`: what may be shown of text that is not complete."""
    if text.endswith("\n"):
        return text
    if text and "\u4e00" <= text[-1] <= "\u9fff":
        return text
    if len(text) > 1 and "\u4e00" <= text[-2] <= "\u9fff":
        return text[:-1]
    return text[: text.rfind(" ") + 1]


def pieces(prompt: list[int], output: list[int]) -> Iterator[str]:
    """The text of each event, a token each, as SGLang's detokeniser finds it."""
    ids = prompt[-CONTEXT:]
    surround, read, shown = 0, len(ids), 0
    for number, token in enumerate(output):
        ids.append(token)
        text = decoded(ids[surround:])[len(decoded(ids[surround:read])) :]
        last = number == len(output) - 1
        if last or (text and not text.endswith("\ufffd")):
            yield text[shown:]
            surround, read, shown = read, len(ids), 0
        else:
            part = printable(text)
            yield part[shown:]
            shown = max(shown, len(part))


def chunks(prompt: list[int], output: list[int], chat: bool, ids_come: bool, step: int) -> list[Chunk]:
    """A whole stream, with `step` tokens to an event."""
    found = []
    texts = list(pieces(prompt, output))
    if chat:
        found.append(_chunk({"role": "assistant", "content": ""}, chat))
    for start in range(0, len(output), step):
        text, ids = "".join(texts[start : start + step]), tuple(output[start : start + step])
        end = "length" if start + step >= len(output) else None
        delta = {"content": text} if chat else {"text": text}
        found.append(_chunk(delta, chat, ids if ids_come else (), end))
    if not ids_come:
        found.append(Chunk(None, tuple(output)))
    usage = Usage(len(prompt), len(output), 0)
    told = {"prompt_tokens": len(prompt), "completion_tokens": len(output)}
    return [*found, Chunk({"choices": [], "usage": told}, usage=usage)]


def _chunk(delta: dict[str, Any], chat: bool, ids: tuple[int, ...] = (), end: str | None = None) -> Chunk:
    part = {"delta": delta} if chat else delta
    return Chunk({"choices": [{"index": 0, **part, "finish_reason": end}], "usage": None}, ids, end)


tokens = st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=1, max_size=24)


@given(tokens, tokens, st.booleans(), st.booleans(), st.lists(st.integers(1, 30), max_size=4), st.data())
def test_a_stream_of_parts_is_that_of_the_whole(
    prompt: list[int], output: list[int], chat: bool, ids_come: bool, breaks: list[int], data: st.DataObject
) -> None:
    """However often it breaks, at whatever event and with whatever steps: the client sees it once."""
    said, shown = Said(chat), []
    for at in [*breaks, None]:
        kept = output[: said.kept_ids]
        step = data.draw(st.integers(1, 3))
        stream = chunks([*prompt, *kept], output[len(kept) :], chat, ids_come, step)
        said.begin()
        lagging = at is not None and data.draw(st.booleans())  # the last one finds no room, and is lost
        for number, chunk in enumerate(stream[:at], start=1):
            rest = said.rest(chunk, "d0")
            if not (lagging and number == at):
                shown.append(rest)
                said.sent(rest)
        said.cut(len(output))
    texts, ends, roles, usages = [], [], 0, []
    for chunk in shown:
        for choice in (chunk.data or {}).get("choices", ()):
            delta = choice["delta"] if chat else choice
            texts.append(delta.get("content" if chat else "text") or "")
            roles += "role" in delta
            if choice["finish_reason"]:
                ends.append(choice["finish_reason"])
        usages += [chunk.usage] if chunk.usage is not None else []
    assert "".join(texts) == "".join(pieces(prompt, output))
    assert [token for chunk in shown for token in chunk.token_ids] == output == said.ids
    assert ends == ["length"] and roles == chat
    assert usages[-1] == Usage(len(prompt), len(output), 0)


@given(tokens, tokens)
def test_the_detokeniser_of_these_tests_loses_nothing(prompt: list[int], output: list[int]) -> None:
    """What it shows piece by piece is the text, where that does not hang on the ids before."""
    text = decoded(output)
    if decoded([*prompt[-CONTEXT:], *output]) == decoded(prompt[-CONTEXT:]) + text:
        assert "".join(pieces(prompt, output)) == text


def test_what_comes_out_otherwise_is_an_error() -> None:
    """Another text, or the same text of other tokens: nothing of it is shown, and it is not tried again."""
    for ids, text in (((1,), "xy"), ((2,), "ab")):
        said = Said(chat=False)
        said.begin()
        said.sent(said.rest(_chunk({"text": "ab"}, False, (1,)), "d0"))
        said.cut(1)
        said.begin()
        with pytest.raises(Diverged, match="d1"):
            said.rest(_chunk({"text": text}, False, ids), "d1")
        assert said.odd


def test_one_token_is_left_to_generate() -> None:
    """An answer whose last token had come without a reason to end goes on from the one before."""
    said = Said(chat=False)
    said.begin()
    for token in (1, 2, 3):
        said.sent(said.rest(_chunk({"text": "ab"}, False, (token,)), "d0"))
    said.cut(3)
    assert said.kept_ids == 2 and said.kept_chars == 4
    said.cut(9)
    assert said.kept_ids == 3


@pytest.mark.parametrize(("last", "sure"), [("a", True), ("\n", True), (" ", False), ("好", False)])
def test_text_that_may_be_held_back_is_no_seam(last: str, sure: bool) -> None:
    assert is_sure(last) is sure


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0, "max_tokens": 5, "seed": 1, "logit_bias": {"3": 1.0}},
        {"temperature": 0.0, "n": 1, "stop": [], "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        {"top_k": 1, "temperature": 0.7, "logprobs": False, "tools": [], "tool_choice": "none"},
        {"temperature": 0.7, "seed": 0},
        {"temperature": 0, "response_format": {"type": "text"}, "stop_token_ids": [3], "messages": [{}]},
    ],
)
def test_plain_answers_may_go_on(body: dict[str, Any]) -> None:
    assert why_not(body) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("stop", "x"), ("stop", ["x"]), ("stop_regex", "x"), ("logprobs", True), ("logprobs", 0),
        ("logprobs", 1), ("top_logprobs", 2), ("echo", True), ("frequency_penalty", 0.1),
        ("presence_penalty", -1.0), ("repetition_penalty", 1.1), ("min_tokens", 3),
        ("tools", [{}]), ("tool_choice", "required"), ("response_format", {"type": "json_object"}),
        ("regex", "a"), ("ebnf", "a"), ("json_schema", "{}"), ("custom_params", {}),
        ("return_token_ids", True), ("separate_reasoning", False), ("made_up", 1),
    ],
)  # fmt: skip
def test_answers_with_a_state_may_not(name: str, value: Any) -> None:
    """Whatever needs more than the tokens, and whatever is not known."""
    assert name in why_not({"temperature": 0, name: value})


@pytest.mark.parametrize("body", [{}, {"temperature": 0.1}, {"top_k": 2}, {"temperature": None}])
def test_chance_may_not(body: dict[str, Any]) -> None:
    assert why_not(body) and not is_greedy(body)
