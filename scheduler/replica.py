"""One replica put together: core, runtime, discovery, ledger; and what the gateway shows of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msgspec import structs

from antiphon.engines.base import Engine, EngineRecord
from antiphon.engines.http import HttpEngine
from antiphon.policies.checked import Checked, CheckedOrdering
from antiphon.policies.latency import load_latency_model
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.config import Config
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.discovery import Discovery
from antiphon.scheduler.engine_calls import CallDeadlines
from antiphon.scheduler.errors import ledger_unavailable
from antiphon.scheduler.gateway.app import Readiness
from antiphon.scheduler.heartbeat import Heartbeat
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.messages import EngineDown, EngineUp, Event, LoadReported, Receipt
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.receipt_log import ReceiptLog
from antiphon.scheduler.recorded_facts import ReplicaFacts
from antiphon.scheduler.recorder import Recorder, RecorderConfig
from antiphon.scheduler.round_log import EndedRound, RoundLog
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
        self._heartbeat = Heartbeat(ledger, name)
        self._drain_s = config.gateway.shutdown_grace_s
        settings = config.scheduler
        latency = load_latency_model(settings.profile)
        self.core = Scheduler(
            Checked(make_policy(settings.policy, config.policy_parameters())),
            CheckedOrdering(make_ordering(settings.ordering)),
            latency,
            CoreConfig(
                max_tries=settings.max_tries,
                prefill_in_flight=settings.prefill_in_flight,
                first_token_deadline_s=settings.first_token_deadline_s,
                session_ttl_s=config.ledger.session_ttl_s,
            ),
        )
        self._discovery = Discovery(
            ledger,
            static=tuple(
                EngineRecord(e.engine_id, e.url, e.pool, "", e.kv_addresses) for e in config.engines
            ),
            make_engine=lambda record: HttpEngine(record, fleet_key),
            on_event=self._on_engine_event,
            on_load=lambda engine_id, load: self.runtime.post(LoadReported(engine_id, load.used_tokens)),
            profiles={name: load_latency_model(profile) for name, profile in settings.profiles.items()},
        )
        # A try that hangs must leave time for another.
        try_s = settings.first_token_deadline_s / settings.max_tries
        self.runtime = Runtime(
            self.core,
            Recorder(
                ledger,
                name,
                RecorderConfig(session_ttl_s=config.ledger.session_ttl_s),
                on_move=lambda result: metrics.moves.labels(result).inc(),
            ),
            self._discovery.engines,
            deadlines=CallDeadlines(prefill_s=try_s, event_s=try_s),
            on_receipt=self._on_receipt,
            on_ended=self._on_ended,
            on_unreachable=self._discovery.report_failure,
        )
        self._facts = ReplicaFacts(
            replica=name,
            policy=settings.policy,
            ordering=settings.ordering,
            profile=latency,
            slo_ttft_s=settings.slo_ttft_s,
            slo_itl_s=settings.slo_itl_s,
            policy_parameters=dict(config.policy_parameters()),
        )
        self._round_log = _round_log(config, name, metrics)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve within; rounds still in flight on the way out get the grace period, then are cancelled."""
        started = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            parts = [
                tasks.create_task(self.runtime.run(started)),
                tasks.create_task(self._heartbeat.run()),
            ]
            await started.wait()
            parts.append(tasks.create_task(self._discovery.run()))
            try:
                yield
            finally:
                if not await self.runtime.drain(self._drain_s):
                    log.warning("%d rounds are cut off by the shutdown", self.runtime.rounds_in_flight)
                for part in parts:
                    part.cancel()
                if self._round_log is not None:
                    await asyncio.to_thread(self._round_log.close)

    def hurry(self) -> None:
        """Give rounds in flight no grace on the way out."""
        self._drain_s = 0.0

    # ---- what the gateway needs

    def submit(self, request: RoundRequest) -> RoundHandle:
        return self.runtime.submit(request)

    async def explain(self, request: RoundRequest) -> dict[str, Any]:
        return (await self.runtime.explain(request)).json()

    def readiness(self) -> Readiness:
        ledger = "degraded" if self._heartbeat.away else "ok" if self._heartbeat.beats else "starting"
        return Readiness(len(self.core.books.fleet.books), ledger)

    def model_ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(e.hello.model_id for e in self._engines() if e.hello is not None))

    def model_path(self) -> str | None:
        """Where the engines found the model; its id, for what it is worth, if none says."""
        records = [engine.record for engine in self._engines()]
        paths = [record.model_path for record in records if record.model_path]
        return next(iter([*paths, *self.model_ids()]), None)

    def context_tokens(self) -> int:
        """What a round may be long: the smallest window, and no more than a device pool holds."""
        hellos = [e.hello for e in self._engines() if e.hello is not None]
        return min((min(h.context_tokens, h.pool_tokens) for h in hellos), default=0)

    async def receipts(self, limit: int, session_id: str | None, tenant: str | None = None) -> Sequence[Item]:
        """This replica's own, newest first: complete even while the ledger is away."""
        return self._receipts.newest(limit, session_id, tenant)

    async def engines(self) -> Sequence[Item]:
        views = self.core.books.fleet.views(self.runtime.now())
        items: list[dict[str, Any]] = []
        for engine in self._engines():
            record = engine.record
            item = {"engine_id": record.engine_id, "url": record.url, "incarnation": record.incarnation}
            view = views.get(record.engine_id)
            if view is not None:
                item |= structs.asdict(view) | {"pool": view.pool.value, "latency": view.latency.name}
            items.append(item)
        return items

    async def sessions(self, limit: int, tenant: str | None = None) -> Sequence[Item]:
        try:
            records, _ = await self._ledger.sessions(limit, tenant=tenant)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"Sessions cannot be listed: {error}") from error
        return [asdict(record) for record in records]

    def _engines(self) -> Sequence[Engine]:
        return [engine for _, engine in sorted(self._discovery.engines.items())]

    def _on_engine_event(self, event: Event) -> None:
        self.runtime.post(event)
        if self._round_log is not None and isinstance(event, EngineUp | EngineDown):
            engine = self._discovery.engines.get(event.engine_id)
            self._facts.note(event, engine.hello if engine is not None else None, time.time())
            self._round_log.describe(self._facts)

    def _on_ended(self, live: LiveRound, receipt: Receipt) -> None:
        self._receipts.add(receipt, live.request.tenant)
        if self._round_log is None:
            return
        ended_s = time.time()
        self._round_log.add(
            EndedRound(
                request=live.request,
                receipt=receipt,
                parent_id=live.handle.parent_id,
                output_ids=live.output_ids,
                prompt_hashes=live.hashes,
                final_hashes=live.final_hashes,
                page_tokens=live.page_tokens,
                arrived_s=ended_s - (self.runtime.now() - live.submitted_s),
                ended_s=ended_s,
            )
        )

    def _on_receipt(self, receipt: Receipt) -> None:
        self._metrics.observe_receipt(receipt)
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


def _round_log(config: Config, name: str, metrics: Metrics) -> RoundLog | None:
    if not config.record.directory:
        return None
    return RoundLog(
        Path(config.record.directory).expanduser(),
        name,
        plain_ids=config.record.session_ids == "plain",
        on_lost=metrics.unrecorded.inc,
    )
