"""What `antiphon engine` takes, checks before SGLang is loaded, and turns into SGLang flags.

Nothing here imports SGLang, torch or NIXL, so every complaint comes within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.engines.interfaces import find_interface

SGLANG_VERSION = "0.5.23"
NIXL_VERSION = "1.5.1"
INSTALL = f"pip install --no-deps sglang=={SGLANG_VERSION} nixl-cu12=={NIXL_VERSION}"
LINKER_MODULE, LINKER_CLASS = "antiphon.engines.linker", "AntiphonLinker"

CPU_FLAGS = (
    "--device", "cpu",
    "--attention-backend", "torch_native",
    "--sampling-backend", "pytorch",
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # else an idle scheduler takes 40 % of a core
    "--page-size", "16",
    "--max-total-tokens", "32768",
    "--max-running-requests", "16",
    "--chunked-prefill-size", "512",
    "--random-seed", "0",
)  # fmt: skip
GPU_FLAGS = ("--page-size", "64")
COMMON_FLAGS = (
    "--grammar-backend", "xgrammar",
    "--prefill-decode-interval", "4",  # decode steps between two chunks of a prompt: bounds the harm to ITL
    "--enable-cache-report",
    "--log-level-http", "warning",
)  # fmt: skip


class LaunchError(Exception):
    """The engine cannot be started as asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """One `antiphon engine` command."""

    model: Path
    port: int
    ledger: str = ""
    """Redis URL to register in; empty = do not register."""
    fleet: str = "default"
    pool: str = "decode"
    engine_id: str = ""
    """Empty = HOST-PORT."""
    interface: str = "127.0.0.1"
    """Network interface or own address for HTTP and KV; also what others are told to connect to."""
    kv_port: int = 0
    """Directory port of rank 0, the others follow; 0 = free ports."""
    advertise: str = ""
    """host:port at which others reach its HTTP, where a port mapping stands before it."""
    advertise_kv: str = ""
    """The same for the directory of rank 0."""
    key_file: str = ""
    """File with the fleet key; empty = the environment variable ANTIPHON_FLEET_KEY."""
    store_pages: int = 0
    """Pages of the host store; 0 = the linker's default."""
    linker: bool = True
    checksum: bool = False
    fault_injection: bool = False
    replace: bool = False
    """Take the engine id over from a live engine."""
    sglang_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pool not in ("prefill", "decode"):
            raise LaunchError(f"--pool must be prefill or decode, got {self.pool!r}")
        for name, port, lowest in (("--port", self.port, 1), ("--kv-port", self.kv_port, 0)):
            if not lowest <= port <= 65535:
                raise LaunchError(f"{name} must be {lowest} to 65535, got {port}")
        if self.ledger and (self.flag("--api-key") is not None or self.flag("--admin-api-key") is not None):
            raise LaunchError(
                "schedulers bring the key that they make from the fleet key, not one of yours: leave it "
                "away, or start with --ledger none and name yours by api_key_env in [[engines]]"
            )
        if self.advertise_kv and self.ranks > 1:
            raise LaunchError("--advertise-kv names one address, but the engine has several ranks")

    @property
    def host(self) -> str:
        return interface_address(self.interface)

    @property
    def resolved_id(self) -> str:
        return self.engine_id or f"{socket.gethostname()}-{self.port}"

    @property
    def model_id(self) -> str:
        return self.flag("--served-model-name") or self.model.resolve().name

    @property
    def takes_fleet_http_key(self) -> bool:
        """Its HTTP asks for the key of the fleet. SGLang cannot with several tokenizer processes."""
        return self.flag("--api-key") is None and int(self.flag("--tokenizer-worker-num") or 1) == 1

    @property
    def ranks(self) -> int:
        return int(self.flag("--tensor-parallel-size", "--tp-size", "--tp") or 1)

    def flag(self, *names: str) -> str | None:
        """Value of the last of the user's SGLang flags that is called one of `names`."""
        value = None
        for index, word in enumerate(self.sglang_flags):
            name, equals, inline = word.partition("=")
            if name in names:
                following = self.sglang_flags[index + 1 : index + 2]
                value = inline if equals else (following[0] if following else "")
        return value

    def arguments(self) -> list[str]:
        """The command line that `parse_options` reads back as this."""
        words = [
            f"--model={self.model}", f"--port={self.port}", f"--ledger={self.ledger}",
            f"--fleet={self.fleet}", f"--pool={self.pool}", f"--engine-id={self.engine_id}",
            f"--interface={self.interface}", f"--advertise={self.advertise}",
            f"--advertise-kv={self.advertise_kv}",
            f"--kv-port={self.kv_port}", f"--key-file={self.key_file}", f"--store-pages={self.store_pages}",
        ]  # fmt: skip
        switches = (("--no-linker", not self.linker), ("--checksum", self.checksum),
                    ("--fault-injection", self.fault_injection), ("--replace", self.replace))  # fmt: skip
        return [*words, *(name for name, on in switches if on), "--", *self.sglang_flags]


def parse_options(arguments: Sequence[str]) -> EngineOptions:
    """Options of a command line; what follows `--` goes to SGLang untouched. Exits on a bad one."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="antiphon engine", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ledger", default="")
    parser.add_argument("--fleet", default="default")
    parser.add_argument("--pool", default="decode")
    parser.add_argument("--engine-id", default="")
    parser.add_argument("--interface", default="127.0.0.1")
    parser.add_argument("--kv-port", type=int, default=0)
    parser.add_argument("--advertise", default="")
    parser.add_argument("--advertise-kv", default="")
    parser.add_argument("--key-file", default="")
    parser.add_argument("--store-pages", type=int, default=0)
    parser.add_argument("--no-linker", dest="linker", action="store_false")
    parser.add_argument("--checksum", action="store_true")
    parser.add_argument("--fault-injection", action="store_true")
    parser.add_argument("--replace", action="store_true")
    return EngineOptions(**vars(parser.parse_args(words[:cut])), sglang_flags=tuple(words[cut + 1 :]))


# ---------------------------------------------------------------- checks


def check_installed(linker: bool) -> None:
    """Raise `LaunchError` if SGLang or NIXL is missing, or SGLang has not the version of our linker."""
    if importlib.util.find_spec("torch") is None:
        raise LaunchError('torch is not installed: run pip install "antiphon[sglang-cpu]"')
    if importlib.util.find_spec("sglang") is None:
        raise LaunchError(f"SGLang is not installed: run {INSTALL}")
    version = importlib.metadata.version("sglang")
    if linker and version != SGLANG_VERSION:
        raise LaunchError(
            f"SGLang {version} is installed, but the KV linker needs {SGLANG_VERSION}: run {INSTALL}, "
            f"or start with --no-linker (rounds then run locally only)"
        )
    if linker and all(importlib.util.find_spec(name) is None for name in ("nixl_cu12", "nixl_cu13")):
        raise LaunchError(f"NIXL is not installed: run {INSTALL}, or start with --no-linker")


def read_model_config(model: Path) -> dict[str, Any]:
    """The model's config.json; raises `LaunchError` if `model` is not a directory with a checkpoint."""
    if not model.is_dir():
        raise LaunchError(f"--model {model} is not a directory (`antiphon tiny-model DIR` makes a small one)")
    try:
        config = json.loads((model / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise LaunchError(f"--model {model} holds no config.json: not a model directory") from error
    except ValueError as error:
        raise LaunchError(f"{model / 'config.json'} is not JSON: {error}") from error
    if not _weight_files(model):
        raise LaunchError(f"--model {model} holds no weights (*.safetensors or *.bin)")
    return dict(config)


def model_revision(model: Path) -> str:
    """Names the checkpoint cheaply: hash of config, weight index, and names and sizes of weight files."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for index in sorted(model.glob("*.index.json")):
        digest.update(index.read_bytes())
    for weights in _weight_files(model):
        digest.update(f"{weights.name}:{weights.stat().st_size};".encode())
    return digest.hexdigest()[:16]


def _weight_files(model: Path) -> list[Path]:
    return sorted([*model.glob("*.safetensors"), *model.glob("*.bin")])


def interface_address(interface: str) -> str:
    """IPv4 address of an interface given by name or by address; raises `LaunchError`."""
    try:
        return find_interface(interface).address
    except ValueError as error:
        raise LaunchError(f"--interface: {error}") from error


def check_port_free(host: str, port: int, name: str) -> None:
    """Raise `LaunchError` if somebody listens there."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise LaunchError(
            f"{name} {port} on {host} cannot be used ({error.strerror}): choose another or stop what holds it"
        ) from error


PORT_RANGE = (16384, 32768 - 64)


def find_free_ports(host: str, count: int) -> int:
    """First of `count` neighbouring free ports."""
    for _ in range(50):
        # Below the range from which outgoing connections get theirs: minutes may pass before it is bound.
        first = random.randrange(*PORT_RANGE)
        try:
            for port in range(first, first + count):
                check_port_free(host, port, "port")
        except (LaunchError, OverflowError):
            continue
        return first
    raise LaunchError(f"found no {count} neighbouring free ports on {host}: give --kv-port")


# ---------------------------------------------------------------- flags


def sglang_arguments(
    options: EngineOptions,
    *,
    on_cpu: bool,
    config: dict[str, Any],
    kv_port: int,
    incarnation: str,
    http_key: str = "",
) -> list[str]:
    """SGLang's arguments. The user's flags come last, and the last one wins.

    No process has them as its command line: with `http_key` they hold a secret.
    """
    words = [
        "--model-path", str(options.model), "--host", options.host, "--port", str(options.port),
        "--served-model-name", options.model_id,
        *(CPU_FLAGS if on_cpu else GPU_FLAGS), *COMMON_FLAGS,
    ]  # fmt: skip
    if (dtype := config.get("dtype") or config.get("torch_dtype")) and on_cpu:
        words += ["--dtype", str(dtype)]  # SGLang's "auto" would turn float32 into float16
    if options.linker:
        linker = {
            "linker": LINKER_CLASS,
            "linker_module_path": LINKER_MODULE,
            "linker_extra_config": linker_config(options, config, kv_port, incarnation),
        }
        words += [
            "--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic",
            "--unified-cache-external-linker-config", json.dumps(linker),
        ]  # fmt: skip
    if http_key:
        words += ["--api-key", http_key]
    return [*words, *options.sglang_flags]


def linker_config(
    options: EngineOptions, config: dict[str, Any], kv_port: int, incarnation: str
) -> dict[str, Any]:
    """What the linker is told. The fleet key is not in it: a command line can be read by others."""
    window = options.flag("--context-length") or config.get("max_position_embeddings") or 0
    extra: dict[str, Any] = {
        "engine_id": options.resolved_id,
        "incarnation": incarnation,
        "kv_port": kv_port,
        "interface": options.host,
        "model_id": options.model_id,
        "model_revision": model_revision(options.model),
        "checksum": options.checksum,
        "fault_injection": options.fault_injection,
        "context_tokens": int(window),
    }
    if options.key_file:
        extra["key_file"] = options.key_file
    if options.store_pages:
        extra["store_pages"] = options.store_pages
    return extra
