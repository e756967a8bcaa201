"""`antiphon engine --simulated`: an engine with virtual KV and timing from a profile.

Speaks the same HTTP and the same directory protocol as an SGLang engine with our linker, so that schedulers,
clients and tests cannot tell which they talk to, except that tokens come from a hash. One event loop runs
HTTP and the batch loop; the directory has threads of its own, as in a real engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from antiphon.engines.base import EngineRecord
from antiphon.engines.directory import DirectoryServer
from antiphon.engines.faults import Faults, exit_now
from antiphon.engines.fleet_secrets import engine_http_key
from antiphon.engines.handshake import load_fleet_key, split_address
from antiphon.engines.interfaces import find_interface
from antiphon.engines.registry import Registration
from antiphon.engines.scripts import Script, load_script
from antiphon.engines.simulated_http import Served, SimulatedHttp
from antiphon.engines.simulated_loop import BatchLoop, LoopSettings
from antiphon.engines.virtual_directory import VirtualAgent, VirtualBackend
from antiphon.engines.virtual_kv import VirtualKv, VirtualStore
from antiphon.engines.wire import Hello
from antiphon.policies.latency import load_latency_model

log = logging.getLogger(__name__)

STOP_S = 2.0
"""Time that answers under way get when the engine stops."""


@dataclass(frozen=True, slots=True)
class SimulatedOptions:
    """One simulated engine. Raises ValueError for values that cannot be."""

    port: int = 0
    """0 = any free one."""
    ledger: str = ""
    """Redis URL to register in; empty = do not register."""
    fleet: str = "default"
    pool: str = "decode"
    engine_id: str = ""
    """Empty = simulated-PORT."""
    interface: str = "127.0.0.1"
    kv_port: int = 0
    advertise: str = ""
    """host:port at which others reach its HTTP, where a port mapping stands before it."""
    advertise_kv: str = ""
    """The same for its directory."""
    key_file: str = ""
    """File with the fleet key; empty = the environment variable ANTIPHON_FLEET_KEY."""
    fault_injection: bool = False
    replace: bool = False
    profile: str = "tiny-cpu"
    """Latency profile: a bundled name or a JSON file."""
    script: Path | None = None
    """JSONL file of scripted answers (`scripts.py`)."""
    model_id: str = "simulated"
    model_path: str = ""
    """Whose tokenizer and chat template gateways are to use; the engine itself needs none."""
    page_size_tokens: int = 16
    pool_tokens: int = 65536
    """Device pool."""
    store_pages: int = 0
    """0 = the device pool and as much again."""
    context_tokens: int = 8192
    chunk_tokens: int = 0
    """--chunked-prefill-size; 0 = whole prompts."""
    decode_interval: int = 0
    """--prefill-decode-interval."""
    max_running_requests: int = 64
    max_queued_requests: int = 0
    """0 = no limit."""
    vocab_tokens: int = 512
    """Hashed tokens are below this."""
    default_output_tokens: int = 128
    """Length of an answer that neither the client nor the script limits."""
    speed: float = 1.0
    """Simulated seconds per second."""
    http_key: bool = False
    """Its HTTP asks for the key that schedulers make from the fleet key; /health stays open."""
    deterministic: bool = False
    """What it says of itself; its tokens are a function of the prompt in any case."""

    def __post_init__(self) -> None:
        if self.pool not in ("prefill", "decode"):
            raise ValueError(f"pool must be prefill or decode, got {self.pool!r}")
        if self.chunk_tokens and self.chunk_tokens < self.page_size_tokens:
            raise ValueError(
                f"chunk_tokens ({self.chunk_tokens}) must be 0 or at least a page ({self.page_size_tokens})"
            )
        for name in ("page_size_tokens", "context_tokens", "max_running_requests", "vocab_tokens",
                     "default_output_tokens", "speed"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.pool_tokens < self.page_size_tokens:
            raise ValueError(f"pool_tokens ({self.pool_tokens}) must hold a page ({self.page_size_tokens})")


_SGLANG_FLAGS: dict[str, tuple[str, type]] = {
    "--served-model-name": ("model_id", str),
    "--model-path": ("model_path", str),
    "--page-size": ("page_size_tokens", int),
    "--max-total-tokens": ("pool_tokens", int),
    "--context-length": ("context_tokens", int),
    "--chunked-prefill-size": ("chunk_tokens", int),
    "--prefill-decode-interval": ("decode_interval", int),
    "--max-running-requests": ("max_running_requests", int),
    "--max-queued-requests": ("max_queued_requests", int),
}


def with_sglang_flags(options: SimulatedOptions, words: list[str]) -> SimulatedOptions:
    """`options` with those SGLang flags that mean something here; raises ValueError for others."""
    switch = "--enable-deterministic-inference"
    changes: dict[str, Any] = {"deterministic": options.deterministic or switch in words}
    words = [word for word in words if word != switch]
    rest = [part for word in words for part in word.split("=", 1)]
    for flag, value in zip(rest[::2], [*rest[1::2], None], strict=False):
        if flag not in _SGLANG_FLAGS or value is None:
            raise ValueError(
                f"a simulated engine takes no SGLang flag {flag}, or it has no value; "
                f"it takes {', '.join((*_SGLANG_FLAGS, switch))}"
            )
        name, kind = _SGLANG_FLAGS[flag]
        changes[name] = max(0, kind(value)) if kind is int else value
    return replace(options, **changes)


class SimulatedEngine:
    """One engine in this process: `async with SimulatedEngine(options) as engine: engine.record ...`.

    `sleep` and `clock` are for the batch loop only (a virtual-time loop); `die` replaces `os._exit` for
    engines that share a process with a test.
    """

    def __init__(
        self,
        options: SimulatedOptions,
        *,
        fleet_key: bytes | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        die: Callable[[], None] = exit_now,
    ) -> None:
        """`fleet_key` None = from the options' key file or the environment. Raises ValueError, OSError."""
        self.options = options
        self.faults = Faults(die)
        self._key = fleet_key if fleet_key is not None else load_fleet_key(path=options.key_file)
        self._latency = load_latency_model(options.profile)
        self._script = load_script(options.script) if options.script is not None else Script()
        device_pages = options.pool_tokens // options.page_size_tokens
        self.store = VirtualStore(options.store_pages or 2 * device_pages)
        self.kv = VirtualKv(device_pages, self.store, options.page_size_tokens)
        self.loop = BatchLoop(_loop_settings(options), self.kv, self._latency, self.faults, sleep, clock)
        self._host = find_interface(options.interface).address
        self._incarnation = uuid.uuid4().hex
        self._closing = contextlib.AsyncExitStack()
        self._directory: DirectoryServer | None = None
        self._address = ""
        """Of the directory, once it was open."""
        self._record: EngineRecord | None = None

    @property
    def record(self) -> EngineRecord:
        """As it stands in the registry; only while the engine is up."""
        if self._record is None:
            raise RuntimeError("the engine is not up")
        return self._record

    @property
    def hello(self) -> Hello:
        """The truth about it, as its directory tells."""
        return self._backend.hello

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._closing = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._closing.aclose()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        options = self.options
        listener = stack.enter_context(socket.create_server((self._host, options.port), backlog=1024))
        port = listener.getsockname()[1]
        engine_id = options.engine_id or f"simulated-{port}"
        self._backend = self._make_backend(engine_id)
        await self._set_directory(True)
        stack.push_async_callback(self._set_directory, False)
        stack.callback(self._backend.close)
        self._record = EngineRecord(
            engine_id=engine_id,
            url=f"http://{options.advertise or f'{self._host}:{port}'}",
            pool=options.pool,
            incarnation=self._incarnation,
            kv_addresses=(options.advertise_kv,) if options.advertise_kv else self.hello.kv_addresses,
            model_id=options.model_id,
            model_path=options.model_path,
            chunk_tokens=options.chunk_tokens,
            decode_interval=options.decode_interval,
            deterministic=options.deterministic,
        )
        self.worker = asyncio.create_task(self.loop.run(), name=f"batch loop of {engine_id}")
        stack.push_async_callback(_cancelled, self.worker)
        http = SimulatedHttp(self._served(), self.loop, self._script, self.faults, self._set_directory)
        runner = web.AppRunner(
            http.app(engine_http_key(self._key) if options.http_key else ""),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=STOP_S,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()
        stack.callback(self.loop.abort, "", everything=True)
        if options.ledger:
            registration = Registration(
                options.ledger,
                self._record,
                fleet=options.fleet,
                replace=options.replace,
                fleet_key=self._key,
            )
            await asyncio.to_thread(registration.start)
            stack.push_async_callback(asyncio.to_thread, registration.close)

    async def _set_directory(self, up: bool) -> None:
        """Open the directory (where it was before) or cut it off."""
        if up and self._directory is None:
            host, port = split_address(self._address) if self._address else (self._host, self.options.kv_port)
            self._directory = DirectoryServer(self._backend, self._key, host, port)
            self._address = self._directory.address
            self._backend.listens_on(self._address)
            self._directory.start()
        elif not up and self._directory is not None:
            directory, self._directory = self._directory, None
            await asyncio.to_thread(directory.close)

    def _make_backend(self, engine_id: str) -> VirtualBackend:
        options = self.options
        hello = Hello(
            engine_id=engine_id,
            incarnation=self._incarnation,
            model_id=options.model_id,
            model_revision=f"profile {self._latency.name}",
            dtype="virtual",
            page_size_tokens=options.page_size_tokens,
            page_bytes=options.page_size_tokens * self._latency.transfer.kv_bytes_per_token,
            layout="virtual",
            pool_tokens=self.loop.pool_tokens,
            store_pages=self.store.n_pages,
            rank=0,
            world_size=1,
            kv_addresses=(),
            transport="virtual",
            context_tokens=options.context_tokens,
        )
        agent = VirtualAgent(hello, self.store, self._latency, self.faults, speed=options.speed)
        return VirtualBackend(
            hello, self.store, agent, self.faults, self._key, fault_injection=options.fault_injection
        )

    def _served(self) -> Served:
        options = self.options
        info = {
            "model_path": options.model_id,
            "served_model_name": options.model_id,
            "page_size": options.page_size_tokens,
            "chunked_prefill_size": options.chunk_tokens or -1,
            "prefill_decode_interval": options.decode_interval or None,
            "max_running_requests": options.max_running_requests,
            "max_total_num_tokens": self.loop.pool_tokens,
            "context_length": options.context_tokens,
            "enable_deterministic_inference": options.deterministic,
            "simulated_profile": self._latency.name,
        }
        return Served(
            model_id=options.model_id,
            context_tokens=options.context_tokens,
            default_output_tokens=options.default_output_tokens,
            fault_injection=options.fault_injection,
            info=info,
        )


async def serve_simulated(options: SimulatedOptions) -> None:
    """Run one engine until SIGINT or SIGTERM. Cannot start: ValueError, OSError, EngineIdTaken."""
    stop = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        running.add_signal_handler(number, stop.set)
    async with SimulatedEngine(options) as engine:
        log.info("simulated engine %s at %s", engine.record.engine_id, engine.record.url)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, engine.worker}, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            # The batch loop only ends by an error: better no engine than one whose answers all hang.
            stopped.cancel()
            engine.worker.result()


def run_simulated(options: SimulatedOptions) -> None:
    """`serve_simulated` for a command line."""
    asyncio.run(serve_simulated(options))


def _loop_settings(options: SimulatedOptions) -> LoopSettings:
    return LoopSettings(
        chunk_tokens=options.chunk_tokens,
        decode_interval=options.decode_interval,
        max_running_requests=options.max_running_requests,
        max_queued_requests=options.max_queued_requests,
        vocab_tokens=options.vocab_tokens,
        speed=options.speed,
    )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
