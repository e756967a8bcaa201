"""For tests of the ledger: receipts, and a fleet of one's own on the shared server."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.messages import Claimed
from antiphon.scheduler.outcomes import Outcome, Receipt

TTL_S = 60.0


@asynccontextmanager
async def ledger_at(url: str, fleet: str | None = None, **options: float) -> AsyncIterator[Ledger]:
    """A ledger for a fleet that nobody else uses."""
    ledger = Ledger(url, fleet=fleet or secrets.token_hex(6), **{"deadline_s": 10.0, **options})  # type: ignore[arg-type]
    try:
        yield ledger
    finally:
        await ledger.close()


async def claim(
    ledger: Ledger, replica: str, round_id: str, session_id: str = "s", tenant: str = "t", **more: object
) -> Claimed:
    arguments = {"candidates": (), "ttl_s": TTL_S, **more}
    return await ledger.claim(
        replica=replica,
        round_id=round_id,
        session_id=session_id,
        tenant=tenant,
        **arguments,  # type: ignore[arg-type]
    )


async def complete(ledger: Ledger, replica: str, claimed: Claimed, tenant: str = "t", **more: object) -> bool:
    """Complete what was claimed; `more` are fields of the receipt, holdings, fence or call."""
    holdings = more.pop("holdings", ())
    fence = more.pop("fence", claimed.fence)
    call = more.pop("call", None)
    recorded = await ledger.complete(
        replica=replica,
        fence=fence,  # type: ignore[arg-type]
        session_id=claimed.session_id,
        tenant=tenant,
        receipt=receipt(claimed.round_id, claimed.session_id, **more),
        holdings=holdings,  # type: ignore[arg-type]
        ttl_s=TTL_S,
        call=call,  # type: ignore[arg-type]
    )
    return bool(recorded)


def receipt(round_id: str, session_id: str, **more: object) -> Receipt:
    fields: dict[str, object] = {
        "round_id": round_id, "session_id": session_id, "round_number": 1, "outcome": Outcome.COMPLETED,
        "arm": None, "home": "d0", "prefill_engine": None, "reason": "test", "tries": (), "degraded": False,
        "prompt_tokens": 100, "history_tokens": 0, "completion_tokens": 10, "cached_tokens": 40,
        "bytes_decode_to_prefill": 0, "bytes_prefill_to_decode": 0, "pulled_tokens": 0,
        "predicted_ttft_s": 0.1, "ttft_s": 0.1, "queue_s": 0.0, "pull_s": 0.0, "prefill_s": 0.0,
        "push_s": 0.0, "itl_s": None,
    }  # fmt: skip
    return Receipt(**{**fields, **more})  # type: ignore[arg-type]


def page(number: int) -> bytes:
    """A page hash."""
    return number.to_bytes(32, "big")


async def until(condition: Callable[[], Awaitable[bool]], deadline_s: float = 20.0) -> None:
    """Poll until it holds; AssertionError at the deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while not await condition():
        assert loop.time() < deadline, f"did not come true in {deadline_s:g} s"
        await asyncio.sleep(0.01)
