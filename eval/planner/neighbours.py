"""Plans one step from a plan: its fleet changed, or its policy, C or K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from msgspec.structs import replace

from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.plans import EngineType, Group, Plan, PoolName, group, in_order

POOLS: tuple[PoolName, ...] = ("prefill", "decode")


def neighbours(plan: Plan, ask: Ask, types: Sequence[EngineType]) -> Iterator[Plan]:
    """Plans one step away that are within the budget, each once: an engine fewer, more, moved, of another
    type; another degree for all. Pools of two types too, of which `candidates` has few."""
    seen = {plan}
    ordered = in_order(types)
    for changed in chain(_resized(plan, ordered), _other_degree(plan, ordered)):
        merged = _merged(changed)
        if merged.pool("decode") and merged.fits(ask.budget) and _allowed(merged, ask):
            if merged.colocated != plan.colocated:
                menu = ask.colocated_policies if merged.colocated else ask.policies
                if not menu:
                    continue
                merged = replace(merged, policy=menu[0])
            if merged not in seen:
                seen.add(merged)
                yield merged


def _resized(plan: Plan, types: Sequence[EngineType]) -> Iterator[Plan]:
    counts = tuple(each.count for each in plan.groups)
    places = range(len(counts))
    beside = _empty_groups(plan, types)
    for drop in places:
        fewer = tuple(count - (at == drop) for at, count in enumerate(counts))
        yield plan.with_counts(fewer)
        for gain in places:
            if gain != drop:
                yield plan.with_counts(tuple(count + (at == gain) for at, count in enumerate(fewer)))
        for new in beside:
            yield Plan((*plan.with_counts(fewer).groups, new), plan.policy)
    for gain in places:
        yield plan.with_counts(tuple(count + (at == gain) for at, count in enumerate(counts)))
    for new in beside:
        yield Plan((*plan.groups, new), plan.policy)


def _empty_groups(plan: Plan, types: Sequence[EngineType]) -> list[Group]:
    """One engine of each type and pool that the plan has not, with the C and K of its pool there."""
    have = {(each.pool, each.type) for each in plan.groups}
    degrees = {each.type.tp for each in plan.groups}
    found = []
    for pool in POOLS:
        like = next(iter(plan.pool(pool)), None)
        for each in types:
            if each.tp in degrees and (pool, each) not in have:
                new = group(pool, each, 1)
                if like is not None:
                    new = replace(new, chunk_tokens=like.chunk_tokens, decode_interval=like.decode_interval)
                found.append(new)
    return found


def _other_degree(plan: Plan, types: Sequence[EngineType]) -> Iterator[Plan]:
    """The same GPUs, as far as they go, in engines of another degree; a pool keeps one engine."""
    by_name = {(each.gpu, each.tp): each for each in types}
    for degree in dict.fromkeys(each.tp for each in types):
        groups = []
        for each in plan.groups:
            other = by_name.get((each.type.gpu, degree))
            if other is None:
                break
            groups.append(replace(each, type=other, count=max(1, each.count * each.type.tp // degree)))
        else:
            yield Plan(tuple(groups), plan.policy)


def _merged(plan: Plan) -> Plan:
    """Groups that are alike as one: equal fleets are equal plans."""
    counts: dict[Group, int] = {}
    for each in plan.groups:
        key = replace(each, count=1)
        counts[key] = counts.get(key, 0) + each.count
    return Plan(tuple(replace(key, count=count) for key, count in counts.items()), plan.policy)


def _allowed(plan: Plan, ask: Ask) -> bool:
    return ask.mixed_tensor_parallel or len({each.type.tp for each in plan.groups}) == 1


def settings(plan: Plan, ask: Ask) -> Iterator[Plan]:
    """The same fleet with one of policy, C of a pool, K of a pool set otherwise, from the ask's menus."""
    for policy in ask.colocated_policies if plan.colocated else ask.policies:
        if policy != plan.policy:
            yield replace(plan, policy=policy)
    for pool in POOLS:
        if not plan.pool(pool):
            continue
        now = plan.pool(pool)[0]
        for chunk_tokens in ask.chunk_tokens:
            if chunk_tokens != now.chunk_tokens:
                yield _with(plan, pool, chunk_tokens, now.decode_interval)
        for interval in ask.decode_intervals:
            if interval != now.decode_interval:
                yield _with(plan, pool, now.chunk_tokens, interval)


def set_like(plan: Plan, other: Plan) -> Plan:
    """The same fleet with the C and K that `other` has in its pools."""
    for pool in POOLS:
        theirs = other.pool(pool)
        if theirs and plan.pool(pool):
            plan = _with(plan, pool, theirs[0].chunk_tokens, theirs[0].decode_interval)
    return plan


def _with(plan: Plan, pool: PoolName, chunk_tokens: int, interval: int) -> Plan:
    groups = (
        replace(each, chunk_tokens=chunk_tokens, decode_interval=interval) if each.pool == pool else each
        for each in plan.groups
    )
    return replace(plan, groups=tuple(groups))
