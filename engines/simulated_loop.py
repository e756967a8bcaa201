"""The batch loop of a simulated engine: SGLang's order of work, with durations instead of forward passes.

Prefill first: while there is a prompt to prefill and room for it, its chunks (`chunk_tokens`, 0 = whole
prompts) run back to back, or with `decode_interval` decode steps after each. Else one decode step for all
that run. A request that finds no page is retracted: it waits again, and computes again what was evicted.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from antiphon.engines.faults import Faults
from antiphon.engines.simulated_request import Finish, LoopRequest, TokenStream
from antiphon.engines.virtual_kv import VirtualKv
from antiphon.policies.latency import LatencyModel

MAX_PREFILL_TOKENS = 16384
"""New tokens of one prefill batch, over all its prompts (SGLang's --max-prefill-tokens)."""

NEW_TOKEN_RATIO = 0.7
"""Share of what a request may still generate for which admission keeps room (SGLang's start value)."""

CLIP_NEW_TOKENS = 4096

MAX_LAG_S = 0.05
"""Steps that start later than this (a busy machine) are not made up for."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    chunk_tokens: int
    decode_interval: int
    max_running_requests: int
    max_queued_requests: int
    """0 = no limit."""
    vocab_tokens: int
    speed: float
    """Simulated seconds per second."""


@dataclass(slots=True)
class LoopTotals:
    """Counters since the start."""

    prefill_uncached_tokens: int = 0
    prefill_busy_s: float = 0.0
    decode_steps: int = 0
    output_tokens: int = 0
    retractions: int = 0


class BatchLoop:
    """Owns every request in flight. `run()` is one task; all methods are for its event loop only."""

    def __init__(
        self,
        settings: LoopSettings,
        kv: VirtualKv,
        latency: LatencyModel,
        faults: Faults,
        sleep: Callable[[float], Awaitable[object]],
        clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.kv = kv
        self.totals = LoopTotals()
        self.waiting: deque[LoopRequest] = deque()
        self.running: list[LoopRequest] = []
        self._latency = latency
        self._faults = faults
        self._sleep = sleep
        self._clock = clock
        self._chunked: LoopRequest | None = None
        """The one request whose prompt is prefilled in part."""
        self._prefilling: list[LoopRequest] = []
        self._interval_left = 0
        self._due_s = 0.0
        self._wake = asyncio.Event()

    # ------------------------------------------------------------ for the HTTP side

    @property
    def live(self) -> list[LoopRequest]:
        """Every unfinished request."""
        known = dict.fromkeys(itertools.chain(self.waiting, self._prefilling, self.running))
        if self._chunked is not None:
            known[self._chunked] = None
        return [request for request in known if request.finish is None]

    @property
    def running_requests(self) -> int:
        return len(self.live) - len(self.waiting)

    @property
    def waiting_uncached_tokens(self) -> int:
        requests = [*self.waiting, *([self._chunked] if self._chunked is not None else [])]
        return sum(len(request.tokens) - request.computed for request in requests)

    @property
    def used_tokens(self) -> int:
        return self.kv.device.used_pages * self.kv.page_size_tokens

    @property
    def pool_tokens(self) -> int:
        return self.kv.device.n_pages * self.kv.page_size_tokens

    def submit(self, request: LoopRequest) -> None:
        """Queue it; a request that can never run, or finds the queue full, is finished at once."""
        limit = self.settings.max_queued_requests
        if self.kv.pages_for(request.prompt_tokens + 1) > self.kv.device.n_pages:
            message = (
                f"Request length is longer than the KV cache pool size ({self.pool_tokens} tokens): "
                f"the prompt has {request.prompt_tokens}"
            )
            self._end(request, Finish("abort", message, 400))
        elif limit and len(self.waiting) >= limit:
            self._end(request, Finish("abort", "The request queue is full.", 503))
        else:
            # As SGLang: an answer is cut where the pool ends.
            request.max_new_tokens = min(request.max_new_tokens, self.pool_tokens - request.prompt_tokens)
            hang = self._faults.take_hang()
            request.hung = hang is not None
            if hang is not None and hang.seconds is not None:
                asyncio.get_running_loop().call_later(hang.seconds, self._unhang, request)
            self.waiting.append(request)
            self._wake.set()

    def abort(self, prefix: str, *, everything: bool = False) -> None:
        """Abort every request whose rid starts with `prefix`: SGLang's rule."""
        for request in self.live:
            if everything or request.rid.startswith(prefix):
                self.abort_request(request)

    def abort_request(self, request: LoopRequest) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            self._end(request, Finish("abort", "Abort in waiting queue"))
        elif request.finish is None:
            # In a batch: it leaves when the step that runs now is over.
            request.aborted = True

    def flush(self) -> bool:
        """Forget the device's pages (the store keeps its own); False while anything runs or waits."""
        if self.live:
            return False
        self.kv.device.flush()
        return True

    def clear_hangs(self) -> None:
        for request in self.waiting:
            request.hung = False
        self._wake.set()

    def _unhang(self, request: LoopRequest) -> None:
        request.hung = False
        self._wake.set()

    # ------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            batch = [] if self._defer_prefill() else self._next_prefill()
            if batch:
                await self._prefill(batch)
            elif self.running:
                await self._decode()
            elif self._chunked is not None:
                # Nothing runs, so nothing will free the pages that its next chunk needs.
                self._retract(self._chunked)
                self._chunked = None
            else:
                self._wake.clear()
                await self._wake.wait()
                self._due_s = self._clock()

    def _defer_prefill(self) -> bool:
        if not self.running:
            self._interval_left = 0
        if self._interval_left == 0:
            return False
        self._interval_left -= 1
        return True

    def _next_prefill(self) -> list[tuple[LoopRequest, int]]:
        """The next prefill batch: (request, new tokens), its pages taken. At most the last one is a part."""
        budget = self.settings.chunk_tokens or MAX_PREFILL_TOKENS
        batch: list[tuple[LoopRequest, int]] = []
        if self._chunked is not None:
            chunked, self._chunked = self._chunked, None
            if chunked.aborted:
                self._finish(chunked, Finish("abort", "Aborted"))
            else:
                budget -= self._add(batch, chunked, budget)
        while self._chunked is None and budget > 0:
            request = next((r for r in self.waiting if not r.hung), None)
            if request is None or len(self.running) + len(batch) >= self.settings.max_running_requests:
                break
            if self._fails(request):
                continue
            if not self._admit(request, [other for other, _ in batch]):
                break
            self.waiting.remove(request)
            taken = self._add(batch, request, budget)
            budget -= taken
            if not taken:
                break
        return batch

    def _fails(self, request: LoopRequest) -> bool:
        fault = None if request.admitted else self._faults.take_abort()
        if fault is None:
            return False
        self.waiting.remove(request)
        self._end(request, Finish("abort", fault.message, 503))
        return True

    def _admit(self, request: LoopRequest, batch: list[LoopRequest]) -> bool:
        """Match its prefix and see that it fits beside what the others may still need."""
        others = self.running + batch
        promised = sum(self._promise(other) for other in others)
        kv = self.kv.admit(request.tokens, request.seed, promised + self._promise(request))
        if kv is None and not others:
            kv = self.kv.admit(request.tokens, request.seed, 1)
        if kv is None:
            return False
        request.kv = kv
        request.computed = kv.device_tokens + kv.host_tokens
        if not request.admitted:
            request.admitted = True
            request.cached_device_tokens = kv.device_tokens
            request.cached_host_tokens = kv.host_tokens
        vocab_tokens = self.settings.vocab_tokens
        request.stream = TokenStream(request.tokens, vocab_tokens, wrong=kv.wrong, choice=request.choice)
        return True

    def _promise(self, request: LoopRequest) -> int:
        left = min(request.max_new_tokens - request.output_tokens, CLIP_NEW_TOKENS)
        return int(left * NEW_TOKEN_RATIO)

    def _add(self, batch: list[tuple[LoopRequest, int]], request: LoopRequest, budget: int) -> int:
        """Put the next piece of a prompt into the batch; returns its tokens, 0 when there is no room for it.

        A prompt of which something is left becomes the chunked request. All of a prompt needs whole chunks'
        pages only; a piece ends at a page boundary.
        """
        assert request.kv is not None
        left = len(request.tokens) - request.computed
        take = left if left <= budget else budget // self.kv.page_size_tokens * self.kv.page_size_tokens
        if take and not self.kv.grow(request.kv, request.computed + take):
            take = 0
        if take < left:
            self._chunked = request
        if take:
            batch.append((request, take))
        return take

    async def _prefill(self, batch: list[tuple[LoopRequest, int]]) -> None:
        self._faults.reach("prefill")
        self._prefilling = [request for request, _ in batch]
        fixed_s = self._latency.prefill.fixed_s
        work_s = sum(self._latency.prefill_s(take, request.computed) - fixed_s for request, take in batch)
        await self._pass(fixed_s + work_s)
        self._prefilling = []
        self.totals.prefill_busy_s += fixed_s + work_s
        self.totals.prefill_uncached_tokens += sum(take for _, take in batch)
        self._interval_left = self.settings.decode_interval
        for request, take in batch:
            assert request.kv is not None
            request.computed += take
            self.kv.commit(request.kv, request.tokens[: request.computed])
            if request.aborted:
                if request is self._chunked:
                    self._chunked = None
                self._finish(request, Finish("abort", "Aborted"))
            elif request is not self._chunked:
                self._first_token(request)

    def _first_token(self, request: LoopRequest) -> None:
        """The prompt is computed: its last position gives the next token."""
        if request.max_new_tokens == 0:
            self._finish(request, Finish("length"))
            return
        self._faults.reach("first_token")
        self.running.append(request)
        self._emit(request)

    async def _decode(self) -> None:
        self._make_room()
        batch = list(self.running)
        if not batch:  # none had room: no step
            return
        context = sum(len(request.tokens) for request in batch)
        await self._pass(self._latency.decode_step_s(len(batch), context))
        self.totals.decode_steps += 1
        for request in batch:
            request.computed += 1
            if request.aborted:
                self._finish(request, Finish("abort", "Aborted"))
            else:
                self._emit(request)

    def _make_room(self) -> None:
        """A page for every running request's next token; those that came last give way."""
        for request in list(self.running):
            while request in self.running:
                assert request.kv is not None
                if self.kv.grow(request.kv, len(request.tokens)):
                    break
                self._retract(self.running[-1])

    def _retract(self, request: LoopRequest) -> None:
        if request.aborted:
            self._finish(request, Finish("abort", "Aborted"))
            return
        self._release(request)
        request.retractions += 1
        self.totals.retractions += 1
        request.computed = 0
        self.waiting.appendleft(request)

    def _emit(self, request: LoopRequest) -> None:
        assert request.stream is not None
        scripted = request.script.token_ids if request.script is not None else None
        position = request.output_tokens
        token = (
            scripted[position] if scripted is not None and position < len(scripted) else request.stream.next()
        )
        request.stream.push(token)
        request.tokens.append(token)
        self.totals.output_tokens += 1
        self._faults.reach("decode", request.output_tokens)
        if request.natural_tokens is not None and request.output_tokens >= request.natural_tokens:
            kind = request.script.finish_reason if request.script is not None else "stop"
            self._finish(request, Finish(kind))
        elif request.output_tokens >= request.max_new_tokens:
            self._finish(request, Finish("length"))
        else:
            request.changed.set()

    def _finish(self, request: LoopRequest, finish: Finish) -> None:
        assert request.kv is not None
        self.kv.commit(request.kv, request.tokens[: request.computed])
        self._release(request)
        self._end(request, finish)

    def _release(self, request: LoopRequest) -> None:
        assert request.kv is not None
        self.kv.release(request.kv)
        request.kv = None
        if request in self.running:
            self.running.remove(request)

    def _end(self, request: LoopRequest, finish: Finish) -> None:
        request.finish = finish
        request.changed.set()

    async def _pass(self, duration_s: float) -> None:
        """Let simulated time pass. Steps are due on a grid of their own, so sleeping late does not add up."""
        now = self._clock()
        duration_s *= self._faults.slow_factor / self.settings.speed
        start = self._due_s if now - self._due_s < MAX_LAG_S else now
        self._due_s = start + duration_s
        await self._sleep(max(0.0, self._due_s - now))
