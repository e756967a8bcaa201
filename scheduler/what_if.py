"""What the core would decide for a round, without deciding it: nothing is written anywhere.

What a claim tells (the session's home, who holds what, the other replicas' load) goes into the books when a
round is placed. Here it is laid over the views instead.
"""

from __future__ import annotations

from types import MappingProxyType

from msgspec.structs import replace

from antiphon.policies.base import ClusterView, EngineView, Placement, Policy, Reject, RoundView
from antiphon.scheduler.admission import why_not_admitted
from antiphon.scheduler.books import Books, claimed_holdings
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.fleet import NO_TOTALS, EngineBook
from antiphon.scheduler.likely_home import likely_home
from antiphon.scheduler.messages import Claimed, RoundArrived, Totals
from antiphon.scheduler.standing import Standings, decide
from antiphon.scheduler.states import Round, new_round, with_session


def explain(
    policy: Policy,
    books: Books,
    standings: Standings,
    config: CoreConfig,
    arrived: RoundArrived,
    claimed: Claimed | None,
    now: float,
) -> Placement | Reject:
    """What is decided of this round now; `claimed` None = as without a ledger."""
    standings.refresh(now)
    round = new_round(arrived, now, now)
    if claimed is None:
        session = books.sessions.get(round.session_key)
        round.round_number = session.round_number + 1 if session else 1
        guess_home(books, standings, round, now)
        view, cluster = books.view(round, now), books.cluster(now)
        return _admitted(books, config, round, *decide(policy, standings, view, cluster, now, retry=True))
    with_session(round, claimed)
    held = _held(books, round, claimed)
    home = books.claimed_home(round, claimed, held)
    view = _round_view(books, round, home, held, now)
    cluster = _cluster(books, round, claimed, home, now)
    return _admitted(books, config, round, *decide(policy, standings, view, cluster, now, retry=True))


def _admitted(
    books: Books, config: CoreConfig, round: Round, answer: Placement | Reject, view: RoundView
) -> Placement | Reject:
    """The answer, unless the round would be turned away with it."""
    if isinstance(answer, Reject):
        return answer
    refusal = why_not_admitted(books, config, round, answer, view)
    return answer if refusal is None else Reject(refusal.reason, refusal.retry_after_s)


def guess_home(books: Books, standings: Standings, round: Round, now: float) -> list[str]:
    """Give a round that no claim tells of a likely home, if its session has none; says why."""
    if books.home(round) is not None:
        return []
    view, silent = books.view(round, now), standings.silent
    held = {e: tokens for e, tokens in view.history_tokens.items() if e not in silent}
    view = replace(view, history_tokens=held, excluded=view.excluded | standings.unusable)
    found = likely_home(round.session_key, view, books.cluster(now))
    if found is None:
        return []
    round.likely_home, why = found
    return [why]


def _held(books: Books, round: Round, claimed: Claimed) -> dict[str, int]:
    """H(e), with what the claim tells."""
    held, size = books.held(round), round.arrived.page_size_tokens
    longest = len(round.arrived.hashes)
    for holding in claimed_holdings(round, claimed):
        book = books.fleet.books.get(holding.engine_id)
        tokens = min(holding.tokens // size, longest) * size
        ours = book is not None and book.up.incarnation == holding.incarnation
        if ours and tokens > held.get(holding.engine_id, 0):
            held[holding.engine_id] = tokens
    return held


def _round_view(books: Books, round: Round, home: str | None, held: dict[str, int], now: float) -> RoundView:
    view = books.view(round, now, held)
    if home is None or home == view.home:
        return view
    return replace(view, home=home if home in books.fleet.books else None)


def _cluster(books: Books, round: Round, claimed: Claimed, home: str | None, now: float) -> ClusterView:
    """The engines with the other replicas' load as claimed, and the session no longer where it was."""
    session = books.sessions.get(round.session_key)
    moved = session is not None and home is not None and home != session.home
    cluster = books.cluster(now)
    changed: dict[str, EngineView] = {}
    for engine_id, book in books.fleet.books.items():
        others = claimed.others.get(engine_id, NO_TOTALS)
        if others != book.others:
            changed[engine_id] = book.view(now, others)
        if moved and session is not None and engine_id == session.home:
            view = changed.get(engine_id, cluster.engines[engine_id])
            changed[engine_id] = _without(view, book, others, book.session_tokens.get(round.session_key))
    return ClusterView(MappingProxyType({**cluster.engines, **changed})) if changed else cluster


def _without(view: EngineView, book: EngineBook, others: Totals, tokens: int | None) -> EngineView:
    """The view without a session of `tokens`; None: it is not counted there."""
    if tokens is None:
        return view
    used_tokens = max(book.idle_tokens - tokens + others.context_tokens, book.reported_tokens)
    return replace(view, used_tokens=min(used_tokens, view.pool_tokens), sessions=view.sessions - 1)
