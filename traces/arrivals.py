"""When sessions start: Poisson, as recorded, or all at once; and how many may live at a time. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from antiphon.traces.schema import SessionTrace, TraceError


class Start(Enum):
    POISSON = "poisson"
    RECORDED = "recorded"
    AT_ONCE = "at_once"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How sessions arrive. `max_live` holds later ones back until an earlier one has ended; None = no bound.

    Only the first round of a session arrives like this: later ones follow the end of the previous response.
    """

    start: Start = Start.AT_ONCE
    rate_per_s: float = 0.0
    """Sessions per second, for `POISSON`."""
    seed: int = 0
    max_live: int | None = None

    def __post_init__(self) -> None:
        if self.start is Start.POISSON and not self.rate_per_s > 0:
            raise ValueError(f"a session rate must be above 0 per second, not {self.rate_per_s}")
        if self.max_live is not None and self.max_live < 1:
            raise ValueError(f"at least one session must be allowed to live, not {self.max_live}")

    def describe(self) -> str:
        words = {
            Start.POISSON: f"Poisson, {self.rate_per_s:g} sessions/s, seed {self.seed}",
            Start.RECORDED: "as recorded",
            Start.AT_ONCE: "all at once",
        }[self.start]
        return words if self.max_live is None else f"{words}, at most {self.max_live} live"


def schedule(sessions: Sequence[SessionTrace], arrivals: Arrivals) -> list[tuple[float, SessionTrace]]:
    """(seconds from the beginning of the run, session), in order of time; ties stay in trace order.

    The first session starts at 0. Raises `TraceError` if recorded starts are asked for and missing.
    """
    if arrivals.start is Start.AT_ONCE:
        return [(0.0, session) for session in sessions]
    if arrivals.start is Start.POISSON:
        return _poisson(sessions, arrivals)
    starts: list[tuple[float, SessionTrace]] = []
    for session in sessions:
        if session.start_s is None:
            raise TraceError(
                f"session {session.session_id!r} has no recorded start: give a session rate instead"
            )
        starts.append((session.start_s, session))
    starts.sort(key=lambda item: item[0])
    first_s = starts[0][0] if starts else 0.0
    return [(start_s - first_s, session) for start_s, session in starts]


def _poisson(sessions: Sequence[SessionTrace], arrivals: Arrivals) -> list[tuple[float, SessionTrace]]:
    chance = random.Random(f"arrivals/{arrivals.seed}")
    starts: list[tuple[float, SessionTrace]] = []
    now_s = 0.0
    for session in sessions:
        starts.append((now_s, session))
        now_s += chance.expovariate(arrivals.rate_per_s)
    return starts
