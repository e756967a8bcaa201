"""A simulated engine in closed form: the batch loop of `simulated_loop.py` without its tokens.

No clock, no tasks, no chance: whoever drives it calls `advance` at `next_event_s`. The order of work is the
loop's: prefill first, chunks back to back or with K decode steps after each, admission that keeps room for
what others may still generate, the last-come retracted when no page is free. Only what it costs to simulate
differs: decode steps between two changes of the batch are one event; nothing is done per token or per page.

Two things differ from the loop, by little; all else is equal. Who waits for room is tried again when the
batch changes, not after every step (`retry_steps=1` does as the loop, at its price): rounding to pages can
let the loop admit a few steps earlier. And a page store that is full keeps other pages (`closed_form_kv.py`).
"""

from __future__ import annotations

from collections import deque

from msgspec.structs import replace

from antiphon.engines.chains import Chain
from antiphon.engines.closed_form_kv import ClosedFormKv
from antiphon.engines.closed_form_request import NEVER, EngineRequest, EngineTotals, Milestone, Stage
from antiphon.engines.cluster import EngineSpec
from antiphon.engines.decode_batch import DecodeBatch, promise
from antiphon.engines.simulated_loop import MAX_PREFILL_TOKENS
from antiphon.policies.latency import LatencyModel

__all__ = ["ClosedFormEngine", "EngineRequest", "EngineTotals", "Milestone"]

# By name: on Python 3.11 a look-up through an Enum's class costs as much as a call.
PENDING, PREFILL, OVER = Stage.PENDING, Stage.PREFILL, Stage.OVER
FIRST_TOKEN, FINISHED = Milestone.FIRST_TOKEN, Milestone.FINISHED

NO_LIMIT = 1 << 60
"""More steps than any run has."""


class ClosedFormEngine:
    """One engine. Times are seconds of the simulation and never go back."""

    def __init__(
        self, spec: EngineSpec, page_tokens: int, incarnation: str = "0", *, retry_steps: int = 0
    ) -> None:
        """`retry_steps`: decode steps between two tries to admit who waits for room; 0 = none."""
        group = spec.group
        if 0 < group.chunk_tokens < page_tokens:
            raise ValueError(f"{spec.engine_id}: chunk_tokens {group.chunk_tokens} < a page of {page_tokens}")
        self.spec = spec
        self.engine_id = spec.engine_id
        self.incarnation = incarnation
        self.page_tokens = page_tokens
        pages = group.device_tokens // page_tokens, group.store_tokens // page_tokens
        self.kv = ClosedFormKv(*pages, page_tokens)
        self.device = self.kv.device
        self.store = self.kv.store
        self.pool_tokens = pages[0] * page_tokens
        self.totals = EngineTotals()
        self.next_event_s = NEVER
        """When `advance` is due; inf when idle."""
        self._latency = spec.latency
        self._request_fixed_s = group.request_fixed_s
        self._budget_tokens = group.chunk_tokens or MAX_PREFILL_TOKENS
        self._interval = group.decode_interval
        self._interval_left = 0
        """Decode steps before the next prefill pass."""
        self._most_running = group.max_running_requests
        self._retry_steps = retry_steps or NO_LIMIT
        self._pending: deque[EngineRequest] = deque()
        """Submitted, not yet seen by the batch loop; in order of `visible_s`."""
        self._refused: deque[EngineRequest] = deque()
        self._waiting: deque[EngineRequest] = deque()
        self._chunked: EngineRequest | None = None
        """The one request whose prompt is prefilled in part."""
        self._pass: list[tuple[EngineRequest, int]] = []
        """The prefill pass under way: request, new tokens."""
        self._batch = DecodeBatch(self._latency.decode, page_tokens)
        self.gaps = self._batch.gaps
        """Seconds between two tokens of an answer."""
        self._out: list[tuple[Milestone, EngineRequest]] = []
        self._end_s = NEVER
        """Of the pass or run under way."""

    # ------------------------------------------------------------ for the driver

    @property
    def running_requests(self) -> int:
        """Admitted and not over."""
        part = self._chunked is not None and all(self._chunked is not request for request, _ in self._pass)
        return len(self._batch.requests) + len(self._pass) + part

    @property
    def waiting_requests(self) -> int:
        return len(self._waiting) + len(self._pending)

    @property
    def used_tokens(self) -> int:
        """KV of requests in flight, as of the last event."""
        return self.device.used_pages * self.page_tokens

    def submit(self, request: EngineRequest, now: float) -> None:
        """The batch loop sees it `request_fixed_s` from now."""
        request.visible_s = visible_s = now + self._request_fixed_s
        request.stage = PENDING
        prompt, pool = request.prompt_tokens, self.pool_tokens
        if prompt + 1 > pool:
            request.message = f"the prompt has {prompt} tokens, the pool of {self.engine_id} only {pool}"
            self._refused.append(request)
            self.next_event_s = min(self.next_event_s, visible_s)
            return
        # As SGLang: an answer is cut where the pool ends.
        if prompt + request.limit > pool:
            request.limit = pool - prompt
        pending = self._pending
        pending.append(request)
        if self._end_s == NEVER:
            if visible_s < self.next_event_s:
                self.next_event_s = visible_s
        elif len(pending) == 1 and self._batch.run_steps and self._is_open():
            self._cut(visible_s, self._interval_left)

    def abort(self, request: EngineRequest, now: float) -> None:
        """It leaves without a milestone: at once when it waits, else at the end of the step that runs."""
        stage = request.stage
        if stage is PENDING:
            self._abort_waiting(request, now)
        elif (stage is Stage.RUNNING or stage is PREFILL) and not request.aborted:
            request.aborted = True
            self._batch.aborting += stage is Stage.RUNNING
            if self._batch.run_steps:
                self._cut(now, self._interval_left if stage is PREFILL else 0)

    def touch(self, chain: Chain, now: float) -> None:
        """The chain is in use: the store evicts it last. Does nothing unless the store has all of it."""
        self.store.touch(chain)

    def advance(self, now: float) -> list[tuple[Milestone, EngineRequest]]:
        """Do what is due at `now`, which must be `next_event_s`; returns what came of it, in order."""
        out: list[tuple[Milestone, EngineRequest]] = []
        self._out = out
        while self._refused and self._refused[0].visible_s <= now:
            refused = self._refused.popleft()
            refused.stage = OVER
            self.totals.refused += 1
            out.append((Milestone.REFUSED, refused))
        pending = self._pending
        if now >= self._end_s or self._end_s == NEVER:
            if self._batch.run_steps:
                self._end_run(now)
            elif self._pass:
                self._end_pass(now)
            while pending and pending[0].visible_s <= now:
                self._waiting.append(pending.popleft())
            self._plan(now)
        self.next_event_s = self._end_s
        if self._end_s == NEVER and pending:
            self.next_event_s = pending[0].visible_s
        if self._refused:
            self.next_event_s = min(self.next_event_s, self._refused[0].visible_s)
        return out

    def recost(self, latency: LatencyModel) -> None:
        """From now on work takes as long as `latency` says. Raises RuntimeError unless it is idle."""
        if self.next_event_s != NEVER:
            raise RuntimeError(f"{self.engine_id} is at work: what that costs cannot change now")
        self.spec = replace(self.spec, latency=latency)
        self._latency = latency
        self._batch.recost(latency.decode)

    # ------------------------------------------------------------ the loop

    def _plan(self, now: float) -> None:
        """What to do next: a prefill pass, a decode run, or nothing."""
        running = self._batch.requests
        while True:
            if not running:
                self._interval_left = 0
            if not self._interval_left and (self._waiting or self._chunked is not None):
                self._fill_pass(now)
                if self._pass:
                    self._start_pass(now)
                    return
            if running:
                if self._start_run(now):
                    return
            elif self._chunked is not None:
                # Nothing runs, so nothing will free the pages that its next chunk needs.
                self._retract(self._chunked)
                self._chunked = None
            elif not self._waiting:
                self._end_s = NEVER
                return

    def _is_open(self) -> bool:
        """A request that arrives now can be next."""
        return not self._waiting and self._chunked is None and len(self._batch.requests) < self._most_running

    def _cut(self, at_s: float, least_steps: int) -> None:
        """The run under way ends with the step that runs at `at_s`."""
        batch = self._batch
        batch.cut(at_s, least_steps)
        self._end_s = batch.end_s
        if batch.end_s < self.next_event_s:
            self.next_event_s = batch.end_s

    def _abort_waiting(self, request: EngineRequest, now: float) -> None:
        request.stage = OVER
        self.totals.aborted += 1
        for queue in (self._pending, self._refused):
            if request in queue:
                queue.remove(request)
                return
        first = self._waiting[0] is request
        self._waiting.remove(request)
        if first and self._batch.run_steps:  # it stood in the others' way
            if self._waiting:
                self._cut(now, self._interval_left)
            elif self._pending and self._is_open():
                self._cut(max(now, self._pending[0].visible_s), self._interval_left)

    # ------------------------------------------------------------ prefill

    def _fill_pass(self, now: float) -> None:
        """The next prefill pass, its pages taken. At most the last request of it is a part."""
        budget, chunked = self._budget_tokens, self._chunked
        if chunked is not None:
            self._chunked = None
            if chunked.aborted:
                self._leave(chunked)
            else:
                budget -= self._add(chunked, budget)
        waiting, running = self._waiting, len(self._batch.requests)
        while waiting and self._chunked is None and budget > 0:
            if running + len(self._pass) >= self._most_running or not self._admit(waiting[0], now):
                break
            budget -= self._add(waiting.popleft(), budget)

    def _admit(self, request: EngineRequest, now: float) -> bool:
        """Match its prefix and see that it fits beside what the others may still need."""
        device = self.device
        tip, depth, usable = self.kv.match(request)
        batch, admitted = self._batch, self._pass
        if batch.requests or admitted:
            tokens = request.prompt_tokens + request.emitted - depth * self.page_tokens
            tokens += promise(request.limit - request.emitted)
            for other, _ in admitted:
                tokens += promise(other.limit - other.emitted)
            room = device.available_pages * self.page_tokens - tokens
            fits = room >= 0 and batch.leaves_room(room)
            if fits and tip is not None:
                # What it locks cannot be evicted any more to make room for the rest of it.
                room -= device.lock(tip, depth) * self.page_tokens
                if room < 0 or not batch.leaves_room(room):
                    device.unlock(tip, depth)
                    return False
            elif tip is not None:
                device.mark(tip, depth)
            if not fits:
                return False
        elif tip is not None:
            # Alone it may always try: it is retracted if it does not work out.
            device.lock(tip, depth)
        host_tokens = self.kv.load(request, tip, depth, usable)
        if host_tokens:
            request.load_s += self._latency.load_s(host_tokens)
        if request.stage is PENDING and not request.retractions:
            request.admitted_s = now
            request.cached_device_tokens = depth * self.page_tokens
            request.cached_host_tokens = host_tokens
            self.totals.prefill_tokens_reused += request.computed
        request.stage = PREFILL
        return True

    def _add(self, request: EngineRequest, budget: int) -> int:
        """Put the next piece of a prompt, whole pages or all, into the pass; returns its tokens, 0 without
        room for it. A prompt of which something is left becomes the chunked request."""
        page = self.page_tokens
        take = left = request.prompt_tokens + request.emitted - request.computed
        if left > budget:
            take = budget // page * page
        if take and not self.kv.grow(request, take):
            take = 0
        if take < left:
            self._chunked = request
        if take:
            self._pass.append((request, take))
        return take

    def _start_pass(self, now: float) -> None:
        cost = self._latency.prefill
        seconds, tokens = cost.fixed_s, 0
        for request, take in self._pass:
            seconds = request.after_prefill_s(seconds, cost, take)
            tokens += take
        totals = self.totals
        totals.prefill_busy_s += seconds
        totals.prefill_tokens_computed += tokens
        totals.prefill_passes += 1
        self._end_s = now + seconds

    def _end_pass(self, now: float) -> None:
        for request, take in self._pass:
            request.computed += take
            self.kv.commit(request)
            if request.aborted:
                if request is self._chunked:
                    self._chunked = None
                self._leave(request)
            elif request is not self._chunked:
                self._first_token(request, now)
        self._pass.clear()
        self._interval_left = self._interval

    def _first_token(self, request: EngineRequest, now: float) -> None:
        """The prompt is computed: its last position gives the next token."""
        if not request.limit:
            self._finish(request, now)
            return
        request.emitted += 1
        self.totals.output_tokens += 1
        if request.emitted == 1:
            request.first_token_s = now
            self._out.append((FIRST_TOKEN, request))
        else:  # it was retracted
            self._batch.gaps.add(now - request.last_token_s, 1)
        if request.emitted >= request.limit:
            self._finish(request, now)
        else:
            self._batch.join(request, now)

    # ------------------------------------------------------------ decode

    def _start_run(self, now: float) -> bool:
        """Decode until the batch changes; False if it had to be given up for want of pages."""
        device, batch = self.device, self._batch
        while not batch.can_step(device.available_pages):
            # Those before it have taken what could be evicted; then who came last gives way. What it held is
            # too little to admit it again: no need to try at once.
            device.evict(device.tree_pages - device.locked_pages)
            self._retract(batch.part_last())
            if not batch.requests:
                return False
        most_steps = NO_LIMIT
        if self._waiting or self._chunked is not None:
            most_steps = self._interval_left or self._retry_steps
        batch.start_run(now, most_steps, device.available_pages)
        self._end_s = batch.end_s
        if self._pending and self._is_open():
            self._cut(self._pending[0].visible_s, self._interval_left)
        return True

    def _end_run(self, now: float) -> None:
        batch, totals = self._batch, self.totals
        steps = batch.run_steps
        self.device.take(batch.new_pages())
        totals.decode_steps += steps
        totals.output_tokens += steps * len(batch.requests)
        totals.decode_busy_s += now - batch.start_s
        if self._interval_left:
            self._interval_left = max(0, self._interval_left - steps)
        for request in batch.end_run(now):
            self.kv.commit(request)
            if request.aborted:
                totals.output_tokens -= 1  # nobody gets its last token
                self._leave(request)
            else:
                self._finish(request, now)

    # ------------------------------------------------------------ the end

    def _finish(self, request: EngineRequest, now: float) -> None:
        request.finished_s = now
        self.totals.finished += 1
        self._out.append((FINISHED, request))
        self.kv.release(request)
        request.stage = OVER

    def _leave(self, request: EngineRequest) -> None:
        """Aborted."""
        self.totals.aborted += 1
        self.kv.release(request)
        request.stage = OVER

    def _retract(self, request: EngineRequest) -> None:
        """It waits again, first in line, and computes again what is evicted meanwhile."""
        if request.aborted:
            self._leave(request)
            return
        self.kv.release(request)
        request.retractions += 1
        self.totals.retractions += 1
        request.computed = 0
        request.stage = PENDING
        self._waiting.appendleft(request)

    # ------------------------------------------------------------ checks

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict themselves. For tests."""
        self.device.check_invariants()
        self.store.check_invariants()
