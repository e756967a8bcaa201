"""Equal fleets are equal plans, from wherever they come and however the budget is written down."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.candidates import candidates, equal_splits
from antiphon.eval.planner.neighbours import neighbours, set_like
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.policies.latency import load_latency_model

LATENCY = load_latency_model("qwen3-32b-h100-tp4")
TYPES = tuple(
    EngineType(gpu, tp, LATENCY, 100_000, 200_000, 50e9, price)
    for gpu, price in (("a100", 1.5), ("h100", 2.5), ("h200", 2.5))
    for tp in (2, 4)
)
BUDGETS = st.fixed_dictionaries({gpu: st.integers(0, 9) for gpu in ("a100", "h100", "h200")})
SHUFFLES = st.randoms(use_true_random=False)


def ask(budget: dict[str, int], mixed: bool = False) -> Ask:
    return Ask(
        model="qwen3-32b", budget=budget, slo=Slo(2.0, 0.05), session_rate_per_s=1.0, window_tokens=131_072,
        mixed_tensor_parallel=mixed, jobs=1,
    )  # fmt: skip


def shuffled(budget: dict[str, int], chance: Random) -> tuple[dict[str, int], tuple[EngineType, ...]]:
    """The budget, and the engines that it can have, in another order."""
    kinds = chance.sample(sorted(budget), len(budget))
    return {gpu: budget[gpu] for gpu in kinds}, tuple(chance.sample(TYPES, len(TYPES)))


def fleet(plan: Plan) -> tuple[frozenset[tuple[Group, int]], str]:
    """What it is, told without `Plan`: engines of each make, and the policy."""
    counts: dict[Group, int] = {}
    for each in plan.groups:
        make = replace(each, count=1)
        counts[make] = counts.get(make, 0) + each.count
    return frozenset(counts.items()), plan.policy


def each_once(plans: Iterable[Plan]) -> None:
    """In the one order: the dearer GPU first, by name between equals; and no fleet twice."""
    known = list(plans)
    assert len({fleet(plan) for plan in known}) == len({plan.describe() for plan in known}) == len(known)
    for plan in known:
        order = [(g.pool == "decode", -g.type.price_per_gpu_hour, g.type.gpu, g.type.tp) for g in plan.groups]
        assert order == sorted(order) and len(set(order)) == len(order)


@given(st.lists(st.tuples(st.sampled_from(TYPES), st.sampled_from(("prefill", "decode")))), SHUFFLES)
def test_the_order_of_groups_makes_no_difference(made: list[tuple[EngineType, str]], chance: Random) -> None:
    groups = [Group(pool, each, n % 3 + 1, 2048, 4) for n, (each, pool) in enumerate(made)]  # type: ignore[arg-type]
    plan = Plan(tuple(groups))
    chance.shuffle(groups)
    again = replace(Plan((), "local"), groups=tuple(groups), policy=plan.policy)
    assert plan == again and hash(plan) == hash(again) and plan.describe() == again.describe()


@settings(max_examples=25, deadline=None)
@given(BUDGETS, st.booleans(), SHUFFLES)
def test_no_fleet_is_there_twice(budget: dict[str, int], mixed: bool, chance: Random) -> None:
    budget, types = shuffled(budget, chance)
    asked = ask(budget, mixed)
    plans = candidates(asked, types)
    each_once(plans)
    for plan in chance.sample(plans, min(6, len(plans))):
        near = list(neighbours(plan, asked, types))
        each_once((plan, *near))
        for steps in near[::9]:  # two steps: pools of three types, from other degrees
            each_once((steps, *neighbours(steps, asked, types)))
        alike = [set_like(other, plan) for other in near]
        each_once(dict.fromkeys(alike))


@settings(max_examples=25, deadline=None)
@given(BUDGETS, st.booleans(), SHUFFLES)
def test_the_order_of_a_budget_makes_no_difference(
    budget: dict[str, int], mixed: bool, chance: Random
) -> None:
    """Nor to the order in which plans are looked at: the answer to an ask is one."""
    one, types = ask(budget, mixed), TYPES
    again, other = shuffled(budget, chance)
    plans = candidates(one, types)
    assert candidates(ask(again, mixed), other) == plans
    assert equal_splits(ask(again, mixed), other) == equal_splits(one, types)
    for plan in plans[:: max(1, len(plans) // 5)]:
        near = list(neighbours(plan, one, types))
        assert list(neighbours(plan, ask(again, mixed), other)) == near
