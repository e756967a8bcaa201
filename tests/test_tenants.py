"""Tenants: who may come in, what is kept apart, and that no key is ever shown."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from antiphon.scheduler.access_config import AccessConfig, KeyConfig, LimitsConfig
from antiphon.scheduler.api_keys import ApiKey, KeyLimits, KeyRing, LedgerKeys, digest_of, new_key
from antiphon.scheduler.config import Config, ModelConfig, load_config, to_toml
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.gateway.app import create_app
from antiphon.scheduler.gateway.conversations import Conversations
from antiphon.scheduler.gateway.limits import Limits
from antiphon.scheduler.gateway.prompts import TokenizerSource
from antiphon.scheduler.gateway.salts import CacheSalts
from antiphon.scheduler.gateway.tenants import Access, presented_key
from antiphon.scheduler.ledger_connection import LedgerConnection, LedgerUnavailable
from antiphon.scheduler.logs import JsonFormatter
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.response_store import ResponseStore
from antiphon.scheduler.session_store import SessionStore
from antiphon.scheduler.token_log import TokenLogs
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.gateway_helpers import (
    CHAT,
    CHAT_PATH,
    DEADLINE_S,
    MODEL,
    TEXT,
    TEXT_PATH,
    FakeState,
    Gateway,
    running_gateway,
    three_words,
)
from tests.ledger_helpers import ledger_at
from tests.replica_helpers import KEY, Cluster, cluster

A, B, ADMIN = "ak-tenant-a-0123456789", "ak-tenant-b-0123456789", "ak-admin-0123456789"


def key_config(name: str, key: str, tenant: str, **more: Any) -> KeyConfig:
    return KeyConfig(name, tenant, hashlib.sha256(key.encode()).hexdigest(), **more)


KEYS = (
    key_config("a", A, "red"),
    key_config("b", B, "blue"),
    key_config("root", ADMIN, "ops", admin=True),
)
GUARDED = Config(keys=KEYS)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ---------------------------------------------------------------- who may come in


def test_without_keys_anybody_is_the_default_tenant(tiny_model_dir: Path) -> None:
    """Any key and none are taken; the client's cache salt is passed on as it is."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir) as gateway:
            for headers in ({}, bearer("anything"), {"x-api-key": "sk-ant"}):
                response, _ = await gateway.post(TEXT_PATH, TEXT | {"cache_salt": "mine"}, **headers)
                assert response.status == 200
            assert {r.tenant for r in gateway.runner.requests} == {"default"}
            assert {r.cache_salt for r in gateway.runner.requests} == {"mine"}
            assert (await gateway.get("/v1/engines"))[0].status == 200

    asyncio.run(scenario())


def test_a_key_makes_a_request_its_tenants(tiny_model_dir: Path) -> None:
    """By either header; the round is the tenant's, and its salt is nobody else's."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, GUARDED) as gateway:
            for headers in (bearer(A), {"x-api-key": A}, {"authorization": f"bearer  {A} "}, bearer(B)):
                response, answer = await gateway.post(CHAT_PATH, CHAT, **headers)
                assert response.status == 200, answer
            requests = gateway.runner.requests
            assert [r.tenant for r in requests] == ["red", "red", "red", "blue"]
            salts = [r.cache_salt for r in requests]
            assert len(set(salts)) == 2 and salts[0] == salts[1] == salts[2] and None not in salts

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(A + "x"),
        bearer(A[:-1]),
        bearer(""),
        {"authorization": f"Basic {A}"},
        {"authorization": A},
        {"x-api-key": "sk-none"},
        bearer("é" * 5),
        bearer("k" * 5000),
        {"authorization": "Bearer wrong", "x-api-key": A},
    ],
    ids=lambda headers: str(headers)[:30],
)
def test_who_is_not_known_is_told_so_in_the_shape_of_the_api(
    tiny_model_dir: Path, headers: dict[str, str]
) -> None:
    """401, as OpenAI has it, and as Anthropic has it on /v1/messages; nothing is run or told."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, GUARDED) as gateway:
            for path in (CHAT_PATH, "/v1/explain", "/no/such/path"):
                response, answer = await gateway.post(path, CHAT, **headers)
                assert response.status == 401 and response.headers["www-authenticate"] == "Bearer"
                assert answer["error"]["code"] == "invalid_api_key"
                assert answer["error"]["type"] == "invalid_request_error"
            response, answer = await gateway.post("/v1/messages", CHAT, **headers)
            assert response.status == 401
            assert answer["type"] == "error" and answer["error"]["type"] == "authentication_error"
            assert response.headers["x-request-id"]
            assert not gateway.runner.requests
            shown = gateway.metrics.render().decode()
            assert 'antiphon_errors_total{code="invalid_api_key"} 4.0' in shown

    asyncio.run(scenario())


def test_some_paths_are_open(tiny_model_dir: Path) -> None:
    """Health, readiness and metrics need no key, unless the configuration says so."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, GUARDED) as gateway:
            for path in ("/health", "/ready", "/metrics"):
                assert (await gateway.get(path))[0].status == 200
            for path in ("/v1/models", "/v1/engines", "/v1/receipts", "/v1/sessions"):
                assert (await gateway.get(path))[0].status == 401
        closed = replace(GUARDED, access=AccessConfig(open_paths=("/health",)))
        async with running_gateway(three_words, tiny_model_dir, closed) as gateway:
            assert (await gateway.get("/health"))[0].status == 200
            assert (await gateway.get("/metrics"))[0].status == 401

    asyncio.run(scenario())


class Told(FakeState):
    """Remembers whose things it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str | None] = []

    async def receipts(self, limit: int, session_id: str | None, tenant: str | None) -> Any:
        self.asked.append(tenant)
        return await super().receipts(limit, session_id, tenant)


async def get(gateway: Gateway, path: str, key: str) -> tuple[int, Any]:
    async with gateway.http.get(gateway.url + path, headers=bearer(key)) as answer:
        return answer.status, await answer.json()


def test_operators_see_all_and_others_their_own(tiny_model_dir: Path) -> None:
    """Engines are for admin keys; receipts and sessions are asked for by tenant."""

    async def scenario() -> None:
        state = Told()
        async with running_gateway(three_words, tiny_model_dir, GUARDED, state) as gateway:
            status, answer = await get(gateway, "/v1/engines", A)
            assert (status, answer["error"]["code"]) == (403, "permission_denied")
            assert (await get(gateway, "/v1/engines", ADMIN))[0] == 200
            for key in (A, B, ADMIN):
                assert (await get(gateway, "/v1/receipts", key))[0] == 200
            assert state.asked == ["red", "blue", None]

    asyncio.run(scenario())


def test_keys_are_never_shown(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither good nor bad keys are in any log line, answer, metric or printed configuration."""
    monkeypatch.setenv("KEY_OF_C", secret := new_key())
    config = replace(GUARDED, keys=(*KEYS, KeyConfig("c", "green", key_env="KEY_OF_C")))
    bad = "ak-bad-key-0123456789"
    texts: list[str] = [to_toml(config)]

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, config) as gateway:
            for key in (A, secret, bad):
                for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, {"model": MODEL}), ("/v1/messages", CHAT)):
                    for headers in (bearer(key), {"x-api-key": key}):
                        _, answer = await gateway.post(path, body, **headers)
                        texts.append(repr(answer))
            texts.append(gateway.metrics.render().decode())

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any('"tenant":"green"' in line and '"key":"c"' in line for line in lines)
    everything = "\n".join([*texts, *lines])
    for key in (A, secret, bad):
        assert key not in everything and key[3:] not in everything
    assert digest_of(secret).hex() not in everything


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=40))
def test_any_header_is_read(text: str) -> None:
    """A header of any content gives a key or none; one that was sent as a bearer is given back whole."""
    for name in (b"authorization", b"x-api-key"):
        key = presented_key(Headers(raw=[(name, text.encode("latin-1"))]))
        assert key is None or key in text.encode("latin-1")
    word = text.strip()
    if word:
        raw = [(b"authorization", b"Bearer " + word.encode("latin-1"))]
        assert presented_key(Headers(raw=raw)) == word.encode("latin-1")


# ---------------------------------------------------------------- keys in the configuration

WRONG = {
    "neither": ('[[keys]]\nname = "a"', "one of key_sha256 and key_env"),
    "both": (f'[[keys]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\nkey_env = "X"', "one of"),
    "plain key": ('[[keys]]\nname = "a"\nkey = "ak-secret"', r"unknown key 'keys\[0\]\.key'"),
    "no digest": ('[[keys]]\nname = "a"\nkey_sha256 = "ak-secret"', "64 hex digits"),
    "name": (f'[[keys]]\nname = "a b"\nkey_sha256 = "{"0" * 64}"', "visible ASCII"),
    "tenant": (f'[[keys]]\nname = "a"\ntenant = ""\nkey_sha256 = "{"0" * 64}"', "tenant is 1 to 255"),
    "twice": (f'[[keys]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\n' * 2, "'a' is there twice"),
    "limit": (f'[[keys]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\nsessions = -1', "sessions must be 0"),
    "limits": ("[limits]\ntokens_per_minute = -5", "tokens_per_minute must be 0"),
    "unknown limit": ("[limits]\ntokens = 5", r"limits\.tokens"),
    "cache": ("[access]\nkey_cache_s = 0", "key_cache_s must be above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_refused_without_being_shown(name: str, tmp_path: Path) -> None:
    """One line that names the key and the remedy; what may be a key is not repeated."""
    text, expected = WRONG[name]
    file = tmp_path / "antiphon.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load_config(file, env={})
    assert "ak-secret" not in str(caught.value)


def test_keys_are_printed_as_they_are_read(tmp_path: Path) -> None:
    """The resolved configuration loads again, limits of keys included."""
    config = Config(
        keys=(*KEYS, KeyConfig("c", "t", key_env="C", sessions=3, tokens_per_minute=0)),
        limits=LimitsConfig(sessions=9),
        access=AccessConfig(ledger_keys=True),
    )
    file = tmp_path / "antiphon.toml"
    file.write_text(to_toml(config))
    assert load_config(file, env={}) == config


def test_a_key_of_the_environment_must_be_there() -> None:
    """It is read when the gateway starts; a missing or a short one stops it."""
    config = Config(keys=(KeyConfig("c", key_env="KEY_OF_C"),))
    for env in ({}, {"KEY_OF_C": "short-secret"}):
        with pytest.raises(UserError, match="KEY_OF_C") as caught:
            KeyRing(config, env=env)
        assert "short-secret" not in str(caught.value)
    ring = KeyRing(config, env={"KEY_OF_C": "a-long-enough-secret"})
    found = asyncio.run(ring.find(b"a-long-enough-secret"))
    assert found is not None and found.name == "c"


def test_limits_of_a_key_win_over_those_of_all() -> None:
    """None is "as for all", 0 is "no limit"."""
    default = LimitsConfig(body_bytes=10, sessions=20, tokens_per_minute=30)
    own = KeyLimits(sessions=5, tokens_per_minute=0)
    assert own.over(default) == LimitsConfig(body_bytes=10, sessions=5, tokens_per_minute=0)


# ---------------------------------------------------------------- keys in the ledger

LEDGER = Config(access=AccessConfig(ledger_keys=True, key_cache_s=5.0, key_keep_s=60.0))


def test_the_ledger_keeps_digests_only(valkey_url: str) -> None:
    """Added, listed, found by digest and removed; a name is given once; the key itself is nowhere."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            keys, secret = LedgerKeys(ledger.connection), new_key()
            record = ApiKey("ci", "red", limits=KeyLimits(sessions=2), created_s=1.0)
            assert await keys.add(record, digest_of(secret))
            assert not await keys.add(ApiKey("ci"), digest_of(new_key()))
            assert await keys.list() == (record,)
            assert await keys.find(digest_of(secret)) == record
            assert await keys.find(digest_of(new_key())) is None
            names = await ledger.connection.command("KEYS", f"{ledger.connection.tag}*")
            stored = [await ledger.connection.command("HGETALL", name) for name in names]
            assert stored and secret not in repr(stored)
            assert await keys.remove("ci") and not await keys.remove("ci")
            assert await keys.find(digest_of(secret)) is None and await keys.list() == ()

    asyncio.run(scenario())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_known_keys_outlive_the_ledger_for_a_time(tmp_path: Path) -> None:
    """Asked again after `key_cache_s`; while the ledger is away it counts for `key_keep_s`, others do not."""

    async def scenario() -> None:
        server = EmbeddedValkey.start(tmp_path / "state")
        connection = LedgerConnection(server.url, "f", 2.0, 4)
        clock, secret = Clock(), new_key()
        try:
            keys = LedgerKeys(connection)
            ring = KeyRing(LEDGER, keys, clock=clock)
            assert ring.required
            await keys.add(ApiKey("ci", "red"), digest_of(secret))
            assert (await ring.find(secret.encode())) == ApiKey("ci", "red")
            await keys.remove("ci")
            assert await ring.find(secret.encode()) is not None, "believed for key_cache_s"
            clock.now += 5.0
            assert await ring.find(secret.encode()) is None, "and no longer"
            await keys.add(ApiKey("ci", "red"), digest_of(secret))
            assert await ring.find(secret.encode()) is not None
            server.stop()
            clock.now += 59.0
            assert await ring.find(secret.encode()) == ApiKey("ci", "red")
            with pytest.raises(LedgerUnavailable):
                await ring.find(new_key().encode())
            clock.now += 2.0
            with pytest.raises(LedgerUnavailable):
                await ring.find(secret.encode())
        finally:
            await connection.close()
            server.stop()

    asyncio.run(scenario())


def test_keys_of_a_ledger_that_is_not_there_are_asked_for_all_the_same(tiny_model_dir: Path) -> None:
    """A gateway that was told to ask and cannot is closed, not open."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, LEDGER) as gateway:
            assert (await gateway.post(CHAT_PATH, CHAT))[0].status == 401
            assert (await gateway.post(CHAT_PATH, CHAT, **bearer(A)))[0].status == 503
            assert not gateway.runner.requests

    asyncio.run(scenario())


def test_few_keys_are_remembered(valkey_url: str) -> None:
    """The memory for keys of the ledger is bounded: the longest unused ones are forgotten."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            keys, secrets = LedgerKeys(ledger.connection), [new_key() for _ in range(4)]
            for number, secret in enumerate(secrets):
                await keys.add(ApiKey(f"k{number}"), digest_of(secret))
            ring = KeyRing(LEDGER, keys, clock=Clock(), max_cached=2)
            for secret in secrets:
                assert await ring.find(secret.encode()) is not None
            for number in range(4):
                await keys.remove(f"k{number}")
            known = [await ring.find(secret.encode()) is not None for secret in secrets]
            assert known == [False, False, True, True]

    asyncio.run(scenario())


def test_a_gateway_without_its_ledger_lets_nobody_in_whom_it_does_not_know(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """503 with a time to come back, for a key that is known only to the ledger; never a silent pass."""

    async def scenario() -> None:
        server = EmbeddedValkey.start(tmp_path / "state")
        connection = LedgerConnection(server.url, "f", 2.0, 4)
        known, unknown = new_key(), new_key()
        try:
            keys = LedgerKeys(connection)
            await keys.add(ApiKey("ci", "red"), digest_of(known))
            await keys.add(ApiKey("other", "red"), digest_of(unknown))
            access = access_of(LEDGER, keys, connection)
            async with running_gateway(three_words, tiny_model_dir, LEDGER, access=access) as gateway:
                assert (await gateway.post(CHAT_PATH, CHAT, **bearer(known)))[0].status == 200
                server.stop()
                assert (await gateway.post(CHAT_PATH, CHAT, **bearer(known)))[0].status == 200
                response, answer = await gateway.post(CHAT_PATH, CHAT, **bearer(unknown))
                assert (response.status, answer["error"]["code"]) == (503, "ledger_unavailable")
                assert "retry-after-ms" in response.headers
                assert (await gateway.post(CHAT_PATH, CHAT))[0].status == 401
                assert [r.tenant for r in gateway.runner.requests] == ["red", "red"]
        finally:
            await connection.close()
            server.stop()

    asyncio.run(scenario())


def access_of(config: Config, keys: LedgerKeys | None, connection: LedgerConnection) -> Access:
    ring = KeyRing(config, keys)
    limits = Limits(connection, session_ttl_s=60.0)
    return Access(ring, CacheSalts(KEY, apart=ring.required), limits)


# ---------------------------------------------------------------- what is kept apart


@given(st.lists(st.tuples(st.text(max_size=8), st.none() | st.text(min_size=1, max_size=8)), max_size=6))
def test_salts_of_tenants_differ(pairs: list[tuple[str, str | None]]) -> None:
    """One salt per (tenant, client's salt), the same at every replica; another fleet key, another salt."""
    pairs = [(tenant.replace("\0", ""), given) for tenant, given in pairs]
    salts, again = CacheSalts(KEY, apart=True), CacheSalts(KEY, apart=True)
    made = {pair: salts.of(*pair) for pair in pairs}
    assert len(set(made.values())) == len(made)
    assert made == {pair: again.of(*pair) for pair in pairs}
    others = {CacheSalts(b"another fleet key", apart=True).of(*pair) for pair in pairs}
    assert not others & set(made.values())
    assert all(CacheSalts(KEY, apart=False).of(*pair) == pair[1] for pair in pairs)


def test_the_salt_is_an_hmac_of_tenant_and_salt() -> None:
    """What other replicas and other versions must make alike."""
    secret = hmac.digest(KEY, b"antiphon cache salt", "sha256")
    expected = base64.b64encode(hmac.digest(secret, b"red\0mine", "sha256")).decode()
    assert CacheSalts(KEY, apart=True).of("red", "mine") == expected


@contextlib.asynccontextmanager
async def guarded(c: Cluster, model_dir: Path) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    """The replica behind a gateway that asks for keys."""
    config = replace(GUARDED, model=ModelConfig(str(model_dir), (MODEL,)))
    access = access_of(config, None, c.ledger.connection)
    tokenizers = TokenizerSource(lambda: str(model_dir))
    url, fleet = c.ledger.connection.where, c.ledger.connection.fleet
    logs, store = TokenLogs(url, fleet=fleet, memory_bytes=2**20), SessionStore(c.ledger)
    app = create_app(
        c.replica,
        tokenizers,
        config,
        c.replica,
        Metrics(),
        access,
        store,
        ResponseStore(c.ledger, 60.0),
        Conversations(logs, store, c.ledger, 60.0),
        c.replica.session_ended,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
            async with aiohttp.ClientSession(timeout=timeout) as http:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}", http
        finally:
            server.should_exit = True
            await serving
            await logs.close()


def test_tenants_share_nothing(valkey_url: str, tiny_model_dir: Path) -> None:
    """Same prompt, same session id: no KV of another tenant is hit, its session and receipts are not seen."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c, guarded(c, tiny_model_dir) as (url, http):
            prompt = [40 + n % 300 for n in range(640)]

            async def cached(key: str, session: str, **more: Any) -> int:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "session_id": session, **more}
                async with http.post(url + TEXT_PATH, json=body, headers=bearer(key)) as answer:
                    found = await answer.json()
                    assert answer.status == 200, found
                await c.recorded()
                cached: int = found["usage"]["prompt_tokens_details"]["cached_tokens"]
                return cached

            async def listed(path: str, key: str) -> set[tuple[str, str]]:
                async with http.get(url + path, headers=bearer(key)) as answer:
                    found = (await answer.json())["data"]
                return {(item["tenant"], item.get("session_id") or item["id"]) for item in found}

            assert await cached(A, "s") == 0, "nobody has sent it"
            assert await cached(B, "s") == 0, "the other tenant's KV is not hit"
            assert await cached(A, "s2") >= 624, "the tenant's own is"
            assert await cached(B, "s2") >= 624
            assert await cached(A, "s3", cache_salt="x") == 0, "a client's own salt still counts"
            red, blue = {("red", s) for s in ("s", "s2", "s3")}, {("blue", "s"), ("blue", "s2")}
            for path in ("/v1/sessions", "/v1/receipts"):
                assert await listed(path, A) == red, path
                assert await listed(path, B) == blue, path
                assert await listed(path, ADMIN) == red | blue, path
            assert await listed("/v1/receipts?session_id=s3", B) == set()

    asyncio.run(scenario())


async def ask(
    http: aiohttp.ClientSession, method: str, url: str, key: str, body: Any = None
) -> tuple[int, Any]:
    async with http.request(method, url, json=body, headers=bearer(key)) as answer:
        return answer.status, await answer.json()


def test_tenants_cannot_reach_each_others_things(valkey_url: str, tiny_model_dir: Path) -> None:
    """By an id that they know: sessions, histories, stored responses; nor by saying the same words."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c, guarded(c, tiny_model_dir) as (url, http):
            words = [{"role": "user", "content": "the launch code is 1234"}]
            chat = {"model": MODEL, "messages": words, "max_tokens": 4, "ignore_eos": True}
            status, said = await ask(http, "POST", url + CHAT_PATH, A, chat | {"session_id": "s"})
            assert status == 200
            await c.recorded()
            for key, expected in ((A, 200), (ADMIN, 404), (B, 404)):
                assert (await ask(http, "GET", f"{url}/v1/sessions/s", key))[0] == expected
            for method, path, body in (
                ("POST", "/v1/sessions/s", {"ttl_s": 5}),
                ("POST", "/v1/sessions/s/fork", {"n": 1}),
                ("POST", "/v1/sessions/s/events", {"type": "tool_start"}),
                ("DELETE", "/v1/sessions/s", None),
            ):
                status, answer = await ask(http, method, url + path, B, body)
                assert (status, answer["error"]["code"]) == (404, "session_not_found"), path

            more = [{"role": "tool", "tool_call_id": "1", "content": "and?"}]
            append = {"model": MODEL, "messages": more, "max_tokens": 4, "ignore_eos": True}
            status, answer = await ask(http, "POST", f"{url}/v1/sessions/s/rounds", B, append)
            assert status in (404, 410), answer
            own = append | {"messages": [{"role": "user", "content": "and?"}]}
            tokens = {}
            for key in (A, B):
                status, answer = await ask(http, "POST", f"{url}/v1/sessions/s/rounds", key, own)
                if status == 200:
                    tokens[key] = answer["usage"]["prompt_tokens"]
                await c.recorded()
            assert tokens[A] > tokens.get(B, 0), "what A said is not in B's prompt"

            reply = said["choices"][0]["message"]
            on = [*words, reply, {"role": "user", "content": "and then?"}]
            for key, found_by in ((B, "new"), (A, "prefix:fork")):
                status, answer = await ask(http, "POST", url + CHAT_PATH, key, chat | {"messages": on})
                assert status == 200 and answer["session"]["identified_by"] == found_by
                await c.recorded()

            first = {"model": MODEL, "input": "remember this", "max_output_tokens": 4}
            status, stored = await ask(http, "POST", f"{url}/v1/responses", A, first)
            assert status == 200
            one = f"{url}/v1/responses/{stored['id']}"
            after = first | {"previous_response_id": stored["id"]}
            assert (await ask(http, "GET", one, B))[0] == 404
            assert (await ask(http, "DELETE", one, B))[0] == 404
            assert (await ask(http, "POST", f"{url}/v1/responses", B, after))[0] == 404
            assert (await ask(http, "GET", one, A))[0] == 200

    asyncio.run(scenario())


def test_explain_sees_the_callers_session_only(valkey_url: str, tiny_model_dir: Path) -> None:
    """What is known of a session and held of a prompt is told to its tenant."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", engines="d0") as c, guarded(c, tiny_model_dir) as (url, http):
            session = uuid.uuid4().hex
            body = {"model": MODEL, "prompt": list(range(40, 300)), "max_tokens": 4, "session_id": session}
            async with http.post(url + TEXT_PATH, json=body, headers=bearer(A)) as answer:
                assert answer.status == 200
            await c.recorded()
            told = {}
            for key in (A, B):
                async with http.post(url + "/v1/explain", json=body, headers=bearer(key)) as answer:
                    told[key] = await answer.json()
            assert told[A]["session"]["known"] and told[A]["history_tokens"] == {"d0": 256}
            assert not told[B]["session"]["known"] and told[B]["history_tokens"] == {}

    asyncio.run(scenario())
