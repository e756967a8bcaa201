"""The plans within a budget.

A pool for prefill of one engine type and one for decode of one, of equal tensor-parallel degree unless the
ask allows mixed ones; co-located engines of one type or of two side by side; the whole budget, where engines
of one type prefill and all others decode; the equal split. Of these none is left out; pools of several
types otherwise come by variation of what leads (`neighbours.py`). C, K and policy are the defaults here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from antiphon.eval.planner.ask import Ask, PlanError
from antiphon.eval.planner.plans import EngineType, Group, Plan, PoolName, group, in_order

MOST_PLANS = 200_000
"""That are screened: about a minute, and some hundred MB."""


def check_number(ask: Ask, types: Sequence[EngineType]) -> None:
    """Raises `PlanError` where all plans of the ask are too many to look at each."""
    number = 0
    for one in types:
        engines = _most(ask, one)
        number += 2 * engines  # co-located alone; prefill beside all others
        for other in types:
            if other.tp != one.tp and not ask.mixed_tensor_parallel:
                continue
            beside = _most(ask, other)
            # of one kind they share the GPUs: half of the pairs; of two, also side by side (half: each once)
            number += engines * beside // 2 if other.gpu == one.gpu else engines * beside * 3 // 2
    if number > MOST_PLANS:
        raise PlanError(
            f"--gpus allows about {number} plans, more than {MOST_PLANS}: name fewer GPUs or degrees (--tp),"
            " or plan a part of the load: a tenth of the rate on a tenth of the GPUs"
        )


def candidates(ask: Ask, types: Sequence[EngineType]) -> tuple[Plan, ...]:
    """Every plan of the ask, equal splits first; each once. The order of the budget changes nothing."""
    ordered = in_order(types)
    made = chain(
        equal_splits(ask, ordered),
        _colocated(ask, ordered),
        _disaggregated(ask, ordered),
        _all_others_decode(ask, ordered),
    )
    return tuple(dict.fromkeys(made))


def _most(ask: Ask, each: EngineType) -> int:
    """Engines of a type that the budget holds."""
    return ask.budget.get(each.gpu, 0) // each.tp


def equal_splits(ask: Ask, types: Sequence[EngineType]) -> tuple[Plan, ...]:
    """Half of each kind's engines for prefill and half for decode, all GPUs used: one plan per degree.

    An engine that is left over decodes. A degree that leaves no engine for prefill has none.
    """
    plans: list[Plan] = []
    if not ask.policies:
        return ()
    types = in_order(types)
    for degree in dict.fromkeys(each.tp for each in types):
        pools: dict[PoolName, list[Group]] = {"prefill": [], "decode": []}
        for each in types:
            engines = _most(ask, each)
            if each.tp != degree or not engines:
                continue
            if engines // 2:
                pools["prefill"].append(group("prefill", each, engines // 2))
            pools["decode"].append(group("decode", each, engines - engines // 2))
        if pools["prefill"]:
            plans.append(Plan((*pools["prefill"], *pools["decode"]), ask.policies[0]))
    return tuple(plan for plan in plans if plan.fits(ask.budget))


def _disaggregated(ask: Ask, types: Sequence[EngineType]) -> Iterator[Plan]:
    if not ask.policies:
        return
    for prefill in types:
        for decode in types:
            if prefill.tp != decode.tp and not ask.mixed_tensor_parallel:
                continue
            for engines in range(1, _most(ask, prefill) + 1):
                left = ask.budget.get(decode.gpu, 0)
                if prefill.gpu == decode.gpu:
                    left -= engines * prefill.tp
                for homes in range(1, left // decode.tp + 1):
                    pools = group("prefill", prefill, engines), group("decode", decode, homes)
                    yield Plan(pools, ask.policies[0])


def _all_others_decode(ask: Ask, types: Sequence[EngineType]) -> Iterator[Plan]:
    """Engines of one type prefill; all others of their degree that the budget holds decode, of any kind."""
    if not ask.policies:
        return
    for prefill in types:
        engines = {each: _most(ask, each) for each in types if each.tp == prefill.tp}
        for number in range(1, engines[prefill] + 1):
            left = {**engines, prefill: engines[prefill] - number}
            homes = [group("decode", each, count) for each, count in left.items() if count]
            if homes:
                yield Plan((group("prefill", prefill, number), *homes), ask.policies[0])


def _colocated(ask: Ask, types: Sequence[EngineType]) -> Iterator[Plan]:
    """Of one type, and of two kinds of GPU side by side."""
    if not ask.colocated_policies:
        return
    policy = ask.colocated_policies[0]
    for number, one in enumerate(types):
        counts = range(1, _most(ask, one) + 1)
        for count in counts:
            yield Plan((group("decode", one, count),), policy)
        for other in types[number + 1 :]:
            if other.gpu == one.gpu or (other.tp != one.tp and not ask.mixed_tensor_parallel):
                continue
            for count in counts:
                for beside in range(1, _most(ask, other) + 1):
                    yield Plan((group("decode", one, count), group("decode", other, beside)), policy)
