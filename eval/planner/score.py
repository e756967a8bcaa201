"""A plan on a workload: the production core under its policy, on simulated engines, for one window of time.

What sessions under way had computed before is brought in by one round each before the window's clock starts,
on engines to which work costs nothing; then all engines are as their profiles say.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from math import ceil, sqrt
from statistics import stdev

from msgspec import Struct
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import Plan
from antiphon.eval.planner.workload import ENTRY_S, Window
from antiphon.policies import arms
from antiphon.policies.base import Arm, ClusterView, Placement, Policy, Reject, RoundView
from antiphon.policies.home import choose_home
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.core_config import CoreConfig
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.simulation import RoundEnd, Simulation, Targets, up_event

PAGE_TOKENS = 64
ERRORS = 2.0
"""Standard errors that a difference of attainments must pass to count (`difference_noise`)."""


class Score(Struct, frozen=True):
    """What a plan did in one window or in several. Shares are of the rounds that were sent within them."""

    rounds: int
    attained: int
    """Answered, first token and mean gap within their targets."""
    ttft_missed: int
    itl_missed: int
    refused: int
    """And failed."""
    ttft_p95: float
    """95th percentile of TTFT as a share of its target; inf where so many were not answered."""
    itl_p95: float
    simulated_rounds: int
    """All that it cost to find out, warm-up included."""
    hopeless: bool = False
    """Given up: it attains less than was asked for (`score`), and nothing here is exact."""
    by_window: tuple[float, ...] = ()
    """Attainments, where it is of several windows."""

    @property
    def attainment(self) -> float:
        return self.attained / max(1, self.rounds)

    @property
    def noise(self) -> float:
        """Standard error of the attainment: that of independent rounds or, where it is larger, what the
        spread between windows says. Rounds share sessions, and these their engines."""
        share, windows = self.attainment, len(self.by_window)
        independent = sqrt(share * (1 - share) / max(1, self.rounds))
        return independent if windows < 2 else max(independent, stdev(self.by_window) / sqrt(windows))


class _Enough(Exception):
    """What is simulated from here on changes nothing that counts."""


class _Entering:
    """Until `policy` is set: every round to its home, or the least used one of the decode pool."""

    def __init__(self, until_s: float) -> None:
        self.policy: Policy | None = None
        self.until_s = until_s
        self.waiting: set[str] = set()
        """Rounds of the window that have been placed and have not ended."""

    def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
        if round.arrived_s <= self.until_s:
            self.waiting.add(round.round_id)
        if self.policy is not None:
            return self.policy.place(round, cluster)
        home = choose_home(round, cluster)
        if isinstance(home, Reject):
            return home
        candidate = arms.local(round, home)
        return Placement(Arm.LOCAL, home.engine_id, home.engine_id, "it was here", candidate, (candidate,))


class _Ends:
    """The rounds that ended. Raises `_Enough` when all that count have, or too many of them missed."""

    def __init__(self, window: Window, slo: Slo, least: float, entering: _Entering, claim_s: float) -> None:
        self.counted: list[RoundEnd] = []
        self.simulated = 0
        self.hopeless = False
        self._window, self._slo, self._entering = window, slo, entering
        self._closed_s = window.until_s + 2 * claim_s
        """By now a round that was sent within the window has been placed."""
        sent = sum(len(session.rounds) for session in window.sessions())
        self._share = 1 - least
        self._may_miss = self._share * sent  # no more than `sent` rounds can ever count

    def __call__(self, end: RoundEnd) -> None:
        self.simulated += 1
        waiting = self._entering.waiting
        waiting.discard(end.receipt.round_id)
        if self._window.from_s <= end.sent_s <= self._window.until_s:
            self.counted.append(end)
            self._may_miss -= not _attained(end, self._slo)
        else:
            self._may_miss -= self._share
        if self._may_miss < -1e-9:
            self.hopeless = True
            raise _Enough
        if not waiting and end.ended_s > self._closed_s:
            raise _Enough


def score(plan: Plan, window: Window, slo: Slo, window_tokens: int, least: float = 0.0) -> Score:
    """Simulate one window. `window_tokens`: the model's longest prompt and output.

    A plan whose attainment is certain to be below `least` is given up: its score is one of the rounds until
    then, and below `least` too.
    """
    ends = _simulated(plan, window, slo, window_tokens, least)
    return _score(ends.counted, slo, ends.simulated, ends.hopeless)


def rounds_of(plan: Plan, window: Window, slo: Slo, window_tokens: int) -> tuple[RoundEnd, ...]:
    """What a score is made of: every round that was sent within the window."""
    return tuple(_simulated(plan, window, slo, window_tokens, 0.0).counted)


def _simulated(plan: Plan, window: Window, slo: Slo, window_tokens: int, least: float) -> _Ends:
    entering = _Entering(window.until_s)
    policy = make_policy(plan.policy)
    core = Scheduler(entering, make_ordering("fcfs"), plan.groups[0].type.latency, CoreConfig(publish=False))
    cluster = plan.cluster("plan", slo, window_tokens, PAGE_TOKENS)
    real = {spec.engine_id: spec.latency for spec in plan.specs()}
    free = [replace(spec, latency=costless(spec.latency)) for spec in plan.specs()]
    ends = _Ends(window, slo, least, entering, cluster.claim_s)
    simulation = Simulation(core, cluster, free, Targets(slo.ttft_s, slo.itl_s, True, True), ends)

    def begin() -> None:
        entering.policy = policy
        for engine_id, engine in simulation.engines.items():
            engine.recost(real[engine_id])
            core.receive(up_event(engine.spec, engine.incarnation, PAGE_TOKENS), ENTRY_S)

    simulation.at(ENTRY_S, begin)
    collecting = gc.isenabled()
    gc.disable()  # what a simulation makes has no cycles to collect
    try:
        simulation.run(iter(window.starts), window.children)
    except _Enough:
        pass
    finally:
        if collecting:
            gc.enable()
    return ends


def costless(latency: LatencyModel) -> LatencyModel:
    """Work takes no time; what a token weighs stays."""
    return replace(latency, prefill=PrefillCost(0.0, 0.0), decode=DecodeCost(0.0), load=None)


def _attained(end: RoundEnd, slo: Slo) -> bool:
    receipt = end.receipt
    if receipt.outcome is not Outcome.COMPLETED or receipt.ttft_s is None or receipt.ttft_s > slo.ttft_s:
        return False
    return receipt.itl_s is None or receipt.itl_s <= slo.itl_s


def _score(ends: Sequence[RoundEnd], slo: Slo, simulated: int, hopeless: bool) -> Score:
    attained = ttft_missed = itl_missed = refused = 0
    ttfts: list[float] = []
    itls: list[float] = []
    for end in ends:
        receipt = end.receipt
        if receipt.outcome is not Outcome.COMPLETED or receipt.ttft_s is None:
            refused += 1
            continue
        ttft = receipt.ttft_s / slo.ttft_s
        itl = 0.0 if receipt.itl_s is None else receipt.itl_s / slo.itl_s
        ttfts.append(ttft)
        itls.append(itl)
        ttft_missed += ttft > 1
        itl_missed += itl > 1
        attained += _attained(end, slo)
    return Score(
        len(ends), attained, ttft_missed, itl_missed, refused,
        _p95(ttfts, len(ends)), _p95(itls, len(ends)), simulated, hopeless,
    )  # fmt: skip


def _p95(values: list[float], of: int) -> float:
    """Of `of` values, those that are missing counting as infinite."""
    if not of:
        return 0.0  # a quiet window
    place = ceil(0.95 * of)
    if place > len(values):
        return float("inf")
    return sorted(values)[max(0, place - 1)]


def together(scores: Sequence[Score]) -> Score:
    """Several windows as one; percentiles are the means of theirs."""
    return Score(
        sum(score.rounds for score in scores),
        sum(score.attained for score in scores),
        sum(score.ttft_missed for score in scores),
        sum(score.itl_missed for score in scores),
        sum(score.refused for score in scores),
        sum(score.ttft_p95 for score in scores) / len(scores),
        sum(score.itl_p95 for score in scores) / len(scores),
        sum(score.simulated_rounds for score in scores),
        any(score.hopeless for score in scores),
        tuple(score.attainment for score in scores) if len(scores) > 1 else (),
    )


def difference_noise(one: Score, other: Score) -> float:
    """Standard error of the difference of two attainments: from window to window where both have the same
    windows, which both find equally hard; never below that of independent rounds."""
    pairs = tuple(zip(one.by_window, other.by_window, strict=False))
    if len(one.by_window) != len(other.by_window) or len(pairs) < 2:
        return sqrt(one.noise**2 + other.noise**2)
    spread = stdev(a - b for a, b in pairs) / sqrt(len(pairs))
    shares = ((score.attainment, max(1, score.rounds)) for score in (one, other))
    return max(spread, sqrt(sum(share * (1 - share) / rounds for share, rounds in shares)))
