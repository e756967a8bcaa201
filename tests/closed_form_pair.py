"""The same requests to the closed-form engine and to the token-by-token batch loop, and a long comparison.

`python -m tests.closed_form_pair --scenarios 4000 --seed 1` (part of `make fuzz`) draws scenario after
scenario, and names each that the two live through differently. Compared is what the closed form promises: so
who waits is tried again after every step, and the page stores have room for all.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.closed_form import ClosedFormEngine, EngineRequest, Milestone
from antiphon.engines.cluster import EngineGroup, EngineSpec
from antiphon.engines.faults import Faults
from antiphon.engines.page_hash import page_hashes
from antiphon.engines.scripts import ScriptLine
from antiphon.engines.simulated_loop import BatchLoop, LoopSettings
from antiphon.engines.simulated_request import LoopRequest
from antiphon.engines.virtual_kv import VirtualKv, VirtualStore
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost

PAGE = 4
STORE_PAGES = 20_000
"""More than any scenario fills."""
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


class End(NamedTuple):
    """Sums over a run, and the device after it."""

    prefill_tokens: int
    decode_steps: int
    output_tokens: int
    retractions: int
    evicted_pages: int
    used_pages: int
    held_pages: tuple[int, ...]
    """Of each request's prompt and output, from the first page on."""


def token_at(branch: Branch, position: int) -> int:
    """The content of a branch: two branches have the same token there only where one forks off the other."""
    at = branch
    while at.parent is not None and position // PAGE < at.fork_pages:
        at = at.parent
    return at.number * 100_000 + position


def tokens_of(arrival: Arrival) -> list[int]:
    """Prompt and output."""
    tokens = arrival.prompt_tokens + arrival.output_tokens
    return [token_at(arrival.end_branch, position) for position in range(tokens)]


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
        kv = VirtualKv(shape.pool_pages, VirtualStore(STORE_PAGES), PAGE)
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
        tokens = tokens_of(arrival)
        output, tokens = tuple(tokens[arrival.prompt_tokens :]), tokens[: arrival.prompt_tokens]
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
        """What became of each, in order of arrival."""

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
        store_tokens=STORE_PAGES * PAGE,
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


def difference(shape: Shape, arrivals: Sequence[Arrival], retry_steps: int = 1) -> str:
    """The first thing that they did not do the same, in words; "" = all the same."""
    loop_run = LoopRun(shape, arrivals)
    want = loop_run.run()
    got, engine = run_closed_form(shape, arrivals, retry_steps)
    for number, (theirs, ours) in enumerate(zip(want, got, strict=True)):
        if not same(theirs, ours):
            return f"request {number}: the loop {theirs}, in closed form {ours}"
    ends = loop_end(loop_run.loop, arrivals), closed_form_end(engine, arrivals)
    return "" if ends[0] == ends[1] else f"at the end: the loop {ends[0]}, in closed form {ends[1]}"


def same(theirs: Lived, ours: Lived) -> bool:
    """Counts are equal; times too, but for the rounding of sums that are added up in another order."""
    return (
        (ours.cached_device_tokens, ours.cached_host_tokens, ours.retractions)
        == (theirs.cached_device_tokens, theirs.cached_host_tokens, theirs.retractions)
        and math.isclose(ours.first_token_s, theirs.first_token_s, rel_tol=1e-9)
        and math.isclose(ours.finished_s, theirs.finished_s, rel_tol=1e-9)
    )


def loop_end(loop: BatchLoop, arrivals: Sequence[Arrival]) -> End:
    totals, device = loop.totals, loop.kv.device
    work = totals.prefill_uncached_tokens, totals.decode_steps, totals.output_tokens, totals.retractions
    held = tuple(device.match(page_hashes(tokens_of(arrival), PAGE, b"")) for arrival in arrivals)
    return End(*work, device.evicted_total, device.used_pages, held)


def closed_form_end(engine: ClosedFormEngine, arrivals: Sequence[Arrival]) -> End:
    totals, device = engine.totals, engine.device
    work = totals.prefill_tokens_computed, totals.decode_steps, totals.output_tokens, totals.retractions
    held = tuple(
        device.match(Chain(arrival.end_branch, len(tokens_of(arrival)) // PAGE)) for arrival in arrivals
    )
    return End(*work, device.evicted_pages, device.used_pages, held)


def fitting(shape: Shape, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Without those that can never run there."""
    return [arrival for arrival in arrivals if arrival.prompt_tokens + 1 <= shape.pool_pages * PAGE]


def with_aborts(arrivals: Sequence[Arrival], rng: random.Random) -> list[Arrival]:
    """Some of them are aborted within half a second."""
    return [
        replace(arrival, abort_s=arrival.at_s + rng.random() * 0.5) if rng.random() < 0.3 else arrival
        for arrival in arrivals
    ]


# ---------------------------------------------------------------- the long comparison

MOST_SCENARIOS = 1_000_000
"""Of one seed."""


def draw_scenario(seed: int) -> tuple[Shape, list[Arrival]]:
    """Any settings; a pool from hopelessly small to large; sessions, or answers longer than was promised."""
    rng = random.Random(seed)
    shape = Shape(
        chunk_tokens=rng.choice([0, 4, 12, 64, 250]),
        decode_interval=rng.choice([0, 0, 1, 3]),
        pool_pages=rng.choice([rng.randint(60, 120), rng.randint(90, 300), 4000]),
        max_running=rng.choice([1, 3, 64]),
    )
    if rng.random() < 0.85:
        longest, output = rng.choice([(120, 90), (300, 20), (30, 200)])
        pace_s = rng.choice([0.02, 0.2, 1.0])
        arrivals = make_arrivals(seed, rng.randint(2, 10), rng.randint(1, 5), longest, output, pace_s)
    else:
        arrivals = long_answers(rng, rng.randint(2, 12))
    arrivals = fitting(shape, arrivals)
    return shape, with_aborts(arrivals, rng) if rng.random() < 0.5 else arrivals


def long_answers(rng: random.Random, requests: int) -> list[Arrival]:
    """Short prompts with answers that fill the pool: admission underestimates them."""
    arrivals = []
    for number in range(requests):
        branch, prompt = Branch(number), rng.randrange(1, 40)
        chain = Chain(branch, prompt // PAGE)
        arrivals.append(Arrival(number * 0.01, chain, prompt, rng.randrange(150, 250), branch))
    return arrivals


def compare(seeds: Iterable[int]) -> list[int]:
    """Run these scenarios; shows and returns those that differ."""
    found = []
    for seed in seeds:
        shape, arrivals = draw_scenario(seed)
        text = difference(shape, arrivals)
        if text:
            found.append(seed)
            print(f"scenario {seed}: {shape}, {len(arrivals)} requests\n  {text}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.closed_form_pair", description=__doc__)
    parser.add_argument("--scenarios", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1, help="another seed has other scenarios")
    parser.add_argument("--only", type=int, help="this scenario, by the number that a run has shown")
    options = parser.parse_args(arguments)
    first, count = options.seed * MOST_SCENARIOS, min(options.scenarios, MOST_SCENARIOS)
    seeds = range(first, first + count) if options.only is None else [options.only]
    begun = time.monotonic()
    found = compare(seeds)
    rate = len(seeds) / max(1e-9, time.monotonic() - begun)
    print(
        f"seed {options.seed}: {len(seeds)} scenarios, {rate:.0f} per second; "
        f"closed form and loop differ in {len(found)} of them"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
