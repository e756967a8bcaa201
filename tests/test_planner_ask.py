"""What `antiphon plan` is told, and what it says to what it cannot use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.eval.known_models import model_named, read_models
from antiphon.eval.planner.ask import PlanError, Rated, choose
from antiphon.eval.planner.engine_types import engine_types
from antiphon.eval.planner.plan import PlanOptions, ask_of, parse_degrees, parse_gpus
from antiphon.eval.planner.plans import Group, Plan
from antiphon.eval.planner.prices import read_prices
from antiphon.eval.planner.read_sessions import GENERATED_SESSIONS, read_sessions
from antiphon.eval.planner.score import Score
from antiphon.traces.schema import TraceError

OPTIONS = PlanOptions("claude-code", "h100:16,a100:16", "qwen3-32b", 2.0, 0.05, 0.1)
NAME, MODEL = model_named("qwen3-32b", read_models())


def test_an_ask_by_its_options() -> None:
    ask = ask_of(replace(OPTIONS, gpus="H100_SXM:8, a100:4", tensor_parallel="4,2,4"), NAME, MODEL)
    assert ask.budget == {"h100": 8, "a100": 4}
    assert ask.tensor_parallel == (2, 4)
    assert (ask.slo.ttft_s, ask.slo.itl_s, ask.session_rate_per_s) == (2.0, 0.05, 0.1)
    assert ask.policies == ("adaptive", "ampd") and ask.window_tokens == MODEL.window_tokens


def test_both_forms_begin_under_the_same_policy() -> None:
    """Else the comparison of pools with co-location, and the early rungs, are one of policies."""
    ask = ask_of(OPTIONS, NAME, MODEL)
    assert ask.policies[0] == ask.colocated_policies[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": "h100"}, "'h100' is not KIND:NUMBER"),
        ({"gpus": "h100:0"}, "'h100:0' is not KIND:NUMBER"),
        ({"gpus": "h100:4,"}, "'' is not KIND:NUMBER"),
        ({"gpus": "h100:4,h100:2"}, "h100 is there twice"),
        ({"gpus": "h100:²"}, "is not KIND:NUMBER"),
        ({"gpus": "tpu:4"}, "'tpu'"),
        ({"slo_ttft_s": 0.0}, "--slo-ttft must be above 0, not 0"),
        ({"slo_itl_s": float("nan")}, "--slo-itl must be above 0, not nan"),
        ({"session_rate_per_s": -1.0}, "--session-rate must be above 0, not -1"),
        ({"session_rate_per_s": float("inf")}, "--session-rate must be above 0, not inf"),
        ({"tolerance": 1.0}, "--tolerance is a share"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"policies": ","}, "--policies names no policy"),
        ({"policies": "adaptive,local"}, "--policies: local sends nothing to a prefill pool"),
        ({"policies": "adaptive,best"}, "--policies: unknown policy 'best'"),
        ({"tensor_parallel": "2,x"}, "--tp '2,x'"),
    ],
)
def test_what_cannot_be_asked_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        ask_of(replace(OPTIONS, **change), NAME, MODEL)  # type: ignore[arg-type]
    assert message in str(caught.value)


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_text_is_a_budget_or_an_error(text: str) -> None:
    try:
        budget = parse_gpus(text)
    except PlanError:
        return
    assert budget and all(name and count > 0 for name, count in budget.items())


@given(
    st.dictionaries(st.from_regex("[a-z][a-z0-9_]{0,8}", fullmatch=True), st.integers(1, 100_000), min_size=1)
)
def test_budgets_are_read_back(budget: dict[str, int]) -> None:
    assert parse_gpus(",".join(f"{name}:{count}" for name, count in budget.items())) == budget


@given(st.lists(st.integers(1, 64), min_size=1))
def test_degrees_are_read_back(degrees: list[int]) -> None:
    assert parse_degrees(",".join(map(str, degrees))) == tuple(sorted(set(degrees)))


# ---------------------------------------------------------------- sessions


def test_sessions_of_a_profile_are_generated() -> None:
    read = read_sessions(OPTIONS, MODEL.window_tokens)
    assert sum(session.parent is None for session in read.sessions) == GENERATED_SESSIONS
    assert read.sha256 == "" and "generated, seed 0" in read.described
    assert max(turn.gap_s for session in read.sessions for turn in session.rounds) <= OPTIONS.max_gap_s


def test_sessions_of_a_trace(demo_trace: Path) -> None:
    read = read_sessions(replace(OPTIONS, trace=str(demo_trace), max_sessions=5), MODEL.window_tokens)
    assert len(read.sessions) == 5 and len(read.sha256) == 64
    with pytest.raises(TraceError, match="no session is left to plan for"):
        read_sessions(replace(OPTIONS, trace=str(demo_trace)), 100)


@pytest.mark.parametrize(
    ("trace", "message"),
    [("nowhere.jsonl", "neither a trace"), ("nowhere.toml", "cannot be read"), ("clode", "claude-code")],
)
def test_sessions_that_are_nowhere(trace: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_sessions(replace(OPTIONS, trace=trace), MODEL.window_tokens)


@pytest.fixture
def demo_trace() -> Path:
    return Path(__file__).resolve().parent.parent / "traces" / "data" / "demo.jsonl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "delta"}, "--form: for recorded traces only; claude-code is a workload profile"),
        ({"share_system": True, "skip_bad": True}, "--share-system and --skip-bad: for recorded traces only"),
        ({"form": "bogus"}, "--form bogus: must be one of auto, cumulative, delta"),
        ({"form": "bogus", "trace": "nowhere.jsonl"}, "--form bogus: must be one of"),
    ],
)
def test_options_of_recorded_traces_are_not_ignored(change: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_sessions(replace(OPTIONS, **change), MODEL.window_tokens)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the choice among equals

TYPE = engine_types(ask_of(OPTIONS, NAME, MODEL), MODEL, read_prices(), 4096).types[0]
EQUAL = Score(100, 90, 10, 0, 0, 1.0, 1.0, 100)


def rated(engines: int, policy: str, price: float = 8.0, score: Score = EQUAL) -> Rated:
    each = msgspec.structs.replace(TYPE, tp=1, price_per_gpu_hour=price / engines)
    return Rated(Plan((Group("decode", each, engines, 2048, 4),), policy), score)


@pytest.mark.parametrize(
    ("chosen", "other"),
    [
        (rated(1, "local"), rated(1, "adaptive")),
        (rated(1, "adaptive"), rated(2, "local")),
        (rated(2, "adaptive"), rated(2, "local")),
        (rated(2, "adaptive", 7.0), rated(1, "local")),
        (rated(2, "adaptive", score=msgspec.structs.replace(EQUAL, attained=91)), rated(1, "local")),
    ],
)
def test_of_equals_the_simpler(chosen: Rated, other: Rated) -> None:
    """Price first, then attainment; then fewer engines; alone, the policy that sends nothing anywhere."""
    assert choose((chosen, other), 0.02) == choose((other, chosen), 0.02) == chosen
