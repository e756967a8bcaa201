"""What the driver keeps of a round in flight, and the gateway's side of it.

The gateway submits a `RoundRequest` and gets a `RoundHandle`. Life of a handle: `start()` returns when the
first event of the answer is there (so that status and headers can still be real), or raises `RoundRefused`;
then iterate over chunks, until the stream ends or raises `RoundBroke`. Leaving the `async with` early means
that the client is gone: the decode is aborted and the lease freed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from antiphon.engines.base import Chunk, EngineError
from antiphon.engines.page_hash import namespace_seed
from antiphon.engines.prompt import Prompt
from antiphon.scheduler.answer_buffer import AnswerBudget, size_of
from antiphon.scheduler.hints import NO_HINTS, Hints
from antiphon.scheduler.messages import HeldChain, Holding, Refuse
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.resume import Said
from antiphon.scheduler.retries import Call

STREAM_BUFFER_CHUNKS = 256
"""A reader that lags further behind takes from the replica's budget; when that is out, the engine waits."""


@dataclass(frozen=True, slots=True)
class RoundRequest:
    """A checked request of one round; `prompt` is the whole of it."""

    round_id: str
    session_id: str
    tenant: str
    path: str
    """The engine's route: /v1/chat/completions or /v1/completions."""
    prompt: Prompt
    body: Mapping[str, Any]
    """Sampling and output fields as the engine takes them."""
    max_output_tokens: int
    slo_ttft_s: float
    slo_itl_s: float
    extra_key: str | None = None
    cache_salt: str | None = None
    tool: str = ""
    """Whose result the round brings, where the client said."""
    parent_id: str | None = None
    """The session that this one was forked from, where that is known."""
    final: bool = False
    """The session's last round, as the client says."""
    hints: Hints = NO_HINTS
    """What the client says of the round and of what is to follow."""
    served_tokens: int = 0
    """So much of the prompt is what the session's rounds before had, or more; 0 = that is not known."""
    model: str = ""
    """Which of the replica's models is to run it; "" = its only one."""
    call: Call | None = None
    """Of which it is a try, if that can be told."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All token ids, copied: not for what every round does."""
        return tuple(self.prompt)


class RoundRefused(Exception):
    """Nothing was streamed. `code` as in `messages.Refuse`; `status` and `body`: an engine's 4xx answer."""

    def __init__(
        self, code: str, message: str, retry_after_s: float, status: int = 0, body: bytes = b""
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.status = status
        self.body = body


class RoundBroke(Exception):
    """The stream broke after its first token."""


class RoundHandle:
    """One round as the gateway sees it: filled by the driver, read by one gateway task."""

    def __init__(
        self,
        request: RoundRequest,
        on_gone: Callable[[], None] | None = None,
        budget: AnswerBudget | None = None,
    ) -> None:
        """Without a `budget` there is none left."""
        self.request = request
        self.session_id = request.session_id
        """The session that the round really ran in: another than asked for when it became a fork."""
        self.parent_id: str | None = None
        self.expires_in_s: float | None = None
        """How long the session is kept after this round, idle; None = the ledger was not asked."""
        self.round_number = 0
        self.fence = 0
        """Of its claim; 0 = it has none."""
        self.arm = ""
        self.receipt: Receipt | None = None
        """Set before the chunk with usage is relayed."""
        self.answered: Prompt | None = None
        """Prompt and output; set when `receipt` is."""
        self.recording: asyncio.Task[None] | None = None
        """Tells the ledger of the end; None = there is nothing to tell. Set when `receipt` is."""
        self.lagged = False
        """The reader has held the engine back."""
        self.pushed_chunks = 0
        self._on_gone = on_gone
        self._started = asyncio.Event()
        self._error: Exception | None = None
        self._ended = False
        self._left = False
        """Nobody reads any more."""
        self._chunks: deque[tuple[Chunk, int]] = deque()
        """With what each takes of the budget."""
        self._budget = budget or AnswerBudget(0)
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """The driver will add nothing more."""
        return self._ended

    # ---- the gateway's side

    async def start(self) -> None:
        """Wait for the first event; raises `RoundRefused`."""
        await self._started.wait()
        if self._error is not None and not self._chunks:
            raise self._error

    async def recorded(self, deadline_s: float) -> None:
        """Wait until the ledger knows that the round has ended, or `deadline_s`.

        A session's next round would find it busy before that, and become a fork.
        """
        if self.recording is not None:
            await asyncio.wait({self.recording}, timeout=deadline_s)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Chunks in order; raises `RoundBroke` after the last one when the stream broke."""
        while True:
            while self._chunks:
                chunk, taken_bytes = self._chunks.popleft()
                self._budget.give_back(taken_bytes)
                self._changed.set()
                yield chunk
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            self._changed.clear()
            await self._changed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended and self._on_gone is not None:
            self._on_gone()
        self._ended = True  # a driver that still pushes must not wait for a reader that left
        self._left = True
        while self._chunks:
            self._budget.give_back(self._chunks.popleft()[1])
        self._changed.set()

    # ---- the driver's side

    async def push(self, chunk: Chunk) -> None:
        """Add a chunk; waits while the reader lags by STREAM_BUFFER_CHUNKS and the budget has no room."""
        taken_bytes = 0
        while len(self._chunks) >= STREAM_BUFFER_CHUNKS and not self._ended:
            size_bytes = size_of(chunk)
            if self._budget.take(size_bytes):
                taken_bytes = size_bytes
                break
            self.lagged = True
            self._changed.clear()
            await self._changed.wait()
        if not self._left:
            self._chunks.append((chunk, taken_bytes))
        self.pushed_chunks += 1
        self._started.set()
        self._changed.set()

    def finish(self, error: Exception | None = None) -> None:
        """No more chunks; `error` is raised to the reader after those there. The first call counts."""
        if not self._ended:
            self._error = error
        self._ended = True
        self._started.set()
        self._changed.set()


@dataclass(slots=True)
class LiveRound:
    """A round in flight, on the driver's side."""

    request: RoundRequest
    handle: RoundHandle
    hashes: tuple[bytes, ...]
    page_tokens: int
    submitted_s: float = 0.0
    """On the driver's clock."""
    final_hashes: tuple[bytes, ...] = ()
    """Once the round is finished: those of prompt and output."""
    fence: int = 0
    claimed: bool = False
    tip: tuple[bytes, Holding] | None = None
    """Where the session's KV ended before this round, as the ledger knows."""
    call: asyncio.Task[None] | None = None
    finished: bool = False
    """Its usage is known: the core has been told."""
    sent_away: bool = False
    """It is being ended for the shutdown: its client is told when its lease is free."""
    deterministic: bool = False
    """The engine that answers says so of itself."""
    prompt: Prompt = field(init=False)
    """What engines compute: the request's, and after that what is kept of an answer that broke."""
    said: Said = field(init=False)
    error: EngineError | None = None
    """The last call's failure: an engine's own 4xx goes to the client."""

    def __post_init__(self) -> None:
        self.prompt = self.request.prompt
        self.said = Said(chat=self.request.path.endswith("/chat/completions"))

    @property
    def output_ids(self) -> list[int]:
        """Of the first choice, as far as they were sent."""
        return self.said.ids

    @property
    def one_choice(self) -> bool:
        return (self.request.body.get("n") or 1) == 1

    @property
    def served_pages(self) -> int:
        """Whole pages of the prompt that the session's rounds before had."""
        return min(self.request.served_tokens // self.page_tokens, len(self.hashes))

    def new_pages(self, chain: HeldChain) -> tuple[bytes, ...]:
        """What its holder has not been told of: all, or what comes after the session's end there."""
        if self.tip is None:
            return chain.hashes
        page_hash, held = self.tip
        pages = held.tokens // self.page_tokens
        theirs = (held.engine_id, held.incarnation) == (chain.engine_id, chain.incarnation)
        known = theirs and 0 < pages <= len(chain.hashes) and chain.hashes[pages - 1] == page_hash
        return chain.hashes[pages - 1 :] if known else chain.hashes

    def refuse(self, command: Refuse) -> None:
        """Answer with an error; the engine's own, if the last call ended in one."""
        status, body = (self.error.status, self.error.body) if self.error else (0, b"")
        self.handle.finish(RoundRefused(command.code, command.message, command.retry_after_s, status, body))

    def cut_off(self, why: str) -> None:
        """End the client's stream without the core: nobody will answer any more."""
        streaming = bool(self.handle.arm)
        self.handle.finish(RoundBroke(why) if streaming else RoundRefused("no_engine_available", why, 1.0))

    def answer_ended(self) -> None:
        """All output ids are there: what the conversation is now."""
        self.handle.answered = self.request.prompt.extended(self.output_ids)

    def hashes_with_output(self) -> tuple[bytes, ...]:
        """Pages with KV at the home after the round: the last token that was sampled has none."""
        answered = self.handle.answered or self.request.prompt
        pages = max(len(self.hashes), (len(answered) - 1) // self.page_tokens)
        return answered.hashes(self.page_tokens, seed_of(self.request))[:pages]


def seed_of(request: RoundRequest) -> bytes:
    """The digest before the first page of the request's chain."""
    return namespace_seed(request.extra_key, request.cache_salt)


class RoundRunner(Protocol):
    """What the gateway needs of the runtime."""

    def submit(self, request: RoundRequest) -> AbstractAsyncContextManager[RoundHandle]:
        """Accept a round; decides and acts in the background. Enter it: that may raise `RoundRefused`."""

    async def explain(self, request: RoundRequest) -> dict[str, Any]:
        """What would be decided of it now, JSON-ready (`explanation.Explanation.json`); nothing is done."""
