"""What the scheduler may rely on, of either kind of engine: KV, and how it moves between engines."""

from __future__ import annotations

import asyncio

import pytest

from antiphon.engines.base import EngineError
from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import ROOT, namespace_seed, page_hashes
from tests.engine_contract import DEADLINE_S, PATHS, play, prefill_on, pull
from tests.simulated_helpers import (
    PAGE,
    Pair,
    answer,
    make_prompt,
    make_request,
    make_rid,
    post,
)

pytest_plugins = ["tests.engine_pair"]


def test_hello_is_the_truth(engine_pair: Pair) -> None:
    """A hello names the incarnation, page size, pool and addresses that record and load know, too."""

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        for adapter in (prefill, decode):
            hello, record = adapter.hello, adapter.record
            assert hello is not None
            assert hello.engine_id == record.engine_id
            assert hello.incarnation == record.incarnation
            assert hello.kv_addresses == record.kv_addresses
            assert hello.world_size == len(record.kv_addresses)
            assert hello.page_size_tokens == PAGE
            assert hello.pool_tokens == (await adapter.load(deadline_s=DEADLINE_S)).pool_tokens
            assert hello.store_pages * PAGE > hello.pool_tokens, "the store must outlast the device pool"
            assert hello.context_tokens > 0
        assert prefill.hello is not None and decode.hello is not None
        assert prefill.hello.incarnation != decode.hello.incarnation
        assert prefill.hello.transport == decode.hello.transport

    play(engine_pair, scenario)


@pytest.mark.parametrize("tokens", [193, 200, 207, 208])
def test_prefill_shows_every_whole_page(engine_pair: Pair, tokens: int) -> None:
    """After the reply of a prefill the directory holds all whole pages of the prompt, and no other."""
    prompt = make_prompt(f"whole pages {tokens}", tokens)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        hashes = page_hashes(prompt, PAGE)
        assert len(hashes) == tokens // PAGE
        assert await prefill.lookup(hashes, deadline_s=DEADLINE_S) == 0
        assert await prefill_on(prefill, prompt) == 0
        assert await prefill.lookup(hashes, deadline_s=DEADLINE_S) == len(hashes)
        assert await decode.lookup(hashes, deadline_s=DEADLINE_S) == 0

    play(engine_pair, scenario)


@pytest.mark.parametrize("tokens", [193, 200, 208, 209])
def test_last_token_is_never_cached(engine_pair: Pair, tokens: int) -> None:
    """A repeated prompt finds whole pages up to the one before its last token."""
    prompt = make_prompt(f"last token {tokens}", tokens)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        await prefill_on(prefill, prompt)
        assert await prefill_on(prefill, prompt) == (tokens - 1) // PAGE * PAGE

    play(engine_pair, scenario)


def test_prefill_generates_nothing(engine_pair: Pair) -> None:
    """`max_new_tokens` 0 answers no token at all."""
    body = {
        "input_ids": make_prompt("generates nothing", 100),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "rid": make_rid(),
    }
    status, reply = asyncio.run(post(engine_pair.prefill, "/generate", body, engine_pair.fleet_key))
    assert status == 200
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"]["type"] == "length"
    assert reply["meta_info"]["prompt_tokens"] == 100


@pytest.mark.parametrize("path", PATHS)
def test_prefetch_brings_pages_that_the_next_round_uses(engine_pair: Pair, path: str) -> None:
    """What was prefilled on one engine and pulled by another is cached there, and the tokens are the same."""
    prompt = make_prompt(f"prefetch {path}", 300)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        hashes = page_hashes(prompt, PAGE)
        await prefill_on(prefill, prompt)
        assert await pull(decode, prefill, hashes) == len(hashes)
        assert await decode.lookup(hashes, deadline_s=DEADLINE_S) == len(hashes)
        here = await answer(decode, make_request(prompt, 12, path=path))
        assert here.cached_tokens == 288
        there = await answer(prefill, make_request(prompt, 12, path=path))
        assert len(here.token_ids) == 12
        assert here.token_ids == there.token_ids

    play(engine_pair, scenario)


def test_tokens_are_equal_whichever_arm(engine_pair: Pair) -> None:
    """Rounds that alternate between computing here and pulling from there continue one and the same text."""
    prompt = make_prompt("arms", 150)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        tokens = list(prompt)
        for number in range(4):
            source, puller = (prefill, decode) if number % 2 == 0 else (decode, prefill)
            await prefill_on(source, tokens)
            hashes = page_hashes(tokens, PAGE)
            await pull(puller, source, hashes)
            pulled = await answer(puller, make_request(tokens, 10))
            assert pulled.cached_tokens == (len(tokens) - 1) // PAGE * PAGE
            # Another salt finds nothing: all is computed.
            computed = await answer(source, make_request(tokens, 10, cache_salt=f"fresh {number}"))
            assert computed.cached_tokens == 0
            assert pulled.token_ids == computed.token_ids
            tokens += [*pulled.token_ids, *make_prompt(f"arms {number}", 37)]

    play(engine_pair, scenario)


def test_output_is_cached_but_for_its_last_token(engine_pair: Pair) -> None:
    """The next round finds prompt and output of the last one, whole pages without the last output token."""
    prompt = make_prompt("output cached", 100)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        first = await answer(decode, make_request(prompt, 61))
        history = [*prompt, *first.token_ids]
        with_kv = (len(history) - 1) // PAGE * PAGE
        hashes = page_hashes(history, PAGE)
        assert await decode.lookup(hashes, deadline_s=DEADLINE_S) == with_kv // PAGE
        second = await answer(decode, make_request([*history, *make_prompt("more", 40)], 5))
        assert second.cached_tokens == with_kv

    play(engine_pair, scenario)


def test_prefetch_from_a_void_incarnation_brings_nothing(engine_pair: Pair) -> None:
    """A source that is no longer the engine meant gives 0 pages and the reason."""
    prompt = make_prompt("void", 100)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        await prefill_on(prefill, prompt)
        hashes = page_hashes(prompt, PAGE)
        result = await decode.prefetch(
            prefill.record.kv_addresses, "an older life", ROOT, hashes, deadline_s=DEADLINE_S
        )
        assert (result.pages, result.pulled_pages, result.pulled_bytes) == (0, 0, 0)
        assert "incarnation" in result.reason
        assert await decode.lookup(hashes, deadline_s=DEADLINE_S) == 0

    play(engine_pair, scenario)


def test_prefetch_of_unknown_pages_brings_nothing(engine_pair: Pair) -> None:
    """Pages that the source never had are 0 pages with a reason, not an error."""
    hashes = page_hashes(make_prompt("unknown", 100), PAGE)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        record = prefill.record
        result = await decode.prefetch(
            record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=DEADLINE_S
        )
        assert (result.pages, result.pulled_pages) == (0, 0)
        assert result.reason

    play(engine_pair, scenario)


def test_prefetch_brings_the_prefix_that_there_is(engine_pair: Pair) -> None:
    """Of a chain that the source holds in part, that part comes; what was here is not pulled again."""
    prompt = make_prompt("in part", 320)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        hashes = page_hashes(prompt, PAGE)
        await prefill_on(decode, prompt[:64])
        await prefill_on(prefill, prompt[:160])
        record = prefill.record
        result = await decode.prefetch(
            record.kv_addresses, record.incarnation, ROOT, hashes, deadline_s=DEADLINE_S
        )
        assert (result.pages, result.pulled_pages) == (10, 6)
        assert decode.hello is not None
        assert result.pulled_bytes == 6 * decode.hello.page_bytes
        assert result.reason
        again = await decode.prefetch(
            record.kv_addresses, record.incarnation, ROOT, hashes[:10], deadline_s=DEADLINE_S
        )
        assert (again.pages, again.pulled_pages, again.reason) == (10, 0, "")

    play(engine_pair, scenario)


def test_prefetch_of_the_tail_of_a_chain(engine_pair: Pair) -> None:
    """With the parent's hash, pages after those that are here already can be named alone."""
    prompt = make_prompt("tail", 320)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        hashes = page_hashes(prompt, PAGE)
        await prefill_on(decode, prompt[:160])
        await prefill_on(prefill, prompt)
        assert await pull(decode, prefill, hashes[10:], parent=hashes[9]) == 10
        assert await prefill_on(decode, prompt) == 304

    play(engine_pair, scenario)


def test_prefetch_from_nowhere_is_no_error(engine_pair: Pair) -> None:
    """A source that does not answer costs pages only."""
    hashes = page_hashes(make_prompt("nowhere", 64), PAGE)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        result = await decode.prefetch(("127.0.0.1:1",), "nobody", ROOT, hashes, deadline_s=DEADLINE_S)
        assert result.pages == 0
        assert result.reason

    play(engine_pair, scenario)


def test_wrong_fleet_key_is_denied(engine_pair: Pair) -> None:
    """Who does not know the fleet key learns nothing from the directory."""

    async def main() -> None:
        stranger = HttpEngine(engine_pair.decode, b"another key of the same length..")
        try:
            with pytest.raises(EngineError, match="denied"):
                await stranger.connect(DEADLINE_S)
            assert stranger.hello is None
        finally:
            await stranger.close()

    asyncio.run(main())


def test_cache_salt_separates(engine_pair: Pair) -> None:
    """The same prompt under another salt has other hashes, finds nothing, and can be pulled under its own."""
    prompt = make_prompt("salt", 160)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        await prefill_on(prefill, prompt, "red")
        assert await prefill_on(prefill, prompt, "blue") == 0
        assert await prefill_on(prefill, prompt) == 0
        assert await prefill_on(prefill, prompt, "red") == 144
        seed = namespace_seed(cache_salt="red")
        hashes = page_hashes(prompt, PAGE, seed)
        await pull(decode, prefill, hashes, parent=seed)
        assert await prefill_on(decode, prompt, "red") == 144
        assert await prefill_on(decode, prompt) == 0

    play(engine_pair, scenario)


def test_touch_takes_any_tip(engine_pair: Pair) -> None:
    """A touch of a chain that is there, or not there, is answered."""
    prompt = make_prompt("touch", 64)

    async def scenario(prefill: HttpEngine, decode: HttpEngine) -> None:
        await prefill_on(prefill, prompt)
        tip = page_hashes(prompt, PAGE)[-1]
        await prefill.touch(tip, deadline_s=DEADLINE_S)
        await decode.touch(tip, deadline_s=DEADLINE_S)

    play(engine_pair, scenario)
