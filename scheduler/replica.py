"""One replica put together: its models, discovery, ledger; and what the gateway shows of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from msgspec import structs

from antiphon.engines.base import Engine, EngineRecord, LoadReport
from antiphon.engines.http import HttpEngine
from antiphon.policies.base import Pool
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler.answer_buffer import AnswerBudget
from antiphon.scheduler.config import Config
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.discovery import Discovery
from antiphon.scheduler.drain_store import DrainStore
from antiphon.scheduler.drainer import Drainer
from antiphon.scheduler.engine_keys import StaticEngineKeys
from antiphon.scheduler.errors import ledger_unavailable
from antiphon.scheduler.gateway.app import Readiness
from antiphon.scheduler.heartbeat import Heartbeat
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable, Recorded
from antiphon.scheduler.messages import (
    EngineDown,
    EngineSuspect,
    EngineUp,
    LoadReported,
)
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.model_fleet import ModelFleet
from antiphon.scheduler.models import ONLY, Model, Models
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.pool_keeper import PoolKeeper
from antiphon.scheduler.pool_store import PoolStore
from antiphon.scheduler.receipt_log import NEVER, NOT_CLAIMED, PENDING, ReceiptLog
from antiphon.scheduler.recorder import Recorder, RecorderConfig, Reservations
from antiphon.scheduler.rounds import LiveRound, RoundHandle, RoundRequest
from antiphon.scheduler.runtime import Runtime

log = logging.getLogger(__name__)

Item = Mapping[str, Any]


class Replica:
    """Everything behind the gateway of one process. `running()` starts and stops it."""

    def __init__(self, config: Config, ledger: Ledger, fleet_key: bytes, name: str, metrics: Metrics) -> None:
        """`name` is this process's incarnation.

        Raises ValueError for a bad policy or profile, or a folder that nothing can be recorded in.
        """
        self._config = config
        self._ledger = ledger
        self._metrics = metrics
        self._receipts = ReceiptLog()
        self._heartbeat = Heartbeat(ledger, name, on_replaced=self._on_replaced)
        self._drain_s = config.gateway.shutdown_grace_s
        self._answers = AnswerBudget(config.gateway.answers_memory_bytes)
        answers = self._answers
        metrics.watch_answers(lambda: answers.used_bytes)
        self._models = Models(config)
        profiles, keys = config.scheduler.profiles, StaticEngineKeys(config.engines)
        self._discovery = Discovery(
            ledger,
            static=tuple(
                EngineRecord(e.engine_id, e.url, e.pool, "", e.kv_addresses, model_id=e.model)
                for e in config.engines
            ),
            make_engine=lambda record: HttpEngine(record, fleet_key, http_key=keys.get(record)),
            on_event=self._on_engine_event,
            on_load=self._on_load,
            on_suspect=self._on_suspect,
            profiles={name: load_latency_model(profile) for name, profile in profiles.items()},
            model_of=self._models.key_of_engine,
        )
        reservations = Reservations(ledger, name)
        self._fleets = {model.key: self._fleet(model, name, reservations) for model in self._models}
        self._fleet_of: dict[str, ModelFleet] = {}
        """Engine id -> whose it is; of engines that are up."""
        metrics.watch_breakers(self._breakers)
        self.drains = DrainStore(ledger.connection)
        self._drainer = Drainer(
            self.drains,
            name,
            self._discovery.engines,
            self._fleet_of.get,
            session_ttl_s=config.ledger.session_ttl_s,
            on_moved=metrics.observe_drained,
            spared_after_s=lambda engine_id: self._pools.spared_after_s(engine_id),
        )
        self._pools = PoolKeeper(
            PoolStore(ledger.connection),
            self.drains,
            name,
            self._fleets,
            self._fleet_of.get,
            config.repool,
            on_pools=self._discovery.set_pools,
            on_flip=lambda direction, result: metrics.flips.labels(direction, result).inc(),
        )
        metrics.watch_pools(self._in_pools, self._pools.shares)

    def _fleet(self, model: Model, name: str, reservations: Reservations) -> ModelFleet:
        recorder = Recorder(
            self._ledger,
            name,
            RecorderConfig(session_ttl_s=self._config.ledger.session_ttl_s),
            on_move=lambda result: self._metrics.moves.labels(result).inc(),
            on_recorded=self._on_recorded,
            reservations=reservations,
            is_foreign=lambda engine_id: self._is_foreign(engine_id, model),
        )
        return ModelFleet(
            model,
            self._config,
            name,
            recorder,
            self._discovery.engines,
            self._metrics,
            budget=self._answers,
            on_ended=self._on_ended,
            on_unreachable=self._discovery.report_failure,
        )

    @property
    def core(self) -> Scheduler:
        """Of the only model, or of the first of several."""
        return next(iter(self._fleets.values())).core

    @property
    def runtime(self) -> Runtime:
        """Of the only model, or of the first of several."""
        return next(iter(self._fleets.values())).runtime

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve within; rounds still in flight on the way out get the grace period, then are cancelled."""
        runtimes = [fleet.runtime for fleet in self._fleets.values()]
        started = [asyncio.Event() for _ in runtimes]
        async with asyncio.TaskGroup() as tasks:
            parts = [
                *(tasks.create_task(runtime.run(up)) for runtime, up in zip(runtimes, started, strict=True)),
                tasks.create_task(self._heartbeat.run()),
            ]
            for up in started:
                await up.wait()
            parts.append(tasks.create_task(self._discovery.run()))
            parts.append(tasks.create_task(self._drainer.run()))
            parts.append(tasks.create_task(self._pools.run()))
            try:
                yield
            finally:
                await asyncio.gather(*(runtime.drain(self._drain_s) for runtime in runtimes))
                if left := sum(runtime.rounds_in_flight for runtime in runtimes):
                    log.warning("%d rounds are cut off by the shutdown", left)
                for part in parts:
                    part.cancel()
                for fleet in self._fleets.values():
                    if fleet.round_log is not None:
                        await asyncio.to_thread(fleet.round_log.close)

    @property
    def rounds_in_flight(self) -> int:
        return sum(fleet.runtime.rounds_in_flight for fleet in self._fleets.values())

    async def send_away(self, why: str, deadline_s: float) -> None:
        """As `Runtime.send_away`, of all models."""
        ways = (fleet.runtime.send_away(why, deadline_s) for fleet in self._fleets.values())
        await asyncio.gather(*ways)

    def hurry(self) -> None:
        """Give rounds in flight no grace on the way out."""
        self._drain_s = 0.0

    # ---- what the gateway needs

    def submit(self, request: RoundRequest) -> RoundHandle:
        return self._fleets[request.model].runtime.submit(request)

    async def explain(self, request: RoundRequest) -> dict[str, Any]:
        return (await self._fleets[request.model].runtime.explain(request)).json()

    def session_ended(self, tenant: str, session_id: str) -> None:
        """Nobody comes back to the session, whichever models it used."""
        for fleet in self._fleets.values():
            fleet.runtime.session_ended(tenant, session_id)

    def readiness(self) -> Readiness:
        ledger = "degraded" if self._heartbeat.away else "ok" if self._heartbeat.beats else "starting"
        idle = [key for key, fleet in self._fleets.items() if key != ONLY and not fleet.engine_ids]
        detail = f"no engine of {', '.join(idle)}" if idle else ""
        return Readiness(sum(len(fleet.engine_ids) for fleet in self._fleets.values()), ledger, detail)

    def model_ids(self, model: str = ONLY) -> tuple[str, ...]:
        """What the engines of a model call it."""
        hellos = (engine.hello for engine in self._engines(model))
        return tuple(dict.fromkeys(hello.model_id for hello in hellos if hello is not None))

    def model_path(self, model: str = ONLY) -> str | None:
        """Where the model's engines found it; its id, for what it is worth, if none says."""
        records = [engine.record for engine in self._engines(model)]
        paths = [record.model_path for record in records if record.model_path]
        return next(iter([*paths, *self.model_ids(model)]), None)

    def context_tokens(self, model: str = ONLY) -> int:
        """What a round may be long: the smallest window, and no more than a device pool holds."""
        hellos = [e.hello for e in self._engines(model) if e.hello is not None]
        return min((min(h.context_tokens, h.pool_tokens) for h in hellos), default=0)

    async def receipts(self, limit: int, session_id: str | None, tenant: str | None = None) -> Sequence[Item]:
        """This replica's own, newest first: complete even while the ledger is away."""
        return self._receipts.newest(limit, session_id, tenant)

    async def engines(self) -> Sequence[Item]:
        items: list[dict[str, Any]] = []
        for key, fleet in self._fleets.items():
            now = fleet.runtime.now()
            views = fleet.core.books.fleet.views(now)
            for engine in self._engines(key):
                record = engine.record
                item: dict[str, Any] = {"engine_id": record.engine_id}
                item |= {"url": record.url, "incarnation": fleet.incarnation(record.engine_id)}
                item["deterministic"] = record.deterministic
                item["standing"] = fleet.core.standings.words(record.engine_id, now)
                item["flip"] = self._pools.flip_of(record.engine_id)
                item["links_not_closed"] = fleet.core.standings.links_of(record.engine_id, now)
                view = views.get(record.engine_id)
                if view is not None:
                    item |= structs.asdict(view) | {"pool": view.pool.value, "latency": view.latency.name}
                items.append(item if key == ONLY else item | {"model": key})
        return items

    async def sessions(self, limit: int, tenant: str | None = None) -> Sequence[Item]:
        try:
            records, _ = await self._ledger.sessions(limit, tenant=tenant)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"Sessions cannot be listed: {error}") from error
        return [asdict(record) for record in records]

    def _engines(self, model: str) -> Sequence[Engine]:
        known = sorted(self._discovery.engines.items())
        return [engine for engine_id, engine in known if self._fleets[model] is self._fleet_of.get(engine_id)]

    def _breakers(self) -> dict[str, tuple[int, int]]:
        """Of engines and of links, in all models: how many are not closed, how often one opened."""
        told = [fleet.core.standings for fleet in self._fleets.values()]
        return {
            "engine": (sum(s.engines.not_closed for s in told), sum(s.engines.opened for s in told)),
            "link": (sum(s.links.not_closed for s in told), sum(s.links.opened for s in told)),
        }

    def _in_pools(self) -> dict[str, int]:
        books = [book for fleet in self._fleets.values() for book in fleet.core.books.fleet.books.values()]
        return {pool.value: sum(book.pool is pool for book in books) for pool in Pool}

    def _is_foreign(self, engine_id: str, model: Model) -> bool:
        fleet = self._fleet_of.get(engine_id)
        return fleet is not None and fleet.model is not model

    def _on_replaced(self, round_id: str) -> None:
        for fleet in self._fleets.values():
            fleet.runtime.replaced(round_id)

    def _on_engine_event(self, event: EngineUp | EngineDown) -> None:
        engine = self._discovery.engines.get(event.engine_id)
        if isinstance(event, EngineUp):
            assert engine is not None
            self._fleet_of[event.engine_id] = self._fleets[self._discovery.model(engine) or ONLY]
            fleet = self._fleet_of[event.engine_id]
        else:
            fleet = self._fleet_of.pop(event.engine_id)
        fleet.engine_changed(event, engine.hello if engine is not None else None)

    def _on_suspect(self, event: EngineSuspect) -> None:
        fleet = self._fleet_of.get(event.engine_id)
        if fleet is not None:
            fleet.runtime.post(event)

    def _on_load(self, engine_id: str, load: LoadReport) -> None:
        fleet = self._fleet_of.get(engine_id)
        if fleet is not None:
            fleet.runtime.post(LoadReported(engine_id, load.used_tokens))

    def _on_recorded(self, round_id: str, recorded: Recorded | None) -> None:
        self._receipts.settle(round_id, NEVER if recorded is None else recorded.name.lower())

    def _on_ended(self, live: LiveRound, receipt: Receipt) -> None:
        offered = live.claimed or receipt.degraded
        self._receipts.add(receipt, live.request.tenant, PENDING if offered else NOT_CLAIMED)
        log.info(
            "round",
            extra={
                "round_id": receipt.round_id,
                "session_id": receipt.session_id,
                "round_number": receipt.round_number,
                "outcome": receipt.outcome.value,
                "arm": receipt.arm.value if receipt.arm else None,
                "reason": receipt.reason,
                "ttft_s": receipt.ttft_s,
            },
        )
