"""A window begins in the middle of things, and shows what a long simulation from an empty fleet shows."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.score import Score, score, together
from antiphon.eval.planner.workload import Window, Workload
from antiphon.traces.schema import SessionTrace
from tests.test_planner_workload import H200, SESSIONS, WINDOW_TOKENS, fleet


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
