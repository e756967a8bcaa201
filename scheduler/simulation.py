"""The heap driver: the same core as `runtime.py` drives, in simulated time, on closed-form engines.

One event at a time, in a total order: by time; at one time batch loops first (in the order of the cluster
file), then the network, then what was scheduled (answered claims, arrivals; first scheduled, first run), then
deaths and starts of engines, then the core's deadlines. No clock and no chance: equal inputs, equal outputs.

It models what the live driver does and nothing else: a claim takes `claim_s`, every engine request its
group's `request_fixed_s`, a transfer the links that it crosses. A client whose round fails ends its session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any, ClassVar, NamedTuple

from antiphon.engines.chains import Chain
from antiphon.engines.closed_form import ClosedFormEngine, EngineRequest, Milestone
from antiphon.engines.closed_form_request import FIRST_TOKEN, REFUSED
from antiphon.engines.cluster import Cluster, EngineEvent, EngineSpec
from antiphon.engines.links import Network, Pull
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Claim,
    Claimed,
    Command,
    Complete,
    EngineDown,
    EngineFailed,
    EngineUp,
    Event,
    FirstToken,
    Generate,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    Refuse,
    RoundArrived,
    RoundFinished,
    Tick,
)
from antiphon.scheduler.outcomes import Outcome, Receipt
from antiphon.scheduler.simulated_sessions import Clients, PageNames, PlannedRound, SessionRun
from antiphon.traces.schema import SessionTrace

LOOP, NETWORK, SCHEDULED, FLEET, DEADLINE = range(5)
"""Ranks of events at one time."""

INFINITY = float("inf")
TENANT = "simulated"


class RoundEnd(NamedTuple):
    """A round that is over, as its client saw it."""

    session: SessionTrace
    number: int
    """1 for a session's first."""
    sent_s: float
    ended_s: float
    receipt: Receipt
    message: str
    """What the client was told of a round that was refused or broke; "" of a completed one."""


class LiveRound:
    """A round in flight: what the driver must know to carry out the core's commands."""

    __slots__ = ("call", "message", "number", "plan", "round_id", "run", "sent_s")

    def __init__(self, run: SessionRun, plan: PlannedRound, number: int, sent_s: float) -> None:
        self.run = run
        self.plan = plan
        self.number = number
        self.round_id = f"{run.trace.session_id}/{number}"
        self.sent_s = sent_s
        self.message = ""
        self.call: EngineRequest | Pull | Claim | Prefetch | None = None
        """Under way; whatever ends that is not this has been aborted."""


class Targets(NamedTuple):
    """What every round is held to. A session's own target wins over these unless they were asked for."""

    ttft_s: float
    itl_s: float
    ttft_wins: bool = False
    itl_wins: bool = False

    def of(self, session: SessionTrace) -> tuple[float, float]:
        """(TTFT, ITL) of the session's rounds, in seconds."""
        own_ttft_s, own_itl_s = session.slo_ttft_s, session.slo_itl_s
        return (
            self.ttft_s if self.ttft_wins or own_ttft_s is None else own_ttft_s,
            self.itl_s if self.itl_wins or own_itl_s is None else own_itl_s,
        )


class Simulation:
    """One run. `run()` once; then read `engines`, `dead`, `now_s`, and what `on_round` was told."""

    def __init__(
        self,
        core: Scheduler,
        cluster: Cluster,
        specs: Iterable[EngineSpec],
        targets: Targets,
        on_round: Callable[[RoundEnd], None],
        max_live: int | None = None,
    ) -> None:
        """`max_live`: later sessions wait until an earlier one has ended; None = no bound."""
        self.core = core
        self.cluster = cluster
        self.targets = targets
        self.specs = {spec.engine_id: spec for spec in specs}
        self._ranks = {engine_id: index for index, engine_id in enumerate(self.specs)}
        self.engines: dict[str, ClosedFormEngine] = {}
        self.dead: list[ClosedFormEngine] = []
        """Earlier lives of engines."""
        self.network = Network(cluster.page_tokens)
        self.now_s = 0.0
        self.clients = Clients(PageNames(cluster.page_tokens), self.at, self._send, max_live)
        self._on_round = on_round
        self._rounds: dict[str, LiveRound] = {}
        self._heap: list[tuple[float, int, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._loops: dict[str, tuple[int, Callable[[], None]]] = {}
        self._due_s: dict[str, float] = {"": INFINITY}
        """What stands in the heap for each batch loop; under "", for the network."""
        self._tick_pending = False
        for spec in self.specs.values():
            self._engine_up(spec)

    def run(
        self,
        starts: Iterator[tuple[float, SessionTrace]],
        children: Mapping[str, Sequence[SessionTrace]] | None = None,
    ) -> None:
        """Every session to its end. `starts` in order of time, read one by one; `children` by parent."""
        for number, event in enumerate(self.cluster.events):
            act: Callable[[], None] = partial(self._fleet_event, event)
            heappush(self._heap, (event.at_s, FLEET, number, act))
        self.clients.feed(starts, children or {})
        heap, clients = self._heap, self.clients
        while clients.open:
            self.now_s, _, _, act = heappop(heap)
            act()

    # ---------------------------------------------------------------- the heap

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Run `act` then, after what engines and network do at that time."""
        self._scheduled += 1
        heappush(self._heap, (when, SCHEDULED, self._scheduled, act))

    def _watch(self, engine: ClosedFormEngine) -> None:
        """The engine was touched: its next event must stand in the heap."""
        due_s, engine_id = engine.next_event_s, engine.engine_id
        if due_s != self._due_s[engine_id]:
            self._due_s[engine_id] = due_s
            if due_s != INFINITY:
                index, act = self._loops[engine_id]
                heappush(self._heap, (due_s, LOOP, index, act))

    def _watch_network(self) -> None:
        due_s = self.network.next_event_s
        if due_s != self._due_s[""]:
            self._due_s[""] = due_s
            if due_s != INFINITY:
                heappush(self._heap, (due_s, NETWORK, 0, self._advance_network))

    def _watch_deadline(self) -> None:
        """At most one Tick stands in the heap: the core's deadlines only grow."""
        if not self._tick_pending:
            due_s = self.core.next_deadline()
            if due_s is not None:
                self._tick_pending = True
                heappush(self._heap, (due_s, DEADLINE, 0, self._tick))

    def _tick(self) -> None:
        self._tick_pending = False
        due_s = self.core.next_deadline()
        if due_s is not None and due_s <= self.now_s:
            self._post(Tick())
        self._watch_deadline()

    # ---------------------------------------------------------------- engines and network

    def _advance_engine(self, engine: ClosedFormEngine) -> None:
        if engine.next_event_s != self.now_s:
            return  # it was moved meanwhile, and stands in the heap again
        self._due_s[engine.engine_id] = INFINITY
        for milestone, request in engine.advance(self.now_s):
            live: LiveRound = request.tag
            if live.call is request:
                self._reached(live, request, milestone)
        self._watch(engine)

    def _reached(self, live: LiveRound, request: EngineRequest, milestone: Milestone) -> None:
        if milestone is FIRST_TOKEN:
            if request.output_tokens:
                self._post(FirstToken(live.round_id))
            return
        live.call = None
        if milestone is REFUSED:
            engine_id = self.core.rounds[live.round_id].engine_id or ""
            self._post(EngineFailed(live.round_id, engine_id, "bad_request", request.message))
            return
        cached_tokens = request.cached_device_tokens + request.cached_host_tokens
        if request.output_tokens:
            hashes = live.plan.end_hashes
            self._post(RoundFinished(live.round_id, request.output_tokens, cached_tokens, hashes))
        else:
            self._post(PrefillDone(live.round_id, cached_tokens))

    def _advance_network(self) -> None:
        if self.network.next_event_s == self.now_s:
            self._due_s[""] = INFINITY
            self._pulled(self.network.advance(self.now_s))
            self._watch_network()

    def _pulled(self, pulls: Iterable[Pull]) -> None:
        for pull in pulls:
            live: LiveRound = pull.tag
            if live.call is pull:
                live.call = None
                elapsed_s, puller = self.now_s - pull.started_s, pull.puller.engine_id
                pages, pulled, pulled_bytes = pull.have_pages, pull.pulled_pages, pull.pulled_bytes
                self._post(
                    PrefetchDone(live.round_id, puller, pages, pulled, pulled_bytes, elapsed_s, pull.reason)
                )

    def _engine_up(self, spec: EngineSpec) -> None:
        engine_id = spec.engine_id
        lives = sum(engine.engine_id == engine_id for engine in self.dead) if self.dead else 0
        engine = ClosedFormEngine(spec, self.cluster.page_tokens, f"{engine_id}/{lives}")
        self.engines[engine_id] = engine
        self._due_s[engine_id] = INFINITY
        self._loops[engine_id] = self._ranks[engine_id], partial(self._advance_engine, engine)
        self._post(self._up(spec, engine.incarnation))

    def _up(self, spec: EngineSpec, incarnation: str) -> EngineUp:
        return up_event(spec, incarnation, self.cluster.page_tokens)

    def _fleet_event(self, event: EngineEvent) -> None:
        engine = self.engines.get(event.engine)
        if event.kind == "up":
            if engine is None:
                self._engine_up(self.specs[event.engine])
        elif engine is not None:
            del self.engines[event.engine]
            self.dead.append(engine)
            self._due_s[event.engine] = INFINITY
            engine.next_event_s = INFINITY
            self._post(EngineDown(event.engine, engine.incarnation, "it died in the simulation"))
            self._pulled(self.network.engine_gone(engine, self.now_s))
            self._watch_network()

    # ---------------------------------------------------------------- rounds

    def _send(self, run: SessionRun, plan: PlannedRound) -> None:
        live = LiveRound(run, plan, run.sent, self.now_s)
        self._rounds[live.round_id] = live
        ttft_s, itl_s = self.targets.of(run.trace)
        self._post(
            RoundArrived(  # by position, as once per round: keywords cost five times as much
                live.round_id,
                run.trace.session_id,
                TENANT,
                plan.trace.prompt_tokens,
                plan.hashes,
                self.cluster.page_tokens,
                plan.trace.output_tokens,
                ttft_s,
                itl_s,
            )
        )
        self._watch_deadline()

    def _post(self, event: Event) -> None:
        for command in self.core.receive(event, self.now_s):
            act = self._acts.get(type(command))
            if act is not None:
                act(self, command)

    def _claim(self, command: Claim) -> None:
        live = self._rounds[command.round_id]
        live.call = command
        self.at(self.now_s + self.cluster.claim_s, lambda: self._claimed(live, command))

    def _claimed(self, live: LiveRound, command: Claim) -> None:
        if live.call is command:
            live.call = None
            self._post(Claimed(live.round_id, 0, live.run.trace.session_id, live.number))

    def _prefetch(self, command: Prefetch) -> None:
        live = self._rounds[command.round_id]
        puller, source = self.engines[command.engine_id], self.engines.get(command.source_id)
        if source is None or source.incarnation != command.source_incarnation:
            pages = puller.store.match(Chain(live.plan.chain.branch, command.pages))
            gone = PrefetchDone(live.round_id, command.engine_id, pages, 0, 0, 0.0, "the source is gone")
            live.call = command
            self.at(self.now_s, lambda: self._nothing_to_pull(live, command, gone))
            return
        chain = live.plan.chain
        pull = Pull(live, puller, source, chain, command.pages, self.now_s + command.deadline_s)
        live.call = pull
        self.network.start(pull, self.now_s)
        self._watch_network()

    def _nothing_to_pull(self, live: LiveRound, command: Prefetch, event: PrefetchDone) -> None:
        if live.call is command:
            live.call = None
            self._post(event)

    def _prefill(self, command: Prefill) -> None:
        live = self._rounds[command.round_id]
        self._submit(live, command.engine_id, 0)

    def _generate(self, command: Generate) -> None:
        live = self._rounds[command.round_id]
        history_pages = self.core.rounds[command.round_id].history_tokens // self.cluster.page_tokens
        branch, pages = live.plan.chain
        self.engines[command.engine_id].touch(Chain(branch, min(history_pages, pages)), self.now_s)
        self._submit(live, command.engine_id, live.plan.trace.output_tokens)

    def _submit(self, live: LiveRound, engine_id: str, output_tokens: int) -> None:
        plan, engine = live.plan, self.engines[engine_id]
        request = EngineRequest(live, plan.chain, plan.trace.prompt_tokens, output_tokens, plan.end)
        live.call = request
        engine.submit(request, self.now_s)
        self._watch(engine)

    def _abort(self, command: Abort) -> None:
        live = self._rounds[command.round_id]
        call, live.call = live.call, None
        if isinstance(call, Pull):
            self.network.cancel(call, self.now_s)
            self._watch_network()
        elif isinstance(call, EngineRequest):
            engine = self.engines.get(command.engine_id)
            if engine is not None:  # else it went with its engine
                engine.abort(call, self.now_s)
                self._watch(engine)

    def _told(self, command: Refuse | Broke) -> None:
        self._rounds[command.round_id].message = command.message

    def _complete(self, command: Complete) -> None:
        live = self._rounds.pop(command.round_id)
        receipt = command.receipt
        self._on_round(RoundEnd(live.run.trace, live.number, live.sent_s, self.now_s, receipt, live.message))
        self.clients.ended(live.run, command.outcome is Outcome.COMPLETED, self.now_s)

    _acts: ClassVar[dict[type[Command], Callable[[Simulation, Any], None]]] = {
        Claim: _claim,
        Prefetch: _prefetch,
        Prefill: _prefill,
        Generate: _generate,
        Abort: _abort,
        Complete: _complete,
        Refuse: _told,
        Broke: _told,
    }
    """The other commands speak to a ledger: nothing of them takes time here."""


def up_event(spec: EngineSpec, incarnation: str, page_tokens: int) -> EngineUp:
    """What the core is told of a simulated engine that has just started."""
    group = spec.group
    return EngineUp(
        engine_id=spec.engine_id,
        incarnation=incarnation,
        pool=group.pool,
        can_transfer=True,
        page_size_tokens=page_tokens,
        pool_tokens=group.device_tokens,
        kv_bytes_per_token=spec.latency.transfer.kv_bytes_per_token,
        chunk_tokens=group.chunk_tokens,
        decode_interval=group.decode_interval,
        latency=spec.believed or spec.latency,
        store_tokens=group.store_tokens,
    )
