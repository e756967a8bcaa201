"""What lies around a plan: an engine more or fewer, other settings (`--explain`), cheaper fleets (the front).

All of it is simulated on the first window of the search's last rung, where the plan was chosen. What lies
around is told by differences from the plan on the same window; what is cheaper is marked as of one window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask, Found, Rated
from antiphon.eval.planner.candidates import candidates
from antiphon.eval.planner.lasting import drowned, lasts
from antiphon.eval.planner.neighbours import set_like, settings
from antiphon.eval.planner.plans import EngineType, Plan
from antiphon.eval.planner.pool import ScorePool
from antiphon.eval.planner.screen import Screen
from antiphon.eval.planner.search import last_views

LEVELS = 0.2, 0.35, 0.5, 0.65, 0.8, 0.95
"""Of the plan's price: where cheaper plans are looked for."""


class Change(Struct, frozen=True):
    """A plan one step from the choice."""

    what: str
    """In words: one decode engine (4xa100) fewer."""
    kind: str
    """count, policy, C or K."""
    rated: Rated | None
    """None: not within the budget."""
    drowns: bool = False
    """One with these engines was found not to last."""


class Around(NamedTuple):
    """On one window: differences from `best` mean something, the values themselves less."""

    best: Rated
    changes: tuple[Change, ...]


def around(ask: Ask, found: Found, pool: ScorePool) -> Around:
    """One engine of each kind more and fewer; each other policy, C and K, one at a time."""
    plan = found.best.plan
    views = last_views(ask, found)[:1]
    named = [*_counts(plan, ask), *_settings(plan, ask)]
    plans = list(dict.fromkeys(each for _, _, each in named if each is not None))
    scores = dict(zip((plan, *plans), pool.score((plan, *plans), views), strict=True))
    return Around(
        Rated(plan, scores[plan]),
        tuple(
            Change(what, kind, None)
            if each is None
            else Change(what, kind, Rated(each, scores[each]), kind == "count" and drowned(each, found.rated))
            for what, kind, each in named
        ),
    )


def _counts(plan: Plan, ask: Ask) -> Iterator[tuple[str, str, Plan | None]]:
    counts = tuple(group.count for group in plan.groups)
    for at, group in enumerate(plan.groups):
        role = "" if plan.colocated else f"{group.pool} "
        for step, word in ((1, "more"), (-1, "fewer")):
            changed = plan.with_counts(tuple(count + step * (n == at) for n, count in enumerate(counts)))
            if not changed.pool("decode") or changed.colocated != plan.colocated:
                continue
            what = f"one {role}engine ({group.type.name}) {word}"
            yield what, "count", changed if changed.fits(ask.budget) else None


def _settings(plan: Plan, ask: Ask) -> Iterator[tuple[str, str, Plan | None]]:
    for changed in settings(plan, ask):
        if changed.policy != plan.policy:
            yield f"policy {changed.policy}", "policy", changed
            continue
        before, after = next((a, b) for a, b in zip(plan.groups, changed.groups, strict=True) if a != b)
        pool = "" if plan.colocated else f" of {after.pool}"
        if before.chunk_tokens != after.chunk_tokens:
            yield f"C{pool} {after.chunk_tokens}", "C", changed
        else:
            yield f"K{pool} {after.decode_interval}", "K", changed


# ---------------------------------------------------------------- the front


def cheaper(ask: Ask, types: Sequence[EngineType], found: Found, pool: ScorePool) -> tuple[Rated, ...]:
    """Plans below the choice's price: at some price levels the co-located and the disaggregated one that the
    screen puts first. The search left them out, since they attain less; the front begins with them. Fleets
    that are known to drown are left out.

    Simulated on the first window of the last rung only.
    """
    best = found.best.plan
    screen = Screen(pool.workload, ask.slo, types)
    known = {each.plan for each in found.rated}
    plans = [plan for plan in candidates(ask, types) if plan.price_per_hour < best.price_per_hour]
    plans = [plan for plan in plans if not drowned(plan, found.rated)]
    ordered = sorted(plans, key=lambda plan: (-screen.estimate(plan), plan.price_per_hour))
    chosen: dict[Plan, None] = {}
    for level in LEVELS:
        within = [plan for plan in ordered if plan.price_per_hour <= level * best.price_per_hour]
        for colocated in (True, False):
            plan = next((each for each in within if each.colocated is colocated), None)
            if plan is not None and _as_set(plan, best) not in known:
                chosen.setdefault(_as_set(plan, best))
    views = last_views(ask, found)[:1]
    return tuple(pool.rate(chosen, views))


def _as_set(plan: Plan, like: Plan) -> Plan:
    """With the policy, C and K that were found for `like`, where both are of one form."""
    if plan.colocated != like.colocated:
        return plan
    return replace(set_like(plan, like), policy=like.policy)


def front(rated: Sequence[Rated]) -> tuple[Rated, ...]:
    """Those that nothing as cheap or cheaper attains more than, the cheapest first; of what was given up it
    is not known, and what does not last is not for sale."""
    kept: list[Rated] = []
    exact = (each for each in rated if not each.score.hopeless and lasts(each))
    for each in sorted(exact, key=lambda r: (r.plan.price_per_hour, -r.score.attainment)):
        if not kept or each.score.attainment > kept[-1].score.attainment:
            kept.append(each)
    return tuple(kept)
