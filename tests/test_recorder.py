"""Ends of rounds reach the ledger before their sessions' next rounds do, outages or not."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.messages import Claimed, ClaimLost
from antiphon.scheduler.recorder import Recorder, RecorderConfig
from antiphon.scheduler.rounds import RoundRequest
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.ledger_helpers import ledger_at, receipt, until


def request(round_id: str) -> RoundRequest:
    return RoundRequest(round_id, "s", "t", "/v1/x", Prompt((1,)), {}, 1, 1.0, 1.0)


async def first_round(recorder: Recorder, ledger: Ledger) -> Claimed:
    await ledger.heartbeat("A", 60.0)
    claimed = await recorder.claim(request("r1"), ())
    assert isinstance(claimed, Claimed)
    return claimed


async def test_a_sequential_session_does_not_fork_after_an_outage(tmp_path: Path) -> None:
    """Its last round's lease is in a ledger that is back before the completion is: the claim waits for it."""
    with EmbeddedValkey.start(tmp_path) as server:
        async with ledger_at(server.url, deadline_s=0.3) as ledger:
            recorder = Recorder(ledger, "A", RecorderConfig(retry_s=0.4))
            claimed = await first_round(recorder, ledger)
            os.kill(server.pointer.pid, signal.SIGSTOP)
            try:
                recording = asyncio.create_task(
                    recorder.record(request("r1"), receipt("r1", "s"), (), claimed.fence)
                )
                await until(lambda: away(ledger))
                assert isinstance(await recorder.claim(request("r2"), ()), ClaimLost)
            finally:
                os.kill(server.pointer.pid, signal.SIGCONT)
            await ledger.check()  # it is back, as some other call has found; the completion is still to come
            third = await recorder.claim(request("r3"), ())
            assert isinstance(third, Claimed)
            assert (third.session_id, third.parent_id, third.round_number) == ("s", None, 2)
            await recording


async def test_a_claim_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A completion that cannot be recorded holds the next round back for a moment only."""
    with EmbeddedValkey.start(tmp_path) as server:
        async with ledger_at(server.url) as ledger:
            recorder = Recorder(ledger, "A", RecorderConfig(retry_s=60.0, pending_s=0.05))
            claimed = await first_round(recorder, ledger)
            ledger.connection.deadline_s = 1e-9
            recording = asyncio.create_task(
                recorder.record(request("r1"), receipt("r1", "s"), (), claimed.fence)
            )
            await until(lambda: away(ledger))
            ledger.connection.deadline_s = 10.0
            await ledger.check()
            second = await recorder.claim(request("r2"), ())
            assert isinstance(second, Claimed) and second.parent_id == "s"
            recording.cancel()
            await asyncio.wait([recording])
            assert not recorder._pending


async def away(ledger: Ledger) -> bool:
    return ledger.connection.failed_within(60.0)
