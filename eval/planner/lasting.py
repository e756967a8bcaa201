"""Does a plan last? Who leads at the end is simulated in one long window; who drowns there does not lead.

Short windows see a fleet that is a little too small do well: it takes some unlucky minutes until slow rounds
have put so many sessions under way that none is fast any more (8 H200 as 4 x 2, 65 `hotpotqa` sessions per
second: 100 % in windows of 3,000 rounds, 27 % of 18,000). A long window for every plan would cost more than
the search, so only the choice and the best of either form have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from antiphon.eval.planner.ask import Rated, choose
from antiphon.eval.planner.plans import Plan
from antiphon.eval.planner.pool import ScorePool, View
from antiphon.eval.planner.score import ERRORS

SAG = 0.05
"""Of attainment: a plan that loses more in a long window, and more than its error, does not last."""
MOST_LOOKS = 4
"""At those who lead, each after the last look's have been found wanting."""

Fits = Callable[[Plan], bool]


def lasts(rated: Rated) -> bool:
    """True of plans at which nobody has looked."""
    if rated.long is None:
        return True
    return rated.long.attainment >= rated.score.attainment - max(SAG, ERRORS * rated.score.noise)


def choose_lasting(rated: Iterable[Rated], tolerance: float) -> Rated:
    """The choice among those that last; if none does, among all."""
    known = list(rated)
    return choose([each for each in known if lasts(each)] or known, tolerance)


def looked_at(
    rated: Sequence[Rated], forms: Sequence[Fits], pool: ScorePool, view: View, tolerance: float
) -> list[Rated]:
    """`rated`, of which the choice of each of `forms` has been simulated on `view`, as has each that was one
    before those ahead of it were found not to last. Raises `PoolError`."""
    known = {each.plan: each for each in rated}
    for _ in range(MOST_LOOKS):
        of_forms = ([each for each in known.values() if form(each.plan)] for form in forms)
        leaders = [choose_lasting(each, tolerance) for each in of_forms if each]
        fresh = list({each.plan: each for each in leaders if each.long is None}.values())
        if not fresh:
            break
        least = min(each.score.attainment - max(SAG, ERRORS * each.score.noise) for each in fresh)
        longer = pool.score([each.plan for each in fresh], (view,), max(0.0, least))
        known |= {each.plan: replace(each, long=long) for each, long in zip(fresh, longer, strict=True)}
    return list(known.values())
