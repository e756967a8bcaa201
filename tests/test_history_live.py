"""Histories by served ids on real SGLang: an answer that tokenises differently hits its KV whole."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions
from tests.conftest import SglangPair
from tests.test_stack import gateway, post

PAIRS = 8
"""Of " th": a space, a t and an h, which the tokenizer would join."""


async def events_of(url: str, body: dict[str, Any]) -> list[bytes]:
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        return [line async for line in answer.content if line.startswith(b"data: ")]


def test_an_answer_that_tokenises_differently_hits_its_kv_whole(
    sglang_pair: SglangPair, valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The model is made to write " th" letter by letter. Its ids stay, for a client that sends all of the
    history and for one that appends; each computes only what is new."""
    tokenizer = PromptTokenizer(tiny_model_dir)
    joined = [tokenizer.encode_rendered(text)[0] for text in (" t", " th")]
    letters = {
        "regex": f"( th){{{PAIRS}}}",
        "logit_bias": {str(token): -100.0 for token in joined},
        "max_tokens": 3 * PAIRS,
        "return_token_ids": True,
    }

    async def run() -> None:
        async with gateway(sglang_pair, valkey_url, tmp_path, tiny_model_dir, "--policy", "local") as url:
            ask = {"role": "user", "content": "what is this?" * 20}
            body = {"model": tiny_model_dir.name, "temperature": 0, "session_id": "letters"}
            status, first = await post(f"{url}/v1/chat/completions", {**body, **letters, "messages": [ask]})
            assert status == 200, first
            reply, output = first["choices"][0]["message"], first["choices"][0]["token_ids"]
            assert reply["content"] == " th" * PAIRS and len(output) == 3 * PAIRS
            assert len(tokenizer.encode_rendered(reply["content"])) == PAIRS
            prompt, messages = first["usage"]["prompt_tokens"], [ask, reply]
            for number in range(2):
                served = prompt + len(output)
                new = {"role": "user", "content": f"and {number}?"}
                if number:
                    path, sent = "/v1/sessions/letters/rounds", [new]
                else:
                    path, sent = "/v1/chat/completions", [*messages, new]
                status, answer = await post(f"{url}{path}", {**body, **letters, "messages": sent})
                assert status == 200, answer
                messages += [new, answer["choices"][0]["message"]]
                text = tokenizer.render(messages[:-1], TemplateOptions())
                usage = answer["usage"]
                rest = usage["prompt_tokens"] - served
                assert 0 < rest < 48 and len(tokenizer.encode_rendered(text)) < usage["prompt_tokens"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                assert cached == (served - 1) // 16 * 16, (cached, served)
                assert "warnings" not in answer["session"]
                prompt, output = usage["prompt_tokens"], answer["choices"][0]["token_ids"]
            events = await events_of(
                f"{url}/v1/sessions/letters/rounds",
                {"messages": [{"role": "user", "content": "end"}], "max_tokens": 4, "stream": True},
            )
            assert events[-1].strip() == b"data: [DONE]" and not any(b"sglext" in event for event in events)

    asyncio.run(run())
