"""What the ledger's scripts answer, as our types. Pure but for a word in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

import msgspec

from antiphon.scheduler.messages import Claimed, Holding, Totals

log = logging.getLogger(__name__)

_totals_decoder = msgspec.json.Decoder(dict[str, Totals])


class Recorded(IntEnum):
    """What became of a completion; true if it changed anything."""

    FENCED = 0
    """A newer claim has the session: it was only counted."""
    YES = 1
    REPEATED = 2
    """Another try of its call was recorded as completed before."""


class Moved(Enum):
    """What came of setting a session's home; few values, for metrics."""

    MOVED = "moved"
    FENCED = "fenced"
    """The claim that asked does not hold the session any more."""
    ENDED = "ended"
    """The round's own completion was faster: what it recorded stands."""
    OTHER_HOME = "other_home"
    """The home is another than the one to be left: nothing was overwritten."""
    UNKNOWN_SESSION = "unknown_session"


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a session, and what a claim of it would answer."""

    known: bool
    """The ledger has a record of it."""
    busy: bool
    """A live round holds it: another one at once would be a fork."""
    claimed: Claimed
    """With round id "" and fence 0. Of a fork, whose id nobody knows yet: that of its parent."""


def read_claim(round_id: str, answer: Sequence[Any]) -> Claimed:
    """Of claim.lua."""
    fence, _, session_id, parent_id, rounds, home, holdings, totals, tip, *of_session = answer
    ttl_ms, ttft_s, itl_s, expected, replaces = of_session
    return Claimed(
        round_id=round_id,
        fence=int(fence),
        session_id=session_id,
        round_number=int(rounds) + 1,
        parent_id=parent_id or None,
        home=home or None,
        holdings=_read_holdings(holdings),
        others=_summed(totals),
        tip=read_tip(tip),
        ttl_s=int(ttl_ms) / 1000,
        slo_ttft_s=float(ttft_s or 0.0),
        slo_itl_s=float(itl_s or 0.0),
        expected_rounds=int(expected or 0),
        replaces=replaces,
    )


def read_look(session_id: str, answer: Sequence[Any]) -> Look:
    """Of look.lua."""
    known, busy, parent_id, rounds, home, holdings, totals, tip, ttft_s, itl_s, expected = answer
    claimed = Claimed(
        round_id="",
        fence=0,
        session_id=session_id,
        round_number=1 if busy else int(rounds) + 1,
        parent_id=session_id if busy else parent_id or None,
        home=home or None,
        holdings=_read_holdings(holdings),
        others=_summed(totals),
        tip=read_tip(tip),
        slo_ttft_s=float(ttft_s or 0.0),
        slo_itl_s=float(itl_s or 0.0),
        expected_rounds=0 if busy else int(expected or 0),
    )
    return Look(bool(known), bool(busy), claimed)


def _read_holdings(flat: Sequence[str]) -> tuple[Holding, ...]:
    return tuple(_holding(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))


def tip_text(page_hash: bytes, holding: Holding) -> str:
    """Where a session's KV ends and who holds it up to there, as its record has it."""
    return f"{page_hash.hex()}|{holding.tokens}|{holding.incarnation}|{holding.engine_id}"


def read_tip(text: str) -> tuple[bytes, Holding] | None:
    if not text:
        return None
    page_hash, tokens, incarnation, engine_id = text.split("|", 3)
    return bytes.fromhex(page_hash), Holding(engine_id, incarnation, int(tokens))


def _holding(engine_id: str, value: str) -> Holding:
    incarnation, _, tokens = value.rpartition("|")
    return Holding(engine_id, incarnation, int(tokens))


def _summed(encoded: Sequence[str]) -> dict[str, Totals]:
    """The other replicas' totals by engine; one that cannot be read is left out."""
    total: dict[str, Totals] = {}
    for text in encoded:
        try:
            replica = _totals_decoder.decode(text)
        except msgspec.MsgspecError as error:
            log.warning("the totals of a replica cannot be read and are ignored: %s", error)
            continue
        for engine_id, theirs in replica.items():
            ours = total.get(engine_id, Totals())
            total[engine_id] = Totals(
                ours.prefill_s + theirs.prefill_s,
                ours.prefill_rounds + theirs.prefill_rounds,
                ours.decode_rounds + theirs.decode_rounds,
                ours.context_tokens + theirs.context_tokens,
            )
    return total
