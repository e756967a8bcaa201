"""The running batch of a closed-form engine: who decodes, until when, and the run of steps under way.

Nothing is done per token: a request is known by the step at which it is finished, the batch by sums. What a
request has computed is brought up to date when it leaves.
"""

from __future__ import annotations

from heapq import heappop, heappush

from antiphon.engines.closed_form_request import NEVER, RUNNING, EngineRequest
from antiphon.engines.decode_run import GapHistogram, PageGrowth, StepTimes
from antiphon.engines.simulated_loop import CLIP_NEW_TOKENS, NEW_TOKEN_RATIO
from antiphon.policies.latency import DecodeCost


def promise(left_tokens: int) -> int:
    """Of the tokens that a request may still generate, those that admission keeps room for."""
    return int((left_tokens if left_tokens < CLIP_NEW_TOKENS else CLIP_NEW_TOKENS) * NEW_TOKEN_RATIO)


class DecodeBatch:
    """Requests in the order in which they joined, and at most one run of steps."""

    __slots__ = (
        "_context", "_end_steps", "_ends", "_growth", "_last_tokens", "_longest_end", "_seq", "_times",
        "aborting", "end_s", "gaps", "requests", "run_steps", "start_s", "step",
    )  # fmt: skip

    def __init__(self, cost: DecodeCost, page_tokens: int) -> None:
        self.requests: dict[EngineRequest, None] = {}
        self.step = 0
        """Decode steps since the start of the engine; those of the run under way are not in it."""
        self.run_steps = 0
        """Of the run under way; 0 = none."""
        self.start_s = self.end_s = NEVER
        """Of the run under way."""
        self.aborting = 0
        """Requests that leave with the next step."""
        self.gaps = GapHistogram()
        self._times = StepTimes(cost)
        self._growth = PageGrowth(page_tokens)
        self._context = 0
        """Tokens of all requests."""
        self._end_steps = 0
        """Sum over all requests."""
        self._longest_end = 0
        """No request that ever joined ends at a later step."""
        self._ends: list[tuple[int, int, EngineRequest]] = []
        """Heap of (end_step, seq, request); who left before is dropped when it comes up."""
        self._seq = 0
        self._last_tokens: list[tuple[float, int]] = []
        """(when they got their last token, how many requests), for all of them."""

    def recost(self, cost: DecodeCost) -> None:
        """What steps cost from now on; nobody is in it."""
        self._times = StepTimes(cost)

    # ------------------------------------------------------------ who is in it

    def join(self, request: EngineRequest, now: float) -> None:
        """It has just got a token, and wants more."""
        request.stage = RUNNING
        request.last_token_s = now
        self._seq = request.seq = self._seq + 1
        request.end_step = end_step = self.step + request.limit - request.emitted
        request.due = self._growth.join(request.computed, self.step)
        self.requests[request] = None
        self._context += request.computed + 1
        self._end_steps += end_step
        if end_step > self._longest_end:
            self._longest_end = end_step
        heappush(self._ends, (end_step, request.seq, request))
        self._last_tokens.append((now, 1))

    def part(self, request: EngineRequest) -> None:
        """It leaves, between two runs, with what it has computed and generated."""
        del self.requests[request]
        request.seq = 0
        emitted = request.limit - (request.end_step - self.step)
        request.computed += emitted - request.emitted
        request.emitted = emitted
        self._growth.leave(request.due)
        self._context -= request.computed + 1
        self._end_steps -= request.end_step
        self.aborting -= request.aborted

    def part_last(self) -> EngineRequest:
        """Who came last leaves."""
        last = next(reversed(self.requests))
        self.part(last)
        last.last_token_s = max(last.last_token_s, self._last_tokens[0][0])
        return last

    def leaves_room(self, tokens: int) -> bool:
        """That many tokens are enough for what is promised to all of them."""
        batch = len(self.requests)
        step = self.step
        # Sums decide nearly always: a promise is the share of what is left, clipped and rounded down.
        most = (self._end_steps - step * batch) * NEW_TOKEN_RATIO
        if tokens >= most + 1.0:
            return True
        if tokens < most - batch - 1.0 and self._longest_end - step <= CLIP_NEW_TOKENS:
            return False
        return tokens >= sum([promise(request.end_step - step) for request in self.requests])

    # ------------------------------------------------------------ runs

    def can_step(self, pages: int) -> bool:
        """There are pages enough for one more token of each."""
        return len(self.requests) <= pages or self._growth.pages(self.step, 1) <= pages

    def start_run(self, now: float, most_steps: int, pages: int) -> None:
        """Plan as many steps as nothing changes the batch for: until one ends, or `pages` are used up."""
        ends = self._ends
        end_step, seq, request = ends[0]
        while request.seq != seq:
            heappop(ends)
            end_step, seq, request = ends[0]
        steps = 1 if self.aborting else end_step - self.step
        if steps > most_steps:
            steps = most_steps
        self.run_steps = steps = self._growth.steps_within(self.step, pages, steps)
        self.start_s = now
        self._times.set(len(self.requests), self._context)
        self.end_s = now + self._times.seconds(steps)

    def cut(self, at_s: float, least_steps: int) -> None:
        """End the run with the step that runs at `at_s`, if it has `least_steps` steps then."""
        steps = self._times.steps_until(at_s - self.start_s, self.run_steps)
        if steps < least_steps:
            steps = least_steps
        if steps < self.run_steps:
            self.run_steps = steps
            self.end_s = self.start_s + self._times.seconds(steps)

    def new_pages(self) -> int:
        """What the run under way adds."""
        return self._growth.pages(self.step, self.run_steps)

    def end_run(self, now: float) -> list[EngineRequest]:
        """The steps are done. Who is finished or aborted leaves, and is returned, in the batch's order."""
        steps = self.run_steps
        self._count_gaps(now - self.start_s, steps)
        self.step = step = self.step + steps
        self._context += len(self.requests) * steps
        self.run_steps = 0
        ends, over = self._ends, []
        while ends and ends[0][0] <= step:
            _, seq, request = heappop(ends)
            if request.seq == seq:
                over.append(request)
        if self.aborting:
            over = [request for request in self.requests if request.aborted or request.end_step == step]
        for request in over:
            self.part(request)
        self._last_tokens = [(now, len(self.requests))] if self.requests else []
        return over

    def _count_gaps(self, seconds: float, steps: int) -> None:
        start_s, last = self.start_s, self._last_tokens
        left = batch = len(self.requests)
        if len(last) > 1 or last[0][0] != start_s:
            # Some waited for a prefill: their first token comes a stall later.
            first_s = self._times.seconds(1)
            for time_s, requests in last:
                requests = min(requests, left)  # fewer after a retraction
                left -= requests
                if requests:
                    self.gaps.add(start_s - time_s + first_s, requests)
            steps -= 1
            seconds -= first_s
        if steps:
            self.gaps.add(seconds / steps, batch * steps)
