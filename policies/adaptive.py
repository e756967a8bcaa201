"""`adaptive`: the default. All four arms and the home, by the SLOs that each choice is expected to lose.

Of every candidate (home, who prefills, where history is pulled from) `forecast.py` predicts the SLOs that it
loses: its own, those of rounds that decode where it is prefilled, those of rounds to come there. Taken
is what loses the fewest; where that makes no difference, what costs the least work. That is one sum, in SLOs:
misses + small weights times work, links, wait, ITL and KV of the home, each as a share of a target or pool.

    the session has a home that loses nothing (`stay`)   local, without looking any further
    else                                                 all arms with this home, and moves to others
    the session has none                                 the best of the shortlisted homes; all arms with the
                                                         two best, if even the best loses something

Pools are ignored: any engine may be a home, any may prefill for another. The ITL of others is a guard, not a
cost: a decode that stays within its target is stalled for free. After a placement the home has all of the
session's KV, so what it does to the next rounds is the home's own load, and `move` is how that is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter

from msgspec import Struct

from antiphon.policies.base import Arm, Candidate, ClusterView, EngineView, Placement, Reject, RoundView
from antiphon.policies.forecast import Forecast
from antiphon.policies.home import can_be_home, no_home, session_home
from antiphon.policies.shortlists import Shortlists


@dataclass(frozen=True, slots=True)
class AdaptiveParameters:
    """All values are Antiphon's; weights are SLOs. docs/policies.md says how they were found."""

    pull: bool = True
    """History may be pulled."""
    move: bool = True
    """The home may change."""
    guard: bool = True
    """The ITL targets of others count."""
    decode_tax: float = 0.0
    """For each second of stall of each decode, whether it loses its target or not."""
    spread: float = 0.15
    """How uncertain a predicted TTFT is, as a share of the target."""
    itl_spread: float = 0.05
    """The same of a predicted ITL."""
    delay_weight: float = 3.0
    """Of rounds that come while it is prefilled: a delay is handed on to those who come after them."""
    evict_weight: float = 2.0
    """Of sessions that lose their history for the room that this one's copy takes."""
    stay: float = 0.01
    """A home that is expected to lose no more than this is not questioned."""
    move_cost: float = 0.1
    """Of a change of the home, on top of its transfer."""
    work_weight: float = 0.05
    """For one TTFT target's worth of prefill."""
    link_weight: float = 0.05
    """For one TTFT target's worth of transfers."""
    wait_weight: float = 0.02
    """For a TTFT as long as its target."""
    itl_weight: float = 0.05
    """For an ITL as long as its target."""
    share_weight: float = 0.05
    """For a home whose page store is full of KV that will be asked for."""
    shortlist: int = 4
    """So many engines of each pool by queue, by history, and of homes by KV in use are looked at."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least = 1 if one.name == "shortlist" else 0
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{one.name} must be a number of at least {least}, got {value}")
        if not (self.spread > 0 and self.itl_spread > 0):
            raise ValueError("spread and itl_spread must be above 0")


class _Choice(Struct, frozen=True, gc=False):
    candidate: Candidate
    source: str | None
    score: float


@dataclass(frozen=True, slots=True)
class Adaptive:
    parameters: AdaptiveParameters = field(default_factory=AdaptiveParameters)

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        p = self.parameters
        look = Forecast(round, p.spread, p.itl_spread, p.delay_weight, p.evict_weight, p.guard, p.decode_tax)
        kept = session_home(round, cluster)
        if kept is not None:
            here = look.at_home(kept)
            if here.misses is not None and here.misses <= p.stay:
                reason = f"adaptive: no SLO is expected to be lost on the session's home {kept.engine_id}"
                return Placement(Arm.LOCAL, kept.engine_id, kept.engine_id, reason, here, (here,))
            near = Shortlists(round, cluster, p.shortlist)
            choices = [self._choice(look, here, kept), *self._other_arms(look, kept, near)]
            if p.move:
                choices += self._moves(look, kept, near)
        else:
            choices = self._first_homes(look, cluster)
            if not choices:
                return no_home(round, cluster)
        return _placement(round, choices, kept)

    # ---------------------------------------------------------------- candidates

    def _first_homes(self, look: Forecast, cluster: ClusterView) -> list[_Choice]:
        """Shortlisted homes for a session without one; other arms if the best one loses something."""
        near = Shortlists(look.round, cluster, self.parameters.shortlist)
        source = _best_holder(look.round, cluster)
        choices = []
        for home in near.homes(lambda engine: can_be_home(engine, look.round)):
            choices.append(self._choice(look, look.at_home(home), home))
            if self.parameters.pull and _can_pull(look.round, source, home):
                choices.append(self._choice(look, look.at_home(home, source), home, source))
        choices.sort(key=_rank)
        if choices and _misses(choices[0]) > self.parameters.stay:
            best = dict.fromkeys(choice.candidate.home for choice in choices)
            for name in list(best)[:2]:
                choices += self._other_arms(look, cluster.engines[name], near, source)
        return choices

    def _other_arms(
        self, look: Forecast, home: EngineView, near: Shortlists, source: EngineView | None = None
    ) -> Iterator[_Choice]:
        """Prefilled on another engine. `source`: who has more of the prompt than the home, if anybody."""
        round = look.round
        if not home.can_transfer:
            return
        if source is None or round.held(source.engine_id) <= round.held(home.engine_id):
            source = home

        def able(engine: EngineView) -> bool:
            return (
                engine is not home
                and engine.can_transfer
                and round.prompt_tokens <= engine.pool_tokens
                and engine.engine_id not in round.excluded
            )

        last_s = look.last_page_s(home)
        for engine in near.prefillers(able):
            yield self._choice(look, look.elsewhere(engine, home), home, last_s=last_s)
            if self.parameters.pull and _can_pull(round, source, engine):
                yield self._choice(look, look.elsewhere(engine, home, source), home, source, last_s)

    def _moves(self, look: Forecast, kept: EngineView, near: Shortlists) -> Iterator[_Choice]:
        """To other homes, which fetch what the present one holds beyond them."""
        round = look.round
        if not kept.can_transfer:
            return

        def able(engine: EngineView) -> bool:
            return engine is not kept and engine.can_transfer and can_be_home(engine, round)

        for home in near.homes(able):
            yield self._choice(look, look.at_home(home, kept), home, kept)

    def _choice(
        self,
        look: Forecast,
        candidate: Candidate,
        home: EngineView,
        source: EngineView | None = None,
        last_s: float = 0.0,
    ) -> _Choice:
        """`last_s`: seconds of work at the home, where another engine prefills."""
        p, round, prefill_s = self.parameters, look.round, candidate.prefill_s
        target_s, pull_s, push_s = round.slo_ttft_s, candidate.pull_s, candidate.push_s
        score = (
            (candidate.misses or 0.0)
            + p.work_weight * (prefill_s + last_s) / target_s
            + p.link_weight * (pull_s + push_s) / target_s
            + p.wait_weight * (candidate.queue_s + prefill_s + pull_s + push_s) / target_s
            + p.itl_weight * (candidate.itl_s or 0.0) / round.slo_itl_s
            + p.share_weight * home.kv_share
        )
        if candidate.arm is Arm.MOVE and round.home is not None:
            score += p.move_cost
        return _Choice(candidate, source.engine_id if source is not None else None, score)


# -------------------------------------------------------------------- choosing


def _placement(round: RoundView, choices: Sequence[_Choice], kept: EngineView | None) -> Placement:
    best = _best(choices)
    taken = best.candidate
    reason = (
        f"adaptive: {taken.arm.value} on {taken.prefill_engine} with home {taken.home} is expected to lose "
        f"{taken.misses:.2f} SLOs, the least of {len(choices)} considered"
    )
    if kept is not None:
        reason += f" (local on {kept.engine_id}: {choices[0].candidate.misses:.2f})"
    considered = tuple([choice.candidate for choice in choices])
    return Placement(taken.arm, taken.home, taken.prefill_engine, reason, taken, considered, best.source)


def _best(choices: Sequence[_Choice]) -> _Choice:
    """By `_rank`, which is asked only about equals."""
    least = min([choice.score for choice in choices])
    equals = [choice for choice in choices if choice.score == least]
    return equals[0] if len(equals) == 1 else min(equals, key=_rank)


def _rank(choice: _Choice) -> tuple[float, bool, str, str]:
    taken = choice.candidate
    return choice.score, taken.arm is not Arm.LOCAL, taken.home, taken.prefill_engine


def _misses(choice: _Choice) -> float:
    return choice.candidate.misses or 0.0


def _best_holder(round: RoundView, cluster: ClusterView) -> EngineView | None:
    """The engine with most of the prompt, of those that can give it; ties by engine id."""
    held, excluded = round.history_tokens, round.excluded
    live = [
        engine
        for engine in map(cluster.engines.get, held)
        if engine is not None and engine.can_transfer and engine.engine_id not in excluded
    ]
    return max(sorted(live, key=_engine_id), key=lambda e: held[e.engine_id], default=None)


_engine_id = attrgetter("engine_id")


def _can_pull(round: RoundView, source: EngineView | None, puller: EngineView) -> bool:
    return (
        source is not None
        and source is not puller
        and puller.can_transfer
        and round.held(source.engine_id) > round.held(puller.engine_id)
    )
