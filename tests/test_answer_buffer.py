"""Slow readers: while the budget lasts they hold no engine and no lease; beyond it they are waited for."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.base import Chunk
from antiphon.scheduler.answer_buffer import AnswerBudget, size_of
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.rounds import STREAM_BUFFER_CHUNKS
from tests.gateway_helpers import chat_chunk, text_chunk
from tests.replica_helpers import Cluster, cluster, until

PROMPT = list(range(1000, 1064))
TOKENS = 3 * STREAM_BUFFER_CHUNKS


def buffered(c: Cluster) -> float:
    return float(c.replica._answers.used_bytes)


@given(st.lists(st.integers(0, 100)), st.integers(0, 500))
def test_no_more_is_taken_than_there_is(sizes: list[int], limit: int) -> None:
    budget = AnswerBudget(limit)
    taken = [size for size in sizes if budget.take(size)]
    assert budget.used_bytes == sum(taken) <= limit
    for size in taken:
        budget.give_back(size)
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    "chunk",
    [
        text_chunk("a", (1,)),
        chat_chunk({"content": "word " * 200}, (1, 2, 3)),
        chat_chunk({"content": "x", "logprobs": [{"token": str(i), "logprob": -i / 7} for i in range(60)]}),
    ],
    ids=["text", "long", "logprobs"],
)
def test_what_is_counted_is_at_least_what_it_takes(chunk: Chunk) -> None:
    """And no more than a few times that, for events parsed from an engine's stream."""
    written = msgspec.json.encode(chunk.data)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [Chunk(msgspec.json.decode(written), tuple(chunk.token_ids)) for _ in range(200)]
        each = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()
    assert each <= size_of(chunk) <= 5 * each


def test_a_slow_reader_holds_neither_engine_nor_lease(valkey_url: str) -> None:
    """The round ends and the session goes on elsewhere, while its answer waits whole for its reader."""

    async def scenario() -> None:
        async with cluster(valkey_url, "local", answers_memory_bytes=2**24) as c:
            async with c.replica.submit(c.request("s", PROMPT, TOKENS)) as slow:
                await slow.start()
                await until(lambda: slow.receipt is not None)
                assert slow.receipt is not None and slow.receipt.outcome is Outcome.COMPLETED
                assert not c.replica.core.rounds and not c.replica.rounds_in_flight and not slow.lagged
                await c.recorded()
                assert buffered(c) > 0
                next_round, _ = await c.run("s", [*PROMPT, *range(64)])
                assert next_round.session_id == "s" and next_round.round_number == 2  # no fork: it is free
                ids = [token async for chunk in slow for token in chunk.token_ids]
                assert len(ids) == TOKENS
            assert buffered(c) == 0

    asyncio.run(scenario())


def test_without_budget_the_engine_waits_and_nothing_is_lost(valkey_url: str) -> None:
    """Whoever leaves gives back what it took; then others run ahead again."""

    async def scenario() -> None:
        room: dict[str, Any] = {"answers_memory_bytes": 100 * size_of(text_chunk("word", (1,)))}
        async with cluster(valkey_url, "local", **room) as c:
            async with c.replica.submit(c.request("a", PROMPT, TOKENS)) as slow:
                await until(lambda: slow.lagged)
                assert slow.receipt is None and len(slow._chunks) < TOKENS
                assert 0 < buffered(c) <= room["answers_memory_bytes"]
                ids = [token async for chunk in slow for token in chunk.token_ids]
                assert len(ids) == TOKENS and buffered(c) == 0
            async with c.replica.submit(c.request("b", PROMPT, TOKENS)) as gone:
                await until(lambda: gone.lagged)
            assert buffered(c) == 0
            await until(lambda: not c.replica.core.rounds)

    asyncio.run(scenario())
