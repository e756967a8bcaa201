"""What the driver keeps of a round in flight, and the gateway's side of it.

The gateway submits a `RoundRequest` and gets a `RoundHandle`. Life of a handle: `start()` returns when the first
event of the answer is there (so that status and headers can still be real), or raises `RoundRefused`; then
iterate over chunks, until the stream ends or raises `RoundBroke`. Leaving the `async with` early means that the
client is gone: the decode is aborted and the lease freed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from antiphon.engines.base import Chunk
from antiphon.scheduler.messages import Receipt

STREAM_BUFFER_CHUNKS = 256
"""A reader that lags further behind holds back the engine's stream, not our memory."""


@dataclass(frozen=True, slots=True)
class RoundRequest:
    """A checked request of one round; `input_ids` is the whole prompt."""

    round_id: str
    session_id: str
    tenant: str
    path: str
    """The engine's route: /v1/chat/completions or /v1/completions."""
    input_ids: tuple[int, ...]
    body: Mapping[str, Any]
    """Sampling and output fields as the engine takes them."""
    max_output_tokens: int
    slo_ttft_s: float
    slo_itl_s: float
    extra_key: str | None = None
    cache_salt: str | None = None


class RoundRefused(Exception):
    """Nothing was streamed. `code` as in `messages.Refuse`; `status` and `body` are an engine's 4xx answer."""

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


@dataclass(slots=True)
class RoundHandle:
    """One round as the gateway sees it. Written only by the driver, read by one gateway task."""

    request: RoundRequest
    on_gone: Any = None
    round_number: int = 0
    arm: str = ""
    receipt: Receipt | None = None
    """Set before the stream ends."""
    session_id: str = ""
    """The session that the round really ran in: another than asked for when it became a fork."""
    parent_id: str | None = None
    ended: bool = False
    _first: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _chunks: asyncio.Queue[Chunk | Exception | None] = field(
        default_factory=lambda: asyncio.Queue(STREAM_BUFFER_CHUNKS)
    )

    async def start(self) -> None:
        """Wait for the first event; raises `RoundRefused`."""
        await self._first

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while (item := await self._chunks.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ended and self.on_gone is not None:
            self.on_gone()


class RoundRunner(Protocol):
    """What the gateway needs of the runtime."""

    def submit(self, request: RoundRequest) -> RoundHandle:
        """Accept a round; decides and acts in the background."""
