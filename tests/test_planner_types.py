"""Which engines an ask can have, and what it is told when there is none."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from antiphon.engines.cluster import Slo
from antiphon.eval.known_models import KnownModel, model_named, read_models
from antiphon.eval.planner.ask import Ask, Infeasible, PlanError
from antiphon.eval.planner.engine_types import (
    LeftOut,
    attainable,
    engine_types,
    gpu_budget,
    typical,
)
from antiphon.eval.planner.plans import EngineType
from antiphon.eval.planner.prices import GpuPrice
from antiphon.eval.planner.workload import Workload
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost
from antiphon.traces.schema import RoundTrace, SessionTrace

PRICES = {
    "h100": GpuPrice(2.5, 8, 50e9, 64 << 30),
    "a100": GpuPrice(1.5, 8, 25e9, 64 << 30),
    "h20": GpuPrice(1.0, 2, 25e9, 0),
}
MODELS = read_models()


def model(name: str) -> KnownModel:
    return model_named(name, MODELS)[1]


def ask(name: str = "qwen3-32b", tp: tuple[int, ...] = (1, 2, 4, 8), **budget: int) -> Ask:
    return Ask(
        model=name,
        budget=budget,
        slo=Slo(2.0, 0.05),
        session_rate_per_s=0.1,
        window_tokens=131_072,
        tensor_parallel=tp,
    )


def test_memory_and_price_by_hand() -> None:
    """Qwen3-32B: 32,761,446,400 parameters of 2 bytes; 64 layers x 8 heads x 128 x 2 x 2 bytes per token."""
    menu = engine_types(ask(h100=16), model("qwen3-32b"), PRICES)
    by_tp = {each.tp: each for each in menu.types}
    assert list(by_tp) == [2, 4, 8]
    for tp, engine in by_tp.items():
        tokens = (tp * 80e9 * 0.88 - 2 * 32_761_446_400) / 262_144
        assert engine.device_tokens == tokens // 64 * 64
        assert engine.store_tokens == tp * 64 * 2**30 // 262_144  # whole pages already
        assert (engine.gpu, engine.name) == ("h100", f"{tp}xh100")
        assert engine.latency.name == f"qwen3-32b-h100-tp{tp}"
        assert engine.link_bytes_per_s == 50e9
        assert engine.price_per_hour == tp * 2.5
    assert menu.left_out == (
        LeftOut("h100", 1, "18560 tokens of KV fit beside the weights, the longest round has 131072"),
    )


def test_a_workload_of_short_rounds_has_smaller_engines() -> None:
    menu = engine_types(ask(h20=2), model("qwen3-32b"), PRICES, longest_tokens=50_000)
    assert [each.name for each in menu.types] == ["1xh20", "2xh20"]


def test_a_budget_by_any_name_and_an_engine_within_one_server() -> None:
    asked = ask(H100_SXM=4, h20=8)
    assert gpu_budget(asked) == {"h100": 4, "h20": 8}
    menu = engine_types(asked, model("qwen3-32b"), PRICES)
    assert [each.name for each in menu.types] == ["2xh100", "4xh100", "2xh20"]
    why = {each.name: each.reason for each in menu.left_out}
    assert why["4xh20"] == "a server has 2 x h20"
    assert why["8xh100"] == "the budget has 4 x h100"


def test_degrees_without_a_profile_are_left_out() -> None:
    """With all degrees of the menu in a server of 16: nothing was calibrated for 16."""
    prices = {"h100": replace(PRICES["h100"], gpus_per_node=16)}
    menu = engine_types(ask(h100=16, tp=(8, 16)), model("qwen3-32b"), prices)
    assert [each.tp for each in menu.types] == [8]
    assert "no latency profile" in menu.left_out[0].reason


def test_nothing_fits() -> None:
    with pytest.raises(Infeasible) as told:
        engine_types(ask("mixtral-8x7b", (1,), h100=8), model("mixtral-8x7b"), PRICES)
    assert "the weights (93 GB) leave no room on 1 x H100" in told.value.reason
    assert told.value.nearest == "one engine on your GPUs takes h100:2 with tensor parallel 2"


def test_the_budget_is_too_small_for_one_engine() -> None:
    with pytest.raises(Infeasible) as told:
        engine_types(ask(h100=1), model("qwen3-32b"), PRICES)
    assert "2xh100: the budget has 1 x h100" in told.value.reason
    assert told.value.nearest == "one engine on your GPUs takes h100:2"


def test_another_gpu_would_do() -> None:
    prices = {**PRICES, "h20": replace(PRICES["h20"], gpus_per_node=1)}
    with pytest.raises(Infeasible) as told:
        engine_types(ask("llama-3.1-70b", h20=8), model("llama-3.1-70b"), prices)
    assert told.value.nearest == "one engine on others takes a100:4, or h100:4"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(PlanError, match="no GPU 'tpu'"):
        engine_types(ask(tpu=8), model("qwen3-32b"), PRICES)
    with pytest.raises(PlanError, match="no price for l40s"):
        engine_types(ask(l40s=8), model("qwen3-32b"), PRICES)


# ---------------------------------------------------------------- targets


def engine(name: str, per_token_s: float, step_s: float) -> EngineType:
    latency = LatencyModel(
        name, "by hand", PrefillCost(0.0, per_token_s), DecodeCost(step_s), TransferCost(0.0, 1e9, 1000)
    )
    return EngineType(name, 1, latency, 10_000, 10_000, 1e9, 1.0)


FAST_PREFILL, FAST_DECODE = engine("fast-prefill", 0.001, 0.04), engine("fast-decode", 0.004, 0.01)
ROUNDS = (
    RoundTrace(prompt_tokens=1000, output_tokens=11),  # 1 s alone
    RoundTrace(prompt_tokens=1111, output_tokens=11, kept_tokens=1011, gap_s=5.0),  # 0.1 s
    RoundTrace(prompt_tokens=1322, output_tokens=1, kept_tokens=1122, gap_s=5.0),  # 0.2 s, one token
)
WORKLOAD = Workload.of([SessionTrace("s", ROUNDS)], 1.0, FAST_PREFILL.latency)


def test_the_typical_engine_does_not_depend_on_the_order() -> None:
    """It decides who is under way: `--gpus a,b` and `--gpus b,a` are one ask."""
    types = [replace(FAST_PREFILL, gpu=gpu, tp=tp) for gpu in ("h100", "a100") for tp in (1, 4, 8)]
    assert typical(types).name == typical(types[::-1]).name == "4xa100"
    assert typical(types[:1]) is types[0]


def test_what_an_unloaded_engine_reaches() -> None:
    """Each phase on the engine that is best at it."""
    unloaded = attainable((FAST_PREFILL, FAST_DECODE), WORKLOAD, Slo(0.5, 0.02))
    assert unloaded.share == unloaded.ttft_share == pytest.approx(2 / 3)
    assert unloaded.itl_share == 1.0
    assert (unloaded.ttft_p50_s, unloaded.ttft_p95_s) == pytest.approx((0.2, 1.0))
    assert (unloaded.itl_p50_s, unloaded.itl_p95_s) == (0.01, 0.01)


def test_targets_below_one_unloaded_prefill() -> None:
    with pytest.raises(Infeasible) as told:
        attainable((FAST_PREFILL, FAST_DECODE), WORKLOAD, Slo(0.05, 0.02))
    assert told.value.reason.startswith("no round can have a first token in 0.05 s, even alone")
    assert "TTFT 0.2 s and ITL 0.01 s" in told.value.nearest
    assert "95 % TTFT 1 s" in told.value.nearest
    attainable((FAST_PREFILL, FAST_DECODE), WORKLOAD, Slo(1.0, 0.01))  # the nearest can be asked


def test_only_a_round_of_one_token_has_no_gaps() -> None:
    assert attainable((FAST_PREFILL,), WORKLOAD, Slo(2.0, 0.03)).share == pytest.approx(1 / 3)
