"""The shared default rule for a session's home, and which engines a round can use at all.

A home holds the whole round: prompt and output must fit its KV pool. An engine that failed this round already
(`RoundView.excluded`) is never used again for it: when nothing else is left, the round is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable

from antiphon.policies.base import (
    ClusterView,
    EngineView,
    Reject,
    RoundView,
    can_be_home,
    possible_homes,
    use_share,
)

__all__ = ["RETRY_AFTER_S", "can_be_home", "choose_home", "least_used", "no_home", "session_home"]

RETRY_AFTER_S = 1.0
"""What a client is told when no engine can take its round. Antiphon's choice."""


def least_used(engines: Iterable[EngineView]) -> EngineView | None:
    """The default rule: least share of KV in use, then fewest sessions, then engine id."""
    return min(engines, key=_use, default=None)


def _use(engine: EngineView) -> tuple[float, int, str]:
    return use_share(engine), engine.sessions, engine.engine_id


def session_home(round: RoundView, cluster: ClusterView) -> EngineView | None:
    """The home that the session already has, if it can take this round."""
    engine = cluster.engines.get(round.home) if round.home is not None else None
    return engine if engine is not None and can_be_home(engine, round) else None


def choose_home(round: RoundView, cluster: ClusterView) -> EngineView | Reject:
    """The session's home; else the least used engine of the decode pool; else of the prefill pool."""
    home = session_home(round, cluster)
    if home is not None:
        return home
    home = least_used(possible_homes(round, cluster))
    return home if home is not None else no_home(round, cluster)


def no_home(round: RoundView, cluster: ClusterView) -> Reject:
    """Why no engine can be this round's home."""
    alive = len(cluster.engines)
    if not alive:
        return Reject("no engine is alive", RETRY_AFTER_S)
    left = [engine for engine in cluster.engines.values() if engine.engine_id not in round.excluded]
    if not left:
        return Reject(f"all {alive} engines alive failed this round already", RETRY_AFTER_S)
    largest = max(engine.pool_tokens for engine in left)
    need = round.prompt_tokens + round.max_output_tokens
    return Reject(
        f"{need} tokens of prompt and output fit no KV pool: the largest of {len(left)} holds {largest}",
        RETRY_AFTER_S,
    )
