"""What a planner is asked, checked; and the answers' shapes, which search, solver and output share."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import Plan
from antiphon.eval.planner.score import Score


class PlanError(Exception):
    """A question that cannot be asked like this: what, where, what to do."""


class Infeasible(Exception):
    """No plan can do it: why, with the nearest that one could ask for."""

    def __init__(self, reason: str, nearest: str) -> None:
        super().__init__(f"{reason}\nnearest: {nearest}")
        self.reason = reason
        self.nearest = nearest


class Ask(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One question. Whatever is a tuple is a menu."""

    model: str
    """Short name: qwen3-32b."""
    budget: dict[str, int]
    """GPU kind -> most of them."""
    slo: Slo
    """For every round."""
    session_rate_per_s: float
    """Sessions that arrive, sub-agents not counted."""
    window_tokens: int
    """The model's longest prompt and output."""
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    mixed_tensor_parallel: bool = False
    """Engines of different degrees in one plan. Our linker moves KV between equal ranks only."""
    policies: tuple[str, ...] = ("adaptive", "ampd")
    """Of plans with a prefill pool; the first is that of the first rungs."""
    colocated_policies: tuple[str, ...] = ("adaptive", "local")
    """The first is that of the first rungs: with several engines `adaptive` can do all that `local` can."""
    chunk_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """C, per pool."""
    decode_intervals: tuple[int, ...] = (1, 4, 16)
    """K, per pool."""
    tolerance: float = 0.005
    """Plans whose attainments differ by less are as good: the cheapest of them is the plan."""
    seed: int = 0
    jobs: int = 2
    """Processes."""


class Rated(Struct, frozen=True):
    """A plan and what it did."""

    plan: Plan
    score: Score
    long: Score | None = None
    """In one long window (`lasting.py`); None = nobody has looked."""


class Solved(Struct, frozen=True):
    """What the MILP says, before any of its plans was simulated as a whole."""

    eq5: Plan | None
    """AMPD's Eq. 5 alone: the least Z, the worst P95 as a share of its target, whatever it costs. None where
    the budget has no two engines: it knows no co-location."""
    eq5_z: float
    plan: Plan
    """The completed form: the cheapest whose Z is within the targets, or the least Z if none is."""
    plan_z: float
    binding: tuple[str, ...]
    """The constraints that keep it from being better or cheaper, in words, the first the tightest."""
    curves_s: float
    """Seconds that the tables of tau took, in simulations."""
    solve_s: float
    gap: float = 0.0
    """How far from its bound the worst answer is that the solver's time limit cut off; 0 = all proven."""


class Rung(Struct, frozen=True):
    """One round of the successive halving, or the first's twins: its cheapest under other policies."""

    plans: int
    rounds: int
    """Of each window."""
    windows: int
    took_s: float


class Found(Struct, frozen=True):
    """What the search says. All plans here were simulated on the same windows."""

    best: Rated
    colocated: Rated | None
    """The best without a prefill pool; None if the menu has none that fits."""
    disaggregated: Rated | None
    single_tier: Rated | None
    """The best of plans with one kind of GPU; None if only one kind was asked."""
    equal_split: Rated | None
    """Half of the engines each, at the budget's full size."""
    eq5: Rated | None
    solved: Rated | None
    rated: tuple[Rated, ...]
    """All that came to the last rung, the best first."""
    rungs: tuple[Rung, ...]
    took_s: float


def cost_per_1k_rounds(plan: Plan, rounds_per_s: float) -> float:
    """USD: the fleet's price over the rounds that it is asked for."""
    return plan.price_per_hour / 3600 / rounds_per_s * 1000


def choose(rated: Iterable[Rated], tolerance: float) -> Rated:
    """The cheapest of those within `tolerance` of the best attainment; of equals the better.

    Where both are equal, the simpler: fewer engines; for a single engine `local`, since it has nobody to send
    anything to. Of several engines another policy may have more in hand.
    """
    known = list(rated)
    best = max(each.score.attainment for each in known)
    good = (each for each in known if each.score.attainment >= best - tolerance)

    def rank(each: Rated) -> tuple[float, float, int, bool, str]:
        plan = each.plan
        alone = plan.engines == 1 and plan.policy == "local"
        return plan.price_per_hour, -each.score.attainment, plan.engines, not alone, plan.describe()

    return min(good, key=rank)
