"""Re-planning the pools while the load drifts: the controller of a fleet of one model. No clock, no I/O.

It is shown the fleet every `period_s` and answers with one flip at a time: one that the rule wants in so many
looks in a row, after the last flip's cool-down, while no other is under way. Who drives it carries it out.

An engine's life between pools (a test compares with docs/operations.md):

    prefill --chosen--> decode                 at once: whatever is queued there is done there
    decode  --chosen--> leaving                nothing new is placed there, its sessions are moved
    leaving --emptied, waited--> prefill       after `drain_limit_s` whoever is still at home there stays so
    leaving --gone, taken_back--> decode       the engine died, or somebody drains it, or it cannot be done
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType

from antiphon.policies.base import Pool
from antiphon.policies.pools import (
    Flip,
    Peaks,
    PoolEngine,
    PoolShares,
    WindowRounds,
    arrow_flip,
    balanced_flip,
    shares,
)
from antiphon.scheduler.demand import Counts
from antiphon.scheduler.pool_looks import DemandWindow
from antiphon.scheduler.repool_config import RepoolConfig


class Place(Enum):
    """Where an engine is between the pools."""

    PREFILL = "prefill"
    DECODE = "decode"
    LEAVING = "leaving"
    """Of the decode pool still; it is being emptied."""


class Step(Enum):
    """What happens to it."""

    CHOSEN = "chosen"
    EMPTIED = "emptied"
    WAITED = "waited"
    GONE = "gone"
    TAKEN_BACK = "taken_back"


class IllegalStep(Exception):
    """A step that cannot follow: a bug in who carries flips out. Nothing was changed."""


TRANSITIONS: Mapping[tuple[Place, Step], Place] = MappingProxyType(
    {
        (Place.PREFILL, Step.CHOSEN): Place.DECODE,
        (Place.DECODE, Step.CHOSEN): Place.LEAVING,
        (Place.LEAVING, Step.EMPTIED): Place.PREFILL,
        (Place.LEAVING, Step.WAITED): Place.PREFILL,
        (Place.LEAVING, Step.GONE): Place.DECODE,
        (Place.LEAVING, Step.TAKEN_BACK): Place.DECODE,
    }
)

RESULTS: Mapping[Step, str] = MappingProxyType(
    {
        Step.CHOSEN: "done",
        Step.EMPTIED: "done",
        Step.WAITED: "in_part",
        Step.GONE: "given_up",
        Step.TAKEN_BACK: "given_up",
    }
)
"""How a flip ended, by the step that ended it."""


def after(place: Place, step: Step) -> Place:
    """Where the engine is then; raises `IllegalStep`."""
    try:
        return TRANSITIONS[place, step]
    except KeyError:
        raise IllegalStep(f"{step.value} cannot follow {place.value}") from None


class Repooler:
    """Chooses flips. One per model; in a fleet of several replicas, that of the leading one counts."""

    def __init__(self, config: RepoolConfig) -> None:
        self._config = config
        self._window = DemandWindow(config.window_s)
        self._direction = ""
        self._wanted = 0
        """Looks in a row that wanted this direction."""
        self._rests_until_s = float("-inf")
        self._works: deque[tuple[float, float, float]] = deque()
        """When looked, and how many engines' work either pool had then."""
        self.shares: PoolShares | None = None
        """As of the last look; None = nobody knows yet."""

    def counted(self, now: float, counts: Mapping[str, Counts]) -> tuple[Counts, float]:
        """What each replica has counted; answers the window's work and its seconds."""
        self._window.add(now, counts)
        return self._window.total()

    def look(
        self,
        engines: Sequence[PoolEngine],
        rounds: WindowRounds,
        now: float,
        *,
        known: bool = True,
        busy: bool = False,
    ) -> Flip | None:
        """The flip that is to begin now.

        `known`: enough of the window was seen to speak of rates. `busy`: a flip is under way already.
        """
        rule, wanted = self._config.pool_rule, None
        if self._config.rule == "arrow":
            wanted = arrow_flip(engines, rule, rounds)
        elif known:
            wanted = balanced_flip(engines, rule, rounds, self._peaks(engines, now))
        self.shares = shares(engines) if known else None
        direction = wanted.direction if wanted is not None else ""
        self._wanted = self._wanted + 1 if direction and direction == self._direction else bool(direction)
        self._direction = direction
        ready = self._wanted >= self._config.sustain and now >= self._rests_until_s
        return wanted if ready and not busy else None

    def _peaks(self, engines: Sequence[PoolEngine], now: float) -> Peaks:
        """Work is told in engines of the pool: what a share is of."""
        found, works = shares(engines), self._works
        prefill = found.prefill * sum(engine.pool is Pool.PREFILL for engine in engines)
        decode = found.decode * sum(engine.pool is Pool.DECODE for engine in engines)
        works.append((now, prefill, decode))
        while works[0][0] < now - self._config.memory_s:
            works.popleft()
        most_prefill, most_decode = max(w[1] for w in works), max(w[2] for w in works)
        return Peaks(
            most_prefill / prefill if prefill > 0 else 1.0, most_decode / decode if decode > 0 else 1.0
        )

    def ended(self, now: float) -> None:
        """A flip is over, or given up: the cool-down begins, and the window anew."""
        self._rests_until_s = now + self._config.cool_down_s
        self._direction, self._wanted = "", 0
        self._window.clear()
