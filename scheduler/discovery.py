"""Finds engines and watches them: registry and configuration -> EngineUp, EngineSuspect and EngineDown.

One task polls the registry; every known engine has a task of its own that says hello, probes and, when the
engine does not answer any more, goes back to saying hello. What an engine is comes from its hello; the record
says only where it is. All run inside `run()`, which the caller's TaskGroup owns.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from msgspec.structs import replace

from antiphon.engines.base import Engine, EngineError, EngineRecord, FailureKind, LoadReport
from antiphon.engines.wire import Hello
from antiphon.policies.base import Pool
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.messages import EngineDown, EngineSuspect, EngineUp

log = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 2.0
POOLS = tuple(pool.value for pool in Pool)
MUST_AGREE = (
    "model_id", "model_revision", "dtype", "layout", "page_size_tokens", "page_bytes", "world_size",
    "transport",
)  # fmt: skip
"""Fields of the hello in which engines of one model must not differ: pages move between all of them."""


@dataclass(frozen=True, slots=True)
class DiscoveryTimes:
    """Seconds, and how often a probe may fail."""

    poll_s: float = 0.5
    probe_s: float = 1.0
    probe_deadline_s: float = 3.0
    connect_deadline_s: float = 5.0
    retry_s: float = 0.25
    """Pause after a failed probe or hello; it doubles for hellos, up to `max_retry_s`."""
    max_retry_s: float = 2.0
    failures_to_down: int = 3
    missing_grace_s: float = 3.0
    """A record that is gone may only mean that the ledger was restarted: engines register again."""


@dataclass(slots=True)
class _Watch:
    """One known engine. Written by its own task and by the poll, both on one loop."""

    record: EngineRecord
    engine: Engine
    up: EngineUp | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    missing_since: float | None = None
    task: asyncio.Task[None] | None = None
    said: str = ""
    """The last complaint in the log: each is said once."""


class Discovery:
    """`engines` holds every engine that is up, by id; `run()` keeps it so until it is cancelled.

    `on_event` is called on the loop, after `engines` has changed; `on_load` with every probe's answer;
    `on_suspect` when an engine that is up misses its first probe, and when it answers again.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        *,
        make_engine: Callable[[EngineRecord], Engine],
        on_event: Callable[[EngineUp | EngineDown], None],
        static: Sequence[EngineRecord] = (),
        on_load: Callable[[str, LoadReport], None] | None = None,
        on_suspect: Callable[[EngineSuspect], None] = lambda event: None,
        times: DiscoveryTimes | None = None,
        profiles: Mapping[str, LatencyModel] = MappingProxyType({}),
        model_of: Callable[[str, str], str | None] = lambda model_id, model_path: "",
    ) -> None:
        """`profiles`: engine id or pool -> what work costs there, where it is not the core's default.

        `model_of`: model id and path, as an engine says them -> which model that is, of those that are
        served; None = it is none. Engines of one model must agree.
        """
        self.engines: dict[str, Engine] = {}
        self._ledger = ledger
        self._make_engine = make_engine
        self._on_event = on_event
        self._static = {record.engine_id: record for record in static}
        self._on_load = on_load
        self._on_suspect = on_suspect
        self._times = times or DiscoveryTimes()
        self._profiles = profiles
        self._model_of = model_of
        self._watches: dict[str, _Watch] = {}
        self._pools: Mapping[str, str] = MappingProxyType({})
        """Engine id -> the pool that it was given, where that is not its own."""
        self._ledger_away = False

    async def run(self) -> None:
        """Find and watch, until cancelled; then every connection is closed."""
        async with asyncio.TaskGroup() as group:
            while True:
                records = await self._records()
                if records is not None:
                    await self._reconcile(records, group)
                await asyncio.sleep(self._times.poll_s)

    def model(self, engine: Engine) -> str | None:
        """Which of the models that are served the engine has."""
        hello, record = engine.hello, engine.record
        return self._model_of(hello.model_id if hello is not None else record.model_id, record.model_path)

    def set_pools(self, pools: Mapping[str, str]) -> None:
        """Which pools engines were given; those that are up and now in another say so at once."""
        if pools == self._pools:
            return
        self._pools = {engine_id: pool for engine_id, pool in pools.items() if pool in POOLS}
        for watch in self._watches.values():
            up = watch.up
            if up is not None and up.pool != (pool := self._pool(watch.record)):
                watch.up = replace(up, pool=pool)
                log.info("engine %s is in the %s pool now", up.engine_id, pool)
                self._on_event(watch.up)

    def _pool(self, record: EngineRecord) -> str:
        return self._pools.get(record.engine_id, record.pool)

    def report_failure(self, engine_id: str) -> None:
        """A call found the engine unreachable: probe it now and not in a second."""
        watch = self._watches.get(engine_id)
        if watch is not None:
            watch.wake.set()

    # ---------------------------------------------------------------- which engines there are

    async def _records(self) -> dict[str, EngineRecord] | None:
        """Configured and registered engines; None while the ledger is away, which says nothing of them."""
        if self._ledger is None:
            return self._static
        try:
            registered = await self._ledger.engines()
        except LedgerUnavailable as error:
            if not self._ledger_away:
                log.warning("%s; the engines known so far are kept", error)
            self._ledger_away = True
            return None if self._watches else self._static
        self._ledger_away = False
        return self._static | {record.engine_id: record for record in registered}

    async def _reconcile(self, records: dict[str, EngineRecord], group: asyncio.TaskGroup) -> None:
        now = asyncio.get_running_loop().time()
        for watch in list(self._watches.values()):
            record = records.get(watch.record.engine_id)
            if record == watch.record:
                watch.missing_since = None
                continue
            if record is not None:
                await self._drop(watch, f"replaced by incarnation {record.incarnation or 'unknown'}")
                continue
            if watch.missing_since is None:
                watch.missing_since = now
                watch.wake.set()
            if watch.up is None or now - watch.missing_since >= self._times.missing_grace_s:
                await self._drop(watch, "its record is gone")
        for engine_id, record in records.items():
            if engine_id not in self._watches:
                watch = _Watch(record, self._make_engine(record))
                self._watches[engine_id] = watch
                watch.task = group.create_task(self._watch(watch), name=f"watch {engine_id}")

    async def _drop(self, watch: _Watch, reason: str) -> None:
        del self._watches[watch.record.engine_id]
        self._set_down(watch, reason)
        if watch.task is not None:
            watch.task.cancel()
            await asyncio.wait([watch.task])

    # ---------------------------------------------------------------- one engine

    async def _watch(self, watch: _Watch) -> None:
        try:
            while True:
                try:
                    await self._greet(watch)
                    reason = await self._probe_until_down(watch)
                except Exception as error:  # one engine's nonsense must not end the watch over all others
                    self._complain(watch, f"cannot be watched: {error!r}")
                    self._set_down(watch, repr(error))
                    await asyncio.sleep(self._times.max_retry_s)
                else:
                    self._set_down(watch, reason)
        finally:
            try:
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    await watch.engine.close()
            except TimeoutError:
                log.warning("engine %s: its connections do not close", watch.record.engine_id)

    async def _greet(self, watch: _Watch) -> None:
        """Say hello until the engine answers and fits into the fleet; it is up then."""
        pause_s = self._times.retry_s
        while True:
            try:
                await watch.engine.connect(self._times.connect_deadline_s)
                up = await self._facts(watch)
            except EngineError as error:
                self._complain(watch, f"is not reachable: {error}")
            else:
                if (mismatch := self._mismatch(watch)) is None:
                    self._set_up(watch, up)
                    return
                self._complain(watch, f"is refused: {mismatch}")
            await self._pause(watch, pause_s)
            pause_s = min(2 * pause_s, self._times.max_retry_s)

    async def _facts(self, watch: _Watch) -> EngineUp:
        """From the hello; an engine without a linker is asked for its pool only. Raises `EngineError`."""
        record, hello = watch.record, watch.engine.hello
        if record.pool not in POOLS:
            raise EngineError(FailureKind.BROKEN, f"its pool is {record.pool!r}, none of {', '.join(POOLS)}")
        if record.kv_addresses and hello is None:
            raise EngineError(FailureKind.BROKEN, f"engine {record.engine_id}: no hello from its directory")
        if hello is not None:
            return EngineUp(
                engine_id=record.engine_id,
                incarnation=hello.incarnation,
                pool=self._pool(record),
                can_transfer=True,
                page_size_tokens=hello.page_size_tokens,
                pool_tokens=hello.pool_tokens,
                kv_bytes_per_token=hello.page_bytes // hello.page_size_tokens * hello.world_size,
                chunk_tokens=record.chunk_tokens,
                decode_interval=record.decode_interval,
                store_tokens=hello.store_pages * hello.page_size_tokens,
                latency=self._profile(record),
            )
        load = await watch.engine.load(deadline_s=self._times.probe_deadline_s)
        reference = self._reference(self.model(watch.engine))
        return EngineUp(
            engine_id=record.engine_id,
            # Whoever comes back after an outage may be another process: nothing held before counts.
            incarnation=record.incarnation or secrets.token_hex(8),
            pool=self._pool(record),
            can_transfer=False,
            page_size_tokens=reference.page_size_tokens if reference is not None else 1,
            pool_tokens=load.pool_tokens,
            chunk_tokens=record.chunk_tokens,
            decode_interval=record.decode_interval,
            latency=self._profile(record),
        )

    def _profile(self, record: EngineRecord) -> LatencyModel | None:
        return self._profiles.get(record.engine_id) or self._profiles.get(record.pool)

    async def _probe_until_down(self, watch: _Watch) -> str:
        """Returns why the engine counts as down."""
        failures = 0
        while True:
            if failures:
                await asyncio.sleep(self._times.retry_s)  # not to be hurried: three probes, not one moment
            else:
                await self._pause(watch, self._times.probe_s)
            try:
                if watch.record.kv_addresses and (failures or not watch.record.incarnation):
                    # It may have been restarted meanwhile: where no record says so, only a hello tells.
                    await watch.engine.connect(self._times.connect_deadline_s)
                    hello, up = watch.engine.hello, watch.up
                    if hello is not None and up is not None and hello.incarnation != up.incarnation:
                        return f"restarted as incarnation {hello.incarnation}"
                load = await watch.engine.load(deadline_s=self._times.probe_deadline_s)
            except EngineError as error:
                failures += 1
                if failures >= self._times.failures_to_down:
                    return f"{failures} probes failed; the last: {error}"
                if failures == 1:
                    self._suspect(watch, True, f"missed a probe: {error}")
                continue
            if failures:
                failures = 0
                self._suspect(watch, False, "answers its probes again")
            if self._on_load is not None:
                self._on_load(watch.record.engine_id, load)

    async def _pause(self, watch: _Watch, seconds: float) -> None:
        """Until the time is over or someone wants to know at once."""
        try:
            async with asyncio.timeout(seconds):
                await watch.wake.wait()
        except TimeoutError:
            return
        watch.wake.clear()

    # ---------------------------------------------------------------- what is up

    def _same_model(self, model: str | None) -> list[Engine]:
        return [engine for engine in self.engines.values() if self.model(engine) == model]

    def _reference(self, model: str | None) -> Hello | None:
        """The hello that newcomers must agree with: that of any engine of their model which is up."""
        hellos = (engine.hello for engine in self._same_model(model))
        return next((hello for hello in hellos if hello is not None), None)

    def _mismatch(self, watch: _Watch) -> str | None:
        """Why the engine does not fit into the fleet, in words; None when it does."""
        hello, model = watch.engine.hello, self.model(watch.engine)
        if model is None:
            said = (hello.model_id if hello is not None else watch.record.model_id) or watch.record.model_path
            return f"its model {said!r} is none of [[models]]"
        reference = self._reference(model)
        if hello is not None and reference is not None:
            for name in MUST_AGREE:
                ours, theirs = getattr(reference, name), getattr(hello, name)
                if ours != theirs:
                    return f"its {name} is {theirs!r}, that of {reference.engine_id} is {ours!r}"
        model_id = hello.model_id if hello is not None else watch.record.model_id
        for other in self._same_model(model):
            theirs = other.hello.model_id if other.hello is not None else other.record.model_id
            if model_id and theirs and model_id != theirs:
                return f"it serves model {model_id!r}, {other.record.engine_id} serves {theirs!r}"
        return None

    def _set_up(self, watch: _Watch, up: EngineUp) -> None:
        watch.up, watch.said = up, ""
        self.engines[up.engine_id] = watch.engine
        log.info("engine %s is up at %s (%s pool)", up.engine_id, watch.record.url, up.pool)
        self._on_event(up)

    def _set_down(self, watch: _Watch, reason: str) -> None:
        up, watch.up = watch.up, None
        if up is not None:
            del self.engines[up.engine_id]
            log.warning("engine %s is down: %s", up.engine_id, reason)
            self._on_event(EngineDown(up.engine_id, up.incarnation, reason))

    def _suspect(self, watch: _Watch, suspect: bool, why: str) -> None:
        """Nothing new goes there until the next probe; rounds under way have deadlines of their own."""
        if watch.up is not None:
            log.warning("engine %s %s", watch.up.engine_id, why)
            self._on_suspect(EngineSuspect(watch.up.engine_id, watch.up.incarnation, suspect))

    def _complain(self, watch: _Watch, what: str) -> None:
        if what != watch.said:
            watch.said = what
            log.warning("engine %s at %s %s", watch.record.engine_id, watch.record.url, what)
