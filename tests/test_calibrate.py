"""`antiphon calibrate`: known coefficients are found again, and what cannot be measured is said."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.eval import calibrate as command
from antiphon.eval.calibrate import CalibrateOptions, calibrate, prefill_grid, run_calibrate, sampling
from antiphon.eval.calibration import Calibration, Measured, fit_prefill_requests
from antiphon.eval.least_squares import DecodePoint
from antiphon.eval.probe import EngineInfo, Probe, ProbeError
from antiphon.policies.latency import LatencyModel, PrefillCost, TransferCost, load_latency_model
from tests.simulated_helpers import FLEET_KEY, simulated_pair
from tests.virtual_time import run_virtually

SPEED = 4.0
TRUE = load_latency_model("tiny-cpu")
EXACT = 0.01
PATIENCE_S = 0.002
BUSY = 0.3
"""How far a time that was really waited for may be off on a busy machine; on a quiet one it is below 0.1."""
SIMULATED = SimulatedOptions(speed=SPEED, chunk_tokens=512, decode_interval=4, max_running_requests=16)
INFO = EngineInfo("m", 16, 512, 4, 16, 65536, 8192)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points, each once: the figures below are of these."""
    monkeypatch.setattr(command, "NEW", (1 / 32, 1 / 4, 1, 2))
    monkeypatch.setattr(command, "CACHED", (0, 1, 3))
    monkeypatch.setattr(command, "BATCHES", (1, 4, 8))
    monkeypatch.setattr(command, "CONTEXTS", (1 / 8, 1))
    monkeypatch.setattr(command, "DECODE_TOKENS", 16)


async def least(options: CalibrateOptions, rounds: int = 2) -> Calibration:
    """Of some rounds the least times: what else runs on the machine only adds to them."""
    async with sampling(options) as sampler:
        sampler.typical = min
        for _ in range(rounds):
            await sampler.round()
        return sampler.fit()


def test_coefficients_of_a_simulated_engine_are_found_again(small: None) -> None:
    """Prefill and decode times of an engine whose profile is known, over its HTTP, on a clock of its own."""

    async def run() -> Calibration:
        clock = asyncio.get_running_loop().time
        async with SimulatedEngine(SIMULATED, fleet_key=FLEET_KEY, clock=clock) as engine:
            return await least(CalibrateOptions(engine.record.url), rounds=1)

    found = run_virtually(run(), PATIENCE_S)
    profile = found.profile
    for new, cached in ((128, 0), (512, 0), (512, 1024), (128, 1024)):
        expected = TRUE.prefill_s(new, cached) / SPEED
        assert profile.prefill_s(new, cached) == pytest.approx(expected, rel=EXACT), (new, cached)
    for batch, context in ((1, 100), (4, 2000), (8, 4000)):
        expected = TRUE.decode_step_s(batch, context) / SPEED
        assert profile.decode_step_s(batch, context) == pytest.approx(expected, rel=EXACT), (batch, context)
    assert found.request_fixed_s == pytest.approx(0, abs=1e-4)
    assert (found.info.chunk_tokens, found.info.decode_interval, found.info.device_tokens) == (512, 4, 65536)
    assert profile.transfer == TRUE.transfer
    assert any("transfers are those of tiny-cpu" in note for note in found.notes)


def test_the_link_of_two_engines_is_found_again(
    small: None, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ledger and a peer: fixed cost, rate and size of a token's KV."""
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", FLEET_KEY.decode())
    monkeypatch.setattr(command, "PULLS", (1, 4, 8))
    monkeypatch.setattr(command, "BATCHES", (1, 2))
    monkeypatch.setattr(command, "CONTEXTS", (1 / 8, 1 / 4))
    fleet = uuid.uuid4().hex
    quick = LatencyModel(
        name="slow link",
        source="here",
        prefill=PrefillCost(0.002, 1e-6),
        decode=TRUE.decode,
        transfer=TransferCost(fixed_s=0.05, bytes_per_s=1e8, kv_bytes_per_token=2048),
    )
    (tmp_path / "slow.json").write_bytes(msgspec.json.encode(quick))

    async def run() -> LatencyModel:
        common = dataclasses.replace(
            SIMULATED, ledger=valkey_url, fleet=fleet, profile=str(tmp_path / "slow.json"), speed=1.0
        )
        async with (
            SimulatedEngine(dataclasses.replace(common, engine_id="a"), fleet_key=FLEET_KEY) as one,
            SimulatedEngine(dataclasses.replace(common, engine_id="b"), fleet_key=FLEET_KEY),
        ):
            options = CalibrateOptions(
                one.record.url, ledger=valkey_url, fleet=fleet, peer="b", most_tokens=7000
            )
            return (await least(options)).profile

    profile = asyncio.run(run())
    assert profile.transfer.kv_bytes_per_token == 2048
    assert profile.transfer.fixed_s == pytest.approx(0.05, rel=2 * BUSY)
    for tokens in (512, 4096):
        assert profile.transfer_s(tokens) == pytest.approx(quick.transfer_s(tokens), rel=BUSY), tokens


def test_a_profile_is_written_that_loads(small: None, tmp_path: Path) -> None:
    """The command writes what `--profile` takes, and names it after the file."""
    path = tmp_path / "measured.json"
    with simulated_pair(dataclasses.replace(SIMULATED, speed=20.0)) as pair:
        options = CalibrateOptions(pair.decode.url, output=path, budget_s=1.0)
        console = Console(record=True, width=200)
        assert run_calibrate(options, console) == 0
    profile = load_latency_model(str(path))
    assert profile.name == "measured" and profile.prefill_error is not None
    said = console.export_text()
    assert "prefill ms = " in said and "chunk_tokens = 512" in said and "request_fixed_s = " in said


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    """Status 2 and a reason with the URL, no traceback; so for a peer without a ledger, or a bad file."""
    console = Console(record=True, width=200)
    assert run_calibrate(CalibrateOptions("http://127.0.0.1:1"), console) == 2
    assert run_calibrate(CalibrateOptions("http://127.0.0.1:1", peer="b"), console) == 2
    assert run_calibrate(CalibrateOptions("127.0.0.1:1"), console) == 2
    assert run_calibrate(CalibrateOptions("http://127.0.0.1:1", output=tmp_path), console) == 2
    said = console.export_text()
    assert "antiphon calibrate: http://127.0.0.1:1: " in said and "--peer needs --ledger" in said
    assert "--url '127.0.0.1:1' is no URL" in said and "Is a directory" in said


def test_an_unknown_engine_is_named(valkey_url: str) -> None:
    """The ledger's engines are listed when the one that was asked for is not among them."""
    options = CalibrateOptions("http://127.0.0.1:1", ledger=valkey_url, fleet=uuid.uuid4().hex, engine="x")
    with pytest.raises(ProbeError, match="no engine 'x'; there are none"):
        asyncio.run(calibrate(options))


def test_what_the_engine_says_of_itself_is_read() -> None:
    """Page, chunk, interval, batch, pool and window, as a simulated engine reports them."""

    async def read() -> EngineInfo:
        async with (
            SimulatedEngine(SIMULATED, fleet_key=FLEET_KEY) as engine,
            Probe(engine.record, FLEET_KEY) as probe,
        ):
            return probe.info

    assert asyncio.run(read()) == EngineInfo("simulated", 16, 512, 4, 16, 65536, 8192)


@settings(max_examples=40, deadline=None)
@given(
    page=st.sampled_from([1, 16, 64]),
    chunk=st.sampled_from([0, 64, 512, 8192]),
    device=st.integers(256, 200_000),
    window=st.integers(256, 131_072),
    most=st.integers(64, 40_000),
)
def test_every_point_fits(page: int, chunk: int, device: int, window: int, most: int) -> None:
    """No point is longer than the window, half the pool, or what was allowed; histories are whole pages."""
    info = EngineInfo("m", page, chunk, 4, 16, device, window)
    for new, cached in prefill_grid(info, most):
        assert new >= 1 and cached % page == 0
        assert new + cached <= min(most, device // 2, window - 1)
    for batch, context in command.decode_grid(info, most):
        assert batch <= 16 and batch * context <= device // 2


@pytest.mark.parametrize("chunk", [512, 0])
def test_terms_are_told_apart(chunk: int) -> None:
    """From points without noise the fit finds every coefficient, the request's own cost beside the pass's."""
    cost = PrefillCost(0.01, 2e-5, 3e-8, 2e-8, cached_token_s=1e-5, cached_squared_s=1.5e-8)
    model = TRUE.__class__(name="x", source="x", prefill=cost, decode=TRUE.decode, transfer=TRUE.transfer)
    ping_s, request_s = 0.001, 0.004 if chunk else 0.001
    points = {}
    for new, cached in prefill_grid(dataclasses.replace(INFO, chunk_tokens=chunk), 4096):
        pieces = [min(chunk or new, new - at) for at in range(0, new, chunk or new)]
        starts = [cached + at for at in range(0, new, chunk or new)]
        points[new, cached] = request_s + sum(map(model.prefill_s, pieces, starts))
    found_s, found, error = fit_prefill_requests(
        Measured(points, [DecodePoint(1, 1, 1.0)], {}, {}, ping_s), chunk
    )
    assert found_s == pytest.approx(request_s, rel=1e-3)
    for name in PrefillCost.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=1e-3), name
    assert error.max < 1e-6
