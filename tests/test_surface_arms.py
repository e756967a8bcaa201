"""Options of a request give what one plain engine gives, on every arm that a round may take."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.scheduler.config import Config
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.prompts import TemplateOptions, TokenizerSource
from antiphon.scheduler.metrics import Metrics
from tests.gateway_helpers import sse_events
from tests.replica_helpers import KEY, cluster

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODEL = "simulated"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    },
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
HISTORY, OUTPUT = list(range(100, 228)), list(range(60, 100))
SAID: list[dict[str, Any]] = [
    {"token_ids": OUTPUT},
    {"text": "one two HALT three"},
    {
        "reasoning": "Let me think.",
        "text": "So.",
        "tool_calls": [{"name": "look", "arguments": '{"q": "x"}'}],
    },
]
"""What the script has: for the first of the options below."""

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {"max_tokens": 60}),
    (TEXT, {"stop": ["HALT"], "max_tokens": 20}),
    (CHAT, {"tools": [TOOL], "max_tokens": 50}),
    (CHAT, {"n": 3, "logprobs": True, "top_logprobs": 2, "max_tokens": 6, "seed": 5}),
    (CHAT, {"tools": [TOOL], "tool_choice": "required", "max_tokens": 50}),
    (
        CHAT,
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            "max_tokens": 50,
        },
    ),
    (
        CHAT,
        {
            "frequency_penalty": 1.0,
            "presence_penalty": 0.5,
            "logit_bias": {"7": 5},
            "max_completion_tokens": 5,
        },
    ),
    (TEXT, {"n": 2, "logprobs": 1, "echo": True, "max_tokens": 5}),
    (TEXT, {"response_format": {"type": "json_object"}, "max_tokens": 20}),
]
ARMS = {
    "local": {"local"},
    "remote": {"remote_recompute"},
    "remote_pull_always": {"remote_recompute", "remote_pull"},
}
"""Policy -> the arms that its rounds take."""


def asked(path: str, change: dict[str, Any], number: int) -> dict[str, Any]:
    """A request; after the first, texts go on from what it said, so that there is something to pull."""
    if path == CHAT:
        words = f"long enough for some pages of KV {'and more ' * number}" * 2
        return {"model": MODEL, "messages": [{"role": "user", "content": words}], **change}
    more = [*OUTPUT, *[300 + number] * 20] if number else []
    return {"model": MODEL, "prompt": HISTORY + more, **change}


def plain(choices: Any) -> Any:
    """Choices without what names the request: ids of calls hold the engine's rid."""
    text = re.sub(r"call_[0-9a-zA-Z_-]+", "call", json.dumps(choices))
    return [
        {name: value for name, value in choice.items() if value is not None} | {"message": _filled(choice)}
        for choice in json.loads(text)
    ]


def _filled(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message") or {}
    shown = {name: value for name, value in message.items() if value}
    for call in shown.get("tool_calls", ()):
        call.pop("index", None)
    return shown


async def on_one_engine(directory: Path, script: Path) -> list[Any]:
    """What a plain engine answers, asked by prompt ids as its own gateway would."""
    answers = []
    settings = SimulatedOptions(speed=20.0, script=script)
    tokenizer = await TokenizerSource(lambda: str(directory)).get("")
    async with SimulatedEngine(settings, fleet_key=KEY) as engine, httpx.AsyncClient() as http:
        for number, (path, change) in enumerate(OPTIONS):
            body = asked(path, change, number)
            if path == CHAT:
                options = TemplateOptions(change.get("tools"))
                body["input_ids"] = tokenizer.encode_chat(body["messages"], options)
            got = await http.post(f"{engine.record.url}{path}", json=body)
            assert got.status_code == 200, got.text
            answers.append(got.json()["choices"])
    return answers


def folded(events: list[Any]) -> list[dict[str, Any]]:
    """Texts, calls and ends of a stream's choices, as far as whole answers have them."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for delta in event["choices"] if isinstance(event, dict) else ():
            choice = choices.setdefault(delta["index"], {"text": "", "arguments": "", "end": None})
            said = delta.get("delta") or {"content": delta.get("text")}
            choice["text"] += said.get("content") or ""
            for call in said.get("tool_calls") or ():
                choice["arguments"] += call["function"]["arguments"]
            choice["end"] = delta.get("finish_reason") or choice["end"]
    return [choices[index] for index in sorted(choices)]


def summed(choices: list[Any]) -> list[dict[str, Any]]:
    """The same of whole choices."""
    found = []
    for choice in choices:
        message = choice.get("message") or {"content": choice.get("text")}
        calls = message.get("tool_calls") or ()
        arguments = "".join(call["function"]["arguments"] for call in calls)
        found.append(
            {"text": message["content"] or "", "arguments": arguments, "end": choice["finish_reason"]}
        )
    return found


@pytest.mark.parametrize("policy", sorted(ARMS))
@pytest.mark.parametrize("stream", [False, True])
def test_options_on_every_arm(
    policy: str, stream: bool, valkey_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Choice by choice what one engine says: texts, log probabilities, calls, reasoning, ends."""
    script = tmp_path / "script.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in SAID))

    async def main() -> set[str]:
        wanted = await on_one_engine(tiny_model_dir, script)
        arms: set[str] = set()
        options: dict[str, Any] = {"script": script, "scheduler": {"slo_ttft_s": 100.0}}
        async with cluster(valkey_url, policy, **options) as running:
            tokenizers = TokenizerSource(lambda: str(tiny_model_dir))
            app = create_app(running.replica, tokenizers, Config(), running.replica, Metrics())
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                for number, (path, change) in enumerate(OPTIONS):
                    body = asked(path, change, number) | {"stream": stream, "session_id": "s"}
                    got = await http.post(path, json=body)
                    assert got.status_code == 200, got.text
                    arms.add(got.headers["x-antiphon-arm"])
                    if stream:
                        assert folded(sse_events(got.content)) == summed(wanted[number]), change
                    else:
                        assert plain(got.json()["choices"]) == plain(wanted[number]), change
                    await running.recorded()
        return arms

    assert asyncio.run(main()) == ARMS[policy]
