"""The KV of one session that rests is copied from its home, which is to be stopped, to its next one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from antiphon.engines.base import Engine, EngineError
from antiphon.scheduler.drain_store import AtHome
from antiphon.scheduler.ledger_answers import read_tip, tip_text
from antiphon.scheduler.messages import Holding
from antiphon.scheduler.model_fleet import ModelFleet


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """Seconds and counts."""

    poll_s: float = 0.5
    pause_factor: float = 5.0
    """After a look at all sessions that took long, the pause is so many times as long."""
    lead_ttl_s: float = 5.0
    """A replica that moves sessions and dies is followed by another after this."""
    directory_s: float = 2.0
    transfer_floor_s: float = 2.0
    transfer_slack: float = 4.0
    """A copy may take so many times its prediction."""
    at_once: int = 2
    """Copies under way: rounds use the same links."""
    tries: int = 3
    """Of a copy that does not come whole, before the rest is left to be computed again."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What was brought where. `pages` of `wanted` are there."""

    to_home: str = ""
    incarnation: str = ""
    hashes: tuple[bytes, ...] = ()
    page_tokens: int = 1
    wanted: int = 0
    pulled_bytes: int = 0
    reason: str = ""
    elsewhere: str = ""
    """The session's tip, if a third engine has it: it stays there."""

    @property
    def whole(self) -> bool:
        return len(self.hashes) == self.wanted

    @property
    def tip(self) -> str:
        """As the session's record has it when the copy is what counts."""
        if not self.hashes:
            return self.elsewhere
        tokens = len(self.hashes) * self.page_tokens
        return tip_text(self.hashes[-1], Holding(self.to_home, self.incarnation, tokens))


async def bring(
    session: AtHome,
    engine_id: str,
    incarnation: str,
    target: str,
    *,
    fleet: ModelFleet,
    engines: Mapping[str, Engine],
    times: DrainTimes,
) -> Copy:
    """Bring the session's KV to the target. What fails is told, not raised."""
    nothing = Copy(target, fleet.incarnation(target))
    tip = read_tip(session.tip)
    if tip is None:
        return nothing
    page_hash, held = tip
    if (held.engine_id, held.incarnation) != (engine_id, incarnation):  # what is to be stopped has none of it
        return replace(nothing, elsewhere=session.tip if held.engine_id != engine_id else "")
    source, puller = engines.get(engine_id), engines.get(target)
    if source is None or source.hello is None or puller is None or puller.hello is None:
        return replace(nothing, wanted=1, reason=f"{engine_id} or {target} is not up")
    page_tokens = puller.hello.page_size_tokens
    wanted = held.tokens // page_tokens
    nothing = replace(nothing, page_tokens=page_tokens, wanted=wanted)
    predicted_s = fleet.core.books.transfer_s(target, engine_id, held.tokens)
    deadline_s = max(times.transfer_floor_s, times.transfer_slack * predicted_s)
    try:
        parent, hashes = await source.chain(page_hash, deadline_s=times.directory_s)
        if len(hashes) != wanted:  # its end was evicted, and with it the way to the rest
            return replace(nothing, reason=f"{engine_id} has {len(hashes)} of {wanted} pages")
        async with asyncio.timeout(deadline_s + times.directory_s):
            came = await puller.prefetch(
                source.record.kv_addresses, incarnation, parent, hashes, deadline_s=deadline_s
            )
    except (EngineError, TimeoutError) as error:
        return replace(nothing, reason=str(error) or f"no answer within {deadline_s:g} s")
    return replace(nothing, hashes=hashes[: came.pages], pulled_bytes=came.pulled_bytes, reason=came.reason)
