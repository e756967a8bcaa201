"""The asyncio driver: carries out the core's commands and reports how they ended.

Per round at most one call is under way; it runs in a task of the runtime's own group and posts exactly one
event when it ends, unless it was cancelled by `Abort`. Nothing here decides anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial

from antiphon.engines.base import Engine, EngineError, FailureKind
from antiphon.scheduler.answer_buffer import AnswerBudget
from antiphon.scheduler.answering import Answering
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.engine_calls import CallDeadlines, EngineCalls
from antiphon.scheduler.explanation import Explanation, explain
from antiphon.scheduler.ledger import KeyReused, RoundTaken
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Claim,
    Claimed,
    ClaimLost,
    ClientGone,
    Command,
    Complete,
    EngineDown,
    EngineFailed,
    EngineUp,
    Event,
    Generate,
    Prefetch,
    Prefill,
    Refuse,
    Rehome,
    Reserved,
    RoundArrived,
    SessionEnded,
    Tick,
)
from antiphon.scheduler.outcomes import Receipt
from antiphon.scheduler.rebuilding import Rebuilding
from antiphon.scheduler.recorder import Recorder
from antiphon.scheduler.rounds import LiveRound, RoundBroke, RoundHandle, RoundRefused, RoundRequest, seed_of
from antiphon.scheduler.told import Told

log = logging.getLogger(__name__)

DEFAULT_PAGE_TOKENS = 16
"""Until an engine with our linker has told its own; without one, nothing is hashed at all."""

RECORD_GRACE_S = 2.0
"""At a shutdown, for the completions of rounds that have ended to reach the ledger."""

REPLACED = "replaced_by_retry"

Call = Callable[[], Coroutine[None, None, Event | None]]


class Runtime:
    """One replica's driver. `run()` owns every task; `submit` works while it runs."""

    def __init__(
        self,
        core: Scheduler,
        recorder: Recorder,
        engines: Mapping[str, Engine],
        *,
        deadlines: CallDeadlines | None = None,
        budget: AnswerBudget | None = None,
        on_receipt: Callable[[Receipt], None] = lambda receipt: None,
        on_ended: Callable[[LiveRound, Receipt], None] = lambda live, receipt: None,
        on_unreachable: Callable[[str], None] = lambda engine_id: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engines` is read at each call, so discovery may change it. `on_unreachable` gets engine ids."""
        self._core = core
        self._recorder = recorder
        self._calls = EngineCalls(engines, deadlines or CallDeadlines())
        self._answering = Answering(core, self._calls, self.post)
        self._rebuilding = Rebuilding(core, self._calls)
        self._budget = budget
        self._on_receipt = on_receipt
        self._on_ended = on_ended
        self._on_unreachable = on_unreachable
        self._clock = clock
        self._live: dict[str, LiveRound] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._closed = False
        self._recording: dict[asyncio.Task[None], str | None] = {}
        """Completions on their way to the ledger -> the home that they tell."""
        self._deadline_changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._told = Told(recorder.session_ttl_s / 4)
        self._page_tokens = DEFAULT_PAGE_TOKENS

    @property
    def rounds_in_flight(self) -> int:
        return len(self._live)

    def now(self) -> float:
        """The clock that the core's times are on."""
        return self._clock()

    # ---------------------------------------------------------------- the gateway's and discovery's side

    async def run(self, started: asyncio.Event | None = None) -> None:
        """Drive until cancelled; every round still in flight is then cancelled with its calls."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            if started is not None:
                started.set()
            try:
                await self._tick()
            finally:
                self._tasks = None
                for live in self._live.values():
                    live.cut_off("the gateway is shutting down")

    def needing(self, engine_id: str) -> int:
        """Rounds that this engine is at work for, or whose end is still to be recorded as there."""
        at_work = sum(round.uses(engine_id) for round in self._core.rounds.values())
        return at_work + sum(home == engine_id for home in self._recording.values())

    async def drain(self, deadline_s: float) -> bool:
        """Wait until no round is in flight and the ended ones are recorded; False after `deadline_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        if self._recording:
            await asyncio.wait(self._recording, timeout=RECORD_GRACE_S)
        return not self._live

    async def send_away(self, why: str, deadline_s: float) -> None:
        """End all rounds in flight: their leases are given back, or that has taken too long; then their
        clients are told to send them again. Whatever comes later is refused."""
        self._closed = True
        left = list(self._live.values())
        for live in left:
            live.sent_away = True
            if live.request.round_id in self._core.rounds:
                self.post(ClientGone(live.request.round_id))
        try:
            await asyncio.gather(*(live.handle.recorded(deadline_s) for live in left))
        finally:
            for live in left:
                live.cut_off(why)

    def submit(self, request: RoundRequest) -> RoundHandle:
        """Accept a round; one that comes after the end is refused."""
        handle = RoundHandle(request, lambda: self._client_gone(request.round_id), self._budget)
        if self._tasks is None or self._closed:
            handle.finish(RoundRefused("no_engine_available", "the gateway is shutting down", 1.0))
            return handle
        arrived = self._arrived(request)
        self._live[request.round_id] = LiveRound(
            request, handle, arrived.hashes, self._page_tokens, submitted_s=self._clock()
        )
        self._idle.clear()
        self.post(arrived)
        self._deadline_changed.set()
        return handle

    async def explain(self, request: RoundRequest) -> Explanation:
        """What would be decided of the round if it came now. Nothing is begun, reserved or written."""
        return await explain(self._core, self._recorder, request, self._arrived(request), self._clock)

    def _arrived(self, request: RoundRequest) -> RoundArrived:
        hashes: tuple[bytes, ...] = ()
        hints = request.hints
        if self._answering.hashing:
            hashes = request.prompt.hashes(self._page_tokens, seed_of(request))
        return RoundArrived(
            round_id=request.round_id,
            session_id=request.session_id,
            tenant=request.tenant,
            prompt_tokens=len(request.prompt),
            hashes=hashes,
            page_size_tokens=self._page_tokens,
            max_output_tokens=request.max_output_tokens,
            slo_ttft_s=request.slo_ttft_s,
            slo_itl_s=request.slo_itl_s,
            expected_output_tokens=hints.expected_output_tokens,
            next_output_tokens=hints.next_output_tokens,
            remaining_rounds=0 if request.final else hints.remaining_rounds,
            expected_gap_s=hints.expected_gap_s,
            priority=hints.priority or 0,
        )

    def session_ended(self, tenant: str, session_id: str) -> None:
        """The session is over: nothing is kept for it any more."""
        self.post(SessionEnded(tenant, session_id))

    def post(self, event: Event) -> None:
        """Give an event to the core and carry out what it commands."""
        if isinstance(event, EngineUp) and event.can_transfer:
            self._page_tokens, self._answering.hashing = event.page_size_tokens, True
        elif isinstance(event, EngineDown):
            event = self._answering.with_goes_on(event, list(self._live.values()))
        for command in self._core.receive(event, self._clock()):
            self._execute(command)

    def _client_gone(self, round_id: str) -> None:
        if round_id in self._live:
            self.post(ClientGone(round_id))

    def replaced(self, round_id: str) -> None:
        """A retry of its call has its lease, here or on another replica: nobody is to answer it any more."""
        live = self._live.get(round_id)
        if live is not None:
            self._turn_away(live, RoundRefused(REPLACED, "A retry of this request took its place.", 0.0))

    def _turn_away(self, live: LiveRound, refused: RoundRefused) -> None:
        live.handle.finish(RoundBroke(str(refused)) if live.handle.arm else refused)
        self._client_gone(live.request.round_id)

    # ---------------------------------------------------------------- commands

    def _execute(self, command: Command) -> None:
        log.debug("command", extra={"command": command})
        if isinstance(command, Reserved):
            if self._recorder.note(command):
                self._background(self._recorder.publish)
            return
        live = self._live[command.round_id]
        match command:
            case Claim():
                self._call(live, "", partial(self._claim, live))
            case Prefetch():
                self._call(live, command.engine_id, partial(self._calls.prefetch, live, command))
            case Prefill():
                self._call(live, command.engine_id, partial(self._calls.prefill, live, command))
            case Generate():
                self._call(live, command.engine_id, partial(self._generate, live, command))
            case Rehome():
                self._rehome(live, command)
            case Abort():
                self._abort(live, command)
            case Refuse():
                live.refuse(command)
            case Broke():
                live.handle.finish(RoundBroke(command.message))
            case Complete():
                self._complete(live, command)

    def _call(self, live: LiveRound, engine_id: str, work: Call) -> None:
        live.call = self._spawn(self._guard(live, engine_id, work))

    async def _guard(self, live: LiveRound, engine_id: str, work: Call) -> None:
        """Run one call and post how it ended; whatever it raises becomes an event. No engine: a claim."""
        round_id = live.request.round_id
        event: Event | None
        try:
            event = await work()
        except EngineError as error:
            live.error = error
            goes_on = self._answering.goes_on(live)
            event = EngineFailed(round_id, engine_id, error.kind.value, str(error), goes_on)
            if error.kind is FailureKind.UNREACHABLE:
                self._on_unreachable(engine_id)
        except Exception as error:
            log.exception("a call of round %s failed by a bug", round_id)
            lost = ClaimLost(round_id, repr(error))
            event = EngineFailed(round_id, engine_id, "bug", repr(error)) if engine_id else lost
        finally:
            # It ended well before its stream did: nothing is owed any more.
            if round_id not in self._live and not live.sent_away:
                live.handle.finish()
        if live.call is not asyncio.current_task():
            return  # it was aborted, and what it awaited swallowed that
        live.call = None
        if event is not None and round_id in self._live:
            self._post_or_cut_off(live, event)

    def _post_or_cut_off(self, live: LiveRound, event: Event) -> None:
        """A bug that one round's event uncovers ends that round and no other."""
        round_id = live.request.round_id
        try:
            self.post(event)
        except Exception:
            log.exception("round %s is cut off by a bug", round_id)
            live.cut_off("the gateway failed; its log has the round id")
            if round_id in self._core.rounds:
                self.post(ClientGone(round_id))
            self._forget(round_id)

    def _abort(self, live: LiveRound, command: Abort) -> None:
        if live.call is not None:
            live.call.cancel()
            live.call = None
        self._background(partial(self._calls.abort, command.engine_id, command.rid))

    def _rehome(self, live: LiveRound, command: Rehome) -> None:
        """Tell the ledger; the round goes on meanwhile."""
        tenant, session_id = live.request.tenant, live.handle.session_id
        self._background(partial(self._recorder.rehome, tenant, session_id, live.fence, command))

    def _complete(self, live: LiveRound, command: Complete) -> None:
        live.handle.receipt = command.receipt
        live.handle.session_id = command.receipt.session_id
        if not live.handle.ended and live.call is None and not live.sent_away:
            live.handle.finish()
        self._forget(command.round_id)
        self._background(partial(self._calls.link, live, command))
        self._on_receipt(command.receipt)
        self._on_ended(live, command.receipt)
        if live.claimed or command.receipt.degraded:
            entries = self._entries(live, command)
            record = partial(self._recorder.record, live.request, command.receipt, entries, live.fence)
            task = self._background(record)
            if task is not None:
                self._recording[task] = command.receipt.home
                task.add_done_callback(self._recording.pop)
                live.handle.recording = task if live.claimed else None

    def _entries(self, live: LiveRound, command: Complete) -> list[tuple[bytes, int, str, str]]:
        """What the ledger keeps of who holds what: (page hash, tokens, engine id, incarnation)."""
        request = live.request
        session = request.tenant, request.session_id
        entries = []
        for chain in command.holdings:
            holder = self._recorder.epoch, chain.engine_id, chain.incarnation
            since = live.served_pages if self._told.holder(session, self._clock()) == holder else 0
            if not since and chain.engine_id == command.home:
                self._told.note((request.tenant, command.receipt.session_id), holder, self._clock())
            entries += [
                (page_hash, tokens, chain.engine_id, chain.incarnation)
                for tokens, page_hash in self._core.checkpoints(chain.hashes, live.page_tokens, since)
            ]
        return entries

    def _forget(self, round_id: str) -> None:
        self._live.pop(round_id, None)
        if not self._live:
            self._idle.set()

    # ---------------------------------------------------------------- calls; each returns its event

    async def _claim(self, live: LiveRound) -> Event | None:
        told = self._told.holder((live.request.tenant, live.request.session_id), self._clock())
        since = live.served_pages if told is not None and told[0] == self._recorder.epoch else 0
        candidates = self._core.checkpoints(live.hashes, live.page_tokens, since)
        try:
            answer = await self._recorder.claim(live.request, candidates)
        except (RoundTaken, KeyReused) as error:
            code = "idempotency_key_reused" if isinstance(error, KeyReused) else REPLACED
            self._turn_away(live, RoundRefused(code, str(error), 0.0))
            return None
        if isinstance(answer, Claimed):
            live.fence, live.claimed, live.tip = answer.fence, True, answer.tip
            live.handle.fence = answer.fence
            if answer.replaces:
                self.replaced(answer.replaces)
            live.handle.session_id, live.handle.parent_id = answer.session_id, answer.parent_id
            live.handle.expires_in_s = answer.ttl_s
        return await self._rebuilding.told(answer, live, lost_data=self._recorder.lost_data)

    async def _generate(self, live: LiveRound, command: Generate) -> None:
        history_tokens = self._core.rounds[command.round_id].history_tokens
        self._background(partial(self._calls.touch, command.engine_id, live, history_tokens))
        await self._answering.answer(live, command)

    # ---------------------------------------------------------------- small things

    async def _tick(self) -> None:
        while True:
            due_s = self._core.next_deadline()
            wait_s = None if due_s is None else max(0.0, due_s - self._clock())
            self._deadline_changed.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._deadline_changed.wait()
            except TimeoutError:
                self.post(Tick())

    def _background(self, work: Callable[[], Coroutine[None, None, None]]) -> asyncio.Task[None] | None:
        """What no round waits for: its failure is logged, and ends nothing else."""

        async def logged() -> None:
            try:
                await work()
            except EngineError as error:
                log.info("%s", error)
            except Exception:
                log.exception("a task in the background failed by a bug")

        return self._spawn(logged())

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None] | None:
        if self._tasks is None:  # shutting down: nothing new is begun
            work.close()
            return None
        return self._tasks.create_task(work)
