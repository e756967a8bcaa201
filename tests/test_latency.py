"""The latency formulas by hand, and the profiles that ship with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost, load_latency_model

MODEL = LatencyModel(
    name="by-hand",
    source="this file",
    prefill=PrefillCost(fixed_s=0.5, per_token_s=0.25, per_token_cached_s=0.125, per_token_squared_s=0.0625),
    decode=DecodeCost(fixed_s=1.0, per_request_s=0.5, per_context_token_s=0.25),
    transfer=TransferCost(fixed_s=2.0, bytes_per_s=8.0, kv_bytes_per_token=4),
)
BUNDLED = sorted(
    entry.name.removesuffix(".json")
    for entry in (resources.files("antiphon.policies") / "data").iterdir()
    if entry.name.endswith(".json")
)


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


def test_decode_step() -> None:
    """1 + 3 * 0.5 + 8 * 0.25 = 4.5 s; no batch, no step."""
    assert MODEL.decode_step_s(3, 8) == 4.5
    assert MODEL.decode_step_s(0, 8) == 0.0


def test_transfer() -> None:
    """2 + 6 tokens * 4 bytes / 8 bytes per second = 5 s; nothing to move costs nothing."""
    assert MODEL.transfer_s(6) == 5.0
    assert MODEL.transfer_s(0) == 0.0
    assert MODEL.transfer_s(-1) == 0.0


@pytest.mark.parametrize("name", BUNDLED)
@given(tokens=st.integers(1, 200_000), cached=st.integers(0, 200_000), more=st.integers(1, 50_000))
def test_bundled_profiles_grow(name: str, tokens: int, cached: int, more: int) -> None:
    """A bundled profile loads, says where it comes from, and never gets cheaper with more work."""
    model = load_latency_model(name)
    assert model.name == name
    assert model.source
    assert 0 < model.prefill_s(tokens, cached) < model.prefill_s(tokens + more, cached)
    assert model.prefill_s(tokens, cached) <= model.prefill_s(tokens, cached + more)
    assert 0 < model.decode_step_s(1, tokens) <= model.decode_step_s(2, tokens + more)
    assert 0 < model.transfer_s(tokens) < model.transfer_s(tokens + more)


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
