"""The closed-form engine against the token-by-token batch loop: the same requests, the same times."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.closed_form import ClosedFormEngine, EngineRequest, Milestone
from antiphon.engines.cluster import EngineGroup, EngineSpec
from antiphon.engines.faults import Faults
from antiphon.engines.scripts import ScriptLine
from antiphon.engines.simulated_loop import BatchLoop, LoopSettings
from antiphon.engines.simulated_request import LoopRequest
from antiphon.engines.virtual_kv import VirtualKv, VirtualStore
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost

PAGE = 4
MODEL = LatencyModel(
    name="differential",
    source="made up, so that every term counts",
    prefill=PrefillCost(0.011, 0.00037, 1.3e-7, 2.1e-7),
    decode=DecodeCost(0.0053, 0.00071, 1.7e-5),
    transfer=TransferCost(0.001, 1e9, 1000),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, and when the batch loop sees it."""

    at_s: float
    chain: Chain
    prompt_tokens: int
    output_tokens: int
    end_branch: Branch
    abort_s: float = float("inf")
    """When it is aborted, if it is not over by then."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What both engines are set to."""

    chunk_tokens: int
    decode_interval: int
    pool_pages: int
    max_running: int = 64


@dataclass(slots=True)
class Lived:
    """What became of a request."""

    cached_device_tokens: int
    cached_host_tokens: int
    retractions: int
    first_token_s: float = -1.0
    finished_s: float = -1.0


def token_at(branch: Branch, position: int) -> int:
    """The content of a branch: two branches have the same token there only where one forks off the other."""
    at = branch
    while at.parent is not None and position // PAGE < at.fork_pages:
        at = at.parent
    return at.number * 100_000 + position


class LoopRun:
    """The batch loop on virtual time, with arrivals in the middle of its steps."""

    def __init__(self, shape: Shape, arrivals: Sequence[Arrival]) -> None:
        self.now = 0.0
        self.arrivals = arrivals
        self.left = events_of(arrivals)
        self.requests: list[LoopRequest] = []
        self.lived: dict[str, Lived] = {}
        self.followers: list[asyncio.Task[None]] = []
        loop_settings = LoopSettings(
            shape.chunk_tokens, shape.decode_interval, shape.max_running, 0, 2**31, 1.0
        )
        kv = VirtualKv(shape.pool_pages, VirtualStore(20_000), PAGE)
        self.loop = BatchLoop(loop_settings, kv, MODEL, Faults(), self.sleep, lambda: self.now)

    async def sleep(self, duration_s: float) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        end_s = self.now + duration_s
        while self.left and self.left[0][0] <= end_s:
            self.happen()
        self.now = end_s

    def happen(self) -> None:
        """The next arrival or abort."""
        now, number, is_abort = self.left.popleft()
        self.now = max(self.now, now)
        if is_abort:
            if self.requests[number].finish is None:
                self.loop.abort_request(self.requests[number])
        else:
            self.arrive(f"{number:04}", self.arrivals[number])

    def arrive(self, rid: str, arrival: Arrival) -> None:
        tokens = [token_at(arrival.end_branch, position) for position in range(arrival.prompt_tokens)]
        output = tuple(
            token_at(arrival.end_branch, arrival.prompt_tokens + position)
            for position in range(arrival.output_tokens)
        )
        script = ScriptLine(token_ids=output) if output else None
        request = LoopRequest(rid, len(tokens), tokens, len(output), b"", None, script)
        self.lived[rid] = Lived(0, 0, 0)
        self.requests.append(request)
        self.loop.submit(request)
        self.followers.append(asyncio.create_task(self.follow(request)))

    async def follow(self, request: LoopRequest) -> None:
        lived = self.lived[request.rid]
        async for _, stop in request.progress():
            if lived.first_token_s < 0 and stop:
                lived.first_token_s = self.now
            if request.finish is not None and request.finish.kind != "abort":
                lived.finished_s = self.now
        lived.cached_device_tokens = request.cached_device_tokens
        lived.cached_host_tokens = request.cached_host_tokens
        lived.retractions = request.retractions

    def run(self) -> list[Lived]:
        async def main() -> None:
            worker = asyncio.create_task(self.loop.run())
            await asyncio.sleep(0)  # it starts with nothing to do
            while self.left or self.loop.live:
                if not self.loop.live:
                    self.happen()
                for _ in range(6):
                    await asyncio.sleep(0)
            await asyncio.gather(*self.followers)
            worker.cancel()

        asyncio.run(main())
        return list(self.lived.values())


def run_closed_form(
    shape: Shape, arrivals: Sequence[Arrival], retry_steps: int
) -> tuple[list[Lived], ClosedFormEngine]:
    group = EngineGroup(
        count=1,
        pool="decode",
        profile="",
        device_tokens=shape.pool_pages * PAGE,
        store_tokens=20_000 * PAGE,
        link_bytes_per_s=1e9,
        chunk_tokens=shape.chunk_tokens,
        decode_interval=shape.decode_interval,
        max_running_requests=shape.max_running,
        request_fixed_s=0.0,
    )
    engine = ClosedFormEngine(EngineSpec("decode-0", group, MODEL), PAGE, retry_steps=retry_steps)
    requests: list[EngineRequest] = []
    left = events_of(arrivals)
    while left or engine.next_event_s < float("inf"):
        if left and left[0][0] <= engine.next_event_s:
            now, number, is_abort = left.popleft()
            if is_abort:
                engine.abort(requests[number], now)
            else:
                requests.append(make_request(number, arrivals[number]))
                engine.submit(requests[number], now)
        else:
            now = engine.next_event_s
            for milestone, request in engine.advance(now):
                if milestone is Milestone.FINISHED:
                    assert request.finished_s == now
            engine.check_invariants()
    return [lived_of(request) for request in requests], engine


def make_request(number: int, arrival: Arrival) -> EngineRequest:
    end = None
    if arrival.output_tokens:
        tokens = arrival.prompt_tokens + arrival.output_tokens - 1
        end = Chain(arrival.end_branch, tokens // PAGE)
    return EngineRequest(number, arrival.chain, arrival.prompt_tokens, arrival.output_tokens, end)


def lived_of(request: EngineRequest) -> Lived:
    lived = Lived(request.cached_device_tokens, request.cached_host_tokens, request.retractions)
    if request.first_token_s == request.first_token_s:
        lived.first_token_s = request.first_token_s
    if request.finished_s == request.finished_s:
        lived.finished_s = request.finished_s
    return lived


def events_of(arrivals: Sequence[Arrival]) -> deque[tuple[float, int, bool]]:
    """(time, number of the request, whether it is its abort), in order."""
    events = [(arrival.at_s, number, False) for number, arrival in enumerate(arrivals)]
    for number, arrival in enumerate(arrivals):
        if arrival.abort_s < float("inf"):
            events.append((arrival.abort_s, number, True))
    return deque(sorted(events))


def make_arrivals(
    seed: int, sessions: int, rounds: int, longest: int, output: int, pace_s: float
) -> list[Arrival]:
    """Sessions that grow round by round; some fork, some share a trunk, some rounds only prefill."""
    rng = random.Random(seed)
    number = 0
    trunk = Branch(number)
    trunk_pages = rng.randrange(0, 12)
    arrivals = []
    for _ in range(sessions):
        number += 1
        branch = Branch(number, trunk, trunk_pages) if rng.random() < 0.6 and trunk_pages else Branch(number)
        tokens = branch.fork_pages * PAGE
        at_s = rng.random() * pace_s * rounds
        for _ in range(rng.randrange(1, rounds + 1)):
            pages = tokens // PAGE
            if rng.random() < 0.2 and pages > branch.fork_pages + 1:
                number += 1
                kept = rng.randrange(branch.fork_pages + 1, pages)
                branch = Branch(number, branch, kept)
                tokens = kept * PAGE
            prompt = tokens + rng.randrange(1, longest)
            tokens = prompt
            outputs = 0 if rng.random() < 0.2 else rng.randrange(1, output)
            arrivals.append(Arrival(at_s, Chain(branch, prompt // PAGE), prompt, outputs, branch))
            tokens += max(0, outputs - 1)
            at_s += rng.random() * pace_s
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def assert_same(shape: Shape, arrivals: Sequence[Arrival], retry_steps: int = 1) -> ClosedFormEngine:
    want = LoopRun(shape, arrivals).run()
    got, engine = run_closed_form(shape, arrivals, retry_steps)
    assert len(want) == len(got) == len(arrivals)
    for number, (theirs, ours) in enumerate(zip(want, got, strict=True)):
        facts = (ours.cached_device_tokens, ours.cached_host_tokens, ours.retractions)
        assert facts == (theirs.cached_device_tokens, theirs.cached_host_tokens, theirs.retractions), number
        assert ours.first_token_s == pytest.approx(theirs.first_token_s, rel=1e-9), number
        assert ours.finished_s == pytest.approx(theirs.finished_s, rel=1e-9), number
    return engine


SHAPES = st.builds(
    Shape,
    chunk_tokens=st.sampled_from([0, 4, 12, 64, 250]),
    decode_interval=st.sampled_from([0, 0, 1, 3]),
    pool_pages=st.just(4000),
    max_running=st.sampled_from([1, 3, 64]),
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.sampled_from([0.02, 0.2, 1.0]))
def test_same_times_with_room(shape: Shape, seed: int, pace_s: float) -> None:
    """With room for all, both admit, batch, chunk and decode at the same moments."""
    arrivals = make_arrivals(seed, sessions=6, rounds=4, longest=150, output=40, pace_s=pace_s)
    engine = assert_same(shape, arrivals, retry_steps=0)
    assert engine.totals.retractions == 0


@settings(max_examples=100, deadline=None)
@example(Shape(0, 0, 91, max_running=3), 78, 0.02, 91)  # a step takes pages, then retracts for want of one
@given(SHAPES, st.integers(0, 10**6), st.sampled_from([0.02, 0.2, 1.0]), st.integers(90, 300))
def test_same_times_under_pressure(shape: Shape, seed: int, pace_s: float, pool_pages: int) -> None:
    """In a pool that is too small, both evict, load, hold back and retract the same."""
    shape = replace(shape, pool_pages=pool_pages)
    arrivals = make_arrivals(seed, sessions=8, rounds=3, longest=120, output=90, pace_s=pace_s)
    arrivals = [arrival for arrival in arrivals if arrival.prompt_tokens + 1 <= pool_pages * PAGE]
    assert_same(shape, arrivals)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.sampled_from([0.02, 0.2]), st.sampled_from([100, 200, 4000]))
def test_same_times_with_aborts(shape: Shape, seed: int, pace_s: float, pool_pages: int) -> None:
    """Whenever a request is aborted, both let it go at the same moment, and go on the same."""
    shape = replace(shape, pool_pages=pool_pages)
    arrivals = make_arrivals(seed, sessions=8, rounds=3, longest=120, output=90, pace_s=pace_s)
    rng = random.Random(seed)
    arrivals = [
        replace(arrival, abort_s=arrival.at_s + rng.random() * 0.5) if rng.random() < 0.3 else arrival
        for arrival in arrivals
        if arrival.prompt_tokens + 1 <= pool_pages * PAGE
    ]
    assert_same(shape, arrivals)


@pytest.mark.parametrize("chunk_tokens", [0, 12])
def test_same_retractions(chunk_tokens: int) -> None:
    """Long answers, which admission underestimates: both retract the same requests, again and again."""
    retractions = 0
    for seed in range(8):
        rng = random.Random(seed)
        shape = Shape(chunk_tokens, seed % 3, pool_pages=110)
        arrivals = []
        for number in range(12):
            branch, prompt = Branch(number), rng.randrange(1, 40)
            chain = Chain(branch, prompt // PAGE)
            arrivals.append(Arrival(number * 0.01, chain, prompt, rng.randrange(150, 250), branch))
        engine = assert_same(shape, arrivals)
        retractions += engine.totals.retractions
        answered = sum(arrival.output_tokens for arrival in arrivals)
        assert engine.totals.output_tokens == answered
        assert engine.gaps.count == answered - len(arrivals)
    assert retractions > 5
