"""Shared fixtures: the real Valkey, the tiny model, and real SGLang engines, each started once per run.

A test that asks for `sglang_pair` or `plain_engine` is marked `engine`; when it fails, the report carries the
end of every engine's log.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from antiphon.engines.base import EngineRecord
from antiphon.engines.handshake import FLEET_KEY_ENV
from antiphon.engines.tiny_model import write_tiny_model
from antiphon.scheduler.valkey import EmbeddedValkey
from tests.engine_processes import EngineProcess, free_port

ENGINE_FIXTURES = {"sglang_fleet", "sglang_pair", "plain_engine"}
FLEET_KEY = b"tests-only-fleet-key-0123456789abcdef"

_running: list[EngineProcess] = []


@dataclass(frozen=True, slots=True)
class SglangPair:
    """Two real engines with the KV linker: checksums and fault injection on, page size 16, 32,768 tokens."""

    prefill: EngineRecord
    decode: EngineRecord


@dataclass(frozen=True, slots=True)
class SglangFleet:
    pair: SglangPair
    plain: EngineRecord
    processes: dict[str, EngineProcess]
    """By engine id: "prefill-0", "decode-0", "plain-0"."""


@pytest.fixture(scope="session")
def fleet_key() -> bytes:
    return FLEET_KEY


@pytest.fixture(scope="session")
def fleet_key_environment(fleet_key: bytes) -> Iterator[None]:
    """The fleet key where engine processes look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FLEET_KEY_ENV, fleet_key.decode())
        yield


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Valkey for the whole run; use keys or fleets of your own."""
    server = EmbeddedValkey.start(tmp_path_factory.mktemp("valkey"))
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, float32."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def sglang_fleet(
    tiny_model_dir: Path,
    valkey_url: str,
    fleet_key_environment: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SglangFleet]:
    """Three engines on one model, started together: a pair with the linker and a plain one."""
    logs = tmp_path_factory.mktemp("engine-logs")
    linked = ["--checksum", "--fault-injection"]
    roles = {
        "prefill-0": ["--pool=prefill", *linked],
        "decode-0": ["--pool=decode", *linked],
        "plain-0": ["--pool=decode", "--no-linker"],
    }
    common = [f"--model={tiny_model_dir}", f"--ledger={valkey_url}"]
    processes: dict[str, EngineProcess] = {}
    try:
        for engine_id, arguments in roles.items():
            words = [*common, f"--port={free_port()}", *arguments]
            processes[engine_id] = EngineProcess.start(engine_id, words, logs / f"{engine_id}.log")
        _running.extend(processes.values())
        records = {name: process.wait_registered(valkey_url) for name, process in processes.items()}
        pair = SglangPair(prefill=records["prefill-0"], decode=records["decode-0"])
        yield SglangFleet(pair, records["plain-0"], processes)
    finally:
        for process in processes.values():
            process.stop()
        _running.clear()


@pytest.fixture(scope="session")
def sglang_pair(sglang_fleet: SglangFleet) -> SglangPair:
    return sglang_fleet.pair


@pytest.fixture(scope="session")
def plain_engine(sglang_fleet: SglangFleet) -> EngineRecord:
    """The same model on an engine without the linker: the reference for tokens."""
    return sglang_fleet.plain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ENGINE_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.engine)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("engine"):
        report.sections += [(f"log of {process.engine_id}", process.log_tail()) for process in _running]
    return report
