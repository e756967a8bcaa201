"""Relays one answer from an engine to its client, over the engines that it takes.

The round is finished when its usage is known, before that is relayed. When the stream breaks, `goes_on` says
how the answer can go on elsewhere; the core decides whether and where it does, and then commands it again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from antiphon.engines.base import Chunk, EngineError, FailureKind, GenerateRequest, Usage
from antiphon.scheduler import resume
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.engine_calls import EngineCalls
from antiphon.scheduler.messages import (
    EngineDown,
    Event,
    FirstToken,
    Generate,
    GoesOn,
    RoundFinished,
)
from antiphon.scheduler.rounds import LiveRound, seed_of
from antiphon.scheduler.states import DECODING


class Answering:
    """`post` gives an event to the core, and carries out what it commands."""

    def __init__(self, core: Scheduler, calls: EngineCalls, post: Callable[[Event], None]) -> None:
        self._core = core
        self._calls = calls
        self._post = post
        self.hashing = False
        """Some engine has a page store: prompts and answers are hashed."""

    async def answer(self, live: LiveRound, command: Generate) -> None:
        """Relay the answer, or the rest of it, to its end; raises `EngineError`."""
        history_tokens = self._core.rounds[command.round_id].history_tokens
        live.said.begin()
        try:
            async with aclosing(self._chunks(live, command)) as chunks:
                async for chunk in chunks:
                    await self._relay(live, chunk, history_tokens)
        except EngineError:
            if live.finished or not live.said.complete:
                raise
            await self._relay(live, _usage_of(live, history_tokens), history_tokens)
        if not live.finished:
            raise EngineError(FailureKind.BROKEN, "the answer ended without its usage")
        live.handle.finish()

    async def _chunks(self, live: LiveRound, command: Generate) -> AsyncGenerator[Chunk, None]:
        """What the engine sends, less what the client has."""
        engine, request, said = self._calls.engine(command.engine_id), live.request, live.said
        live.deterministic = engine.record.deterministic
        body: dict[str, Any] = dict(request.body)
        if said.kept_ids:
            body["max_tokens"] = request.max_output_tokens - said.kept_ids
        call = GenerateRequest(
            path=request.path,
            input_ids=live.prompt,
            rid=command.rid,
            session_id=live.handle.session_id,
            body=body,
            cache_salt=request.cache_salt,
        )
        started = False
        most_s, silence_s = self._calls.deadlines.event_s, partial(self._core.silence_s, command.round_id)
        answer = engine.generate(
            call, deadline_s=command.deadline_s, silence_s=lambda: min(most_s, silence_s())
        )
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                rest = said.rest(chunk, command.engine_id) if live.one_choice else chunk
                if not started:
                    started = True
                    self._begin(live)
                yield rest

    async def _relay(self, live: LiveRound, chunk: Chunk, history_tokens: int) -> None:
        """A chunk counts as sent once it is in the reader's buffer: whoever waits for room may be cut off."""
        if chunk.usage is not None and not live.finished:
            live.said.ids += chunk.token_ids
            live.finished = True
            self._finish(live, chunk.usage, history_tokens)
        await live.handle.push(chunk)
        if live.finished:
            return
        if live.one_choice:
            live.said.sent(chunk)
        else:
            live.said.ids += chunk.token_ids

    def _begin(self, live: LiveRound) -> None:
        round = self._core.rounds[live.request.round_id]
        live.handle.arm = round.arm.value if round.arm else ""
        live.handle.round_number = round.round_number
        self._post(FirstToken(live.request.round_id))

    def _finish(self, live: LiveRound, usage: Usage, history_tokens: int) -> None:
        live.answer_ended()
        completion_tokens, cached_tokens = usage.completion_tokens, usage.cached_tokens
        if not live.one_choice:
            # The engine computes the prompt of several choices apart, and then calls all of it cached; their
            # outputs are summed. What counts here is the first choice, and what was believed to be held.
            completion_tokens, cached_tokens = len(live.output_ids), min(cached_tokens, history_tokens)
        hashes = live.final_hashes = live.hashes_with_output() if self.hashing else ()
        lagged = live.handle.lagged or not live.one_choice  # nothing is to be learned of the engine's speed
        self._post(RoundFinished(live.request.round_id, completion_tokens, cached_tokens, hashes, lagged))

    # ---------------------------------------------------------------- when it breaks

    def goes_on(self, live: LiveRound) -> GoesOn | str:
        """How the answer can go on elsewhere, or why it cannot; "" before its first token."""
        round = self._core.rounds.get(live.request.round_id)
        if round is None or round.phase is not DECODING:
            return ""
        request, said = live.request, live.said
        why = resume.why_not(request.body) or said.odd
        excluded: frozenset[str] = frozenset()
        if not why and not resume.is_greedy(request.body):
            excluded = self._calls.indeterminate()
            why = "" if live.deterministic else resume.NOT_REPEATABLE
        if why:
            return why
        said_tokens = len(said.ids)
        said.cut(request.max_output_tokens)
        live.prompt = request.prompt.extended(said.ids[: said.kept_ids])
        live.hashes = live.prompt.hashes(live.page_tokens, seed_of(request)) if self.hashing else ()
        left = request.max_output_tokens - said.kept_ids
        return GoesOn(len(live.prompt), live.hashes, left, said_tokens, excluded)

    def with_goes_on(self, down: EngineDown, live_rounds: list[LiveRound]) -> EngineDown:
        """The event, with what becomes of the answers that the engine was giving."""
        book = self._core.books.fleet.books.get(down.engine_id)
        if book is None or book.up.incarnation != down.incarnation:
            return down
        rounds = self._core.rounds
        theirs = {
            live.request.round_id: self.goes_on(live)
            for live in live_rounds
            if (round := rounds.get(live.request.round_id)) is not None
            and round.phase is DECODING
            and round.depends_on(down.engine_id)
        }
        return EngineDown(down.engine_id, down.incarnation, down.reason, theirs)


def _usage_of(live: LiveRound, history_tokens: int) -> Chunk:
    """For an answer that came to its end, and whose engine failed before it had counted."""
    prompt_tokens, completion_tokens = len(live.request.prompt), len(live.said.ids)
    cached_tokens = min(history_tokens, prompt_tokens)
    usage = Usage(prompt_tokens, completion_tokens, cached_tokens)
    told = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return Chunk({"choices": [], "usage": told}, usage=usage)
