"""The doctor: it finds what is wrong, says what to do, and proves a fleet by using it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from antiphon.engines.base import EngineRecord
from antiphon.engines.simulated import SimulatedEngine, SimulatedOptions
from antiphon.scheduler.config import Config, LedgerConfig
from antiphon.scheduler.doctor import (
    SGLANG_VERSION,
    Check,
    check_fleet,
    check_packages,
    check_python,
    run_doctor,
)
from tests.simulated_helpers import FAST, FLEET_KEY

PACKAGES = {"sglang": SGLANG_VERSION, "nixl-cu12": "1.5.1", "torch": "2.13.0"}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def failed(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.ok}


async def examine(*engines: SimulatedOptions, key: bytes = FLEET_KEY) -> list[Check]:
    """The fleet checks over simulated engines in this loop."""
    async with contextlib.AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(SimulatedEngine(options, fleet_key=FLEET_KEY))
            for options in engines
        ]
        return await check_fleet([engine.record for engine in started], "f", key)


def named(engine_id: str, **options: Any) -> SimulatedOptions:
    return replace(FAST, engine_id=engine_id, **options)


def test_python_versions() -> None:
    """Too old fails, newer than tested is only mentioned."""
    assert check_python((3, 11)).ok
    assert not check_python((3, 10)).ok
    assert "3.11" in check_python((3, 10)).fix
    newer = check_python((3, 99))
    assert newer.ok
    assert "tested up to" in newer.detail


def test_packages_of_an_engine_machine() -> None:
    """All there: fine. One missing, or another SGLang: what is wrong and the command that mends it."""
    assert failed(check_packages(PACKAGES.get)) == {}
    (nixl,) = (c for c in check_packages({**PACKAGES, "nixl-cu12": None}.get) if not c.ok)
    assert (nixl.name, nixl.detail) == ("package nixl", "not installed")
    assert "pip install --no-deps nixl-cu12" in nixl.fix
    assert failed(check_packages({"nixl-cu13": "1", **PACKAGES, "nixl-cu12": None}.get)) == {}
    (sglang,) = (c for c in check_packages({**PACKAGES, "sglang": "0.5.22"}.get) if not c.ok)
    assert "0.5.22, but" in sglang.detail
    assert SGLANG_VERSION in sglang.fix


def test_a_light_installation_is_no_fault() -> None:
    """A machine without any engine package runs the gateway; the commands for engines are told."""
    (check,) = check_packages(lambda name: None)
    assert check.ok
    assert f"sglang=={SGLANG_VERSION}" in check.fix


def test_a_sound_fleet_passes_every_check() -> None:
    """Each engine, its page hashes, and the pages moved both ways between each two."""

    async def scenario() -> None:
        checks = await examine(named("a", pool="prefill"), named("b"), named("c"))
        assert failed(checks) == {}
        assert [check.name for check in checks] == [
            *(f"{what} {name}" for name in "abc" for what in ("engine", "page hashes of")),
            "KV a -> b", "KV a -> c", "KV b -> c", "KV b -> a", "KV c -> a", "KV c -> b",
        ]  # fmt: skip
        assert "3 of 3 pages, 98304 bytes" in checks[-1].detail

    run(scenario())


def test_an_empty_fleet_is_told_how_to_start() -> None:
    """No engine at all is a failure with a command."""

    async def scenario() -> None:
        (check,) = await check_fleet([], "f", FLEET_KEY)
        assert not check.ok
        assert "antiphon engine" in check.fix

    run(scenario())


def test_what_is_wrong_is_named_and_the_rest_is_still_checked() -> None:
    """An engine that is away, and one of another page size, fail in their own lines only."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(SimulatedEngine(options, fleet_key=FLEET_KEY))
                for options in (named("a"), named("b"), named("odd", page_size_tokens=32))
            ]
            away = EngineRecord("away", "http://127.0.0.1:1", "decode", "x", ("127.0.0.1:1",))
            checks = await check_fleet([*(e.record for e in engines), away], "f", FLEET_KEY)
        wrong = failed(checks)
        assert set(wrong) == {"engine away", "KV a -> odd", "KV b -> odd", "KV odd -> a", "KV odd -> b"}
        assert "127.0.0.1:1" in wrong["engine away"]
        assert "0 of 3 pages" in wrong["KV a -> odd"]

    run(scenario())


def test_a_wrong_fleet_key_is_found() -> None:
    """An engine that does not know our key is not believed, and the key is what is asked about."""

    async def scenario() -> None:
        (check,) = await examine(named("a"), key=b"another key for another fleet...")
        assert not check.ok
        assert "fleet key" in check.fix

    run(scenario())


def test_hashes_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that names its pages otherwise than we do fails the check of page hashes."""

    async def scenario() -> None:
        monkeypatch.setattr("antiphon.scheduler.doctor.OFFLOAD_DEADLINE_S", 0.1)
        monkeypatch.setattr(
            "antiphon.scheduler.doctor.page_hashes", lambda ids, page, seed: (b"\0" * 32,) * 3
        )
        wrong = failed(await examine(named("a")))
        assert wrong == {"page hashes of a": "0 of 3 pages found without a cache salt"}

    run(scenario())


def test_an_engine_without_a_linker_is_local_only() -> None:
    """It passes, with that remark, and takes no part in transfers."""

    async def scenario() -> None:
        async with SimulatedEngine(named("a"), fleet_key=FLEET_KEY) as engine:
            plain = EngineRecord("plain", engine.record.url, "decode", "")
            checks = await check_fleet([plain, engine.record], "f", FLEET_KEY)
        assert failed(checks) == {}
        assert [check.name for check in checks] == [
            "engine plain",
            "engine a",
            "page hashes of a",
            "transfers",
        ]
        assert "local rounds only" in checks[0].detail

    run(scenario())


def test_the_whole_run(valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a configuration: this machine, the ledger, and every engine that is registered there."""
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", FLEET_KEY.decode())
    monkeypatch.delenv("ANTIPHON_REDIS_URL", raising=False)
    fleet = f"doctor-{secrets.token_hex(4)}"
    config = Config(ledger=LedgerConfig(url=valkey_url, state_dir=str(tmp_path), fleet=fleet))

    async def scenario() -> None:
        options = [named(name, ledger=valkey_url, fleet=fleet) for name in ("a", "b")]
        async with contextlib.AsyncExitStack() as stack:
            for one in options:
                await stack.enter_async_context(SimulatedEngine(one, fleet_key=FLEET_KEY))
            checks = await asyncio.to_thread(run_doctor, config)
        live = [check for check in checks if not check.name.startswith(("python", "package", "engine p"))]
        assert [check.name for check in live] == [
            "ledger", "engine a", "page hashes of a", "engine b", "page hashes of b",
            "KV a -> b", "KV b -> a",
        ]  # fmt: skip
        assert failed(live) == {}

    run(scenario())


def test_a_ledger_that_is_away_is_one_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other checks still run; an embedded ledger that is not running is started and ended again."""
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", FLEET_KEY.decode())
    monkeypatch.delenv("ANTIPHON_REDIS_URL", raising=False)
    away = LedgerConfig(url=f"unix://{tmp_path}/none.sock", state_dir=str(tmp_path))
    wrong = failed(run_doctor(Config(ledger=away)))
    assert "none.sock is away" in wrong["ledger"]
    embedded = run_doctor(Config(ledger=LedgerConfig(state_dir=str(tmp_path / "state"))))
    assert "ledger" not in failed(embedded)
    assert not (tmp_path / "state" / "valkey.sock").exists()
