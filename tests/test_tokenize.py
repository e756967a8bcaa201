"""/tokenize and /detokenize: the ids that a round would be given, and back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_helpers import CHAT, CHAT_PATH, TEXT_PATH, Start, starter


@pytest.fixture
def gateway(tiny_model_dir: Path) -> Start:
    return starter(tiny_model_dir)


def test_ids_are_those_of_a_round(gateway: Start) -> None:
    """A text's and a chat's, tools included; the window comes along."""
    tool = {"type": "function", "function": {"name": "look"}}
    chat = {**CHAT, "tools": [tool]}

    async def scenario() -> None:
        async with gateway() as g:
            for path, body in ((TEXT_PATH, {"model": "tiny", "prompt": "hi é"}), (CHAT_PATH, chat)):
                await g.post(path, body)
                for route in ("/tokenize", "/v1/tokenize"):
                    response, answer = await g.post(route, body)
                    assert response.status == 200
                    assert answer["tokens"] == list(g.runner.requests[-1].prompt.ids)
                    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 8192

    asyncio.run(scenario())


def test_there_and_back(gateway: Start) -> None:
    """One text, or several; special tokens as asked."""

    async def scenario() -> None:
        async with gateway() as g:
            texts = ["one", "two é 你好", ""]
            _, made = await g.post(
                "/tokenize", {"model": "tiny", "prompt": texts, "add_special_tokens": False}
            )
            assert made["count"] == [len(ids) for ids in made["tokens"]]
            _, back = await g.post("/detokenize", {"model": "tiny", "tokens": made["tokens"]})
            assert back["text"] == back["prompt"] == texts
            _, one = await g.post("/v1/detokenize", {"model": "tiny", "tokens": made["tokens"][1]})
            assert one["text"] == texts[1]
            _, chat = await g.post("/tokenize", CHAT)
            shown = {}
            for skip in (True, False):
                body = {"model": "tiny", "tokens": chat["tokens"], "skip_special_tokens": skip}
                shown[skip] = (await g.post("/detokenize", body))[1]["text"]
            assert len(shown[True]) < len(shown[False]) and "hi" in shown[True]

    asyncio.run(scenario())


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {"model": "tiny"}, "prompt"),
    ("/tokenize", {"model": "tiny", "prompt": "a", "messages": []}, "prompt"),
    ("/tokenize", {"model": "tiny", "messages": []}, "messages"),
    ("/tokenize", {"model": "tiny", "prompt": ["a"] * 257}, "prompt"),
    ("/tokenize", {**CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
    ("/detokenize", {"model": "tiny", "tokens": [10**6]}, "tokens"),
    ("/detokenize", {"model": "tiny", "tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {"model": "tiny", "tokens": [1, [2]]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_a_wrong_field_is_named(gateway: Start, path: str, body: dict[str, Any], param: str) -> None:
    async def scenario() -> None:
        async with gateway() as g:
            response, error = await g.post(path, body)
            assert (response.status, error["error"]["param"]) == (400, param)
            assert (await g.post(path, body | {"model": "nobody"}))[0].status in (400, 404)

    asyncio.run(scenario())
