"""Several models behind one gateway: rounds only run on engines that have their model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.engines.tiny_model import write_tiny_model
from antiphon.scheduler.config import (
    Config,
    EngineConfig,
    GatewayConfig,
    LedgerConfig,
    ModelConfig,
    RecordConfig,
    SchedulerConfig,
    ServedModelConfig,
    load_config,
    to_toml,
)
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.models import Models
from antiphon.scheduler.replica import Replica
from antiphon.scheduler.serve import tokenizers_of
from tests.gateway_helpers import DEADLINE_S
from tests.replica_helpers import KEY, until

BIG, SMALL = "big", "small"
ENGINES = {"b0": BIG, "b1": BIG, "s0": SMALL}
WINDOWS = {BIG: 4096, SMALL: 1024}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models; the small one has a chat template of its own, so that prompts differ."""
    folder = tmp_path_factory.mktemp("models")
    dirs = {
        BIG: write_tiny_model(folder / "big-llama", architecture="llama"),
        SMALL: write_tiny_model(folder / "small-qwen3", architecture="qwen3", seed=1),
    }
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    (dirs[SMALL] / "chat_template.jinja").write_text(template)
    return dirs


class Client:
    def __init__(self, url: str, http: aiohttp.ClientSession, replica: Replica) -> None:
        self.url = url
        self.http = http
        self.replica = replica

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> Any:
        async with self.http.get(self.url + path) as answer:
            return await answer.json()

    async def chat(self, model: str, text: str, session: str = "s", **more: Any) -> dict[str, Any]:
        body = {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8,
            "session_id": session, "ignore_eos": True, **more,
        }  # fmt: skip
        status, answer = await self.post("/v1/chat/completions", body)
        assert status == 200, answer
        await self.recorded()
        found: dict[str, Any] = answer
        return found

    async def recorded(self) -> None:
        fleets = self.replica._fleets.values()
        await until(lambda: not any(fleet.runtime._recording for fleet in fleets))

    async def last(self, session: str = "s") -> dict[str, Any]:
        return dict((await self.get(f"/v1/receipts?limit=1&session_id={session}"))["data"][0])


def several(model_dirs: dict[str, Path], **paths: str | None) -> tuple[ServedModelConfig, ...]:
    return tuple(
        ServedModelConfig((name, f"{name}-alias"), paths.get(name, str(path)), engine_model=path.name)
        for name, path in model_dirs.items()
    )


@contextlib.asynccontextmanager
async def stack(
    valkey_url: str,
    model_dirs: dict[str, Path],
    engines: dict[str, str] = ENGINES,
    *,
    expected: int | None = None,
    **sections: Any,
) -> AsyncIterator[Client]:
    """A replica of both models behind its gateway, with simulated engines."""
    fleet = uuid.uuid4().hex
    config = Config(
        gateway=GatewayConfig(shutdown_grace_s=0.05),
        scheduler=SchedulerConfig(policy="ampd"),
        ledger=LedgerConfig(fleet=fleet),
        **{"models": several(model_dirs), **sections},
    )
    ledger = Ledger(valkey_url, fleet=fleet)
    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(ledger.close)
        replica = Replica(config, ledger, KEY, uuid.uuid4().hex, Metrics())
        for engine_id, model in engines.items():
            options = SimulatedOptions(
                engine_id=engine_id, pool="decode", ledger=valkey_url, fleet=fleet, speed=20.0,
                model_id=model_dirs[model].name, model_path=str(model_dirs[model]),
                context_tokens=WINDOWS[model],
            )  # fmt: skip
            await closing.enter_async_context(SimulatedEngine(options, fleet_key=KEY))
        await closing.enter_async_context(replica.running())
        alive = len(engines) if expected is None else expected
        await until(lambda: replica.readiness().engines_alive == alive and replica.readiness().ledger == "ok")
        app = create_app(replica, tokenizers_of(config, replica), config, replica, Metrics())
        listener = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        settings = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
            async with aiohttp.ClientSession(timeout=timeout) as http:
                yield Client(f"http://127.0.0.1:{listener.getsockname()[1]}", http, replica)
        finally:
            server.should_exit = True
            await serving


def test_rounds_run_on_engines_of_their_model(valkey_url: str, model_dirs: dict[str, Path]) -> None:
    """Under either name; with the model's own tokenizer, template and window; explained alike."""

    async def scenario() -> None:
        async with stack(valkey_url, model_dirs) as client:
            homes: dict[str, set[str]] = {BIG: set(), SMALL: set()}
            prompts: dict[str, int] = {}
            for number in range(6):
                for model in (BIG, SMALL):
                    name = model if number % 2 else f"{model}-alias"
                    session = f"{model}-{number}"
                    answer = await client.chat(name, "a prompt of some words", session)
                    assert answer["model"] == name
                    receipt = await client.last(session)
                    homes[model].add(receipt["home"])
                    prompts[model] = answer["usage"]["prompt_tokens"]
            assert homes == {BIG: {"b0", "b1"}, SMALL: {"s0"}}
            assert prompts[SMALL] < prompts[BIG], "its template adds less"
            for model, known in ((BIG, {"b0", "b1"}), (SMALL, {"s0"})):
                body = {"model": model, "prompt": "hello", "session_id": "new"}
                _, told = await client.post("/v1/explain", body)
                assert {told["home"], *(c["home"] for c in told["considered"])} <= known

    asyncio.run(scenario())


def test_models_are_listed_with_their_windows(valkey_url: str, model_dirs: dict[str, Path]) -> None:
    """All names; a prompt is held against the window of its own model; an unknown model is a 404."""

    async def scenario() -> None:
        async with stack(valkey_url, model_dirs) as client:
            shown = {item["id"]: item["max_model_len"] for item in (await client.get("/v1/models"))["data"]}
            assert shown == {"big": 4096, "big-alias": 4096, "small": 1024, "small-alias": 1024}
            assert (await client.get("/v1/models/small"))["max_model_len"] == 1024
            long = {"prompt": [40] * 2000, "max_tokens": 4, "ignore_eos": True}
            assert (await client.post("/v1/completions", {"model": BIG, **long}))[0] == 200
            status, answer = await client.post("/v1/completions", {"model": SMALL, **long})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            status, answer = await client.post("/v1/completions", {"model": "huge", **long})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
            assert "'big'" in answer["error"]["message"] and "'small'" in answer["error"]["message"]
            engines = {item["engine_id"]: item["model"] for item in (await client.get("/v1/engines"))["data"]}
            assert engines == ENGINES

    asyncio.run(scenario())


def test_a_session_has_a_home_in_each_of_its_models(valkey_url: str, model_dirs: dict[str, Path]) -> None:
    """It may use them in turn: each time its KV is found where that model has it."""

    async def scenario() -> None:
        async with stack(valkey_url, model_dirs) as client:
            ids = [40 + n % 300 for n in range(640)]
            homes: list[str] = []
            for number in range(6):
                model = (BIG, SMALL)[number % 2]
                body = {"model": model, "prompt": ids, "max_tokens": 4, "session_id": "s", "ignore_eos": True}
                status, answer = await client.post("/v1/completions", body)
                assert status == 200, answer
                await client.recorded()
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                receipt = await client.last()
                homes.append(receipt["home"])
                assert receipt["session_id"] == "s" and receipt["round_number"] == number + 1
                if number < 2:
                    assert cached == 0, "the other model's KV of the same tokens is of no use"
                else:
                    assert cached >= 624 and receipt["arm"] == "local"
            assert len(set(homes[::2])) == 1 and set(homes[1::2]) == {"s0"}

    asyncio.run(scenario())


def test_a_model_without_engines(valkey_url: str, model_dirs: dict[str, Path]) -> None:
    """Its rounds are refused until one comes; the other model is served; readiness says so."""

    async def scenario() -> None:
        async with stack(valkey_url, model_dirs, {"b0": BIG}) as client:
            ready = await client.get("/ready")
            assert ready["ready"] and ready["detail"] == "no engine of small"
            await client.chat(BIG, "hello")
            body = {"model": SMALL, "messages": [{"role": "user", "content": "hello"}]}
            status, answer = await client.post("/v1/chat/completions", body)
            assert (status, answer["error"]["code"]) == (503, "no_engine_available")

    asyncio.run(scenario())


def test_tokenizers_come_from_the_engines_where_no_path_is_set(
    valkey_url: str, model_dirs: dict[str, Path]
) -> None:
    """Each model's from its own engines."""

    async def scenario() -> None:
        models = several(model_dirs, big=None, small=None)
        async with stack(valkey_url, model_dirs, models=models) as client:
            tokens = {}
            for model in (BIG, SMALL):
                tokens[model] = (await client.chat(model, "hello", model))["usage"]["prompt_tokens"]
            assert tokens[SMALL] < tokens[BIG]

    asyncio.run(scenario())


def test_engines_of_other_models_are_refused(
    valkey_url: str, model_dirs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Named in the log; nothing is placed there. [model] still means one model for all engines."""

    async def scenario() -> None:
        only_big = several({BIG: model_dirs[BIG]})
        async with stack(valkey_url, model_dirs, models=only_big, expected=2) as client:
            assert {item["engine_id"] for item in (await client.get("/v1/engines"))["data"]} == {"b0", "b1"}
            await until(lambda: "is none of [[models]]" in caplog.text)

    asyncio.run(scenario())


def test_each_model_is_recorded_in_a_folder_of_its_own(
    valkey_url: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """A recording is of one model: it has one latency profile."""

    async def scenario() -> None:
        record = RecordConfig(directory=str(tmp_path / "rounds"))
        async with stack(valkey_url, model_dirs, record=record) as client:
            for model in (BIG, BIG, SMALL):
                await client.chat(model, "hello", uuid.uuid4().hex)

    asyncio.run(scenario())
    lines = {
        model: sum(
            len(file.read_text().splitlines()) for file in (tmp_path / "rounds" / model).glob("rounds-*")
        )
        for model in (BIG, SMALL)
    }
    assert lines == {BIG: 2, SMALL: 1}


def test_models_of_the_configuration(tmp_path: Path) -> None:
    """Printed as it is read; engines are known by model id, by its last component, or by their path."""
    config = Config(
        models=(
            ServedModelConfig(("a", "a-2"), "/models/llama-8b/"),
            ServedModelConfig(("b",), engine_model="org/qwen"),
        ),
        engines=(EngineConfig("e0", "http://127.0.0.1:1", model="b"),),
    )
    file = tmp_path / "antiphon.toml"
    file.write_text(to_toml(config))
    assert load_config(file, env={}) == config
    models = Models(config)
    said = {
        ("llama-8b", ""): "a", ("/other/llama-8b", ""): "a", ("a-2", ""): "a", ("", "/models/llama-8b"): "a",
        ("org/qwen", ""): "b", ("b", ""): None, ("qwen", ""): None, ("llama-70b", ""): None, ("", ""): None,
    }  # fmt: skip
    assert {pair: models.key_of_engine(*pair) for pair in said} == said
    assert Models(Config()).key_of_engine("anything", "") == ""


WRONG = {
    "no name": ("[[models]]\nnames = []", "needs `names`"),
    "twice": ('[[models]]\nnames = ["a"]\n[[models]]\nnames = ["b", "a"]', "'a' is there twice"),
    "both": ('[model]\nnames = ["a"]\n[[models]]\nnames = ["b"]', "not both"),
    "unknown": ('[[models]]\nnames = ["a"]\npth = "x"', r"models\[0\]\.pth.*'path'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_models_are_refused(name: str, tmp_path: Path) -> None:
    text, expected = WRONG[name]
    file = tmp_path / "antiphon.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_config(file, env={})


def test_one_model_is_as_before() -> None:
    """[model] alone: one key, names as configured, or as the engines say."""
    config = replace(Config(), model=ModelConfig("/m/tiny", ("x",)))
    (model,) = Models(config)
    assert model.key == "" and Models(config).names(model, ("id",)) == ("x",)
    (model,) = Models(Config())
    assert Models(Config()).names(model, ("org/tiny",)) == ("tiny", "org/tiny")
