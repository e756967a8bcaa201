"""The closed-form engine: one engine's cases worked by hand, to the microsecond."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.closed_form import ClosedFormEngine, EngineRequest, Milestone
from antiphon.engines.cluster import EngineGroup, EngineSpec
from antiphon.policies.latency import DecodeCost, LatencyModel, LoadCost, PrefillCost, TransferCost

PAGE = 10
FOREVER = float("inf")
FIXED_S = 0.002
MICROSECOND = 1e-6
MODEL = LatencyModel(
    name="round numbers",
    source="made up",
    prefill=PrefillCost(fixed_s=0.010, per_token_s=0.001, per_token_cached_s=1e-6, per_token_squared_s=1e-6),
    decode=DecodeCost(fixed_s=0.010, per_request_s=0.001, per_context_token_s=1e-5),
    transfer=TransferCost(0.001, 1e9, 1000),
    load=LoadCost(fixed_s=0.003, bytes_per_s=1e7),
)
"""Loading takes 0.1 ms a token."""


@dataclass(slots=True)
class Bench:
    """One engine, moved from event to event; every milestone by request, with its time."""

    engine: ClosedFormEngine
    times: dict[tuple[str, Milestone], float] = field(default_factory=dict)
    now: float = 0.0

    def submit(
        self, at_s: float, tag: str, prompt: int, output: int, branch: Branch | None = None
    ) -> EngineRequest:
        """The batch loop sees it at `at_s`."""
        branch = branch or Branch(1000 + ord(tag[0]))
        end = Chain(branch, (prompt + output - 1) // PAGE) if output else None
        request = EngineRequest(tag, Chain(branch, prompt // PAGE), prompt, output, end)
        self.run(at_s - FIXED_S)
        self.engine.submit(request, at_s - FIXED_S)
        return request

    def run(self, until_s: float = FOREVER) -> None:
        while self.engine.next_event_s <= until_s and self.engine.next_event_s < FOREVER:
            assert self.engine.next_event_s >= self.now
            self.now = self.engine.next_event_s
            for milestone, request in self.engine.advance(self.now):
                assert (request.tag, milestone) not in self.times
                self.times[request.tag, milestone] = self.now
            self.engine.check_invariants()

    def first(self, tag: str) -> float:
        return self.times[tag, Milestone.FIRST_TOKEN]

    def finished(self, tag: str) -> float:
        return self.times[tag, Milestone.FINISHED]


def make_bench(
    *, chunk: int = 0, interval: int = 0, pool_pages: int = 1000, store_pages: int = 10_000, running: int = 64
) -> Bench:
    tokens = pool_pages * PAGE, store_pages * PAGE
    group = EngineGroup(
        *(1, "decode", "", *tokens, 1e9),
        chunk_tokens=chunk,
        decode_interval=interval,
        max_running_requests=running,
        request_fixed_s=FIXED_S,
    )
    return Bench(ClosedFormEngine(EngineSpec("decode-0", group, MODEL), PAGE))


def at(seconds: float) -> object:
    return pytest.approx(seconds, abs=MICROSECOND / 2)


def test_one_request_alone() -> None:
    """Fixed cost, prefill, then steps that grow with the context."""
    bench = make_bench()
    request = bench.submit(1.0, "a", 100, 4)
    bench.run()
    # Prefill of 100: 10 ms + 100 ms + 10 ms of squares. Steps at 101, 102, 103 tokens: 11 ms + 1.01 ms ...
    assert bench.first("a") == request.first_token_s == at(1.120)
    assert bench.finished("a") == request.finished_s == at(1.120 + 0.033 + 0.00306)
    assert request.admitted_s == at(1.0)
    totals = bench.engine.totals
    assert (totals.prefill_tokens_computed, totals.output_tokens, totals.decode_steps) == (100, 4, 3)
    assert totals.busy_s == at(bench.now - 1.0)
    assert bench.engine.next_event_s == FOREVER
    assert bench.engine.device.used_pages == 0


def test_the_next_round_computes_what_is_new() -> None:
    """The pages of prompt and answer are found on the device; the last token and half a page are not."""
    bench = make_bench()
    branch = Branch(0)
    bench.submit(1.0, "a", 100, 5, branch)
    bench.run()
    # 104 tokens have KV, 10 pages.
    request = bench.submit(2.0, "b", 150, 1, branch)
    bench.run()
    assert (request.cached_device_tokens, request.cached_host_tokens) == (100, 0)
    # 50 new over 100: 10 ms + 50 ms + 5 ms + 2.5 ms.
    assert bench.first("b") == bench.finished("b") == at(2.0675)


def test_prompt_at_a_page_boundary_computes_a_page() -> None:
    """The last token of a prompt is always computed, so with it its page."""
    bench = make_bench()
    branch = Branch(0)
    bench.submit(1.0, "a", 100, 0, branch)
    request = bench.submit(2.0, "b", 100, 0, branch)
    bench.run()
    assert request.cached_device_tokens == 90
    # 10 new over 90: 10 ms + 10 ms + 0.9 ms + 0.1 ms.
    assert bench.finished("b") == at(2.021)
    assert ("b", Milestone.FIRST_TOKEN) not in bench.times


def test_two_arrivals_share_a_pass() -> None:
    """What has arrived when a pass ends is batched: one fixed cost, the sum of the rest."""
    bench = make_bench()
    bench.submit(1.0, "a", 100, 0)
    bench.submit(1.05, "b", 100, 0)
    bench.submit(1.06, "c", 100, 0)
    bench.run()
    assert bench.finished("a") == at(1.120)
    assert bench.finished("b") == bench.finished("c") == at(1.120 + 0.010 + 0.220)


def test_chunks_without_interval_stall_a_decode() -> None:
    """K = 0: all chunks run back to back, and the stream that decodes gets nothing until the last."""
    bench = make_bench(chunk=100)
    bench.submit(1.0, "a", 100, 41)
    bench.submit(1.2, "b", 250, 1)
    bench.run()
    # a: first token 1.120; step j (from 0) takes 11 ms + (101 + j) * 10 us. b arrives in the seventh step,
    # and waits for its end: 7 * 11 + 0.01 * (707 + 21) = 84.28 ms.
    start = 1.120 + 0.08428
    # 100 over 0: 120 ms; 100 over 100: 130 ms; 50 over 200: 10 + 50 + 10 + 2.5 = 72.5 ms.
    stall = 0.120 + 0.130 + 0.0725
    assert bench.first("b") == at(start + stall)
    assert bench.finished("a") == at(start + stall + 33 * 0.011 + 1e-5 * (33 * 108 + 33 * 16))
    gaps = bench.engine.gaps.summary()
    assert gaps.count == 40
    assert gaps.mean * 40 == at(bench.finished("a") - 1.120)
    assert gaps.p99 == pytest.approx(stall + 0.011 + 1e-5 * 108, rel=0.005)
    assert gaps.p90 == pytest.approx(0.0122, rel=0.03)


def test_interval_puts_decode_steps_between_chunks() -> None:
    """K = 2: after every chunk the running decodes get two tokens, and an arrival waits for them too."""
    bench = make_bench(chunk=100, interval=2)
    bench.submit(1.0, "a", 100, 41)
    bench.submit(1.125, "b", 250, 1)
    bench.run()
    # b arrives in the first of the two steps that follow a's own chunk.
    pairs = [0.022 + 1e-5 * (2 * (101 + 2 * n) + 1) for n in range(3)]
    chunks = [0.120, 0.130, 0.0725]
    assert bench.first("b") == at(1.120 + sum(pairs) + sum(chunks))


def test_decode_of_two_grows_by_two() -> None:
    """Every step of a batch adds one token for each: what a step costs grows with the batch."""
    bench = make_bench()
    bench.submit(1.0, "a", 100, 11)
    bench.submit(1.0, "b", 60, 21)
    bench.run()
    first = 1.0 + 0.010 + 0.160 + 0.010 + 0.0036
    assert bench.first("a") == bench.first("b") == at(first)
    both = 10 * 0.012 + 1e-5 * (10 * 162 + 2 * 45)
    assert bench.finished("a") == at(first + both)
    assert bench.finished("b") == at(first + both + 10 * 0.011 + 1e-5 * (10 * 71 + 45))


def test_store_is_loaded_to_the_device() -> None:
    """What the device has evicted comes from the store, and takes the time of a load."""
    bench = make_bench(pool_pages=20)
    branch = Branch(0)
    bench.submit(1.0, "a", 100, 0, branch)
    bench.submit(2.0, "b", 185, 0, Branch(1))
    request = bench.submit(3.0, "c", 125, 0, branch)
    bench.run()
    # b left one page of a: nine come from the store, 90 tokens in 3 + 9 ms. 25 new over 100: 38.125 ms.
    assert (request.cached_device_tokens, request.cached_host_tokens) == (10, 90)
    assert bench.finished("c") == at(3.0 + 0.012 + 0.010 + 0.025 + 0.0025 + 0.000625)
    assert bench.engine.totals.prefill_tokens_reused == 100


def test_who_came_last_is_retracted() -> None:
    """Without a free page the last-come gives way, and is first in line when there is room again."""
    bench = make_bench(pool_pages=14)
    # Admission keeps 0.7 of what may still come: 40 + 28 + 40 + 28 tokens of 140.
    bench.submit(1.0, "a", 40, 41)
    late = bench.submit(1.0, "b", 40, 41)
    bench.run()
    first = 1.0 + 0.010 + 0.080 + 0.0032
    # Seven pages each hold 70 tokens: after 30 steps each needs an eighth.
    shared = 30 * 0.012 + 1e-5 * (30 * 82 + 2 * 435)
    alone = 10 * 0.011 + 1e-5 * (10 * 71 + 45)
    assert bench.finished("a") == at(first + shared + alone)
    # b had 31 tokens. Its prompt is on the device: 31 of 71 are computed again, over 40; 9 more are to come.
    again = 0.010 + 0.031 + 31 * 40e-6 + 31 * 31e-6
    left = 9 * 0.011 + 1e-5 * (9 * 72 + 36)
    assert bench.finished("b") == at(first + shared + alone + again + left)
    assert late.retractions == bench.engine.totals.retractions == 1
    assert late.first_token_s == at(first)
    assert bench.engine.totals.output_tokens == 82
    assert bench.engine.gaps.count == 80


def test_who_just_came_is_retracted() -> None:
    """Its stall and that of the others are gaps of one token each, also when it leaves before a step."""
    bench = make_bench(pool_pages=14)
    bench.submit(1.0, "a", 41, 11)
    joined = 1.0 + 0.010 + 0.041 + 0.001681
    # After nine steps a has KV for 50 tokens and promises nothing for its last; b takes all that is left.
    nine = 9 * 0.011 + 1e-5 * (9 * 42 + 36)
    bench.submit(joined + nine - 0.005, "b", 88, 2)
    bench.run()
    stall = 0.010 + 0.088 + 0.007744
    assert bench.first("b") == at(joined + nine + stall)
    last = 0.011 + 1e-5 * 51
    assert bench.finished("a") == at(joined + nine + stall + last)
    # Eighty tokens of b are still there.
    again = 0.010 + 0.009 + 9 * 80e-6 + 81e-6
    assert bench.finished("b") == at(bench.finished("a") + again)
    gaps = bench.engine.gaps
    assert gaps.count == 11
    assert gaps.total_s == at(nine + stall + last + last + again)


def test_admission_keeps_room() -> None:
    """Who would leave too little for what the others may still generate waits for one of them to end."""
    bench = make_bench(pool_pages=14)
    bench.submit(1.0, "a", 40, 101)
    bench.submit(1.0, "b", 10, 1)
    bench.run()
    # a may need 70 more: with its 40, 3 pages are left for b's 10 tokens. It fits; 40 would not.
    assert bench.first("a") == bench.first("b") == at(1.0 + 0.010 + 0.050 + 0.0017)
    bench = make_bench(pool_pages=14)
    bench.submit(1.0, "a", 40, 101)
    bench.submit(1.0, "b", 40, 1)
    bench.run()
    assert bench.first("a") == at(1.0516)
    assert bench.first("b") == at(bench.finished("a") + 0.010 + 0.040 + 0.0016)


def test_most_running_requests() -> None:
    """No more than the limit are in the batch."""
    bench = make_bench(running=1)
    bench.submit(1.0, "a", 10, 11)
    bench.submit(1.0, "b", 10, 1)
    bench.run()
    assert bench.first("b") == at(bench.finished("a") + 0.0201)


def test_prompt_larger_than_the_pool_is_refused() -> None:
    """It can never run: it is refused, busy engine or not. An answer is cut where the pool ends."""
    bench = make_bench(pool_pages=10)
    bench.submit(1.0, "a", 50, 500)
    refused = bench.submit(1.01, "b", 100, 1)
    bench.run()
    assert bench.times["b", Milestone.REFUSED] == at(1.01)
    assert "100 tokens" in refused.message and "100" in refused.message
    assert bench.engine.totals.output_tokens == 50
    assert bench.finished("a") > 1.01


def test_aborts() -> None:
    """A waiting request leaves at once, one in the batch with the step that runs; nothing is reported."""
    bench = make_bench(chunk=100)
    engine = bench.engine
    running = bench.submit(1.0, "running", 100, 1000)
    other = bench.submit(1.0, "other", 10, 400)
    bench.run(1.2)
    prefilling = bench.submit(1.3, "prefilling", 300, 10)
    waiting = bench.submit(1.3, "waiting", 100, 10)
    bench.run(1.4)
    for request in (prefilling, waiting):
        engine.abort(request, 1.4)
        engine.abort(request, 1.4)
    bench.run(1.7)
    assert (engine.waiting_requests, engine.running_requests) == (0, 2)
    engine.abort(running, 1.7)
    assert engine.next_event_s - 1.7 < 0.02
    bench.run()
    assert [tag for tag, _ in bench.times] == ["running", "other", "other"]
    assert other.finished_s < FOREVER
    assert engine.totals.aborted == 3
    assert engine.device.used_pages == 0
    # What was computed stays: ten pages of the prompt and what came after it.
    assert engine.device.match(Chain(running.chain.branch, 99)) > 10


def test_abort_of_who_stood_in_the_way() -> None:
    """When the first in line goes, the next one is tried at the end of the step that runs."""
    bench = make_bench(pool_pages=40)
    bench.submit(1.0, "a", 100, 201)
    large = bench.submit(1.5, "large", 350, 1)
    bench.submit(1.6, "small", 10, 1)
    bench.run(2.0)
    bench.engine.abort(large, 2.0)
    bench.run()
    assert 2.0 < bench.first("small") < 2.0 + 0.015 + 0.0201


def test_pull_while_it_decodes_is_found_at_admission() -> None:
    """Pages that came into the store, from wherever, are used by the next admission."""
    bench = make_bench()
    branch = Branch(0)
    bench.engine.store.extend(branch, 8, 0)
    request = bench.submit(1.0, "a", 100, 0, branch)
    bench.run()
    assert (request.cached_device_tokens, request.cached_host_tokens) == (0, 80)
    # 80 loaded: 3 + 8 ms; 20 new over 80: 10 + 20 + 1.6 + 0.4 ms.
    assert bench.finished("a") == at(1.0 + 0.011 + 0.032)


def test_evicted_from_the_store_is_not_offered_again() -> None:
    """The store keeps only what continues a chain that it has."""
    bench = make_bench(store_pages=12)
    branch, other = Branch(0), Branch(1)
    bench.submit(1.0, "a", 100, 0, branch)
    bench.submit(2.0, "b", 60, 0, other)
    bench.run()
    assert bench.engine.store.match(Chain(branch, 10)) == 6
    bench.submit(3.0, "c", 120, 0, branch)
    bench.run()
    assert bench.engine.device.match(Chain(branch, 12)) == 12
    assert bench.engine.store.match(Chain(branch, 12)) == 6


def test_touch_keeps_a_chain_in_the_store() -> None:
    """A chain that the scheduler says is in use outlives one that nobody named."""
    bench = make_bench(store_pages=20)
    branches = [Branch(number) for number in range(3)]
    for number in range(2):
        bench.submit(1.0 + number, f"r{number}", 100, 0, branches[number])
    bench.run()
    bench.engine.touch(Chain(branches[0], 10), bench.now)
    bench.submit(4.0, "r2", 80, 0, branches[2])
    bench.run()
    assert [bench.engine.store.match(Chain(branch, 10)) for branch in branches] == [10, 2, 8]


def test_chunk_below_a_page_is_an_error() -> None:
    """Chunks end at page boundaries, so none could be made."""
    with pytest.raises(ValueError, match="chunk_tokens 5 < a page of 10"):
        make_bench(chunk=5)


@pytest.mark.parametrize("seed", range(6))
def test_conservation(seed: int) -> None:
    """Under any load every token asked for comes once, the gaps add up, and no KV is beyond the pool."""
    rng = random.Random(seed)
    bench = make_bench(chunk=rng.choice([0, 50]), interval=rng.choice([0, 3]), pool_pages=80, store_pages=200)
    requests, aborted = [], []
    branches = [Branch(0)]
    for number in range(60):
        parent = rng.choice(branches)
        branches.append(Branch(number + 1, parent, rng.randrange(0, 20)))
        branch = branches[-1]
        prompt = branch.fork_pages * PAGE + rng.randrange(1, 200)
        output = rng.choice([0, 1, rng.randrange(1, 300)])
        at_s = bench.now + FIXED_S + rng.random() * 0.4
        requests.append(bench.submit(at_s, f"r{number}", prompt, output, branch))
        if rng.random() < 0.1:
            victim = rng.choice(requests)
            if victim.finished_s != victim.finished_s:
                bench.engine.abort(victim, bench.now)
                aborted.append(victim)
    bench.run()
    engine = bench.engine
    assert engine.device.used_pages == engine.running_requests == engine.waiting_requests == 0
    done = [request for request in requests if (request.tag, Milestone.FINISHED) in bench.times]
    refused = [request for request in requests if (request.tag, Milestone.REFUSED) in bench.times]
    assert len(done) + len(refused) + len(set(aborted)) == len(requests)
    wanted = sum(min(request.output_tokens, 800 - request.prompt_tokens) for request in done)
    if not aborted:
        assert engine.totals.output_tokens == wanted
        answered = [request for request in done if request.output_tokens]
        seconds = sum(request.finished_s - request.first_token_s for request in answered)
        assert engine.gaps.count == wanted - len(answered)
        assert engine.gaps.summary().mean * engine.gaps.count == pytest.approx(seconds, rel=1e-9)
    assert engine.totals.output_tokens >= wanted
    assert engine.totals.busy_s <= bench.now
