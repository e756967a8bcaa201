"""The main claim: whatever way a round takes between two engines, its tokens are those of one plain engine.

Greedy, float32, 8 sessions at once, 6 rounds each, all three arms mixed, with and without a cache salt.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from antiphon.engines.base import EngineRecord, PrefetchResult, Usage
from antiphon.engines.http import HttpEngine
from antiphon.engines.page_hash import namespace_seed, page_hashes
from antiphon.policies.base import Arm
from tests.conftest import SglangPair
from tests.engine_calls import CHAT, COMPLETIONS, DEADLINE_S, answer, connected, random_prompt, random_rid

SESSIONS, ROUNDS = 8, 6
PAGE = 16
ARMS = (Arm.LOCAL, Arm.REMOTE_PULL, Arm.REMOTE_RECOMPUTE)


@dataclass(slots=True)
class Tally:
    """What a run moved and which arms it took."""

    arms: Counter[Arm] = field(default_factory=Counter)
    bytes_decode_to_prefill: int = 0
    bytes_prefill_to_decode: int = 0
    mismatches: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """One conversation after the other's manner, through both roads at once."""

    prefill: HttpEngine
    decode: HttpEngine
    plain: HttpEngine
    salt: str | None
    tally: Tally = field(default_factory=Tally)

    async def session(self, number: int) -> None:
        generator = random.Random(f"{self.salt}-{number}")
        path = CHAT if number % 2 else COMPLETIONS
        history: list[int] = []
        for round_number in range(ROUNDS):
            prompt = history + random_prompt(generator, generator.randrange(5, 160))
            arm = ARMS[generator.randrange(3)] if round_number else ARMS[number % 3]
            rid = random_rid(generator)
            expected, _ = await answer(self.plain, prompt, rid, path)
            got, usage = await self.round(arm, prompt, len(history), rid, path)
            label = f"session {number} round {round_number} {arm.value}"
            if got != expected:
                self.tally.mismatches.append(f"{label}: {got} instead of {expected}")
            if arm is not Arm.LOCAL and usage.cached_tokens < (len(prompt) - 1) // PAGE * PAGE:
                self.tally.mismatches.append(f"{label}: only {usage.cached_tokens} of {len(prompt)} came")
            self.tally.arms[arm] += 1
            history = prompt + expected

    async def round(
        self, arm: Arm, prompt: list[int], history_tokens: int, rid: str, path: str
    ) -> tuple[list[int], Usage]:
        hashes = page_hashes(prompt, PAGE, namespace_seed(cache_salt=self.salt))
        if arm is Arm.REMOTE_PULL:
            # The last token of an answer has no KV, so the page that it ends may be missing.
            pulled = await self.pull(self.prefill, self.decode, hashes[: max(history_tokens - 1, 0) // PAGE])
            self.tally.bytes_decode_to_prefill += pulled.pulled_bytes
        if arm is not Arm.LOCAL:
            await self.prefill.prefill(
                prompt, f"p{rid}", session_id=rid[:8], cache_salt=self.salt, deadline_s=DEADLINE_S
            )
            pulled = await self.pull(self.decode, self.prefill, hashes)
            self.tally.bytes_prefill_to_decode += pulled.pulled_bytes
        return await answer(self.decode, prompt, rid, path, self.salt)

    async def pull(self, puller: HttpEngine, source: HttpEngine, hashes: tuple[bytes, ...]) -> PrefetchResult:
        """Bring what the puller's store lacks of `hashes`; everything must come."""
        assert source.hello is not None
        if not hashes:
            return PrefetchResult(0, 0, 0, 0.0, "")
        held = await puller.lookup(hashes, deadline_s=5.0)
        parent = hashes[held - 1] if held else b""
        result = await puller.prefetch(
            source.record.kv_addresses, source.record.incarnation, parent, hashes[held:], deadline_s=20.0
        )
        if result.pages != len(hashes) - held:
            self.tally.mismatches.append(f"pulled {result.pages} of {len(hashes) - held}: {result.reason}")
        return result


@pytest.mark.parametrize("salt", [None, "tenant-1"])
def test_every_arm_gives_the_plain_engines_tokens(
    sglang_pair: SglangPair, plain_engine: EngineRecord, fleet_key: bytes, salt: str | None
) -> None:
    """Every output token of every round equals a plain engine's, and KV went both ways."""

    async def go() -> Tally:
        records = (sglang_pair.prefill, sglang_pair.decode, plain_engine)
        async with connected(*records, key=fleet_key) as (prefill, decode, plain):
            run = Run(prefill, decode, plain, salt)
            await asyncio.gather(*(run.session(number) for number in range(SESSIONS)))
            return run.tally

    tally = asyncio.run(go())
    assert tally.mismatches == []
    assert sum(tally.arms.values()) == SESSIONS * ROUNDS and min(tally.arms[arm] for arm in ARMS) >= 5
    assert tally.bytes_decode_to_prefill > 0 and tally.bytes_prefill_to_decode > 0
    print(f"\nsalt {salt}: {dict(tally.arms)}, bytes {tally.bytes_decode_to_prefill} d->p, "
          f"{tally.bytes_prefill_to_decode} p->d")  # fmt: skip


def test_another_tenants_pages_are_not_used(sglang_pair: SglangPair, fleet_key: bytes) -> None:
    """The same prompt under another salt shares nothing: no hit on the engine, no page by name."""

    async def go() -> None:
        async with connected(sglang_pair.decode, key=fleet_key) as (decode,):
            prompt = random_prompt(random.Random(5), 100)
            first = [await answer(decode, prompt, f"{n:032x}", COMPLETIONS, "a") for n in (1, 2)]
            other = await answer(decode, prompt, f"{3:032x}", COMPLETIONS, "b")
            assert [usage.cached_tokens for _, usage in first] == [0, 96] and other[1].cached_tokens == 0
            assert first[0][0] == first[1][0] == other[0]
            for salt, pages in (("a", 6), ("b", 6), ("c", 0), (None, 0)):
                hashes = page_hashes(prompt, PAGE, namespace_seed(cache_salt=salt))
                assert await decode.lookup(hashes, deadline_s=5.0) == pages

    asyncio.run(go())
