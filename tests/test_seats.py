"""Requests under way: a bound that holds, and retries that are not refused because of their first try."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.scheduler.config import Config, GatewayConfig
from antiphon.scheduler.gateway.seats import Seat, Seats
from antiphon.scheduler.rounds import RoundHandle
from tests.gateway_helpers import TEXT, TEXT_PATH, Gateway, running_gateway, three_words, until
from tests.test_limits import OK, limited, status
from tests.test_tenants import A, B

BOUND = 3
STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "again", "leave"]), st.integers(0, 9)), min_size=1, max_size=40
)


@given(STEPS)
def test_no_more_than_two_sit_on_a_seat(steps: list[tuple[str, int]]) -> None:
    """Whoever comes and goes in whatever order; when all have gone all seats are free."""
    seats, sitting = Seats(), list[Seat]()
    for what, number in steps:
        if what == "leave":
            if sitting:
                seats.leave(sitting.pop(number % len(sitting)))
        else:
            full, lent = seats.taken >= BOUND, seats.lends(f"call {number % 4}")
            seat = seats.take(BOUND, f"call {number % 4}", again=what == "again")
            assert (seat is not None) == (not full or (what == "again" and lent))
            sitting += [seat] if seat is not None else []
        assert sum(seat.counts for seat in sitting) == seats.taken <= BOUND
        assert len(sitting) <= 2 * BOUND
    for seat in sitting:
        seats.leave(seat)
    assert seats.taken == 0 and not seats._named


def test_whoever_is_refused_gives_the_seat_back() -> None:
    """Another retry finds the first try there again."""
    seats = Seats()
    first = seats.take(1, "a")
    for _ in range(2):
        retry = seats.take(1, "a", again=True)
        assert retry is not None and not seats.lends("a") and seats.take(1, "a", again=True) is None
        seats.leave(retry)
    assert first is not None and first.counts and seats.taken == 1
    seats.leave(first)
    assert seats.take(1, "b") is not None


# ---------------------------------------------------------------- at the gateway

TRIES = pytest.mark.parametrize(
    ("first", "again"),
    [({"Idempotency_Key": "k"},) * 2, ({}, {"X_Stainless_Retry_Count": "1"})],
    ids=["key", "count"],
)


async def held(gateway: Gateway, key: str, headers: dict[str, str]) -> asyncio.Task[Any]:
    """A round that hangs; those after it do not."""
    begun = asyncio.Event()

    async def hangs(handle: RoundHandle) -> None:
        begun.set()
        await asyncio.Event().wait()

    gateway.runner.script = hangs
    task = asyncio.create_task(status(gateway, key, **headers))
    await begun.wait()
    gateway.runner.script = three_words
    return task


@TRIES
def test_rounds_in_flight_of_a_key(
    tiny_model_dir: Path, first: dict[str, str], again: dict[str, str]
) -> None:
    """A retry is let in while its first try is; another request is not, nor another key's retry."""

    async def scenario() -> None:
        async with running_gateway(three_words, tiny_model_dir, limited(rounds_in_flight=1)) as gateway:
            task = await held(gateway, A, first)
            other = {"Idempotency_Key": "other", "X_Stainless_Retry_Count": "1", "X_Session_ID": "s"}
            full = (429, "rate_limit_exceeded")
            assert await status(gateway, A) == full and await status(gateway, A, **other) == full
            assert await status(gateway, A, **again) == OK
            assert await status(gateway, A) == full, "the first try hangs still"
            task.cancel()
            await until(lambda: len(gateway.runner.gone) == 1)
            assert await status(gateway, A) == OK

    asyncio.run(scenario())


@TRIES
def test_rounds_of_a_replica(tiny_model_dir: Path, first: dict[str, str], again: dict[str, str]) -> None:
    """The same at a replica that has as many as it takes, before anything is made of the body."""

    async def scenario() -> None:
        config = Config(gateway=GatewayConfig(max_rounds=1), keys=limited().keys)
        async with running_gateway(three_words, tiny_model_dir, config) as gateway:
            task = await held(gateway, A, first)
            full = (503, "overloaded")
            assert await status(gateway, A) == full
            assert await status(gateway, B, **again) == full, "another tenant's"
            assert await status(gateway, A, {**TEXT, "prompt": [5]}, X_Stainless_Retry_Count="1") == full
            assert await status(gateway, A, **again) == OK
            assert await status(gateway, A) == full
            task.cancel()
            await until(lambda: b"antiphon_gateway_rounds 0.0\n" in gateway.metrics.render())
            assert await status(gateway, A) == OK

    asyncio.run(scenario())


def test_a_retry_that_never_sends_its_body_is_not_waited_for(tiny_model_dir: Path) -> None:
    """It gets the refusal that it would have got at once."""

    async def scenario() -> None:
        config = Config(gateway=GatewayConfig(max_rounds=1, body_deadline_s=0.1))
        async with running_gateway(three_words, tiny_model_dir, config) as gateway:
            task = await held(gateway, A, {})
            reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
            body = json.dumps(TEXT).encode()
            head = f"POST {TEXT_PATH} HTTP/1.1\r\nHost: x\r\nX-Stainless-Retry-Count: 1\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])
            async with asyncio.timeout(5):
                assert b" 503 " in await reader.readline()
            writer.transport.abort()
            task.cancel()

    asyncio.run(scenario())
