"""Requests on real SGLang through the gateway give what one plain engine gives, on every arm."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.engines.base import EngineRecord
from antiphon.scheduler.config import Config
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.prompts import PromptTokenizer, TemplateOptions, TokenizerSource
from antiphon.scheduler.gateway.relay import LOGPROBS_MISSING
from antiphon.scheduler.metrics import Metrics
from tests.conftest import SglangPair
from tests.engine_calls import random_prompt
from tests.move_helpers import MovesEvery
from tests.option_helpers import CHAT, OPTIONS, Option, compared, differences, folded, gaps
from tests.simulated_helpers import engine_key
from tests.test_move_live import replica_over
from tests.test_stack import gateway

AT_ONCE = 6
DEADLINE_S = 60.0
SEED_TOKENS = 18
"""Of the round before: more than a page, so that the home holds one that no other engine has."""
OUTPUT_TOKENS = 8
ARMS = {
    "local": {"local"},
    "remote": {"remote_recompute"},
    "remote_pull_always": {"remote_pull"},
    "move": {"move"},
}
"""Policy -> the arms that a session's second round takes."""

Settled = Callable[[], Awaitable[None]]
"""Returns when the ledger knows of all rounds that were answered."""


async def at_once() -> None:
    """Nothing to wait for."""


@pytest.fixture(scope="module")
def plain_answers() -> dict[str, bytes]:
    """What the plain engine said, by what it was asked: every arm is asked the same."""
    return {}


@dataclass(slots=True)
class Plain:
    """The engine without a scheduler. What it was asked once is not asked again."""

    http: httpx.AsyncClient
    answers: dict[str, bytes]

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        key = path + json.dumps(body, sort_keys=True)
        if key not in self.answers:
            got = await self.http.post(path, json=body)
            assert got.status_code == 200, (body, got.text)
            self.answers[key] = got.content
        return self.answers[key]


@dataclass(slots=True)
class Compared:
    """One option, on one policy: two sessions of a round before and the option, whole and streamed."""

    http: httpx.AsyncClient
    plain: Plain
    tokenizer: PromptTokenizer
    model: str
    policy: str
    settled: Settled
    forks: int = 0
    """Rounds that came before the ledger knew that the one before had ended."""
    arms: Counter[str] = field(default_factory=Counter)
    """Of rounds that go on from the ids of the one before."""
    wrong: dict[str, list[str]] = field(default_factory=dict)
    equal: list[str] = field(default_factory=list)

    async def option(self, number: int, option: Option) -> None:
        for stream in (False, True):
            label = f"{option.path[4:]}: {option.name}, {'streamed' if stream else 'whole'}"
            compare = self._chat if option.path == CHAT else self._text
            found = await compare(f"{number}-{stream}", option, stream)
            if found:
                self.wrong[label] = found
            else:
                self.equal.append(label)

    async def _chat(self, name: str, option: Option, stream: bool) -> list[str]:
        first = [{"role": "user", "content": f"Question {name}: what is it that {option.name} does?"}]
        asked = self._asked_before() | {"messages": first}
        before, wanted = await asyncio.gather(
            self._ours(option.path, name, asked | {"return_token_ids": True}),
            self.plain.post(option.path, {"model": self.model, **asked}),
        )
        said = before["choices"][0]
        output = said.pop("token_ids")
        found = differences(compared(before), compared(json.loads(wanted)), "before")
        # The plain engine gets the ids that were served: text of a model often tokenises differently.
        messages = [*first, said["message"], {"role": "user", "content": "And then?"}]
        text, begun = (self.tokenizer.render(m, TemplateOptions()) for m in (messages, first))
        assert text.startswith(begun + said["message"]["content"])
        encode = self.tokenizer.encode_rendered
        ids = [*encode(begun), *output, *encode(text.removeprefix(begun + said["message"]["content"]))]
        return found + await self._compare(name, option, stream, {"messages": messages}, {"input_ids": ids})

    async def _text(self, name: str, option: Option, stream: bool) -> list[str]:
        prompt: Any = random_prompt(random.Random(name), 40)
        if option.tail:
            prompt = f"Text {name} that goes on for a while. " * 2
        asked = self._asked_before() | {"return_token_ids": True, "prompt": prompt}
        output = (await self._ours(option.path, name, asked))["choices"][0]["token_ids"]
        prompt = prompt + option.tail if option.tail else [*prompt, *output, *range(300, 308)]
        return await self._compare(name, option, stream, {"prompt": prompt}, {})

    def _asked_before(self) -> dict[str, Any]:
        unsaid = {str(token): -100.0 for token in self.tokenizer.eos_ids}
        return {"temperature": 0, "ignore_eos": True, "max_tokens": SEED_TOKENS, "logit_bias": unsaid}

    async def _compare(
        self, name: str, option: Option, stream: bool, prompt: dict[str, Any], plain: dict[str, Any]
    ) -> list[str]:
        change: dict[str, Any] = {"temperature": 0, "max_tokens": OUTPUT_TOKENS} | option.change
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        as_stream = stream and not option.gaps
        wanted = change | (streaming if as_stream else {}) | prompt | plain
        ours, content = await asyncio.gather(
            self._ours(
                option.path, name, change | (streaming if stream else {}) | prompt, arm=not option.tail
            ),
            self.plain.post(option.path, {"model": self.model, **wanted}),
        )
        theirs = folded(content) if as_stream else json.loads(content)
        missing, found = gaps(ours, theirs) if option.gaps else (0, [])
        warnings = [LOGPROBS_MISSING.format(missing)] if missing else []
        found += differences(ours["session"].get("warnings", []), warnings, "warnings")
        return found + differences(compared(ours, option.drawn), compared(theirs, option.drawn))

    async def _ours(
        self, path: str, session: str, body: dict[str, Any], *, arm: bool = False
    ) -> dict[str, Any]:
        named = {"model": self.model, "session_id": f"{path[4:8]}-{session}", "cache_salt": self.policy}
        got = await self.http.post(path, json=body | named)
        assert got.status_code == 200, (body, got.text)
        if arm:
            self.arms[got.headers["x-antiphon-arm"]] += 1
        self.forks += got.headers["x-session-id"] != named["session_id"]
        await self.settled()
        whole: dict[str, Any] = folded(got.content) if body.get("stream") else got.json()
        return whole


@asynccontextmanager
async def moving(
    pair: SglangPair, valkey_url: str, key: bytes, model: Path
) -> AsyncIterator[tuple[httpx.AsyncClient, Settled]]:
    """A gateway in this process whose sessions move in every second round."""
    async with replica_over(pair, valkey_url, key) as c:
        c.replica.core.policy = MovesEvery((pair.decode.engine_id, pair.prefill.engine_id), every=2)
        app = create_app(c.replica, TokenizerSource(lambda: str(model)), Config(), c.replica, Metrics())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://gateway", timeout=DEADLINE_S
        ) as http:
            yield http, c.recorded


@asynccontextmanager
async def serving(
    pair: SglangPair, valkey_url: str, directory: Path, model: Path, policy: str
) -> AsyncIterator[tuple[httpx.AsyncClient, Settled]]:
    """`antiphon serve` with that policy."""
    options = ("--policy", policy, "--slo-ttft", "100")
    async with (
        gateway(pair, valkey_url, directory, model, *options) as url,
        httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http,
    ):
        yield http, at_once


@pytest.mark.parametrize("policy", list(ARMS))
def test_options_on_every_arm(
    policy: str,
    sglang_pair: SglangPair,
    plain_engine: EngineRecord,
    valkey_url: str,
    fleet_key: bytes,
    plain_answers: dict[str, bytes],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    """Choice by choice what the plain engine says: texts, log probabilities, ends, usage."""

    async def main() -> Compared:
        if policy == "move":
            front = moving(sglang_pair, valkey_url, fleet_key, tiny_model_dir)
        else:
            front = serving(sglang_pair, valkey_url, tmp_path, tiny_model_dir, policy)
        async with (
            front as (http, settled),
            httpx.AsyncClient(
                base_url=plain_engine.url, timeout=DEADLINE_S, headers=engine_key(fleet_key)
            ) as direct,
        ):
            run = Compared(
                http,
                Plain(direct, plain_answers),
                PromptTokenizer(tiny_model_dir),
                tiny_model_dir.name,
                policy,
                settled,
            )
            places = asyncio.Semaphore(AT_ONCE)

            async def one(number: int, option: Option) -> None:
                async with places:
                    await run.option(number, option)

            async with asyncio.TaskGroup() as tasks:
                for number, option in enumerate(OPTIONS):
                    tasks.create_task(one(number, option))
            return run

    run = asyncio.run(main())
    print(
        f"\n{policy}: {len(run.equal)} of {2 * len(OPTIONS)} equal, arms {dict(run.arms)}, {run.forks} forks"
    )
    for label, lines in run.wrong.items():
        print(label, *lines[:6], sep="\n    ")
    assert not run.wrong and set(run.arms) == ARMS[policy]
