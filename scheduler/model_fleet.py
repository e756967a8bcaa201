"""One model of a replica: a core of its own with the engines that have the model, and its driver.

Rounds of different models never meet: no placement, no transfer and no belief crosses from one to another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from antiphon.engines.base import Engine
from antiphon.engines.wire import Hello
from antiphon.policies.checked import Checked, CheckedOrdering
from antiphon.policies.latency import load_latency_model
from antiphon.policies.leaving import Leaving
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.answer_buffer import AnswerBudget
from antiphon.scheduler.config import Config
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.engine_calls import CallDeadlines
from antiphon.scheduler.messages import (
    EngineDown,
    EngineUp,
)
from antiphon.scheduler.metrics import Metrics
from antiphon.scheduler.models import ONLY, Model
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.recorded_facts import ReplicaFacts
from antiphon.scheduler.recorder import Recorder
from antiphon.scheduler.round_log import EndedRound, RoundLog
from antiphon.scheduler.rounds import LiveRound
from antiphon.scheduler.runtime import Runtime

log = logging.getLogger(__name__)


class ModelFleet:
    """Core, driver and recording of one model."""

    def __init__(
        self,
        model: Model,
        config: Config,
        name: str,
        recorder: Recorder,
        engines: Mapping[str, Engine],
        metrics: Metrics,
        *,
        budget: AnswerBudget | None = None,
        on_ended: Callable[[LiveRound, Receipt], None],
        on_unreachable: Callable[[str], None],
    ) -> None:
        """`name`: the replica's; `engines` holds those of all models. Raises ValueError as `Replica`."""
        self.model = model
        settings = config.scheduler
        self._latency = load_latency_model(model.profile)
        self.core = Scheduler(
            Leaving(Checked(make_policy(settings.policy, config.policy_parameters()))),
            CheckedOrdering(make_ordering(settings.ordering)),
            self._latency,
            CoreConfig(
                max_tries=settings.max_tries,
                prefill_in_flight=settings.prefill_in_flight,
                max_queued_rounds=settings.max_queued_rounds,
                admission=settings.admission,
                admission_under_way=settings.admission_under_way,
                first_token_deadline_s=settings.first_token_deadline_s,
                session_ttl_s=config.ledger.session_ttl_s,
            ),
        )
        # An answer that hangs must leave time for another engine to go on with it.
        try_s = settings.first_token_deadline_s / settings.max_tries
        self.runtime = Runtime(
            self.core,
            recorder,
            engines,
            deadlines=CallDeadlines(event_s=try_s),
            budget=budget,
            on_receipt=metrics.observe_receipt,
            on_ended=self._on_ended,
            on_unreachable=on_unreachable,
        )
        self._ended = on_ended
        self._facts = ReplicaFacts(
            replica=name,
            policy=settings.policy,
            ordering=settings.ordering,
            profile=self._latency,
            slo_ttft_s=settings.slo_ttft_s,
            slo_itl_s=settings.slo_itl_s,
            policy_parameters=dict(config.policy_parameters()),
        )
        self.round_log = _round_log(config, model, name, metrics)

    @property
    def engine_ids(self) -> frozenset[str]:
        """Of those that are up."""
        return frozenset(self.core.books.fleet.books)

    def incarnation(self, engine_id: str) -> str:
        """Of an engine of this model; "" if it is not up."""
        book = self.core.books.fleet.books.get(engine_id)
        return book.up.incarnation if book is not None else ""

    def engine_changed(self, event: EngineUp | EngineDown, hello: Hello | None) -> None:
        """An engine of this model came or went."""
        self.runtime.post(event)
        if self.round_log is not None:
            self._facts.note(event, hello, time.time())
            self.round_log.describe(self._facts)

    def _on_ended(self, live: LiveRound, receipt: Receipt) -> None:
        self._ended(live, receipt)
        if self.round_log is None:
            return
        ended_s = time.time()
        self.round_log.add(
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


def _round_log(config: Config, model: Model, name: str, metrics: Metrics) -> RoundLog | None:
    """A recording is of one model: each of several has a folder of its own in it."""
    if not config.record.directory:
        return None
    folder = Path(config.record.directory).expanduser()
    return RoundLog(
        folder if model.key == ONLY else folder / quote(model.key, safe=""),
        name,
        plain_ids=config.record.session_ids == "plain",
        on_lost=metrics.unrecorded.inc,
    )
