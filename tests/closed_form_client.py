"""Closed-form engines behind the `Engine` port: for the live driver on a loop of virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from antiphon.engines.base import (
    Chunk,
    EngineRecord,
    GenerateRequest,
    LoadReport,
    PrefetchResult,
    PrefillResult,
    Usage,
)
from antiphon.engines.chains import Chain
from antiphon.engines.closed_form import ClosedFormEngine, EngineRequest, Milestone
from antiphon.engines.cluster import EngineSpec
from antiphon.engines.links import Network, Pull
from antiphon.engines.wire import Hello
from antiphon.scheduler.simulated_sessions import PlannedRound


class _Call:
    """Somebody waits for an engine request."""

    def __init__(self) -> None:
        self.first = asyncio.get_running_loop().create_future()
        self.done = asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class ClosedFormFleet:
    """All engines of one test, and the timers that move them."""

    page_tokens: int
    clients: dict[str, ClosedFormClient] = field(default_factory=dict)
    plans: dict[str, PlannedRound] = field(default_factory=dict)
    """By round id."""
    chains: dict[bytes, Chain] = field(default_factory=dict)
    """By the real hash of the chain's last page."""
    network: Network = field(init=False)
    timers: dict[str, tuple[float, asyncio.TimerHandle]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = Network(self.page_tokens)

    def add(self, spec: EngineSpec) -> ClosedFormClient:
        engine = ClosedFormEngine(spec, self.page_tokens, f"{spec.engine_id}/0")
        self.clients[spec.engine_id] = client = ClosedFormClient(self, engine, spec)
        return client

    def learn(self, plan: PlannedRound, round_id: str, hashes: Sequence[bytes]) -> None:
        """The round's real page hashes."""
        self.plans[round_id] = plan
        for depth, page_hash in enumerate(hashes, 1):
            self.chains[page_hash] = Chain(plan.chain.branch, depth)

    def watch(self, name: str, thing: ClosedFormEngine | Network) -> None:
        """Set the timer of whatever was touched."""
        due_s, timer = self.timers.pop(name, (0.0, None))
        if timer is not None:
            if due_s == thing.next_event_s:
                self.timers[name] = due_s, timer
                return
            timer.cancel()
        if thing.next_event_s != float("inf"):
            loop = asyncio.get_running_loop()
            handle = loop.call_at(thing.next_event_s, partial(self._advance, name, thing))
            self.timers[name] = thing.next_event_s, handle

    def _advance(self, name: str, thing: ClosedFormEngine | Network) -> None:
        del self.timers[name]
        now = thing.next_event_s
        if isinstance(thing, Network):
            for pull in thing.advance(now):
                if not pull.tag.done():
                    pull.tag.set_result(None)
        else:
            for milestone, request in thing.advance(now):
                assert milestone is not Milestone.REFUSED, request.message
                waiting = request.tag.first if milestone is Milestone.FIRST_TOKEN else request.tag.done
                if not waiting.done():
                    waiting.set_result(None)
        self.watch(name, thing)


class ClosedFormClient:
    """One engine as the runtime sees it."""

    def __init__(self, fleet: ClosedFormFleet, engine: ClosedFormEngine, spec: EngineSpec) -> None:
        self._fleet = fleet
        self.engine = engine
        self.record = EngineRecord(
            spec.engine_id,
            f"closed-form:{spec.engine_id}",
            spec.group.pool,
            engine.incarnation,
            (spec.engine_id,),
        )
        self.hello: Hello | None = Hello(
            spec.engine_id, engine.incarnation, "m", "", "float32", fleet.page_tokens, 1, "virtual",
            spec.group.device_tokens, 1, 0, 1, (spec.engine_id,), "virtual",
        )  # fmt: skip

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _submit(self, rid: str, output_tokens: int) -> EngineRequest:
        plan = self._fleet.plans[rid.rpartition("-")[0]]
        request = EngineRequest(_Call(), plan.chain, plan.trace.prompt_tokens, output_tokens, plan.end)
        self.engine.submit(request, self._now)
        self._fleet.watch(self.engine.engine_id, self.engine)
        return request

    async def connect(self, deadline_s: float) -> None: ...

    async def prefill(
        self,
        input_ids: Sequence[int],
        rid: str,
        *,
        session_id: str,
        cache_salt: str | None,
        deadline_s: float,
    ) -> PrefillResult:
        request = self._submit(rid, 0)
        await request.tag.done
        cached = request.cached_device_tokens + request.cached_host_tokens
        return PrefillResult(request.prompt_tokens, cached)

    async def generate(
        self, request: GenerateRequest, *, deadline_s: float, silence_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        tokens = self._fleet.plans[request.rid.rpartition("-")[0]].trace.output_tokens
        call = self._submit(request.rid, tokens)
        await call.tag.first
        yield Chunk({}, (1,))
        await call.tag.done
        cached = call.cached_device_tokens + call.cached_host_tokens
        usage = Usage(call.prompt_tokens, tokens, cached)
        yield Chunk({}, (1,) * (tokens - 1), "length", usage)

    async def prefetch(
        self, source: Sequence[str], source_incarnation: str, parent: bytes, hashes: Sequence[bytes], *,
        deadline_s: float,
    ) -> PrefetchResult:  # fmt: skip
        chain = self._fleet.chains[hashes[-1]]
        ended = asyncio.get_running_loop().create_future()
        began_s = self._now
        origin = self._fleet.clients[source[0]].engine
        pull = Pull(ended, self.engine, origin, chain, len(hashes), began_s + deadline_s)
        self._fleet.network.start(pull, began_s)
        self._fleet.watch("", self._fleet.network)
        await ended
        elapsed_s = self._now - began_s
        return PrefetchResult(pull.have_pages, pull.pulled_pages, pull.pulled_bytes, elapsed_s, pull.reason)

    async def touch(self, tip: bytes, *, deadline_s: float) -> None:
        self.engine.touch(self._fleet.chains[tip], self._now)

    async def lookup(self, hashes: Sequence[bytes], *, deadline_s: float) -> int:
        return self.engine.store.match(self._fleet.chains[hashes[-1]])

    async def abort(self, rid: str, *, deadline_s: float) -> None:
        raise AssertionError("nobody goes away in these tests")

    async def load(self, *, deadline_s: float) -> LoadReport:
        raise AssertionError("not asked in these tests")

    async def close(self) -> None: ...
