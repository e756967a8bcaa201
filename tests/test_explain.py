"""`POST /v1/explain` over real HTTP: gateway, replica, simulated engines and the real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from antiphon.scheduler.config import Config, ModelConfig, SchedulerConfig
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.gateway_helpers import DEADLINE_S, running_gateway, three_words
from tests.replica_helpers import KEY, Cluster, cluster, until
from tests.test_ledger_moves import everything

MODEL = "tiny"
PROMPT = list(range(40, 340))


@contextlib.asynccontextmanager
async def served(c: Cluster, model_dir: Path) -> AsyncIterator[Client]:
    """The replica behind its gateway, on a free port."""
    config = Config(
        scheduler=replace(SchedulerConfig(), policy="ampd"), model=ModelConfig(str(model_dir), (MODEL,))
    )
    app = create_app(c.replica, TokenizerSource(lambda: str(model_dir)), config, c.replica, Metrics())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as http:
                yield Client(f"http://127.0.0.1:{listener.getsockname()[1]}", http)
        finally:
            server.should_exit = True
            await serving


class Client:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url = url
        self._http = http

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._http.post(self._url + path, json=body, headers=named) as answer:
            return answer.status, await answer.json()

    async def explain(self, prompt: list[int], session: str = "s", **more: Any) -> dict[str, Any]:
        status, answer = await self.post("/v1/explain", body(prompt, session, **more))
        assert status == 200, answer
        return answer


def body(prompt: list[int], session: str = "s", **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL, "prompt": prompt, "max_tokens": 24, "session_id": session, "ignore_eos": True,
        "return_token_ids": True, **more,
    }  # fmt: skip


def books(c: Cluster) -> object:
    """All that the core would decide by, as one value."""
    core = c.replica.core
    now = c.replica.runtime.now()
    engines = {name: copy.copy(view) for name, view in core.books.fleet.views(now).items()}
    sessions = {key: copy.copy(session) for key, session in core.books.sessions._sessions.items()}
    return engines, sessions, len(core.books.residency), dict(core.rounds), core.accepted


@pytest.mark.parametrize("policy", ["ampd", "adaptive"])
def test_what_is_explained_is_what_is_done(valkey_url: str, tiny_model_dir: Path, policy: str) -> None:
    """Round after round: arm, engines, reason and history are those of the round that then follows."""

    async def scenario() -> None:
        async with cluster(valkey_url, policy) as c, served(c, tiny_model_dir) as client:
            prompt = list(PROMPT)
            for number in (1, 2, 3):
                before, kept = books(c), await everything(c.ledger)
                told = await client.explain(prompt, stream=True)
                assert books(c) == before, "the core has not changed"
                assert await everything(c.ledger) == kept, "nor has the ledger"
                assert told["session"]["round"] == number and told["session"]["known"] == (number > 1)
                status, answer = await client.post("/v1/completions", body(prompt))
                assert status == 200
                await c.recorded()
                (receipt,) = await c.replica.receipts(1, "s")
                placement = receipt["tries"][0]["placement"]
                for name in ("arm", "home", "prefill_engine", "reason"):
                    assert told[name] == placement[name], name
                assert told["predicted"]["prefill_s"] == placement["predicted"]["prefill_s"]
                assert [c["arm"] for c in told["considered"]] == [c["arm"] for c in placement["considered"]]
                assert told["history_tokens"].get(told["home"], 0) == receipt["history_tokens"]
                assert told["arm"] == answer["session"]["arm"]
                assert (told["slo"]["ttft_s"], told["slo"]["itl_s"]) == (2.0, 0.1)
                assert (receipt["slo_ttft_s"], receipt["slo_itl_s"]) == (2.0, 0.1)
                prompt += answer["choices"][0]["token_ids"] + list(range(50, 50 + 60 * number))
            if policy == "ampd":
                assert told["arm"] == "remote_pull" and set(told["history_tokens"]) == {"p0", "d0"}

    asyncio.run(scenario())


def test_another_replica_explains_by_the_ledger(valkey_url: str, tiny_model_dir: Path) -> None:
    """A replica that never saw the sessions tells their homes and histories, and knows neither afterwards."""
    prompts = {f"s{n}": [40 + (n * 50 + i) % 300 for i in range(1500)] for n in range(3)}

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd", engines="d0 d1 p0") as c, served(c, tiny_model_dir) as client:
            for session, prompt in prompts.items():
                _, answer = await client.post("/v1/completions", body(prompt, session))
                prompt += answer["choices"][0]["token_ids"] + [7] * 100
            await c.recorded()
            other = Replica(c.replica._config, c.ledger, KEY, uuid.uuid4().hex, Metrics())
            second = Cluster(other, c.ledger)
            async with other.running(), served(second, tiny_model_dir) as stranger:
                await until(lambda: other.readiness().engines_alive == 3 and other.readiness().ledger == "ok")
                before, homes = books(second), set()
                for session, prompt in prompts.items():
                    told, same = [await x.explain(prompt, session) for x in (client, stranger)]
                    for name in ("arm", "home", "prefill_engine", "session"):
                        assert same[name] == told[name], name
                    known, kept = told["history_tokens"], same["history_tokens"]
                    assert kept[told["home"]] == known[told["home"]] >= 1500
                    assert all(tokens - 512 < kept[name] <= tokens for name, tokens in known.items())
                    homes.add(told["home"])
                assert len(homes) == 2, "one of them is not where a new session would go"
                assert books(second) == before

    asyncio.run(scenario())


def test_the_form_of_an_explanation(valkey_url: str, tiny_model_dir: Path) -> None:
    """A chat and a text body; policy, targets and what named them; a session without a name is a new one."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd") as c, served(c, tiny_model_dir) as client:
            chat = {
                "model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5,
                "session": {"slo": {"ttft_ms": 750}},
            }  # fmt: skip
            status, told = await client.post("/v1/explain", chat, X_Session_Hints="tpot_ms=40")
            assert status == 200
            assert (told["object"], told["endpoint"]) == ("antiphon.explanation", "/v1/chat/completions")
            assert (told["policy"], told["ordering"], told["model"]) == ("ampd", "fcfs", MODEL)
            slo = {"ttft_s": 0.75, "itl_s": 0.04, "ttft_from": "body", "itl_from": "header"}
            assert told["slo"] == slo
            assert told["max_output_tokens"] == 5 and told["prompt_tokens"] > 0
            assert told["session"]["identified_by"] == "new" and told["session"]["known"] is False
            assert told["degraded"] is None and told["retry_after_s"] is None
            text = await client.explain([1, 2, 3], "t")
            assert text["endpoint"] == "/v1/completions" and text["slo"]["ttft_from"] == "default"
            predicted = text["predicted"]
            terms = [predicted[name] for name in ("queue_s", "prefill_s", "pull_s", "push_s")]
            assert predicted["ttft_s"] == pytest.approx(sum(terms)) and predicted["home"] == text["home"]
            assert {"itl_s", "misses"} <= predicted.keys()

    asyncio.run(scenario())


def test_a_busy_session_is_explained_as_a_fork(valkey_url: str, tiny_model_dir: Path) -> None:
    """While a round of the session runs, another would be its fork: told so, at the parent's home."""

    async def scenario() -> None:
        async with (
            cluster(valkey_url, "local", engines="d0", speed=1.0) as c,
            served(c, tiny_model_dir) as client,
        ):
            request = replace(c.request("s", PROMPT, 4000), tenant="default")
            first = replace(c.request("s", PROMPT, 4), tenant="default")
            async with c.replica.submit(first) as handle:
                await handle.start()
                assert [chunk async for chunk in handle]
            await c.recorded()
            async with c.replica.submit(request) as handle:
                await handle.start()
                told = await client.explain(PROMPT)
                session = told["session"]
                assert (session["busy"], session["parent_id"], session["round"]) == (True, "s", 1)
                assert session["home"] == told["home"] == "d0"

    asyncio.run(scenario())


def test_without_the_ledger(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The ledger is away: explained by what this replica knows, and said so."""

    async def scenario() -> None:
        server = EmbeddedValkey.start(tmp_path)
        try:
            async with cluster(server.url, "ampd", engines="d0") as c, served(c, tiny_model_dir) as client:
                await asyncio.to_thread(server.stop)
                told = await client.explain(PROMPT)
                assert told["arm"] == "local" and "ledger" in told["degraded"]
                assert told["session"]["known"] is None
        finally:
            server.stop()

    asyncio.run(scenario())


def test_a_refusal_is_an_explanation(valkey_url: str, tiny_model_dir: Path) -> None:
    """Without an engine the answer says that the round would be refused, why, and when to come again."""

    async def scenario() -> None:
        async with cluster(valkey_url, "ampd", engines="") as c, served(c, tiny_model_dir) as client:
            told = await client.explain(PROMPT)
            assert (told["arm"], told["home"], told["predicted"]) == (None, None, None)
            assert told["retry_after_s"] > 0 and told["reason"]

    asyncio.run(scenario())


BELOW_ZERO = {"slo": {"ttft_ms": -1}}
BAD = {
    "neither": ({"model": MODEL}, 400, "messages"),
    "both": ({"model": MODEL, "messages": [], "prompt": "x"}, 400, "prompt"),
    "no messages": ({"model": MODEL, "messages": []}, 400, "messages"),
    "wrong model": ({"model": "other", "prompt": "x"}, 404, "model"),
    "wrong target": (
        {"model": MODEL, "prompt": "x", "session": {"slo": {"ttft_ms": -1}}},
        400,
        "session.slo.ttft_ms",
    ),
    "a list": ([1], 400, None),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_openais_errors(tiny_model_dir: Path, case: str) -> None:
    """The checks are those of the completion routes; nothing reaches the scheduler."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir) as g:
            sent, status, param = BAD[case]
            response, answer = await g.post("/v1/explain", sent)
            assert (response.status, answer["error"]["param"]) == (status, param), answer
            assert answer["error"]["type"] == "invalid_request_error" and g.runner.requests == []
            response, _ = await g.get("/v1/explain")
            assert response.status == 405

    asyncio.run(scenario())
