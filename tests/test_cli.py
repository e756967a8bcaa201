"""The `antiphon` command: what it prints, its exit codes, and that a wrong word gives one clear line."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from antiphon.engines.base import EngineRecord
from antiphon.engines.registry import Registration
from antiphon.scheduler import cli
from antiphon.scheduler.config import Config
from antiphon.scheduler.errors import UserError
from tests.gateway_helpers import DEADLINE_S, FakeState, Gateway, running_gateway, three_words

RECEIPT = {
    "session_id": "s1", "round_number": 2, "arm": "remote_pull", "outcome": "completed",
    "home": "d0", "prefill_engine": "p0", "prompt_tokens": 1234, "cached_tokens": 1000,
    "bytes_decode_to_prefill": 3 * 2**20, "bytes_prefill_to_decode": 0,
    "predicted_ttft_s": 0.05, "ttft_s": 1.5, "itl_s": None, "reason": "home is hot",
}  # fmt: skip


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output of one command, errors as `main` shows them."""
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "240"})
    if isinstance(result.exception, UserError):
        return 2, f"antiphon: {result.exception}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@contextmanager
def gateway_in_a_thread(model_dir: Path, state: FakeState, config: Config | None = None) -> Iterator[str]:
    """A gateway that blocking commands can ask."""
    loop = asyncio.new_event_loop()
    started: list[Gateway] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with running_gateway(three_words, model_dir, config, state) as gateway:
            started.append(gateway)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield started[0].url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)
        loop.close()


def test_help_is_quick_and_light() -> None:
    """--help imports nothing heavy: no torch, transformers, tokenizers, aiohttp, uvicorn or redis."""
    code = (
        "import sys; sys.argv = ['antiphon', '--help']\n"
        "from antiphon.scheduler import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'sglang', 'aiohttp', 'uvicorn', 'redis', 'jinja2'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "HEAVY []" in shown.stdout
    for command in (
        "serve",
        "engine",
        "tiny-model",
        "doctor",
        "status",
        "engines",
        "sessions",
        "receipts",
        "replay",
    ):
        assert f" {command} " in shown.stdout


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "engine",
        "tiny-model",
        "doctor",
        "status",
        "engines",
        "sessions",
        "receipts",
        "replay",
        "version",
    ],
)
def test_every_command_has_help(command: str) -> None:
    """Each command says what it does."""
    code, shown = run(command, "--help")
    assert code == 0 and "Usage" in shown


def test_version() -> None:
    """The installed version."""
    assert re.fullmatch(r"antiphon \d+\.\d+.*\n", run("version")[1])


def test_check_prints_the_resolved_configuration(tmp_path: Path) -> None:
    """`serve --check` shows file and flags together, and starts nothing."""
    file = tmp_path / "a.toml"
    file.write_text('[gateway]\nport = 9\n[scheduler]\npolicy = "remote"\n')
    code, shown = run("serve", "--config", str(file), "--check", "--policy", "local", "--state-dir", "/tmp/x")
    assert code == 0
    assert 'policy = "local"' in shown and "port = 9" in shown and 'state_dir = "/tmp/x"' in shown


WRONG: dict[str, tuple[list[str], str]] = {
    "policy": (["serve", "--check", "--policy", "best"], "unknown policy 'best'"),
    "profile": (["serve", "--check", "--profile", "none.json"], "latency profile"),
    "port": (["serve", "--check", "--port", "99999"], "port must be 0 to 65535"),
    "config": (["serve", "--check", "--config", "absent.toml"], "absent.toml: cannot be read"),
    "no ledger": (["engine", "--port", "1"], "no ledger"),
    "no model": (["engine", "--port", "1", "--ledger", "none"], "--model DIR is needed"),
    "model": (["engine", "--port", "1", "--ledger", "none", "--model", "/nowhere"], "is not a directory"),
    "pool": (["engine", "--port", "1", "--ledger", "none", "--simulated", "--pool", "both"], "pool must be"),
    "flag": (["engine", "--port", "1", "--ledger", "none", "--simulated", "--", "--tp", "2"], "--tp"),
    "script": (
        ["engine", "--port", "1", "--ledger", "none", "--simulated", "--script", "/nowhere"],
        "/nowhere",
    ),
    "architecture": (["tiny-model", "{tmp}/m", "--architecture", "gpt"], "unknown architecture"),
    "url": (["status", "--url", "ftp://x"], "must begin with http"),
    "no gateway": (["engines", "--url", "http://127.0.0.1:1"], "is `antiphon serve` running?"),
    "ledger": (["sessions", "--ledger", "redis://127.0.0.1:1"], "--ledger: the ledger at"),
    "ledger url": (["sessions", "--ledger", "nonsense"], "--ledger"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_word_gives_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What, where and what to do; exit status 2; no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", "k" * 32)
    monkeypatch.delenv("ANTIPHON_REDIS_URL", raising=False)
    arguments, expected = WRONG[name]
    code, shown = run(*(word.replace("{tmp}", str(tmp_path)) for word in arguments))
    assert code == 2 and expected in shown, shown
    assert "Traceback" not in shown and len(shown.strip().splitlines()) == 1


def test_main_exits_with_two(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself turns a `UserError` into a line on stderr and status 2."""
    monkeypatch.setattr(sys, "argv", ["antiphon", "status", "--url", "ftp://x"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("antiphon: --url 'ftp://x'")


def test_tiny_model(tmp_path: Path) -> None:
    """Writes the checkpoint and prints where."""
    code, shown = run("tiny-model", str(tmp_path / "m"))
    assert code == 0 and shown.strip() == str(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_engine_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags reach the launcher, what follows `--` goes to SGLang, the fleet key is made on first use."""
    from antiphon.engines import launcher, simulated

    seen: list[Any] = []
    monkeypatch.delenv("ANTIPHON_FLEET_KEY", raising=False)
    monkeypatch.setattr(launcher, "run_engine", seen.append)
    monkeypatch.setattr(simulated, "run_simulated", seen.append)
    common = ["engine", "--port", "7", "--ledger", "none", "--pool", "prefill", "--state-dir", str(tmp_path)]
    assert run(*common, "--model", "/m", "--no-linker", "--", "--tp", "2", "--page-size=64")[0] == 0
    assert run(*common, "--simulated", "--profile", "tiny-cpu", "--", "--page-size", "32")[0] == 0
    sglang, virtual = seen
    assert (sglang.port, sglang.pool, sglang.ledger, sglang.linker) == (7, "prefill", "", False)
    assert sglang.sglang_flags == ("--tp", "2", "--page-size=64")
    assert sglang.key_file == str(tmp_path / "fleet.key") and (tmp_path / "fleet.key").is_file()
    assert (virtual.page_size_tokens, virtual.pool) == (32, "prefill")


def test_what_a_gateway_shows(tiny_model_dir: Path) -> None:
    """status, engines, sessions and receipts: tables for people, JSON for programs."""
    state = FakeState(receipt_items=[RECEIPT, {**RECEIPT, "session_id": "s2", "arm": "local"}])
    with gateway_in_a_thread(tiny_model_dir, state) as url:
        code, shown = run("status", "--url", url)
        assert code == 0 and "1 alive (decode 1)" in shown and "2 (local 1, remote_pull 1)" in shown
        assert "d->p MiB" in run("receipts", "--url", url)[1]
        code, shown = run("receipts", "--url", url, "--session", "s1")
        row = next(line for line in shown.splitlines() if "remote_pull" in line)
        for cell in ("s1", "1,234", "3.0", "50 ms", "1.50 s", "home is hot"):
            assert cell in row
        assert "s2" not in shown
        assert json.loads(run("receipts", "--url", url, "--json", "--limit", "1")[1]) == [RECEIPT]
        assert "e0" in run("engines", "--url", url)[1]
        assert len(json.loads(run("sessions", "--url", url, "--json", "--limit", "3")[1])) == 3
        assert json.loads(run("status", "--url", url, "--json")[1])["engines_alive"] == 1
        state.engines_alive = 0
        code, shown = run("status", "--url", url)
        assert code == 1 and re.search(r"ready\s+no", shown)


def test_what_a_ledger_shows(valkey_url: str) -> None:
    """Without a gateway the ledger tells engines, sessions and receipts of a fleet."""
    record = EngineRecord("d0", "http://127.0.0.1:9", "decode", "i1", ("127.0.0.1:8",), "tiny")
    fleet = ["--ledger", valkey_url, "--fleet", "cli-test"]
    registration = Registration(valkey_url, record, fleet="cli-test")
    registration.start()
    try:
        shown = json.loads(run("engines", *fleet, "--json")[1])
        assert [engine["engine_id"] for engine in shown] == ["d0"]
        code, text = run("engines", *fleet)
        assert code == 0 and "http://127.0.0.1:9" in text and "yes" in text
        assert "engines: 1" in text
        assert run("status", *fleet)[0] == 0
        assert json.loads(run("sessions", *fleet, "--json")[1]) == []
        assert json.loads(run("receipts", *fleet, "--json")[1]) == []
        assert "sessions: 0" in run("sessions", *fleet)[1]
    finally:
        registration.close()
    assert run("status", *fleet)[0] == 1
