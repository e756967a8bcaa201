"""`HttpEngine`: the scheduler's side of an engine, by SGLang's HTTP API and the directory of each rank.

One connection pool per engine; every wait has a deadline; aiohttp's, JSON's and the directory's errors become
`EngineError` here and nowhere else. An answer that fails before its first chunk is REFUSED (or BAD_REQUEST if
the engine blames the request), after it BROKEN.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
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
from antiphon.engines.fleet_secrets import engine_http_key
from antiphon.engines.http_events import ResponseEvents, translated
from antiphon.engines.prompt import body_with
from antiphon.engines.whole_answers import Aborted, read_load, read_prefill

MAX_CONNECTIONS = 1024
"""Per engine: more rounds than that wait here instead of in the engine's queue."""
HEALTH = "/health"
MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""Of what is no stream: loads, the end of a prefill, errors."""
KEEP_ALIVE_S = 2.0
"""Shorter than the server's 5 s, so that we never reuse a connection that it is just closing."""
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

    def __init__(
        self, record: EngineRecord, fleet_key: bytes, *, peer: str = "scheduler", http_key: str | None = None
    ) -> None:
        """`http_key` is presented to its HTTP: None = the one of the fleet, "" = none."""
        self._record = record
        key = engine_http_key(fleet_key) if http_key is None else http_key
        self._key_header = {"Authorization": f"Bearer {key}"} if key else {}
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
            health = group.create_task(self._settled(self._call, "GET", HEALTH, None, deadline_s))
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
            return read_prefill(answer)
        except Aborted as error:
            raise EngineError(FailureKind.REFUSED, f"{self._name} aborted the prefill: {error}") from error
        except ValueError as error:
            raise self._nonsense("/generate", answer) from error

    async def generate(
        self, request: GenerateRequest, *, deadline_s: float, silence_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Stream one answer; raises `EngineError`. Close the iterator if it is left early."""
        reader = stream.AnswerReader(request, self._name)
        began_s = asyncio.get_running_loop().time()
        response = await self._open_stream(request.path, reader.body(), deadline_s)
        events = ResponseEvents(response, self._name, began_s, deadline_s, silence_s or (lambda: deadline_s))
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
            blame=any(reply.blame for reply in replies),
        )

    async def touch(self, tip: bytes, *, deadline_s: float) -> None:
        """Mark the chain as just used on every rank; nothing to do without a linker."""
        await self._ask_all(wire.Touch(tip), wire.Touched, deadline_s)

    async def lookup(self, hashes: Sequence[bytes], *, deadline_s: float) -> int:
        """Pages of `hashes`, from the first on, in every rank's store; 0 without a linker."""
        found = await self._ask_all(wire.Lookup(tuple(hashes)), wire.Found, deadline_s)
        return min((reply.pages for reply in found), default=0)

    async def chain(self, tip: bytes, *, deadline_s: float) -> tuple[bytes, tuple[bytes, ...]]:
        """(digest before the first, hashes) of the pages up to `tip`, in order; none without a linker."""
        if not self._directories:
            return b"", ()
        found = await self._ask(self._directories[0], wire.Chain(tip), wire.ChainPages, deadline_s)
        return found.parent, found.hashes

    async def abort(self, rid: str, *, deadline_s: float) -> None:
        """Stop `rid`; an unknown one is no error. SGLang also stops every rid that begins with it."""
        await self._call("POST", "/abort_request", msgspec.json.encode({"rid": rid}), deadline_s)

    async def load(self, *, deadline_s: float) -> LoadReport:
        """Sums over data-parallel ranks."""
        answer = await self._call("GET", "/v1/loads?include=core", None, deadline_s)
        try:
            return read_load(answer)
        except ValueError as error:
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
                # An answer that is small on the way must not be huge here.
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._session

    async def _call(self, method: str, path: str, body: bytes | None, deadline_s: float) -> bytes:
        """Body of a 200 answer; raises `EngineError`."""
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._http().request(
                    method, path, data=body, allow_redirects=False, headers=self._headers(path)
                ) as response,
            ):
                answer = await self._whole(response, path)
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
                response = await self._http().post(
                    path, data=body, allow_redirects=False, headers=self._headers(path)
                )
                if response.status == 200:
                    return response
                answer = await self._whole(response, path)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if response is not None:
                response.close()
            raise translated(error, self._name, path, deadline_s, started=False) from error
        raise stream.answer_error(self._name, path, response.status, answer)

    def _headers(self, path: str) -> dict[str, str]:
        """The key goes to no server that is only greeted: its directory must prove the fleet key first."""
        return {} if path == HEALTH else self._key_header

    async def _whole(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        """A body that is no stream; raises `EngineError` when it is larger than any of these can be."""
        pieces: list[bytes] = []
        left = MAX_ANSWER_BYTES
        async for piece in response.content.iter_any():
            left -= len(piece)
            if left < 0:
                response.close()
                message = f"{self._name}: {path}: an answer of more than {MAX_ANSWER_BYTES} bytes"
                raise EngineError(FailureKind.BROKEN, message, status=response.status)
            pieces.append(piece)
        return b"".join(pieces)

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
