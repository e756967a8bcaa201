"""`HttpEngine`: the scheduler's side of an engine, by SGLang's HTTP API and the directory of each rank.

One connection pool per engine; every wait has a deadline; aiohttp's, JSON's and the directory's errors become
`EngineError` here and nowhere else. An answer that fails before its first chunk is REFUSED (or BAD_REQUEST if
the engine blames the request), after it BROKEN.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import aiohttp
import msgspec

from antiphon.engines import stream, wire
from antiphon.engines.base import (
    Chunk,
    EngineError,
    EngineRecord,
    FailureKind,
    GenerateRequest,
    LoadReport,
    PrefetchResult,
    PrefillResult,
)
from antiphon.engines.directory_client import AsyncDirectoryClient, DirectoryError
from antiphon.engines.prompt import body_with
from antiphon.engines.sse import SseError, SseEvent, SseParser

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
"""Per engine: more rounds than that wait here instead of in the engine's queue."""
KEEP_ALIVE_S = 2.0
"""Shorter than the server's 5 s, so that we never reuse a connection that it is just closing."""
END_S = 0.05
"""After the end mark, for the body to end too: only then can its connection be used again."""
REPLY_MARGIN_S = 0.5
"""A prefetch ends at its deadline in the engine; its answer may take this much longer."""

ReplyT = TypeVar("ReplyT", bound=wire.Message)

_DIRECTORY_KINDS = {
    "unreachable": FailureKind.UNREACHABLE,
    "deadline": FailureKind.DEADLINE,
    "broken": FailureKind.BROKEN,
    "bad_request": FailureKind.BAD_REQUEST,
}


class HttpEngine:
    """`engines.base.Engine` over the network; belongs to one event loop. `close` it."""

    def __init__(self, record: EngineRecord, fleet_key: bytes, *, peer: str = "scheduler") -> None:
        self._record = record
        self._hello: wire.Hello | None = None
        self._session: aiohttp.ClientSession | None = None
        self._directories = [
            AsyncDirectoryClient(address, fleet_key, peer) for address in record.kv_addresses
        ]

    @property
    def record(self) -> EngineRecord:
        return self._record

    @property
    def hello(self) -> wire.Hello | None:
        return self._hello

    async def connect(self, deadline_s: float) -> None:
        """Health over HTTP and the hello of every rank, which must tell one story; raises `EngineError`."""
        async with asyncio.TaskGroup() as group:
            health = group.create_task(self._settled(self._call, "GET", "/health", None, deadline_s))
            hellos = [
                group.create_task(self._settled(self._greet, directory, deadline_s))
                for directory in self._directories
            ]
        for task in (health, *hellos):
            if isinstance(outcome := task.result(), EngineError):
                raise outcome
        if hellos:
            self._hello = self._agreed([task.result() for task in hellos])

    async def prefill(
        self,
        input_ids: Sequence[int],
        rid: str,
        *,
        session_id: str,
        cache_salt: str | None,
        deadline_s: float,
    ) -> PrefillResult:
        """Compute and keep the KV of `input_ids`; raises `EngineError`."""
        fields = {
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "rid": rid,
            "session_id": session_id,
            "cache_salt": cache_salt,
            "stream": False,
        }
        body = body_with(fields, "input_ids", input_ids)
        answer = await self._call("POST", "/generate", body, deadline_s)
        try:
            meta = msgspec.json.decode(answer)["meta_info"]
            reason = meta.get("finish_reason") or {}
            if reason.get("type") == "abort":
                raise EngineError(FailureKind.REFUSED, f"{self._name} aborted the prefill: {reason}")
            return PrefillResult(int(meta["prompt_tokens"]), int(meta["cached_tokens"]))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._nonsense("/generate", answer) from error

    async def generate(
        self, request: GenerateRequest, *, deadline_s: float, silence_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Stream one answer; raises `EngineError`. Close the iterator if it is left early."""
        reader = stream.AnswerReader(request, self._name)
        began_s = asyncio.get_running_loop().time()
        response = await self._open_stream(request.path, reader.body(), deadline_s)
        events = _Events(response, self._name, began_s, deadline_s, silence_s or (lambda: deadline_s))
        try:
            while not reader.done:
                event = await events.next(started=reader.started)
                if event is None:
                    raise EngineError(
                        FailureKind.BROKEN, f"{self._name} ended the stream without an end mark"
                    )
                chunk = reader.read(event)
                if chunk is not None:
                    yield chunk
            await events.end()
        finally:
            response.close()

    async def prefetch(
        self,
        source: Sequence[str],
        source_incarnation: str,
        parent: bytes,
        hashes: Sequence[bytes],
        *,
        deadline_s: float,
    ) -> PrefetchResult:
        """Every rank pulls from the same rank of `source`. Never raises: what did not come is recomputed."""
        if not self._directories:
            return PrefetchResult(0, 0, 0, 0.0, f"{self._name} has no KV linker")
        if len(source) != len(self._directories):
            reason = f"{self._name} has {len(self._directories)} ranks, the source {len(source)}"
            return PrefetchResult(0, 0, 0, 0.0, reason)
        started = asyncio.get_running_loop().time()
        requests = [
            wire.Prefetch(address, source_incarnation, parent, tuple(hashes), deadline_s)
            for address in source
        ]
        outcomes = await asyncio.gather(
            *(
                self._settled(self._ask, directory, request, wire.Prefetched, deadline_s + REPLY_MARGIN_S)
                for directory, request in zip(self._directories, requests, strict=True)
            )
        )
        elapsed_s = asyncio.get_running_loop().time() - started
        replies = [outcome for outcome in outcomes if isinstance(outcome, wire.Prefetched)]
        failures = [str(outcome) for outcome in outcomes if isinstance(outcome, EngineError)]
        reasons = failures + [reply.reason for reply in replies if reply.reason]
        return PrefetchResult(
            pages=0 if failures else min(reply.pages for reply in replies),
            pulled_pages=0 if failures else min(reply.pulled_pages for reply in replies),
            pulled_bytes=sum(reply.pulled_bytes for reply in replies),
            elapsed_s=elapsed_s,
            reason="; ".join(dict.fromkeys(reasons)),
        )

    async def touch(self, tip: bytes, *, deadline_s: float) -> None:
        """Mark the chain as just used on every rank; nothing to do without a linker."""
        await self._ask_all(wire.Touch(tip), wire.Touched, deadline_s)

    async def lookup(self, hashes: Sequence[bytes], *, deadline_s: float) -> int:
        """Pages of `hashes`, from the first on, in every rank's store; 0 without a linker."""
        found = await self._ask_all(wire.Lookup(tuple(hashes)), wire.Found, deadline_s)
        return min((reply.pages for reply in found), default=0)

    async def abort(self, rid: str, *, deadline_s: float) -> None:
        """Stop `rid`; an unknown one is no error. SGLang also stops every rid that begins with it."""
        await self._call("POST", "/abort_request", msgspec.json.encode({"rid": rid}), deadline_s)

    async def load(self, *, deadline_s: float) -> LoadReport:
        """Sums over data-parallel ranks."""
        answer = await self._call("GET", "/v1/loads?include=core", None, deadline_s)
        try:
            loads = msgspec.json.decode(answer)["loads"]
            return LoadReport(
                running_requests=sum(int(load["num_running_reqs"]) for load in loads),
                waiting_requests=sum(int(load["num_waiting_reqs"]) for load in loads),
                waiting_uncached_tokens=sum(int(load["num_waiting_uncached_tokens"]) for load in loads),
                used_tokens=sum(int(load["num_used_tokens"]) for load in loads),
                pool_tokens=sum(int(load["max_total_num_tokens"]) for load in loads),
            )
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise self._nonsense("/v1/loads", answer) from error

    async def close(self) -> None:
        for directory in self._directories:
            await directory.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ------------------------------------------------------------ HTTP

    @property
    def _name(self) -> str:
        return f"engine {self._record.engine_id}"

    def _http(self) -> aiohttp.ClientSession:
        """The connection pool; made on first use, because it belongs to the running loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_ALIVE_S)
            # Deadlines are per call, by asyncio.timeout; nothing here follows redirects or keeps cookies.
            self._session = aiohttp.ClientSession(
                self._record.url,
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Content-Type": "application/json"},
            )
        return self._session

    async def _call(self, method: str, path: str, body: bytes | None, deadline_s: float) -> bytes:
        """Body of a 200 answer; raises `EngineError`."""
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._http().request(method, path, data=body, allow_redirects=False) as response,
            ):
                answer = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise translated(error, self._name, path, deadline_s, started=False) from error
        if response.status != 200:
            raise stream.answer_error(self._name, path, response.status, answer)
        return answer

    async def _open_stream(self, path: str, body: bytes, deadline_s: float) -> aiohttp.ClientResponse:
        """A 200 response whose body is still to come; raises `EngineError`."""
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(deadline_s):
                response = await self._http().post(path, data=body, allow_redirects=False)
                if response.status == 200:
                    return response
                answer = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if response is not None:
                response.close()
            raise translated(error, self._name, path, deadline_s, started=False) from error
        raise stream.answer_error(self._name, path, response.status, answer)

    def _nonsense(self, path: str, answer: bytes) -> EngineError:
        return EngineError(FailureKind.BROKEN, f"{self._name} answered {path} with {answer[:200]!r}")

    # ------------------------------------------------------------ directories

    async def _greet(self, directory: AsyncDirectoryClient, deadline_s: float) -> wire.Hello:
        try:
            return await directory.connect(deadline_s=deadline_s)
        except DirectoryError as error:
            raise self._directory_error(error) from error

    async def _ask(
        self, directory: AsyncDirectoryClient, request: wire.Request, reply: type[ReplyT], deadline_s: float
    ) -> ReplyT:
        try:
            return await directory.ask(request, reply, deadline_s=deadline_s)
        except DirectoryError as error:
            raise self._directory_error(error) from error

    async def _ask_all(self, request: wire.Request, reply: type[ReplyT], deadline_s: float) -> list[ReplyT]:
        """One answer per rank; raises the first rank's `EngineError` after all have answered."""
        outcomes = await asyncio.gather(
            *(
                self._settled(self._ask, directory, request, reply, deadline_s)
                for directory in self._directories
            )
        )
        replies: list[ReplyT] = []
        for outcome in outcomes:
            if isinstance(outcome, EngineError):
                raise outcome
            replies.append(outcome)
        return replies

    def _directory_error(self, error: DirectoryError) -> EngineError:
        kind = _DIRECTORY_KINDS.get(error.code, FailureKind.REFUSED)
        return EngineError(kind, f"{self._name}: {error} ({error.code})")

    @staticmethod
    async def _settled(call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """Result or `EngineError` as a value, so that one rank's failure does not cancel the others."""
        try:
            return await call(*arguments)
        except EngineError as error:
            return error

    def _agreed(self, hellos: list[wire.Hello]) -> wire.Hello:
        """Rank 0's hello, if all ranks tell the same and it is what the record says; raises `EngineError`."""
        first = hellos[0]
        expected = {"incarnation": self._record.incarnation, "model_id": self._record.model_id}
        for name, value in expected.items():
            if value and getattr(first, name) != value:
                raise EngineError(
                    FailureKind.BROKEN,
                    f"{self._name}: its directory says {name} {getattr(first, name)!r}, its record {value!r}",
                )
        same = (
            "engine_id",
            "incarnation",
            "model_id",
            "model_revision",
            "dtype",
            "layout",
            "page_size_tokens",
        )
        for rank, hello in enumerate(hellos):
            wrong = [name for name in same if getattr(hello, name) != getattr(first, name)]
            if hello.rank != rank or hello.world_size != len(hellos):
                wrong.append(f"rank {hello.rank} of {hello.world_size}")
            if wrong:
                address = self._record.kv_addresses[rank]
                raise EngineError(
                    FailureKind.BROKEN,
                    f"{self._name}: rank {rank} at {address} differs from rank 0 in {', '.join(wrong)}",
                )
        return first


class _Events:
    """Server-sent events of one response: a deadline for the first, and one for the silence after each."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        name: str,
        began_s: float,
        deadline_s: float,
        silence_s: Callable[[], float],
    ) -> None:
        """The first event is due `deadline_s` after `began_s`, on the loop's clock."""
        self._response = response
        self._name = name
        self._since_s = began_s
        self._limit_s: Callable[[], float] = lambda: deadline_s
        self._silence_s = silence_s
        self._parser = SseParser()
        self._ready: deque[SseEvent] = deque()

    async def next(self, *, started: bool) -> SseEvent | None:
        """The next event, None at the end of the stream; raises `EngineError`."""
        if self._ready:
            return self._ready.popleft()
        path, loop = self._response.url.path, asyncio.get_running_loop()
        if started:
            self._since_s, self._limit_s = loop.time(), self._silence_s
        while not self._ready:
            limit_s = self._limit_s()
            try:
                async with asyncio.timeout_at(self._since_s + limit_s):
                    received = await self._response.content.readany()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                if isinstance(error, TimeoutError) and loop.time() < self._since_s + self._limit_s():
                    continue  # meanwhile there is reason to wait longer
                raise translated(error, self._name, path, limit_s, started=started) from error
            if not received:
                return None
            try:
                self._ready.extend(self._parser.feed(received))
            except SseError as error:
                raise EngineError(FailureKind.BROKEN, f"{self._name}: {path}: {error}") from error
        return self._ready.popleft()

    async def end(self) -> None:
        """Wait a moment for the body's own end."""
        with suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(END_S):
                while await self._response.content.readany():
                    pass


def translated(error: Exception, name: str, path: str, deadline_s: float, *, started: bool) -> EngineError:
    """Our error for one of aiohttp or the network; `started` = part of the answer was passed on already."""
    if isinstance(error, TimeoutError):
        return EngineError(FailureKind.DEADLINE, f"{name}: {path}: nothing came within {deadline_s:.3g} s")
    kind = FailureKind.BROKEN if started else FailureKind.UNREACHABLE
    log.debug("%s: %s: connection failed: %r", name, path, error)
    return EngineError(kind, f"{name}: {path}: connection failed ({type(error).__name__})")
