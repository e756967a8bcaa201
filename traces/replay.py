"""`antiphon replay`: sessions arrive by a schedule, rounds follow the session's own answers.

A session's first round is sent when its turn comes (and, with a bound on live sessions, when one has ended);
each later round at the end of the last response plus the recorded gap. A round that fails is tried again
`retries` times where that makes sense, then its session ends and its other rounds count as not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
from rich.console import Console

from antiphon.traces.answers import Answer, RoundFailed
from antiphon.traces.arrivals import schedule
from antiphon.traces.display import ReplayDisplay, result_table
from antiphon.traces.gateway_client import GatewayClient, ReplayError
from antiphon.traces.plan import (
    Plan,
    ReplayOptions,
    choose_arrivals,
    choose_model,
    make_plan,
    offered_load,
    wire_session_id,
)  # fmt: skip
from antiphon.traces.prompts import prompt_ids
from antiphon.traces.results import (
    RoundRecord,
    RunResult,
    VerifyRecord,
    add_receipts,
    summarise,
    write_result,
    write_rounds,
)  # fmt: skip
from antiphon.traces.schema import SessionTrace, TraceError

__all__ = ["OnPlan", "OnRound", "ReplayError", "ReplayOptions", "replay", "run_replay"]

RECEIPTS_DEADLINE_S = 5.0
"""For the last receipts to show up."""
RECEIPTS_POLL_S = 0.1


OnRound = Callable[[RoundRecord], None]
OnPlan = Callable[[Plan], None]


async def replay(
    options: ReplayOptions,
    on_round: OnRound,
    on_plan: OnPlan | None = None,
    stop: asyncio.Event | None = None,
) -> RunResult:
    """Run the trace against the gateway; the result has every round's record.

    `on_round` is called once per round, when it has ended either way. When `stop` is set, nothing more is
    sent, rounds in flight are given up and the result says `interrupted`. Raises `ReplayError` or
    `TraceError` if it cannot start.
    """
    arrivals = choose_arrivals(options)
    async with GatewayClient(options.url, options.timeout_s) as client:
        plan = make_plan(options, arrivals, choose_model(await client.models(), options))
        starts = schedule(plan.sessions, arrivals)
        if on_plan is not None:
            on_plan(plan)
        policy = await client.policy()
        with _verify_log(options.verify_log) as log:
            run = _Run(options, plan, client, on_round, log)
            interrupted = await _until_stopped(run.drive(starts, arrivals.max_live), stop)
        wall_s = time.perf_counter() - run.began_at
        await _fetch_receipts(client, run.records)
    return summarise(
        trace=plan.trace,
        conditions=plan.conditions,
        policy=policy,
        seed=options.seed,
        slo={"ttft_s": options.slo_ttft_s, "itl_s": options.slo_itl_s},
        session_rounds={session.session_id: len(session.rounds) for session in plan.sessions},
        records=run.records,
        wall_s=wall_s,
        interrupted=interrupted,
        load=offered_load(arrivals),
    )


def run_replay(options: ReplayOptions, console: Console | None = None) -> int:
    """The command: progress while it runs, result file and table at the end. Returns the exit code.

    0 = every round completed, 1 = some did not, 2 = it could not start, 130 = interrupted.
    """
    console = console or Console()
    try:
        with ReplayDisplay(console) as display:
            result = asyncio.run(_interruptible(options, display))
        if options.rounds_path is not None:
            write_rounds(result.rounds, options.rounds_path)
        if options.json_path is not None:
            write_result(result, options.json_path)
    except (ReplayError, TraceError, OSError) as error:
        console.print(f"antiphon replay: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(result_table(result))
    if options.json_path is not None:
        console.print(f"result: {options.json_path}", markup=False, highlight=False)
    if result.interrupted:
        return 130
    return 0 if result.rounds_completed == result.rounds_total else 1


async def _interruptible(options: ReplayOptions, display: ReplayDisplay) -> RunResult:
    """The first interrupt ends the sending and keeps the figures; a second one is Python's own."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await replay(options, display.on_round, display.on_plan, stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _verify_log(path: Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as log:
        yield log


# ---------------------------------------------------------------- the run


async def _until_stopped(work: Coroutine[object, object, None], stop: asyncio.Event | None) -> bool:
    """Run `work` to its end (False) or until `stop` is set (True)."""
    driving = asyncio.ensure_future(work)
    tasks: set[asyncio.Future[Any]] = {driving}
    if stop is not None:
        tasks.add(asyncio.ensure_future(stop.wait()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if driving.cancelled():
        return True
    driving.result()
    return False


@dataclass(slots=True)
class _Run:
    """One run's state; every session task appends to `records`."""

    options: ReplayOptions
    plan: Plan
    client: GatewayClient
    on_round: OnRound
    log: IO[bytes] | None
    records: list[RoundRecord] = field(default_factory=list)
    began_at: float = field(default_factory=time.perf_counter)

    async def drive(self, starts: list[tuple[float, SessionTrace]], max_live: int | None) -> None:
        """Start every session in its time; returns when the last has ended.

        A round's failure is a record; anything else (a full disk, a fault of ours) ends the run as it is.
        """
        free = asyncio.Semaphore(max_live if max_live is not None else len(starts))
        try:
            async with asyncio.TaskGroup() as group:
                for start_s, session in starts:
                    await asyncio.sleep(self.began_at + start_s - time.perf_counter())
                    await free.acquire()
                    group.create_task(self._session(session)).add_done_callback(lambda _: free.release())
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from faults

    async def _session(self, session: SessionTrace) -> None:
        said: list[int] = []
        for index, turn in enumerate(session.rounds):
            ready_at = time.perf_counter() + (turn.gap_s if index else 0.0)
            prompt = prompt_ids(session, index, said, self.options.vocabulary, self.options.seed)
            await asyncio.sleep(ready_at - time.perf_counter())
            output = await self._round(session, index, prompt)
            if output is None:
                return
            said = prompt + output

    async def _round(self, session: SessionTrace, index: int, prompt: list[int]) -> list[int] | None:
        """Send one round, again if it fails; the output ids, or None if it failed for good."""
        turn = session.rounds[index]
        record = RoundRecord(
            session=session.session_id,
            round=index + 1,
            prompt_tokens=turn.prompt_tokens,
            kept_tokens=turn.kept_tokens,
            tool=turn.tool,
            gap_s=turn.gap_s if index else 0.0,
            slo_ttft_s=session.slo_ttft_s if self.options.slo_ttft_s is None else self.options.slo_ttft_s,
            slo_itl_s=session.slo_itl_s if self.options.slo_itl_s is None else self.options.slo_itl_s,
        )
        try:
            answer = await self._tries(record, session.session_id, prompt, turn.output_tokens)
        except asyncio.CancelledError:
            record.message = "given up: the replay was stopped"
            raise
        finally:
            self.records.append(record)
        if answer is not None:
            _fill(record, answer)
            self._write_log(record, prompt, answer)
        self.on_round(record)
        return answer.output_ids if answer is not None else None

    async def _tries(
        self, record: RoundRecord, session_id: str, prompt: list[int], output_tokens: int
    ) -> Answer | None:
        model, wire_id = self.plan.conditions.model, wire_session_id(self.plan.conditions.run_id, session_id)
        for left in range(self.options.retries, -1, -1):
            record.tries += 1
            record.sent_s = time.perf_counter() - self.began_at
            try:
                return await self.client.complete(model, wire_id, prompt, output_tokens)
            except RoundFailed as failure:
                record.http_status, record.message = failure.status, failure.message
                record.request_id, record.arm = failure.request_id, failure.arm
                if not left or not failure.retryable:
                    return None
                await asyncio.sleep(failure.retry_after_s)
        return None

    def _write_log(self, record: RoundRecord, prompt: list[int], answer: Answer) -> None:
        if self.log is not None:
            line = VerifyRecord(
                session=record.session,
                round=record.round,
                kept_tokens=record.kept_tokens,
                prompt_ids=prompt,
                output_ids=answer.output_ids,
                arm=record.arm,
                round_id=record.round_id,
            )
            self.log.write(msgspec.json.encode(line) + b"\n")


def _fill(record: RoundRecord, answer: Answer) -> None:
    record.status, record.http_status = "completed", 200
    record.request_id, record.round_id = answer.request_id, answer.round_id
    record.session_round, record.arm = answer.session_round, answer.arm
    record.ttft_s, record.itl_s, record.e2e_s = answer.ttft_s, answer.itl_s, answer.e2e_s
    record.output_tokens, record.cached_tokens = len(answer.output_ids), answer.cached_tokens


async def _fetch_receipts(client: GatewayClient, records: list[RoundRecord]) -> None:
    """Join what the gateway wrote down; a gateway that keeps no receipts leaves them missing, and counted."""
    limit = 100 + 2 * sum(record.tries for record in records)
    deadline = time.perf_counter() + RECEIPTS_DEADLINE_S
    while True:
        try:
            add_receipts(records, await client.receipts(limit))
        except ReplayError:
            return
        complete = all(record.receipt for record in records if record.completed)
        if complete or time.perf_counter() > deadline:
            return
        await asyncio.sleep(RECEIPTS_POLL_S)
