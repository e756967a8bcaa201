"""The port between the scheduler's driver and an engine: one protocol, two kinds of engines behind it.

`HttpEngine` (http.py) is the only adapter: SGLang and the simulated engine speak the same HTTP and the same
directory protocol, and one contract test suite runs over both.

Ownership: whoever calls `generate` owns the stream and must close it (`aclosing`); closing it early aborts
nothing by itself: call `abort(rid)`. Every method has a deadline and raises only `EngineError`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from antiphon.engines.wire import Hello


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What the registry knows of an engine: enough to reach it. The rest comes from its hello."""

    engine_id: str
    url: str
    pool: str
    """"prefill" or "decode": the role that the scheduler gives it; it can do either."""
    incarnation: str
    kv_addresses: tuple[str, ...] = ()
    """host:port of each rank's directory; empty = an engine without our linker (`local` only)."""
    model_id: str = ""
    chunk_tokens: int = 0
    """--chunked-prefill-size; 0 = unknown."""
    decode_interval: int = 0
    """--prefill-decode-interval: decode steps between chunks; 0 = prefill first."""
    model_path: str = ""
    """Where the engine found its model: the gateway takes tokenizer and chat template from there."""
    deterministic: bool = False
    """--enable-deterministic-inference: the same seed samples the same tokens, whatever else it does."""


class FailureKind(Enum):
    """Why an engine call failed, as far as the scheduler must tell them apart."""

    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    """503, full queue, aborted by the engine: another try elsewhere makes sense."""
    DEADLINE = "deadline"
    BROKEN = "broken"
    """The stream ended without a finish, or spoke nonsense."""
    BAD_REQUEST = "bad_request"
    """The engine says the request itself is wrong (4xx): no other engine will like it better."""


class EngineError(Exception):
    """An engine call failed. `kind` says how; `status` and `body` are the engine's own answer, if any."""

    def __init__(self, kind: FailureKind, message: str, *, status: int = 0, body: bytes = b"") -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the prompt, tokens that THIS engine did not compute for this call (device + host)."""


@dataclass(frozen=True, slots=True)
class PrefillResult:
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One SSE event of an engine's stream, parsed once.

    `data` is the JSON as the client may see it: ids that only we asked for are taken out, and an event that
    existed only for them has `data` None.
    """

    data: dict[str, Any] | None
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One call of /v1/chat/completions or /v1/completions. `input_ids` is the whole prompt."""

    path: str
    input_ids: Sequence[int]
    rid: str
    session_id: str
    body: Mapping[str, Any] = field(default_factory=dict)
    """The client's sampling and output fields, checked by the gateway; ours win over equal names."""
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """Outcome over all ranks: the minimum of pages, the sum of bytes."""

    pages: int
    pulled_pages: int
    pulled_bytes: int
    elapsed_s: float
    reason: str
    blame: bool = False
    """Some rank blames the way from the source, or the source. A puller without an answer blames itself."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """From /v1/loads: corrects drift of our own books, never counted on top of them."""

    running_requests: int
    waiting_requests: int
    waiting_uncached_tokens: int
    used_tokens: int
    pool_tokens: int


class Engine(Protocol):
    """An engine as the scheduler's driver sees it."""

    @property
    def record(self) -> EngineRecord: ...

    @property
    def hello(self) -> Hello | None:
        """Rank 0's hello of the current incarnation; None for an engine without our linker."""

    async def connect(self, deadline_s: float) -> None:
        """Check health and exchange hellos with every rank; raises `EngineError`."""

    async def prefill(
        self,
        input_ids: Sequence[int],
        rid: str,
        *,
        session_id: str,
        cache_salt: str | None,
        deadline_s: float,
    ) -> PrefillResult:
        """Compute and keep the KV of `input_ids`, generate nothing (`max_new_tokens` 0)."""

    def generate(
        self, request: GenerateRequest, *, deadline_s: float, silence_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Stream one answer. `deadline_s` bounds the wait for the first event, `silence_s` that for each next
        one (None: `deadline_s` again); it is asked anew before the wait is given up."""

    async def prefetch(
        self,
        source: Sequence[str],
        source_incarnation: str,
        parent: bytes,
        hashes: Sequence[bytes],
        *,
        deadline_s: float,
    ) -> PrefetchResult:
        """Have every rank pull `hashes` from the same rank of the source; result = minimum over ranks."""

    async def touch(self, tip: bytes, *, deadline_s: float) -> None: ...

    async def lookup(self, hashes: Sequence[bytes], *, deadline_s: float) -> int:
        """Pages of `hashes`, from the first on, that every rank's store holds."""

    async def chain(self, tip: bytes, *, deadline_s: float) -> tuple[bytes, tuple[bytes, ...]]:
        """(digest before the first, hashes) of the pages that rank 0's store holds up to `tip`, in order."""

    async def abort(self, rid: str, *, deadline_s: float) -> None: ...

    async def load(self, *, deadline_s: float) -> LoadReport: ...

    async def close(self) -> None: ...
