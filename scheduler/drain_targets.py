"""Where a session that rests goes when its home is to be stopped: the least used engine that can hold it."""

from __future__ import annotations

from antiphon.policies.leaving import new_home
from antiphon.scheduler.core import Scheduler


def choose_target(core: Scheduler, engine_id: str, context_tokens: int, now: float) -> str | None:
    """Another engine of the same model; None if none can be counted on and hold so much.

    Sessions that were moved count where they are now: the next one sees them.
    """
    core.standings.refresh(now)
    engines, unusable = core.books.cluster(now).engines, core.standings.unusable | {engine_id}
    home = engines.get(engine_id)
    if home is None:
        return None
    usable = [e for name, e in engines.items() if name not in unusable and context_tokens < e.pool_tokens]
    chosen = new_home(usable, home.pool)
    return chosen.engine_id if chosen is not None else None
