"""Windows of a trace in steady state, and plans scored on them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines.cluster import Slo
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.eval.planner.score import Score, difference_noise, score, together
from antiphon.eval.planner.workload import ENTRY_S, Window, Workload
from antiphon.eval.simulation_plan import check_parents
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost, load_latency_model
from antiphon.traces.generate import generate, take
from antiphon.traces.profiles import load_profile
from antiphon.traces.schema import RoundTrace, SessionTrace, TraceError, session_fault
from antiphon.traces.shape import Shape, shape

IDLE = LatencyModel(
    "idle", "by hand", PrefillCost(0.0, 0.001), DecodeCost(0.01), TransferCost(0.0, 1e9, 1000)
)
H200 = EngineType("h200", 4, load_latency_model("qwen3-32b-h200-tp4"), 1_643_328, 2_097_152, 50e9, 3.5)
WINDOW_TOKENS = 131_072


def turns(*gaps_s: float) -> tuple[RoundTrace, ...]:
    """Rounds of 100 new tokens and 101 of output, each over all before it: 0.1 s and 1 s when idle."""
    made: list[RoundTrace] = []
    for gap_s in gaps_s:
        kept = made[-1].total_tokens if made else 0
        made.append(RoundTrace(prompt_tokens=kept + 100, output_tokens=101, kept_tokens=kept, gap_s=gap_s))
    return tuple(made)


def agents(profile: str = "claude-code", count: int = 40) -> tuple[SessionTrace, ...]:
    """The first sessions of a profile that arrive, with their sub-agents."""
    found: list[SessionTrace] = []
    for session in take(generate(profile, load_profile(profile))):
        if sum(each.parent is None for each in found) == count and session.parent is None:
            break
        found.append(session)
    return shape(found, Shape(max_gap_s=60, window_tokens=WINDOW_TOKENS)).sessions


def all_sessions(window: Window) -> list[SessionTrace]:
    return [session for _, session in window.starts] + [s for each in window.children.values() for s in each]


# ---------------------------------------------------------------- by hand


def test_how_long_rounds_last_and_what_is_live() -> None:
    workload = Workload.of([SessionTrace("s", turns(0, 10, 20))], 0.5, IDLE)
    ((timed,),) = workload.families
    assert timed.sent_s == pytest.approx((0, 11.1, 32.2))
    assert timed.ended_s == pytest.approx((1.1, 12.2, 33.3))
    assert workload.rounds_per_s == pytest.approx(1.5)
    assert workload.live_sessions == pytest.approx(0.5 * 33.3)
    assert workload.live_tokens == pytest.approx(0.5 * (201 * 11.1 + 402 * 21.1 + 603 * 1.1))


def test_the_warm_up_by_hand() -> None:
    """0.6 of what is measured; from two rounds of 1.1 s to 1,000 rounds, or two of each session."""
    session = SessionTrace("s", turns(0, 10, 20))
    some, many = (Workload.of([session], rate, IDLE) for rate in (10.0, 100.0))

    def warm_up_s(workload: Workload, rounds: int, rate_factor: float = 1.0) -> float:
        return workload.window(1, rounds, rate_factor).from_s - ENTRY_S

    assert warm_up_s(some, 300) == pytest.approx(0.6 * 10)
    assert warm_up_s(some, 30) == pytest.approx(2 * 1.1)
    assert warm_up_s(some, 3_000) == pytest.approx(1_000 / 30)
    assert warm_up_s(some, 3_000, 0.5) == pytest.approx(0.6 * 100)
    assert warm_up_s(some, 30_000, 0.5) == pytest.approx(1_000 / 15)
    assert many.live_sessions == pytest.approx(3_330)
    assert warm_up_s(many, 30_000) == pytest.approx(2 * 3_330 / 300)


def test_a_session_under_way_brings_its_history_in_one_round() -> None:
    """Every session rests for 1,000 s and one comes every 10 s: about a hundred are under way."""
    workload = Workload.of([SessionTrace("s", turns(0, 997.8))], 0.1, IDLE)
    window = workload.window(seed=3, rounds=20)
    entered = [session for start_s, session in window.starts if start_s == 0.0]
    assert len(entered) == window.live > 50
    sent = 0
    for session in entered:
        entry, *later = session.rounds
        assert entry == RoundTrace(prompt_tokens=201, output_tokens=1)
        for turn in later:  # the others rest for all of the window, and hold their KV
            sent += 1
            assert (turn.prompt_tokens, turn.kept_tokens) == (301, 201)
            assert ENTRY_S <= turn.gap_s <= window.until_s
    assert 5 < sent < 30
    for start_s, session in window.starts:
        if session not in entered:
            assert start_s >= ENTRY_S and session.rounds == turns(0, 997.8)[: len(session.rounds)]


def test_sub_agents_stay_with_the_part_of_their_parent_that_is_left() -> None:
    parent = SessionTrace("p", turns(0, 100, 100, 100))
    first = SessionTrace("c1", turns(0), parent="p", after_round=1)
    last = SessionTrace("c3", turns(0), parent="p", after_round=3)
    workload = Workload.of([parent, first, last], 0.05, IDLE)
    window = workload.window(seed=1, rounds=60)
    parents = {s.session_id: s for s in all_sessions(window) if s.session_id.startswith("p~")}
    seen = {"c1": 0, "c3": 0}
    for owner, children in window.children.items():
        for child in children:
            name = child.session_id.partition("~")[0]
            seen[name] += 1
            whole = len(parent.rounds) + 1 - len(parents[owner].rounds)
            assert child.after_round - (1 if name == "c1" else 3) in (0, -whole, 1 - whole)
            assert child.after_round <= len(parents[owner].rounds)
    assert all(seen.values()), seen


def test_nothing_to_plan_for_is_said() -> None:
    with pytest.raises(TraceError, match="no session arrives by itself"):
        Workload.of([], 1.0, IDLE)


# ---------------------------------------------------------------- properties


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rounds=st.integers(10, 400),
    rate=st.floats(0.005, 0.5),
    factor=st.sampled_from((0.5, 1.0, 1.2)),
    profile=st.sampled_from(("claude-code", "hotpotqa")),
)
def test_windows_are_sound(seed: int, rounds: int, rate: float, factor: float, profile: str) -> None:
    workload = Workload.of(SESSIONS[profile], rate, H200.latency)
    window = workload.window(seed, rounds, factor)
    sessions = all_sessions(window)
    assert [session_fault(session) for session in sessions] == [None] * len(sessions)
    assert len({session.session_id for session in sessions}) == len(sessions)
    check_parents(sessions)
    starts_s = [start_s for start_s, _ in window.starts]
    assert starts_s == sorted(starts_s) and all(0 <= start_s <= window.until_s for start_s in starts_s)
    assert window.until_s - window.from_s == pytest.approx(workload.measured_s(rounds))
    assert workload.window(seed, rounds, factor) == window


def test_as_many_rounds_and_live_sessions_as_by_littles_law() -> None:
    workload = Workload.of(SESSIONS["hotpotqa"], 1.0, H200.latency)
    windows = [workload.window(seed, 2000) for seed in range(8)]
    live = sum(window.live for window in windows) / len(windows)
    assert live == pytest.approx(workload.live_sessions, rel=0.25)
    sent = sum(len(s.rounds) for window in windows for s in all_sessions(window)) / len(windows)
    expected = workload.rounds_per_s * windows[0].until_s + live
    assert sent == pytest.approx(expected, rel=0.1)


# ---------------------------------------------------------------- scores


def fleet(prefill: int, decode: int, policy: str = "adaptive") -> Plan:
    groups = [Group("decode", H200, decode, 2048, 4)]
    if prefill:
        groups.insert(0, Group("prefill", H200, prefill, 8192, 4))
    return Plan(tuple(groups), policy)


def test_history_is_there_when_the_window_opens() -> None:
    """A round is prefilled over what its session had, though nobody computed that within the window."""
    workload = Workload.of(SESSIONS["claude-code"], 0.01, H200.latency)
    window = workload.window(seed=0, rounds=150)
    assert window.live > 3
    found = score(fleet(1, 2), window, Slo(2.0, 0.05), WINDOW_TOKENS)
    cold = Window(
        tuple((s, session) for s, session in window.starts if s > 0.0),
        window.children,
        0.0,
        window.until_s,
        0,
    )
    assert found.refused == 0 and found.attainment > 0.9
    assert found.ttft_p95 <= score(fleet(1, 2), cold, Slo(2.0, 0.05), WINDOW_TOKENS).ttft_p95 * 1.5


def test_more_engines_attain_more_and_targets_count() -> None:
    workload = Workload.of(SESSIONS["claude-code"], 0.1, H200.latency)
    window = workload.window(seed=0, rounds=400)
    small, large = (score(fleet(0, n, "local"), window, Slo(1.0, 0.05), WINDOW_TOKENS) for n in (1, 8))
    assert small.attainment < large.attainment
    assert small.ttft_p95 > large.ttft_p95
    never = score(fleet(0, 8, "local"), window, Slo(1e-6, 0.05), WINDOW_TOKENS)
    assert never.attained == 0 and never.ttft_missed == never.rounds == large.rounds
    assert score(fleet(0, 8, "local"), window, Slo(1.0, 0.05), WINDOW_TOKENS) == large


def test_windows_add_up() -> None:
    one, two = Score(10, 9, 1, 0, 0, 0.8, 0.4, 12), Score(30, 15, 10, 3, 2, 1.2, 0.6, 40)
    both = together([one, two])
    assert (both.rounds, both.attained, both.refused, both.simulated_rounds) == (40, 24, 2, 52)
    assert both.attainment == 0.6 and both.ttft_p95 == pytest.approx(1.0)
    assert both.by_window == (0.9, 0.5)


def scored(*attained: int) -> Score:
    return together([Score(1000, each, 1000 - each, 0, 0, 0.5, 0.5, 1000) for each in attained])


def test_the_error_is_that_of_the_windows() -> None:
    """1,000 independent rounds at 90 % have an error of 0.95 points, three thousand 0.55. Windows of 95, 90
    and 85 % have a standard deviation of 5 points: 2.9 for their mean."""
    assert scored(900, 900, 900).noise == pytest.approx(0.0055, abs=1e-4)
    assert scored(950, 900, 850).noise == pytest.approx(0.05 / 3**0.5)
    assert Score(1000, 900, 100, 0, 0, 0.5, 0.5, 1000).noise == pytest.approx(0.0095, abs=1e-4)


def test_a_difference_is_surer_on_the_same_windows() -> None:
    """Both find the third window hard: one is always 2 points ahead, within what independent rounds say."""
    one, other = scored(950, 900, 850), scored(930, 880, 830)
    independent = (0.9 * 0.1 / 3000 + 0.88 * 0.12 / 3000) ** 0.5
    assert difference_noise(one, other) == pytest.approx(independent)
    assert difference_noise(one, scored(830, 880, 930)) == pytest.approx(0.1 / 3**0.5)
    alone = Score(1000, 880, 120, 0, 0, 0.5, 0.5, 1000)
    assert difference_noise(one, alone) == pytest.approx((one.noise**2 + alone.noise**2) ** 0.5)


SESSIONS = {profile: agents(profile) for profile in ("claude-code", "hotpotqa")}
