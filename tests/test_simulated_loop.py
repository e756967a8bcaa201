"""The batch loop of the simulated engine, on a clock of its own: order of work, durations, tokens."""

from __future__ import annotations

import asyncio

import pytest

from antiphon.engines.faults import Faults
from antiphon.engines.simulated_loop import BatchLoop, LoopSettings
from antiphon.engines.simulated_request import LoopRequest, expected_tokens
from antiphon.engines.virtual_kv import VirtualKv, VirtualStore
from antiphon.policies.latency import LatencyModel, load_latency_model
from tests.simulated_helpers import (
    PAGE,
    make_prompt,
)

MODEL: LatencyModel = load_latency_model("tiny-cpu")


class Timeline:
    """A batch loop on virtual time, and the time at which each token of each request came."""

    def __init__(self, *, chunk_tokens: int = 0, decode_interval: int = 0, pool_tokens: int = 65536) -> None:
        self.now = 0.0
        self.tokens: dict[str, list[float]] = {}
        settings = LoopSettings(chunk_tokens, decode_interval, 64, 0, 512, 1.0)
        kv = VirtualKv(pool_tokens // PAGE, VirtualStore(2 * pool_tokens // PAGE), PAGE)
        self.loop = BatchLoop(settings, kv, MODEL, Faults(), self._sleep, lambda: self.now)

    async def _sleep(self, duration_s: float) -> None:
        # Whoever follows a request sees what has come before time goes on.
        for _ in range(3):
            await asyncio.sleep(0)
        self.now += duration_s

    def submit(self, rid: str, prompt: list[int], max_new_tokens: int) -> LoopRequest:
        request = LoopRequest(rid, len(prompt), list(prompt), max_new_tokens, b"", None, None)
        self.tokens[rid] = []
        self.loop.submit(request)
        return request

    async def follow(self, request: LoopRequest) -> None:
        async for start, stop in request.progress():
            self.tokens[request.rid] += [self.now] * (stop - start)

    def run(self, *arrivals: tuple[str, list[int], int]) -> dict[str, LoopRequest]:
        """All requests arrive at once, in order; returns them when all have finished."""

        async def main() -> dict[str, LoopRequest]:
            requests = {rid: self.submit(rid, prompt, most) for rid, prompt, most in arrivals}
            worker = asyncio.create_task(self.loop.run())
            await asyncio.gather(*(self.follow(request) for request in requests.values()))
            worker.cancel()
            return requests

        return asyncio.run(main())


def test_time_to_first_token_is_the_profiles_prefill() -> None:
    """One prompt alone takes exactly the model's prefill, then its decode steps."""
    timeline = Timeline()
    timeline.run(("a", make_prompt("alone", 1000), 3))
    first, second, third = timeline.tokens["a"]
    assert first == pytest.approx(MODEL.prefill_s(1000, 0))
    assert second - first == pytest.approx(MODEL.decode_step_s(1, 1001))
    assert third - second == pytest.approx(MODEL.decode_step_s(1, 1002))


def test_history_is_not_computed_again() -> None:
    """The second round of a conversation pays for what is new only."""
    timeline = Timeline()
    prompt = make_prompt("history", 1000)
    timeline.run(("a", prompt, 1))
    started = timeline.now
    again = timeline.run(("b", [*prompt, *make_prompt("new", 100)], 1))["b"]
    assert again.cached_tokens == again.cached_device_tokens == 992
    assert timeline.tokens["b"][0] - started == pytest.approx(MODEL.prefill_s(108, 992))


def test_chunks_run_back_to_back() -> None:
    """Without an interval the chunks of a prompt stall all decodes until its last."""
    timeline = Timeline(chunk_tokens=128)
    timeline.run(("a", make_prompt("decoding", 64), 40), ("b", make_prompt("chunked", 1000), 2))
    first_of_b = timeline.tokens["b"][0]
    between = [t for t in timeline.tokens["a"] if timeline.tokens["a"][0] < t < first_of_b]
    assert between == []


def test_decode_interval_puts_steps_between_chunks() -> None:
    """With --prefill-decode-interval K every chunk is followed by K decode steps of those that run."""
    timeline = Timeline(chunk_tokens=128, decode_interval=3)
    timeline.run(("a", make_prompt("decoding", 64), 40), ("b", make_prompt("chunked", 1000), 2))
    first_of_b = timeline.tokens["b"][0]
    between = [t for t in timeline.tokens["a"] if timeline.tokens["a"][0] < t < first_of_b]
    # 64 tokens of b go with a's prompt, 936 are left: 8 chunks, K steps before each.
    assert len(between) == 8 * 3


def test_batch_decodes_together() -> None:
    """All running requests get one token per step, whose time grows with batch and context."""
    timeline = Timeline()
    timeline.run(*((f"r{n}", make_prompt(f"batch {n}", 100), 5) for n in range(4)))
    assert len({tuple(times) for times in timeline.tokens.values()}) == 1
    times = timeline.tokens["r0"]
    assert times[1] - times[0] == pytest.approx(MODEL.decode_step_s(4, 4 * 101))


@pytest.mark.parametrize("chunk_tokens", [0, 64])
def test_small_pool_retracts_and_answers_all_the_same(chunk_tokens: int) -> None:
    """When the pool runs out requests are retracted and computed again, with the same tokens."""
    timeline = Timeline(pool_tokens=640, chunk_tokens=chunk_tokens)
    prompts = {f"r{n}": make_prompt(f"retract {n}", 60) for n in range(6)}
    done = timeline.run(*((rid, prompt, 200) for rid, prompt in prompts.items()))
    assert timeline.loop.totals.retractions > 0
    for rid, prompt in prompts.items():
        assert tuple(done[rid].output_ids) == expected_tokens(prompt, 200, 512)
        assert len(timeline.tokens[rid]) == 200
    assert timeline.loop.used_tokens == 0
    timeline.loop.kv.device.check_invariants()


def test_tokens_depend_on_the_prefix_only() -> None:
    """A conversation cut anywhere continues with the same tokens, chunked or not."""
    prompt = make_prompt("prefix", 300)
    want = expected_tokens(prompt, 30, 512)
    assert len(set(want)) > 10
    for chunk_tokens in (0, 16, 100):
        timeline = Timeline(chunk_tokens=chunk_tokens)
        got = timeline.run(("a", prompt, 30))["a"]
        cut = timeline.run(("b", [*prompt, *want[:11]], 19))["b"]
        assert tuple(got.output_ids) == want
        assert tuple(cut.output_ids) == want[11:]


def test_request_that_can_never_fit_is_a_bad_request() -> None:
    """A prompt larger than the pool is refused at once instead of waiting for ever."""
    timeline = Timeline(pool_tokens=128)
    request = timeline.run(("a", make_prompt("huge", 128), 1))["a"]
    assert request.finish is not None
    assert (request.finish.kind, request.finish.status) == ("abort", 400)
