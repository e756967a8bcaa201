"""The latency formulas by hand, and the profiles that ship with the package."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.policies.latency import (
    DecodeCost,
    LatencyModel,
    LoadCost,
    PrefillCost,
    TransferCost,
    bundled_profiles,
    load_latency_model,
)

MODEL = LatencyModel(
    name="by-hand",
    source="this file",
    prefill=PrefillCost(fixed_s=0.5, per_token_s=0.25, per_token_cached_s=0.125, per_token_squared_s=0.0625),
    decode=DecodeCost(fixed_s=1.0, per_request_s=0.5, per_context_token_s=0.25),
    transfer=TransferCost(fixed_s=2.0, bytes_per_s=8.0, kv_bytes_per_token=4),
    load=LoadCost(fixed_s=0.5, bytes_per_s=16.0),
)
BUNDLED = bundled_profiles()
PROFILES = {name: load_latency_model(name) for name in BUNDLED}


@pytest.mark.parametrize(
    ("new", "cached", "expected"),
    [
        # 0.5 + 4 * 0.25 + 4 * 8 * 0.125 + 16 * 0.0625 = 0.5 + 1 + 4 + 1
        (4, 8, 6.5),
        # no history: 0.5 + 1 + 0 + 1
        (4, 0, 2.5),
        (0, 100, 0.0),
        (-3, 100, 0.0),
    ],
)
def test_prefill(new: int, cached: int, expected: float) -> None:
    """fixed + N * per_token + N * P * per_token_cached + N^2 * per_token_squared; nothing to do is free."""
    assert MODEL.prefill_s(new, cached) == expected


def test_prefill_over_a_history_that_costs() -> None:
    """... + P * cached_token + P^2 * cached_squared, however few are new: 6.5 + 8 * 0.5 + 64 * 0.25."""
    cost = PrefillCost(0.5, 0.25, 0.125, 0.0625, cached_token_s=0.5, cached_squared_s=0.25)
    assert msgspec.structs.replace(MODEL, prefill=cost).prefill_s(4, 8) == 26.5
    assert msgspec.structs.replace(MODEL, prefill=cost).prefill_s(0, 8) == 0.0


def test_decode_step() -> None:
    """1 + 3 * 0.5 + 8 * 0.25 = 4.5 s; no batch, no step."""
    assert MODEL.decode_step_s(3, 8) == 4.5
    assert MODEL.decode_step_s(0, 8) == 0.0


def test_decode_step_of_a_mixture_of_experts() -> None:
    """+ 8 * (1 - 0.75^B): a quarter of the experts for one token, 7/16 for two, in the end all."""
    mixture = DecodeCost(fixed_s=1.0, per_request_s=0.5, experts_s=8.0, expert_missed=0.75)
    model = msgspec.structs.replace(MODEL, decode=mixture)
    assert model.decode_step_s(1, 8) == 1.0 + 0.5 + 8.0 * 0.25
    assert model.decode_step_s(2, 8) == 1.0 + 1.0 + 8.0 * 7 / 16
    assert model.decode_step_s(500, 0) == pytest.approx(1.0 + 250.0 + 8.0)
    assert mixture.batch_s(2) == model.decode_step_s(2, 0)


def test_transfer() -> None:
    """2 + 6 tokens * 4 bytes / 8 bytes per second = 5 s; nothing to move costs nothing."""
    assert MODEL.transfer_s(6) == 5.0
    assert MODEL.transfer_s(0) == 0.0
    assert MODEL.transfer_s(-1) == 0.0


def test_transfer_waits_for_what_the_link_owes() -> None:
    """2 + (16 queued + 24) bytes / 8 bytes per second = 7 s; a queue does not matter to who moves nothing."""
    assert MODEL.transfer_s(6, queued_bytes=16.0) == 7.0
    assert MODEL.transfer_s(0, queued_bytes=16.0) == 0.0


def test_load() -> None:
    """0.5 + 8 tokens * 4 bytes / 16 bytes per second = 2.5 s; free for nothing, or if never measured."""
    assert MODEL.load_s(8) == 2.5
    assert MODEL.load_s(0) == 0.0
    assert msgspec.structs.replace(MODEL, load=None).load_s(8) == 0.0


@given(
    name=st.sampled_from(BUNDLED),
    tokens=st.integers(1, 200_000),
    cached=st.integers(0, 200_000),
    more=st.integers(1, 50_000),
)
@settings(max_examples=300, deadline=None)
def test_bundled_profiles_grow(name: str, tokens: int, cached: int, more: int) -> None:
    """A bundled profile never gets cheaper with more work."""
    model = PROFILES[name]
    assert 0 < model.prefill_s(tokens, cached) < model.prefill_s(tokens + more, cached)
    assert model.prefill_s(tokens, cached) <= model.prefill_s(tokens, cached + more)
    assert 0 < model.decode_step_s(1, tokens) <= model.decode_step_s(2, tokens + more)
    assert 0 < model.transfer_s(tokens) < model.transfer_s(tokens + more)
    assert model.transfer_s(tokens) <= model.transfer_s(tokens, float(more))
    assert 0 <= model.load_s(tokens) <= model.load_s(tokens + more)


@given(
    name=st.sampled_from(BUNDLED),
    batch=st.integers(1, 255),
    context=st.integers(1, 10**6),
    more=st.integers(1, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_bundled_decode_steps_grow(name: str, batch: int, context: int, more: int) -> None:
    """One more request, or more context, never makes a step shorter; a batch beats two steps."""
    model = PROFILES[name]
    step_s = model.decode_step_s(batch, context)
    assert step_s <= model.decode_step_s(batch + 1, context)
    assert step_s <= model.decode_step_s(batch, context + more)
    both_s = model.decode_step_s(batch + 1, context + more)
    assert both_s <= step_s + model.decode_step_s(1, more)


@pytest.mark.parametrize("model", ["qwen3-32b", "llama-3.1-70b", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_gpus_are_in_the_order_of_their_data_sheets(model: str) -> None:
    """H200 decodes fastest, A100 slowest; H20 prefills slowest and decodes faster than A100."""
    by_gpu = {gpu: load_latency_model(f"{model}-{gpu}-tp4") for gpu in ("h100", "h200", "a100", "h20")}
    prefill = {gpu: profile.prefill_s(4096, 16384) for gpu, profile in by_gpu.items()}
    decode = {gpu: profile.decode_step_s(32, 32 * 16384) for gpu, profile in by_gpu.items()}
    assert max(prefill["h100"], prefill["h200"]) < prefill["a100"] < prefill["h20"]
    assert decode["h200"] < decode["h100"] < decode["a100"]
    assert decode["h20"] < decode["a100"]


def test_a_profile_is_loaded_by_path(tmp_path: Path) -> None:
    """A JSON file of one's own does as well as a bundled name."""
    path = tmp_path / "mine.json"
    path.write_text(
        '{"name": "mine", "source": "here", "prefill": {"fixed_s": 1, "per_token_s": 2},'
        ' "decode": {"fixed_s": 3}, "transfer": {"fixed_s": 4, "bytes_per_s": 5, "kv_bytes_per_token": 6}}'
    )
    assert load_latency_model(str(path)).prefill_s(10, 0) == 21.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is neither bundled nor a readable file"),
        ("{", "mine.json"),
        ('{"name": "mine", "surprise": 1}', "surprise"),
        ('{"name": "mine", "source": "x"}', "prefill"),
    ],
)
def test_a_bad_profile_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    """ValueError names the profile and what is wrong with it."""
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_latency_model(str(path))
