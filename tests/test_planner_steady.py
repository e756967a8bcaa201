"""A window begins in the middle of things, and shows what a long simulation from an empty fleet shows."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import EngineType, Plan, group
from antiphon.eval.planner.score import Score, score, together
from antiphon.eval.planner.workload import Window, Workload
from antiphon.policies.latency import load_latency_model
from antiphon.traces.schema import SessionTrace
from tests.test_planner_workload import H200, SESSIONS, WINDOW_TOKENS, agents, fleet

ALONE = EngineType("h200", 1, load_latency_model("qwen3-32b-h200-tp1"), 223_360, 524_288, 50e9, 3.5)


def plain(workload: Workload, seed: int, rounds: int) -> Window:
    """Families arrive on an empty fleet; what is sent before the longest of them could end does not count."""
    chance, deck = Random(seed), list(workload.families)
    from_s = max(timed.ended_s[-1] for family in workload.families for timed in family)
    until_s = from_s + workload.measured_s(rounds)
    starts: list[tuple[float, SessionTrace]] = []
    now_s, number = 0.0, 0
    while (now_s := now_s + chance.expovariate(workload.rate_per_s)) < until_s:
        number += 1
        for timed in chance.choice(deck):
            named = replace(timed.session, session_id=f"{timed.session.session_id}~{number}")
            starts.append((now_s, named))
    return Window(tuple(starts), {}, from_s, until_s, 0)


@pytest.mark.parametrize(
    ("prefill", "policy", "slo"),
    ((0, "local", Slo(0.1, 0.0115)), (1, "adaptive", Slo(0.07, 0.0095))),
)
def test_windows_show_the_steady_state(prefill: int, policy: str, slo: Slo) -> None:
    """Tight targets, so that waiting shows."""
    workload = Workload.of(SESSIONS["hotpotqa"], 8.0, H200.latency)
    plan = fleet(prefill, 1, policy)

    def on(windows: list[Window]) -> Score:
        return together([score(plan, window, slo, WINDOW_TOKENS) for window in windows])

    long = on([plain(workload, seed, 1500) for seed in (1, 2)])
    short = on([workload.window(seed, 300) for seed in range(8)])
    assert 0.7 < long.attainment < 0.98  # there is something to see
    assert short.attainment == pytest.approx(long.attainment, abs=0.04)
    assert short.ttft_p95 == pytest.approx(long.ttft_p95, rel=0.1)
    assert short.itl_p95 == pytest.approx(long.itl_p95, rel=0.1)


def test_a_fleet_that_drowns_in_the_long_run_does_so_in_a_window() -> None:
    """swe-agent on one H200: at 0.17 sessions per second it does well for ever. At 0.26 it does so for
    some minutes; then more and more sessions are under way, and it never does again."""
    slo = Slo(2.0, 0.05)
    plan, sessions = Plan((group("decode", ALONE, 1),), "adaptive"), agents("swe-agent")
    for rate, low, high in ((0.17, 0.95, 1.0), (0.26, 0.0, 0.5)):
        workload = Workload.of(sessions, rate, ALONE.latency, slo)
        windows = [workload.window(seed, 1500) for seed in range(3)]
        attained = together([score(plan, window, slo, WINDOW_TOKENS) for window in windows]).attainment
        assert low <= attained <= high, (rate, attained)
    unhurried = Workload.of(sessions, 0.26, ALONE.latency)
    kind = score(plan, unhurried.window(1, 400), slo, WINDOW_TOKENS)
    assert kind.attainment > 0.9  # what a window says that opens where nothing waits
