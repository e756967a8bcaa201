"""One replica put together: core, runtime, discovery, ledger; and what the gateway shows of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from antiphon.engines.base import Engine, EngineRecord
from antiphon.engines.http import HttpEngine
from antiphon.policies.checked import Checked, CheckedOrdering
from antiphon.policies.latency import load_latency_model
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.config import Config
from antiphon.scheduler.core import CoreConfig, Scheduler
from antiphon.scheduler.discovery import Discovery
from antiphon.scheduler.engine_calls import CallDeadlines
from antiphon.scheduler.errors import ledger_unavailable
from antiphon.scheduler.gateway import Readiness
from antiphon.scheduler.heartbeat import Heartbeat
from antiphon.scheduler.ledger import Ledger, LedgerUnavailable
from antiphon.scheduler.messages import LoadReported, Receipt
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.receipt_log import ReceiptLog
from antiphon.scheduler.recorder import Recorder, RecorderConfig
from antiphon.scheduler.rounds import RoundHandle, RoundRequest
from antiphon.scheduler.runtime import Runtime

log = logging.getLogger(__name__)

Item = Mapping[str, Any]


class Replica:
    """Everything behind the gateway of one process. `running()` starts and stops it."""

    def __init__(self, config: Config, ledger: Ledger, fleet_key: bytes, name: str, metrics: Metrics) -> None:
        """`name` is this process's incarnation. Raises ValueError for a bad policy or profile."""
        self._config = config
        self._ledger = ledger
        self._metrics = metrics
        self._receipts = ReceiptLog()
        self._heartbeat = Heartbeat(ledger, name)
        self._drain_s = config.gateway.shutdown_grace_s
        settings = config.scheduler
        self.core = Scheduler(
            Checked(make_policy(settings.policy, config.policy_parameters())),
            CheckedOrdering(make_ordering(settings.ordering)),
            load_latency_model(settings.profile),
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
            on_event=lambda event: self.runtime.post(event),
            on_load=lambda engine_id, load: self.runtime.post(LoadReported(engine_id, load.used_tokens)),
        )
        # A try that hangs must leave time for another.
        try_s = settings.first_token_deadline_s / settings.max_tries
        self.runtime = Runtime(
            self.core,
            Recorder(ledger, name, RecorderConfig(session_ttl_s=config.ledger.session_ttl_s)),
            self._discovery.engines,
            deadlines=CallDeadlines(prefill_s=try_s, event_s=try_s),
            on_receipt=self._on_receipt,
            on_unreachable=self._discovery.report_failure,
        )

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

    def hurry(self) -> None:
        """Give rounds in flight no grace on the way out."""
        self._drain_s = 0.0

    # ---- what the gateway needs

    def submit(self, request: RoundRequest) -> RoundHandle:
        return self.runtime.submit(request)

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

    async def receipts(self, limit: int, session_id: str | None) -> Sequence[Item]:
        """This replica's own, newest first: complete even while the ledger is away."""
        return self._receipts.newest(limit, session_id)

    async def engines(self) -> Sequence[Item]:
        views = self.core.books.fleet.views(self.runtime.now())
        items: list[dict[str, Any]] = []
        for engine in self._engines():
            record = engine.record
            item = {"engine_id": record.engine_id, "url": record.url, "incarnation": record.incarnation}
            view = views.get(record.engine_id)
            if view is not None:
                item |= asdict(view) | {"pool": view.pool.value}
            items.append(item)
        return items

    async def sessions(self, limit: int) -> Sequence[Item]:
        try:
            records, _ = await self._ledger.sessions(limit)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"Sessions cannot be listed: {error}") from error
        return [asdict(record) for record in records]

    def _engines(self) -> Sequence[Engine]:
        return [engine for _, engine in sorted(self._discovery.engines.items())]

    def _on_receipt(self, receipt: Receipt) -> None:
        self._receipts.add(receipt)
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
