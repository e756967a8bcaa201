"""Fitting latency profiles: least squares by hand, known coefficients, points, scaling, the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.eval.aiconfigurator_query import ask
from antiphon.eval.fit import fit, main
from antiphon.eval.fit_points import (
    DECODE_GRID,
    PREFILL_GRID,
    Points,
    PointsError,
    ask_aiconfigurator,
    read_points,
    scale_points,
)
from antiphon.eval.hardware import GPUS, ModelShape, device_tokens, shape_of
from antiphon.eval.known_models import profile_name
from antiphon.eval.least_squares import (
    DecodePoint,
    FitFailed,
    PrefillPoint,
    fit_decode,
    fit_error,
    fit_prefill,
    relative_least_squares,
)
from antiphon.policies.latency import load_latency_model

STORED = Path(__file__).with_name("data") / "points-qwen3-32b-h200-tp4.json"
"""What AIConfigurator 0.12.0 answered for Qwen3-32B on 4 x H200."""
QWEN = {
    "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936,
}  # fmt: skip
LLAMA = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 128256,
}  # fmt: skip
MIXTRAL = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
COST = st.floats(0.1, 10.0)


# ---------------------------------------------------------------- least squares


def test_errors_count_as_shares() -> None:
    """A constant for points 1 and 3: (c - 1)^2 + (c/3 - 1)^2 is least at c = (1 + 1/3) / (1 + 1/9) = 1.2."""
    assert relative_least_squares([(1.0,), (1.0,)], [1.0, 3.0]) == pytest.approx([1.2])


@given(st.tuples(COST, COST, COST, COST))
@settings(max_examples=25, deadline=None)
def test_prefill_coefficients_come_back(scale: tuple[float, float, float, float]) -> None:
    """Points made from coefficients give those coefficients and no error."""
    fixed, each, cached, squared = 1e-2 * scale[0], 1e-5 * scale[1], 1e-9 * scale[2], 1e-9 * scale[3]
    points = [
        PrefillPoint(n, p, fixed + n * each + n * p * cached + n * n * squared) for n, p in PREFILL_GRID
    ]
    cost, error = fit_prefill(points)
    assert msgspec.structs.astuple(cost)[:4] == pytest.approx((fixed, each, cached, squared), rel=1e-6)
    assert error.points == 72 and error.max < 1e-9


@given(st.tuples(COST, COST, COST, COST), st.sampled_from([0.0, 0.5, 0.75, 0.9375]))
@settings(max_examples=25, deadline=None)
def test_decode_coefficients_come_back(scale: tuple[float, float, float, float], missed: float) -> None:
    """The same for a decode step, dense and with the term of the experts."""
    fixed, each, context = 1e-2 * scale[0], 1e-5 * scale[1], 1e-8 * scale[2]
    experts = 1e-2 * scale[3] if missed else 0.0
    points = [
        DecodePoint(b, b * t, fixed + b * each + b * t * context + experts * (1 - missed**b))
        for b, t in DECODE_GRID
    ]
    cost, error = fit_decode(points, missed)
    expected = (fixed, each, context, experts, missed)
    assert msgspec.structs.astuple(cost) == pytest.approx(expected, rel=1e-5)
    assert error.points == 63 and error.max < 1e-9


def test_no_coefficient_is_negative() -> None:
    """Points that get cheaper with N^2 lose that term, and the rest is refitted."""
    points = [PrefillPoint(n, p, 0.01 + n * 1e-4 - n * n * 1e-9) for n, p in PREFILL_GRID]
    cost, error = fit_prefill(points)
    assert cost.per_token_squared_s == 0.0
    assert min(msgspec.structs.astuple(cost)) >= 0.0
    assert error.max < 0.2


@given(st.lists(st.tuples(st.integers(1, 256), st.integers(1, 10**6), st.floats(1e-3, 1.0)), min_size=4))
@settings(max_examples=40, deadline=None)
def test_the_best_non_negative_fit_is_found(points: list[tuple[int, int, float]]) -> None:
    """Whatever the points, no coefficient is negative and no single step away from the answer is better."""
    rows = [(1.0, float(batch), float(context)) for batch, context, _ in points]
    values = [seconds for _, _, seconds in points]
    try:
        found = relative_least_squares(rows, values)
    except FitFailed:
        return

    def residual(coefficients: list[float]) -> float:
        return sum(
            (sum(c * x for c, x in zip(coefficients, row, strict=True)) / value - 1) ** 2
            for row, value in zip(rows, values, strict=True)
        )

    least = residual(found)
    assert min(found) >= 0.0
    for column in range(3):
        typical = 0.01 / max(row[column] for row in rows)
        for step in (-typical, typical):
            other = list(found)
            other[column] = max(0.0, other[column] + 0.01 * step)
            assert residual(other) >= least - 1e-9 * max(1.0, least)


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([(1.0, 2.0), (1.0, 3.0)], [1.0, 1.0], "more points than coefficients"),
        ([], [], "more points than coefficients"),
        ([(1.0,), (1.0,)], [1.0, 0.0], "above zero"),
        ([(0.0,), (0.0,)], [1.0, 1.0], "vary every quantity"),
    ],
)
def test_points_that_determine_nothing_are_refused(
    rows: list[tuple[float, ...]], values: list[float], message: str
) -> None:
    """FitFailed says what the points lack."""
    with pytest.raises(FitFailed, match=message):
        relative_least_squares(rows, values)


def test_errors_by_hand() -> None:
    """Twenty points of which one is off by 50 %, one by 10 %: mean 3 %, p95 and max 50 %."""
    error = fit_error([(1.0,)] * 20, [1.0] * 18 + [1 / 1.1, 2.0], [1.0])
    assert (error.points, error.p95, error.max) == (20, 0.5, 0.5)
    assert error.mean == pytest.approx(0.03)


# ---------------------------------------------------------------- hardware


@pytest.mark.parametrize(
    ("config", "kv_bytes", "parameters", "active"),
    [
        (QWEN, 262_144, 32.76e9, 31.98e9),
        (LLAMA, 327_680, 70.55e9, 69.50e9),
        # 2 of 8 experts: 12.7 of 46.7 billion for one token
        (MIXTRAL, 131_072, 46.70e9, 12.75e9),
    ],
)
def test_shapes(config: dict[str, int], kv_bytes: int, parameters: float, active: float) -> None:
    """Bytes of KV per token and parameters, from the model's config.json, as published."""
    shape = shape_of(config)
    assert shape.kv_bytes_per_token(4) == kv_bytes
    assert shape.parameters == pytest.approx(parameters, rel=1e-3)
    assert shape.active_parameters == pytest.approx(active, rel=1e-3)
    assert shape.expert_missed == (0.75 if config is MIXTRAL else 0.0)


def test_kv_heads_are_repeated_when_there_are_more_ranks() -> None:
    """2 KV heads on 8 ranks: every rank holds one, so four times the bytes."""
    shape = ModelShape(layers=3, kv_heads=2, head_dim=16, parameters=1, active_parameters=1)
    assert shape.kv_bytes_per_token(2) == 3 * 2 * 2 * 16 * 2
    assert shape.kv_bytes_per_token(8) == 4 * shape.kv_bytes_per_token(2)


def test_a_config_without_a_key_is_refused() -> None:
    """ValueError names the key."""
    with pytest.raises(ValueError, match="vocab_size"):
        shape_of({key: value for key, value in QWEN.items() if key != "vocab_size"})


def test_device_tokens() -> None:
    """0.88 x 80 GB less 20 GB of weights = 50.4 GB; at 1 MB a token 50,400, in whole pages of 64 50,368."""
    shape = ModelShape(layers=125, kv_heads=1, head_dim=2000, parameters=10_000_000_000, active_parameters=1)
    assert shape.kv_bytes_per_token(1) == 1_000_000
    assert device_tokens(shape, GPUS["h100_sxm"], 1) == 50_368
    with pytest.raises(ValueError, match="leave no room"):
        device_tokens(msgspec.structs.replace(shape, parameters=40_000_000_000), GPUS["h100_sxm"], 1)


# ---------------------------------------------------------------- points


def test_the_published_fit_is_reproduced() -> None:
    """Qwen3-32B on 4 x H200, as fitted before this command existed: coefficients to the digits given."""
    model = fit(read_points(STORED), "x", "2026-01-01")
    prefill = [coefficient * 1e3 for coefficient in msgspec.structs.astuple(model.prefill)[:4]]
    assert prefill == pytest.approx([7.17, 0.02749, 8.31e-7, 6.02e-7], rel=1e-3)
    decode = [coefficient * 1e3 for coefficient in msgspec.structs.astuple(model.decode)[:3]]
    assert decode == pytest.approx([6.638, 0.01716, 1.496e-5], rel=1e-3)
    assert model.prefill_error is not None and model.decode_error is not None
    assert (model.prefill_error.mean, model.decode_error.mean) == pytest.approx((0.033, 0.015), rel=0.02)
    assert (model.prefill_error.max, model.decode_error.max) == pytest.approx((0.109, 0.075), rel=0.01)


def test_the_bundled_profile_is_the_fit_of_the_stored_points() -> None:
    """Nobody edited the numbers by hand: refitting gives the file that ships, but for the date."""
    bundled = load_latency_model("qwen3-32b-h200-tp4")
    again = fit(read_points(STORED), bundled.name, "2026-11-24")
    assert again == bundled


def test_h20_points_by_hand() -> None:
    """Prefill beyond its fixed part x 989/148; decode x 3.35/4.0, plus arithmetic beyond the weights."""
    shape = ModelShape(1, 1, 1, parameters=4_000_000_000, active_parameters=4_000_000_000)
    prefill = tuple(PrefillPoint(n, 0, 0.01 + n * 1e-4) for n in (10, 20, 30, 40, 50))
    decode = (DecodePoint(1, 100, 0.008), DecodePoint(1000, 100, 0.020))
    scaled = scale_points(Points("m", "h100_sxm", 1, "here", shape, prefill, decode), "h20_sxm")
    assert scaled.system == "h20_sxm" and scaled.source.startswith("scaled, not measured: H100")
    assert scaled.prefill[0].seconds == pytest.approx(0.01 + 10 * 1e-4 * 989 / 148)
    # one request: 8e9 / 148e12 s of arithmetic are less than the 8e9 / 4e12 s that the weights take
    assert scaled.decode[0].seconds == pytest.approx(0.008 * 3.35 / 4.0)
    # a thousand: 54.05 ms of arithmetic, 2 ms of weights
    assert scaled.decode[1].seconds == pytest.approx(0.020 * 3.35 / 4.0 + 1000 * 8e9 / 148e12 - 0.002)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a file of points"), ("{}", "not a file of points"), ("schema", "schema 'other/1'")],
)
def test_bad_points_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    """PointsError names the file and what is wrong."""
    path = tmp_path / "points.json"
    if content == "schema":
        content = STORED.read_text().replace("antiphon.points/1", "other/1")
    if content is not None:
        path.write_text(content)
    with pytest.raises(PointsError, match=message) as caught:
        read_points(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------- the other Python


def script(tmp_path: Path, body: str) -> Path:
    """A program that stands where the other Python is named."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_python_without_aiconfigurator_is_named(tmp_path: Path) -> None:
    """The query runs there and fails; the error says where, why, and what to install."""
    with pytest.raises(PointsError, match="aiconfigurator_core") as caught:
        ask_aiconfigurator(Path(sys.executable), "Qwen/Qwen3-32B", "h200_sxm", 4)
    assert sys.executable in str(caught.value) and "pip install aiconfigurator" in str(caught.value)
    with pytest.raises(PointsError, match="cannot be run"):
        ask_aiconfigurator(tmp_path / "none", "Qwen/Qwen3-32B", "h200_sxm", 4)


def test_the_query_has_a_deadline(tmp_path: Path) -> None:
    """A Python that says nothing is given up."""
    with pytest.raises(PointsError, match=r"no answer within 0\.2 s"):
        ask_aiconfigurator(script(tmp_path, "exec sleep 30"), "m", "h200_sxm", 4, deadline_s=0.2)


def test_an_answer_becomes_points(tmp_path: Path) -> None:
    """Context is of the whole batch; what the database lacks or estimates is in the source."""
    answer = {
        "database": "aiconfigurator-core 9", "backend_version": "1.2", "config": MIXTRAL,
        "prefill": [[64, 0, 0.01]], "decode": [[8, 512, 0.02]], "left_out": 3, "estimated": 0,
    }  # fmt: skip
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    python = script(tmp_path, f"cat > {tmp_path}/asked.json; cat {tmp_path}/answer.json")
    points = ask_aiconfigurator(python, "a/b", "a100_sxm", 2)
    assert points.prefill == (PrefillPoint(64, 0, 0.01),)
    assert points.decode == (DecodePoint(8, 8 * 512, 0.02),)
    assert points.source == (
        "aiconfigurator-core 9, a100_sxm, sglang 1.2, tp 2: 1 prefill and 1 decode points, 3 without data"
    )
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert (asked["model"], asked["system"], asked["tp"]) == ("a/b", "a100_sxm", 2)
    assert (len(asked["prefill"]), len(asked["decode"])) == (72, 63)


def test_points_without_data_are_left_out() -> None:
    """The database's own refusal is counted, its estimates too; any other error is an error."""

    class PerfDataNotAvailableError(Exception):
        pass

    class Engine:
        def last_provenance(self) -> str | None:
            return "empirical"

    def latency_ms(first: int, _: int) -> float:
        if first == 2:
            raise PerfDataNotAvailableError
        return 5.0 * first

    answered = ask(Engine(), [(1, 0), (2, 0), (3, 0)], latency_ms)
    assert answered == ([(1, 0, 0.005), (3, 0, 0.015)], 1, 2)
    with pytest.raises(ZeroDivisionError):
        ask(Engine(), [(1, 0)], lambda first, second: first / second)


# ---------------------------------------------------------------- the command


def test_the_command_refits_stored_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--points needs no AIConfigurator; the profile loads, and the formulas are printed in milliseconds."""
    out = tmp_path / "profile.json"
    assert main(["--points", str(STORED), "-o", str(out)]) == 0
    assert load_latency_model(str(out)).prefill == load_latency_model("qwen3-32b-h200-tp4").prefill
    said = capsys.readouterr().out
    assert "prefill ms = 7.17 + 0.02749 N + 8.31e-07 N P + 6.02e-07 N^2  (72 points" in said
    assert "decode  ms = 6.638 + 0.01716 B + 1.496e-05 T  (63 points" in said


def test_the_command_scales_and_saves(tmp_path: Path) -> None:
    """--system with --points scales them; what --save-points wrote gives the same profile again."""
    first, second, saved = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "points.json"
    scaling = ["--points", str(STORED), "--system", "h20_sxm", "--save-points", str(saved)]
    assert main([*scaling, "-o", str(first)]) == 0
    assert main(["--points", str(saved), "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    model = load_latency_model(str(first))
    assert (model.name, model.gpu) == ("qwen3-32b-h20-tp4", "H20 96 GB")
    assert "scaled, not measured" in model.source


def test_the_command_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1 and one line, no traceback."""
    assert main(["--model", "m", "-o", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err.startswith("fit: give --points FILE, or --model")


@pytest.mark.parametrize(
    ("model", "system", "name"),
    [
        ("Qwen/Qwen3-32B", "h200_sxm", "qwen3-32b-h200-tp4"),
        ("meta-llama/Meta-Llama-3.1-70B", "a100_sxm", "llama-3.1-70b-a100-tp4"),
        ("mistralai/Mixtral-8x7B-v0.1", "h20_sxm", "mixtral-8x7b-h20-tp4"),
    ],
)
def test_names_of_profiles(model: str, system: str, name: str) -> None:
    """MODEL-GPU-tpN, in lower case; every one of them ships."""
    assert profile_name(model, system, 4) == name
    assert load_latency_model(name).name == name
