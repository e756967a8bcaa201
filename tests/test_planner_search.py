"""Plans of a budget, their order by the screen, the search over them, the processes that simulate."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner import score as score_module
from antiphon.eval.planner.ask import Ask, Found, Infeasible, Solved, choose
from antiphon.eval.planner.brute import all_plans, brute_force
from antiphon.eval.planner.candidates import candidates, equal_splits
from antiphon.eval.planner.effort import Effort
from antiphon.eval.planner.neighbours import neighbours
from antiphon.eval.planner.neighbours import settings as settings_of
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.eval.planner.pool import PoolError, ScorePool, View
from antiphon.eval.planner.score import Score, score
from antiphon.eval.planner.screen import Screen, _gap_s, _Work
from antiphon.eval.planner.search import search
from antiphon.eval.planner.workload import Window, Workload
from antiphon.policies.latency import DecodeCost, PrefillCost, load_latency_model
from antiphon.traces.schema import RoundTrace, SessionTrace
from tests.test_planner_workload import SESSIONS, WINDOW_TOKENS, fleet


def engine(gpu: str, tp: int, tokens: int, price: float) -> EngineType:
    latency = load_latency_model(f"qwen3-32b-{gpu}-tp{tp}")
    return EngineType(gpu, tp, latency, tokens, 2 * tokens, 50e9, price)


H200 = engine("h200", 4, 1_643_328, 3.5), engine("h200", 2, 696_704, 3.5)
MIXED = engine("h100", 4, 824_256, 2.5), engine("a100", 4, 824_256, 1.5)
ROOT = Path(__file__).resolve().parent.parent
SLO = Slo(2.0, 0.05)
SHORT = Effort(((8, 60), (5, 120)), (3, 150, 2), 60, 2, 3000, 0)


def ask(budget: dict[str, int], rate: float, **more: object) -> Ask:
    return Ask(
        model="qwen3-32b", budget=budget, slo=SLO, session_rate_per_s=rate, window_tokens=WINDOW_TOKENS,
        **{"jobs": 1, **more},  # type: ignore[arg-type]
    )  # fmt: skip


def workload(rate: float, profile: str = "claude-code") -> Workload:
    return Workload.of(SESSIONS[profile], rate, H200[0].latency)


# ---------------------------------------------------------------- plans


def test_all_plans_of_a_small_budget() -> None:
    plans = candidates(ask({"h200": 8}, 1.0), H200)
    assert {plan.describe() for plan in plans} == {
        "prefill 1 x 4xh200, decode 1 x 4xh200, adaptive",
        "prefill 1 x 2xh200, decode 1 x 2xh200, adaptive",
        "prefill 1 x 2xh200, decode 2 x 2xh200, adaptive",
        "prefill 1 x 2xh200, decode 3 x 2xh200, adaptive",
        "prefill 2 x 2xh200, decode 1 x 2xh200, adaptive",
        "prefill 2 x 2xh200, decode 2 x 2xh200, adaptive",
        "prefill 3 x 2xh200, decode 1 x 2xh200, adaptive",
        *(f"co-located {n} x 4xh200, adaptive" for n in (1, 2)),
        *(f"co-located {n} x 2xh200, adaptive" for n in (1, 2, 3, 4)),
    }


def test_kinds_side_by_side_and_degrees_that_may_be_mixed() -> None:
    asked = ask({"h100": 4, "a100": 8}, 1.0)
    words = {plan.describe() for plan in candidates(asked, MIXED)}
    assert "co-located 1 x 4xh100 + 2 x 4xa100, adaptive" in words
    assert "prefill 1 x 4xh100, decode 2 x 4xa100, adaptive" in words
    assert "prefill 1 x 4xh100, decode 1 x 4xh100, adaptive" not in words
    assert "prefill 1 x 4xa100, decode 1 x 4xh100 + 1 x 4xa100, adaptive" in words
    assert "prefill 1 x 4xa100, decode 1 x 4xa100, adaptive" in words  # the same without the other kind
    mixed = candidates(ask({"h200": 8}, 1.0, mixed_tensor_parallel=True), H200)
    assert "prefill 2 x 2xh200, decode 1 x 4xh200, adaptive" in {plan.describe() for plan in mixed}


def test_the_equal_split_uses_every_engine_and_leaves_the_odd_one_to_decode() -> None:
    (split,) = equal_splits(ask({"h100": 12, "a100": 8}, 1.0), MIXED)
    assert split.describe() == "prefill 1 x 4xh100 + 1 x 4xa100, decode 2 x 4xh100 + 1 x 4xa100, adaptive"
    assert split.gpus == {"h100": 12, "a100": 8}


@settings(max_examples=40, deadline=None)
@given(
    budget=st.fixed_dictionaries(
        {"h200": st.integers(0, 20), "h100": st.integers(0, 20), "a100": st.integers(0, 9)}
    ),
    mixed=st.booleans(),
)
def test_nothing_exceeds_the_budget(budget: dict[str, int], mixed: bool) -> None:
    asked = ask(budget, 1.0, mixed_tensor_parallel=mixed)
    types = (*H200, *MIXED)
    plans = candidates(asked, types)
    assert len(set(plans)) == len(plans)
    for plan in plans[::37]:
        near = [*settings_of(plan, asked), *neighbours(plan, asked, types)]
        for each in (plan, *near):
            assert each.fits(budget) and each.pool("decode") and all(group.count > 0 for group in each.groups)
            assert mixed or len({group.type.tp for group in each.groups}) == 1
        assert plan not in near


def test_steps_from_a_plan() -> None:
    asked = ask({"h100": 8, "a100": 8}, 1.0)
    plan = Plan((Group("prefill", MIXED[0], 1, 8192, 4), Group("decode", MIXED[1], 2, 1024, 16)), "adaptive")
    words = {each.describe() for each in neighbours(plan, asked, MIXED)}
    assert "prefill 1 x 4xh100, decode 1 x 4xa100, adaptive" in words
    assert "prefill 1 x 4xh100, decode 1 x 4xh100 + 2 x 4xa100, adaptive" in words
    assert "co-located 2 x 4xa100, adaptive" in words
    varied = {
        (each.policy, *((g.chunk_tokens, g.decode_interval) for g in each.groups))
        for each in settings_of(plan, asked)
    }
    assert ("ampd", (8192, 4), (1024, 16)) in varied
    assert ("adaptive", (8192, 4), (4096, 16)) in varied
    assert len(varied) == 1 + 2 * (3 + 2)


def test_the_screen_prefers_what_keeps_up() -> None:
    screen = Screen(workload(0.03), SLO, H200)
    alone, two, split = fleet(0, 1, "local"), fleet(0, 2, "local"), fleet(1, 1)
    big = H200[0]
    plans = [
        replace(plan, groups=tuple(replace(group, type=big) for group in plan.groups))
        for plan in (alone, two, split)
    ]
    one, more, apart = (screen.estimate(plan) for plan in plans)
    assert one < more <= 1 and one < apart <= 1
    assert screen.utilisation(plans[0]) == pytest.approx(2 * screen.utilisation(plans[1]))
    drowned = Screen(workload(30.0), SLO, H200)
    assert drowned.estimate(plans[0]) < drowned.estimate(plans[1]) < 0


def test_short_prompts_share_the_fixed_cost_of_a_pass() -> None:
    """Passes of 1 s and nothing else for 512 new tokens: four prompts fit one, 0.25 s each; of 2048, one."""

    def load(new_tokens: int) -> Workload:
        turns = (RoundTrace(prompt_tokens=new_tokens, output_tokens=2),)
        return Workload.of((SessionTrace(session_id="a", rounds=turns),), 2.0, engine_latency)

    engine_latency = replace(H200[0].latency, prefill=PrefillCost(1.0, 0.0), decode=DecodeCost(1e-6))
    types = [replace(H200[0], latency=engine_latency)]
    plan = Plan((Group("decode", types[0], 4, 2048, 4),), "local")
    used = [Screen(load(tokens), SLO, types).utilisation(plan) for tokens in (512, 1024, 2048, 4096)]
    assert used == pytest.approx([2 * 0.25 / 4, 2 * 0.5 / 4, 2 / 4, 2 / 4], rel=1e-3)


def test_gaps_between_tokens_by_hand() -> None:
    """Steps of 10 ms and 1 ms per request; 200 tokens/s. Alone 10 / (1 - 0.2) + 1 ms = 13.5 ms; with prefill
    in half of the time 10 / (0.5 - 0.2) + 2."""
    work = _Work(0.5, 0.2, 1.0, (), 0.1, 200.0, 0.010, 0.001)
    assert _gap_s([(1, work)], 0.0) == pytest.approx(0.0135)
    assert _gap_s([(1, work)], 0.5) == pytest.approx(0.010 / 0.3 + 0.002)
    assert _gap_s([(2, work)], 0.0) == pytest.approx(0.010 / 0.9 + 0.001)
    assert _gap_s([(1, work)], 0.9) > 1.0  # no time is left for 0.2 of it


# ---------------------------------------------------------------- scores


def replace_until(window: Window, until_s: float) -> Window:
    """The same sessions, of which only the rounds until then count."""
    return dataclasses.replace(window, until_s=until_s)


def test_what_is_not_simulated_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation that ends with the last round that counts has the score of one that runs to its end."""
    window = workload(0.06).window(seed=4, rounds=150)
    window = replace_until(window, window.until_s / 2)
    short = score(fleet(0, 3, "local"), window, SLO, WINDOW_TOKENS)
    whole = score_module._Entering.__init__

    def endless(self: score_module._Entering, until_s: float) -> None:
        whole(self, until_s)
        self.waiting.add("a round that never ends")

    monkeypatch.setattr(score_module._Entering, "__init__", endless)
    long = score(fleet(0, 3, "local"), window, SLO, WINDOW_TOKENS)
    assert short.simulated_rounds < long.simulated_rounds
    assert short == replace(long, simulated_rounds=short.simulated_rounds)


def test_only_what_is_hopeless_is_given_up() -> None:
    counts, window = (1, 2, 6), workload(0.06).window(seed=4, rounds=200)
    exact = [score(fleet(0, count, "local"), window, SLO, WINDOW_TOKENS) for count in counts]
    least = exact[2].attainment - 0.05
    cut = [score(fleet(0, count, "local"), window, SLO, WINDOW_TOKENS, least) for count in counts]
    assert cut[2] == exact[2]
    assert any(each.hopeless for each in cut)
    for was, now in zip(exact, cut, strict=True):
        assert was == now or (now.hopeless and max(was.attainment, now.attainment) < least)
        assert now.simulated_rounds <= was.simulated_rounds


def test_processes_say_what_one_process_says() -> None:
    plans, views = (fleet(0, 1, "local"), fleet(1, 1)), (View(1, 40), View(2, 40, 1.2))
    load = workload(0.02)
    with ScorePool(load, SLO, WINDOW_TOKENS, 1) as here, ScorePool(load, SLO, WINDOW_TOKENS, 2) as there:
        assert here.executor is None and there.executor is not None
        assert here.score(plans, views) == there.score(plans, views)
        assert here.simulated_rounds == there.simulated_rounds > 160
        with pytest.raises(PoolError, match="fewer jobs"):
            there.executor.submit(os._exit, 1)
            there.score(plans * 50, views)


def test_processes_end_with_the_one_that_began_them() -> None:
    """However it ends: nobody is left who would wait for work."""
    code = """if True:
        import os, sys
        from tests.test_planner_search import SLO, WINDOW_TOKENS, ScorePool, View, fleet, workload
        pool = ScorePool(workload(0.02), SLO, WINDOW_TOKENS, 2)
        pool.score((fleet(0, 1, "local"),), (View(1, 20), View(2, 20)))
        print(*pool.executor._processes)
        sys.stdout.flush()
        os.kill(os.getpid(), 9)
    """
    killed = subprocess.run(
        (sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    pids = [int(pid) for pid in killed.stdout.split()]
    assert killed.returncode == -9 and pids, killed.stderr
    ends_s = time.monotonic() + 20
    while any(map(runs, pids)):
        assert time.monotonic() < ends_s, "processes that nobody waits for"


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- the search


def found(asked: Ask, types: Sequence[EngineType], load: Workload, **more: object) -> Found:
    return search(asked, types, load, effort=SHORT, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("types", "rate"), ((H200[:1], 0.003), (H200, 0.03)))
def test_as_good_as_brute_force_on_a_small_budget(types: Sequence[EngineType], rate: float) -> None:
    """Where load is low, half of the budget is as good as the whole, and the plan is that."""
    asked = ask({"h200": 8}, rate, decode_intervals=(4,), chunk_tokens=(2048, 8192))
    load = workload(rate, "hotpotqa" if rate < 0.01 else "claude-code")
    plan = found(asked, types, load).best.plan
    with ScorePool(load, SLO, WINDOW_TOKENS, 1) as pool:
        best = brute_force(asked, types, pool, 100, lambda message: None)
        assert best.plans == len(all_plans(asked, types))
        ours, theirs = pool.score((plan, best.plan), (View(77, 400),))
    assert ours.attainment >= theirs.attainment - 0.02
    assert plan.price_per_hour <= best.plan.price_per_hour
    assert (plan.price_per_hour < 28.0) == (rate < 0.01)


def test_a_smaller_fleet_may_do_under_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine attains 80 % under the first policy and all under the second: the plan is that one."""

    def told(pool: ScorePool, plans: Iterable[Plan], views: object, least: float = 0.0) -> tuple[Score, ...]:
        good = [plan.engines > 1 or plan.policy == "local" for plan in plans]
        return tuple(Score(1000, 1000 if each else 800, 0, 0, 0, 0.5, 0.5, 1000) for each in good)

    monkeypatch.setattr(ScorePool, "score", told)
    asked = ask({"h200": 8}, 0.02, policies=(), colocated_policies=("adaptive", "local"))
    answer = found(asked, H200[:1], workload(0.02))
    assert (answer.best.plan.engines, answer.best.plan.policy) == (1, "local")
    first, twins, *_ = answer.rungs
    assert first.plans == twins.plans == 2 and first.rounds == twins.rounds == 60


def test_what_it_answers_is_consistent_and_the_same_again() -> None:
    asked, load = ask({"h100": 8, "a100": 8}, 0.02), workload(0.02)
    poor = fleet(0, 1, "local")
    poor = replace(poor, groups=(replace(poor.groups[0], type=MIXED[1], chunk_tokens=1024),))
    eq5 = Plan((Group("prefill", MIXED[1], 2, 8192, 4), Group("decode", MIXED[0], 1, 2048, 4)), "ampd")
    solved = Solved(eq5, 1.0, eq5, 1.0, (), 0.0, 0.0)
    told: list[str] = []
    answer = search(asked, MIXED, load, (poor,), told.append, solved=solved, effort=SHORT)
    plans = [each.plan for each in answer.rated]
    assert answer.rated[0] == answer.best == choose(answer.rated, asked.tolerance)
    assert poor in plans and len(set(plans)) == len(plans)
    assert all(plan.fits(asked.budget) for plan in plans)
    assert answer.eq5 is not None and answer.eq5 == answer.solved and answer.eq5.plan == eq5
    assert answer.colocated is not None and answer.colocated.plan.colocated
    assert answer.disaggregated is not None and not answer.disaggregated.plan.colocated
    assert answer.best in (answer.colocated, answer.disaggregated)
    assert answer.single_tier is not None and len(answer.single_tier.plan.gpus) == 1
    assert answer.equal_split is not None and answer.equal_split.plan in equal_splits(asked, MIXED)
    assert [rung.windows for rung in answer.rungs] == [1, 1, 1, 2] and len(told) == 6
    again = search(asked, MIXED, load, (poor,), solved=solved, effort=SHORT)
    assert again.rated == answer.rated


def test_other_asks() -> None:
    """One kind of GPU, no policy for co-location, no GPU at all."""
    only_apart = ask({"h200": 8}, 0.01, colocated_policies=())
    answer = found(only_apart, H200[:1], workload(0.01))
    assert answer.colocated is None and answer.single_tier is None and answer.eq5 is None
    assert not answer.best.plan.colocated
    with pytest.raises(Infeasible, match="no plan fits"):
        found(ask({"h200": 0}, 0.01), H200, workload(0.01))
