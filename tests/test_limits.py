"""Limits of API keys: the bucket's sums, the script in the ledger, and what clients get to see."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.scheduler.access_config import LimitsConfig
from antiphon.scheduler.api_keys import KeyRing
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway.caller import Caller, caller_var
from antiphon.scheduler.gateway.limits import Limits, duration
from antiphon.scheduler.gateway.salts import CacheSalts
from antiphon.scheduler.gateway.tenants import Access
from antiphon.scheduler.gateway.token_bucket import Bucket, level, take
from antiphon.scheduler.ledger_connection import LedgerConnection
from antiphon.scheduler.rounds import RoundHandle, RoundRefused
from tests.gateway_helpers import (
    CHAT,
    CHAT_PATH,
    TEXT,
    TEXT_PATH,
    Gateway,
    running_gateway,
    text_chunk,
    three_words,
    until,
)
from tests.replica_helpers import KEY
from tests.test_tenants import A, B, bearer, key_config

TEN = {**TEXT, "prompt": list(range(10, 20))}
"""Ten prompt tokens; `three_words` answers it with three."""


def limited(**limits: int) -> Config:
    """Key A has these limits, key B has none."""
    return Config(keys=(key_config("a", A, "red", **limits), key_config("b", B, "blue")))


# ---------------------------------------------------------------- the bucket

STEPS = st.lists(
    st.tuples(st.floats(0, 90), st.integers(0, 400), st.floats(-50, 50)), min_size=1, max_size=30
)


@given(st.integers(1, 300), STEPS)
def test_a_bucket_lets_in_no_more_than_it_says(
    per_minute: int, steps: list[tuple[float, int, float]]
) -> None:
    """Over any stretch: what it held, what has come since, and one prompt that was too long for it."""
    bucket, now = None, 0.0
    let_in: list[tuple[float, int]] = []
    for gap_s, asked, _ in steps:
        now += gap_s
        taken = take(bucket, per_minute, asked, 0.0, now)
        bucket = taken.bucket
        assert bucket.level <= per_minute
        if taken.wait_s == 0:
            let_in.append((now, asked))
    for first in range(len(let_in)):
        for last in range(first, len(let_in)):
            stretch_s = let_in[last][0] - let_in[first][0]
            total = sum(asked for _, asked in let_in[first:last])
            assert total <= per_minute + stretch_s * per_minute / 60 + 400


@given(st.integers(1, 300), STEPS)
def test_who_waits_as_long_as_told_is_let_in(per_minute: int, steps: list[tuple[float, int, float]]) -> None:
    """The wait is enough, and no longer than it must be; a refusal takes nothing but what was owed."""
    bucket, now = None, 0.0
    for gap_s, asked, owed in steps:
        now += gap_s
        before = level(bucket, per_minute, now, owed)
        taken = take(bucket, per_minute, asked, owed, now)
        if taken.wait_s > 0:
            assert taken.bucket.level == before
            assert take(taken.bucket, per_minute, asked, 0.0, now + taken.wait_s * 1.0001 + 1e-6).wait_s == 0
            assert take(taken.bucket, per_minute, asked, 0.0, now + taken.wait_s * 0.99 - 1e-3).wait_s > 0
        else:
            assert taken.bucket.level == before - asked
        bucket = taken.bucket


def test_a_clock_that_goes_back_fills_nothing() -> None:
    """And a long prompt needs a full bucket, no more."""
    assert level(Bucket(5.0, 100.0), 60, 40.0) == 5.0
    assert level(Bucket(5.0, 100.0), 60, 110.0, owed=8.0) == 7.0
    assert level(Bucket(50.0, 0.0), 60, 100.0, owed=80.0) == 60.0, "what was owed has come back since"
    assert take(None, 60, 1000, 0.0, 0.0) == (Bucket(-940.0, 0.0), 0.0)
    assert take(Bucket(59.0, 0.0), 60, 1000, 0.0, 0.0).wait_s == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.integers(0, 3000), st.floats(-20, 60)), min_size=1, max_size=8),
)
def test_the_ledger_does_the_same_sums(
    valkey_url: str, per_minute: int, steps: list[tuple[int, float]]
) -> None:
    """data/limit.lua against token_bucket.py, on the server's clock."""

    async def scenario() -> None:
        connection = LedgerConnection(valkey_url, secrets.token_hex(6), 5.0, 2)
        try:
            bucket = None
            for asked, owed in steps:
                keys = connection.keys("limit:k", "limit_sessions:k")
                arguments = [per_minute, asked, repr(owed), 0, "", 1000]
                let_in, full, left, wait_ms, _, now_ms = await connection.script("limit", keys, arguments)
                taken = take(bucket, per_minute, asked, owed, now_ms / 1000)
                bucket = taken.bucket
                assert bool(let_in) == (taken.wait_s == 0) and not full
                assert float(left) == pytest.approx(bucket.level, abs=1e-3)
                assert wait_ms / 1000 == pytest.approx(taken.wait_s, abs=1.1e-3)
        finally:
            await connection.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0ms"), (0.0204, "21ms"), (1.5, "1.5s"), (59.0, "59s"), (360.4, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# ---------------------------------------------------------------- at the gateway


@asynccontextmanager
async def gateway_at(
    url: str, config: Config, model_dir: Path, fleet: str, script: Any = three_words
) -> AsyncIterator[Gateway]:
    """A gateway whose limits are counted in the ledger."""
    connection = LedgerConnection(url, fleet, 2.0, 4)
    access = Access(KeyRing(config), CacheSalts(KEY, apart=True), Limits(connection, session_ttl_s=60.0))
    try:
        async with running_gateway(script, model_dir, config, access=access) as gateway:
            yield gateway
    finally:
        await connection.close()


async def status(gateway: Gateway, key: str, body: Any = TEN, **headers: str) -> tuple[int, str]:
    """Status and error code."""
    response, answer = await gateway.post(TEXT_PATH, body, **bearer(key), **headers)
    return response.status, answer["error"]["code"] if response.status != 200 else ""


OK = (200, "")


def test_tokens_per_minute_are_counted_over_the_fleet(valkey_url: str, tiny_model_dir: Path) -> None:
    """Prompt and output; at either replica; the other key is not touched. Headers as OpenAI has them."""

    async def scenario() -> None:
        config, fleet = limited(tokens_per_minute=30), secrets.token_hex(6)
        async with (
            gateway_at(valkey_url, config, tiny_model_dir, fleet) as one,
            gateway_at(valkey_url, config, tiny_model_dir, fleet) as two,
        ):
            response, _ = await one.post(TEXT_PATH, TEN, **bearer(A))
            assert response.status == 200
            assert response.headers["x-ratelimit-limit-tokens"] == "30"
            assert response.headers["x-ratelimit-remaining-tokens"] == "20"
            assert response.headers["x-ratelimit-reset-tokens"] == "20s"
            response, _ = await one.post(TEXT_PATH, TEN, **bearer(A))
            # 20 are left; the answer of 3 is told now, and what has come since is less than a second's
            assert response.headers["x-ratelimit-remaining-tokens"] in ("7", "8")
            response, answer = await two.post(TEXT_PATH, TEN, **bearer(A))
            assert (response.status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer["error"]["type"] == "rate_limit_error"
            assert 0 < int(response.headers["retry-after-ms"]) < 8000
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-ratelimit-limit-tokens"] == "30"
            assert len(two.runner.requests) == 0
            assert await status(two, B) == OK
            assert "x-ratelimit-limit-tokens" not in (await two.post(TEXT_PATH, TEN, **bearer(B)))[0].headers

    asyncio.run(scenario())


def test_a_refused_round_gives_its_tokens_back(valkey_url: str, tiny_model_dir: Path) -> None:
    """What no engine took is not charged; what a client left early is, as far as it was generated."""

    async def refuses(handle: RoundHandle) -> None:
        handle.finish(RoundRefused("no_engine_available", "no engine", 1.0))

    async def scenario() -> None:
        config = limited(tokens_per_minute=12)
        fleet = secrets.token_hex(6)
        async with gateway_at(valkey_url, config, tiny_model_dir, fleet, refuses) as gateway:
            for _ in range(3):
                assert await status(gateway, A) == (503, "no_engine_available")
            gateway.runner.script = three_words
            assert await status(gateway, A) == OK
            assert (await status(gateway, A))[0] == 429

    asyncio.run(scenario())


def test_an_answer_that_is_left_early_is_charged(valkey_url: str, tiny_model_dir: Path) -> None:
    """By its chunks: who goes away before the end has used what was generated."""
    left = asyncio.Event()

    async def endless(handle: RoundHandle) -> None:
        for number in range(40):
            await handle.push(text_chunk(" x", (number,)))
        await left.wait()

    async def scenario() -> None:
        config = limited(tokens_per_minute=60)
        fleet = secrets.token_hex(6)
        async with gateway_at(valkey_url, config, tiny_model_dir, fleet, endless) as gateway:
            body = {**TEN, "stream": True}
            async with gateway.http.post(gateway.url + TEXT_PATH, json=body, headers=bearer(A)) as response:
                await response.content.readline()
            await until(lambda: len(gateway.runner.gone) == 1)
            gateway.runner.script = three_words
            response, _ = await gateway.post(TEXT_PATH, TEN, **bearer(A))
            # 60 - 10 - 40 = 10, and a few that came since
            assert response.status == 200
            assert 0 <= int(response.headers["x-ratelimit-remaining-tokens"]) <= 5

    asyncio.run(scenario())


def test_rounds_in_flight(tiny_model_dir: Path) -> None:
    """The third at once is refused; when one has ended, or its client has gone, there is room again."""
    go = asyncio.Event()

    async def waits(handle: RoundHandle) -> None:
        await go.wait()
        await three_words(handle)

    async def scenario() -> None:
        async with running_gateway(waits, tiny_model_dir, limited(rounds_in_flight=2)) as gateway:
            first = [asyncio.create_task(status(gateway, A)) for _ in range(2)]
            await until(lambda: len(gateway.runner.requests) == 2)
            response, answer = await gateway.post(CHAT_PATH, CHAT, **bearer(A))
            assert (response.status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert response.headers["retry-after-ms"] == "1000"
            other = asyncio.create_task(status(gateway, B))
            await until(lambda: len(gateway.runner.requests) == 3)
            first[0].cancel()
            await until(lambda: len(gateway.runner.gone) == 1)
            third = asyncio.create_task(status(gateway, A))
            await until(lambda: len(gateway.runner.requests) == 4)
            go.set()
            assert set(await asyncio.gather(first[1], other, third)) == {OK}
            assert await status(gateway, A) == OK

    asyncio.run(scenario())


def test_live_sessions(valkey_url: str, tiny_model_dir: Path) -> None:
    """A new session over the limit is refused at any replica, a known one goes on; ended ones make room."""

    async def scenario() -> None:
        config, fleet = limited(sessions=2), secrets.token_hex(6)
        async with (
            gateway_at(valkey_url, config, tiny_model_dir, fleet) as one,
            gateway_at(valkey_url, config, tiny_model_dir, fleet) as two,
        ):
            assert await status(one, A, x_session_id="s1") == OK
            assert await status(two, A, x_session_id="s2") == OK
            over = (429, "session_limit_exceeded")
            for gateway in (one, two):
                assert await status(gateway, A, x_session_id="s3") == over
                assert await status(gateway, A, x_session_id="s1") == OK
            assert await status(one, B, x_session_id="s3") == OK
            # s1 and s2 were let in just now; once they are older, those without a record have ended.
            connection = LedgerConnection(valkey_url, fleet, 2.0, 2)
            try:
                (sessions,) = connection.keys("limit_sessions:a")
                for name in ("s1", "s2"):
                    key = connection.session_key("red", name)
                    await connection.command("ZADD", sessions, 1, key)
                await connection.command("HSET", connection.session_key("red", "s1"), "session_id", "s1")
                await connection.command("DEL", f"{sessions}:pruned")
                assert await status(two, A, x_session_id="s3") == OK
                assert await status(two, A, x_session_id="s2") == over
                assert await status(one, A, x_session_id="s1") == OK
            finally:
                await connection.close()

    asyncio.run(scenario())


def test_sessions_that_are_made_without_a_round_count_too(valkey_url: str) -> None:
    """`opened` counts as a round does; a session that is known is not counted twice."""

    async def scenario() -> None:
        connection = LedgerConnection(valkey_url, secrets.token_hex(6), 2.0, 2)
        limits = Limits(connection, session_ttl_s=60.0)
        token = caller_var.set(Caller("red", "a", limits=LimitsConfig(sessions=2)))
        try:
            for name in ("s1", "s2", "s1"):
                await limits.opened(name)
            with pytest.raises(ApiError) as caught:
                await limits.opened("s3")
            assert (caught.value.status, caught.value.code) == (429, "session_limit_exceeded")
        finally:
            caller_var.reset(token)
            await connection.close()

    asyncio.run(scenario())


def test_without_its_ledger_a_replica_counts_for_itself(tiny_model_dir: Path) -> None:
    """Nothing waits for a ledger that is away, and no limit is lifted."""

    async def scenario() -> None:
        config, nowhere = limited(sessions=2, tokens_per_minute=32), "redis://127.0.0.1:1"
        async with gateway_at(nowhere, config, tiny_model_dir, "f") as gateway:
            assert await status(gateway, A, x_session_id="s1") == OK
            assert await status(gateway, A, x_session_id="s2") == OK
            assert await status(gateway, A, x_session_id="s3") == (429, "session_limit_exceeded")
            response, answer = await gateway.post(TEXT_PATH, TEN, x_session_id="s1", **bearer(A))
            assert (response.status, answer["error"]["code"]) == (429, "rate_limit_exceeded")

    asyncio.run(scenario())


def test_without_keys_the_limits_are_of_all_clients_together(tiny_model_dir: Path) -> None:
    """[limits] counts without [[keys]] too."""

    async def scenario() -> None:
        config = Config(limits=LimitsConfig(tokens_per_minute=15))
        async with running_gateway(three_words, tiny_model_dir, config) as gateway:
            assert await status(gateway, "anything") == OK
            assert (await status(gateway, "another"))[0] == 429

    asyncio.run(scenario())


def test_the_body_of_a_key(tiny_model_dir: Path) -> None:
    """A key's own limit, never above the gateway's."""

    async def scenario() -> None:
        config = replace(limited(body_bytes=100), limits=LimitsConfig(body_bytes=2000))
        async with running_gateway(three_words, tiny_model_dir, config) as gateway:
            long = {**TEXT, "prompt": list(range(10, 60))}
            assert await status(gateway, A) == OK
            assert await status(gateway, A, long) == (413, "body_too_large")
            assert await status(gateway, B, long) == OK
            assert await status(gateway, B, {**TEXT, "prompt": [300] * 1000}) == (413, "body_too_large")

    asyncio.run(scenario())


def test_explaining_costs_nothing(tiny_model_dir: Path) -> None:
    """Only rounds are counted."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, limited(tokens_per_minute=12)) as gateway:
            for _ in range(3):
                response, _ = await gateway.post("/v1/explain", TEN, **bearer(A))
                assert response.status == 200
            assert await status(gateway, A) == OK

    asyncio.run(scenario())
