"""`antiphon engine`: complaints before anything is loaded, SGLang's flags, and a clean end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from antiphon.engines import cpu_shims
from antiphon.engines.handshake import FLEET_KEY_ENV
from antiphon.engines.launch_options import (
    EngineOptions,
    LaunchError,
    check_installed,
    find_free_ports,
    interface_address,
    model_revision,
    parse_options,
    read_model_config,
    sglang_arguments,
)
from antiphon.engines.launcher import check, prebuild_page_hash
from tests.engine_processes import EngineProcess, alive, descendants, free_port, registered, wait_for


def words_of(options: EngineOptions, *, on_cpu: bool = True) -> list[str]:
    config = read_model_config(options.model)
    return sglang_arguments(options, on_cpu=on_cpu, config=config, kv_port=4000, incarnation="abc")


def value_of(words: list[str], flag: str) -> str:
    """What SGLang's parser takes: the last one wins."""
    return words[len(words) - words[::-1].index(flag)]


# ---------------------------------------------------------------- options and flags


def test_command_line_round_trip(tiny_model_dir: Path) -> None:
    """The command that `antiphon engine` becomes is read back as the same options, SGLang's flags as is."""
    options = EngineOptions(
        model=tiny_model_dir, port=31000, ledger="redis://x/0", fleet="f", pool="prefill", engine_id="p0",
        interface="127.0.0.1", kv_port=4000, key_file="/k", store_pages=7, linker=False, checksum=True,
        fault_injection=True, replace=True, sglang_flags=("--mem-fraction-static", "0.5", "--", "--tp=2"),
    )  # fmt: skip
    assert parse_options(options.arguments()) == options
    plain = EngineOptions(model=tiny_model_dir, port=1)
    assert parse_options(plain.arguments()) == plain


def test_the_users_flags_win(tiny_model_dir: Path) -> None:
    """Our flags are defaults: a flag after `--` comes last, where SGLang's parser lets it win."""
    plain = EngineOptions(tiny_model_dir, 31000)
    assert value_of(words_of(plain), "--page-size") == "16"
    theirs = EngineOptions(tiny_model_dir, 31000, sglang_flags=("--page-size", "32", "--tp=2"))
    assert value_of(words_of(theirs), "--page-size") == "32" and theirs.ranks == 2
    assert theirs.flag("--tp-size", "--tp") == "2" and theirs.flag("--device") is None


def test_float32_stays_float32_on_a_cpu(tiny_model_dir: Path) -> None:
    """SGLang would turn a float32 checkpoint into float16: the checkpoint's type is named on a CPU."""
    assert value_of(words_of(EngineOptions(tiny_model_dir, 1)), "--dtype") == "float32"
    gpu = words_of(EngineOptions(tiny_model_dir, 1), on_cpu=False)
    assert "--dtype" not in gpu and "--device" not in gpu


def test_the_linker_is_told_who_it_is(tiny_model_dir: Path) -> None:
    """Identity and addresses reach the linker; the fleet key is not on the command line."""
    options = EngineOptions(tiny_model_dir, 31000, engine_id="p0", checksum=True, store_pages=9)
    words = words_of(options)
    linker = json.loads(value_of(words, "--unified-cache-external-linker-config"))
    extra = linker["linker_extra_config"]
    assert (linker["linker_module_path"], linker["linker"]) == ("antiphon.engines.linker", "AntiphonLinker")
    assert (extra["engine_id"], extra["incarnation"], extra["kv_port"]) == ("p0", "abc", 4000)
    assert extra["model_id"] == "tiny-llama" and extra["context_tokens"] == 8192 and extra["store_pages"] == 9
    assert extra["checksum"] is True and extra["fault_injection"] is False
    assert "unified" not in " ".join(words_of(EngineOptions(tiny_model_dir, 31000, linker=False)))


def test_revision_names_the_checkpoint(tmp_path: Path) -> None:
    """Another config or other weights are another revision; the same files elsewhere are the same one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"1234")
    assert model_revision(tmp_path / "a") == model_revision(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"12345")
    assert model_revision(tmp_path / "a") != model_revision(tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text("{ }")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"1234")
    assert model_revision(tmp_path / "a") != model_revision(tmp_path / "b")


# ---------------------------------------------------------------- complaints


def test_wrong_model_directory(tmp_path: Path) -> None:
    """Each way in which a directory is no model is said, with what to do."""
    with pytest.raises(LaunchError, match="not a directory"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(LaunchError, match=r"no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LaunchError, match="not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LaunchError, match="no weights"):
        read_model_config(tmp_path)


def test_taken_port(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that somebody listens on is named at once, HTTP or KV."""
    monkeypatch.setenv(FLEET_KEY_ENV, "0123456789abcdef")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--port {port} on 127.0.0.1"):
            check(EngineOptions(tiny_model_dir, port))
        with pytest.raises(LaunchError, match=f"--kv-port {port} on 127.0.0.1"):
            check(EngineOptions(tiny_model_dir, free_port(), kv_port=port))


def test_missing_fleet_key(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with the linker needs the fleet key; one without does not."""
    monkeypatch.delenv(FLEET_KEY_ENV, raising=False)
    with pytest.raises(LaunchError, match=FLEET_KEY_ENV):
        check(EngineOptions(tiny_model_dir, free_port()))
    check(EngineOptions(tiny_model_dir, free_port(), linker=False))


@pytest.mark.parametrize(
    ("missing", "linker", "message"),
    [
        ({"torch"}, True, "sglang-cpu"),
        ({"sglang"}, True, r"pip install --no-deps sglang==0\.5\.23 nixl-cu12==1\.5\.1"),
        ({"nixl_cu12", "nixl_cu13"}, True, "NIXL is not installed: run pip install"),
    ],
)
def test_missing_packages(
    missing: set[str], linker: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not installed is named with the command that installs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(LaunchError, match=message):
        check_installed(linker)


def test_another_sglang_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker's interface exists in one version only; without the linker any will do."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.21")
    with pytest.raises(LaunchError, match=r"SGLang 0\.5\.21 is installed, but the KV linker needs 0\.5\.23"):
        check_installed(linker=True)
    check_installed(linker=False)


def test_bad_values(tiny_model_dir: Path) -> None:
    """Pools, ports and interfaces are checked by name."""
    with pytest.raises(LaunchError, match="--pool"):
        EngineOptions(tiny_model_dir, 1, pool="both")
    with pytest.raises(LaunchError, match="--port"):
        EngineOptions(tiny_model_dir, 70000)
    with pytest.raises(LaunchError, match="no network interface 'nope0'"):
        interface_address("nope0")
    assert interface_address("lo") == "127.0.0.1"
    assert find_free_ports("127.0.0.1", 3) > 0


def test_the_command_complains_in_one_line(tmp_path: Path) -> None:
    """A user sees what is wrong, not a traceback, within seconds."""
    command = [sys.executable, "-m", "antiphon.engines.launcher", f"--model={tmp_path}", "--port=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        result.stderr.strip()
        == f"antiphon engine: --model {tmp_path} holds no config.json: not a model directory"
    )


# ---------------------------------------------------------------- the end of an engine


@pytest.mark.engine
def test_kill_during_the_start_leaves_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    """kill -9 of the main process, while its children still import, takes them along."""
    arguments = [f"--model={tiny_model_dir}", f"--port={free_port()}", "--no-linker"]
    engine = EngineProcess.start("killed", arguments, tmp_path / "engine.log")
    try:
        # SGLang's two children, and multiprocessing's tracker.
        pids = wait_for(
            "its children",
            lambda: found if len(found := descendants(engine.process.pid)) >= 4 else None,
            120.0,
        )
        engine.kill()
        wait_for("the children's end", lambda: not any(alive(pid) for pid in pids), 10.0)
    finally:
        engine.stop()


@pytest.mark.engine
def test_registers_when_it_serves_and_leaves_on_sigterm(
    tiny_model_dir: Path, tmp_path: Path, valkey_url: str
) -> None:
    """The record, with C and K, appears when the engine answers; SIGTERM takes it out and ends everything."""
    flags = ["--", "--chunked-prefill-size", "256", "--prefill-decode-interval", "3"]
    arguments = [
        f"--model={tiny_model_dir}",
        f"--port={free_port()}",
        f"--ledger={valkey_url}",
        "--no-linker",
    ]
    engine = EngineProcess.start("short-lived", [*arguments, *flags], tmp_path / "engine.log")
    try:
        record = engine.wait_registered(valkey_url)
        assert (record.chunk_tokens, record.decode_interval) == (256, 3)
        assert record.model_id == "tiny-llama" and record.kv_addresses == () and record.pool == "decode"
        assert re.fullmatch("[0-9a-f]{32}", record.incarnation)
        pids = descendants(engine.process.pid)
        os.kill(engine.process.pid, signal.SIGTERM)
        assert engine.process.wait(5.0) == 0
        assert not any(alive(pid) for pid in pids) and "short-lived" not in registered(valkey_url)
    finally:
        engine.stop()


def test_the_page_hash_is_compiled_before_the_first_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU machine: built at start, or a clear word on what to install; never in the first request."""
    cpu_shims.define_torchvision_operators()
    cpu_shims.provide_sgl_kernel()
    from sglang.srt.mem_cache.cpp_utils import native_hash

    def broken() -> None:
        raise RuntimeError("Failed to load HiCache native hash extension") from OSError("no g++")

    monkeypatch.setattr(native_hash, "_load_native_hash_module", broken)
    with pytest.raises(LaunchError, match=r"no g\+\+.*install g\+\+, ninja"):
        prebuild_page_hash()
