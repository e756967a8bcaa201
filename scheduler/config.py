"""antiphon.toml and command line -> one frozen `Config`, built once by `load_config`.

Defaults live on the dataclasses only. Unknown keys are refused with their path and the nearest known name.
Order of precedence: command line, environment, file, default.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import msgspec

from antiphon.scheduler.access_config import AccessConfig, KeyConfig, LimitsConfig
from antiphon.scheduler.errors import UserError
from antiphon.scheduler.repool_config import RepoolConfig
from antiphon.scheduler.session_config import SessionConfig

DEFAULT_FILE = "antiphon.toml"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    """0 = any free port; it is logged."""
    body_limit_bytes: int = 16 * 1024 * 1024
    body_deadline_s: float = 60.0
    """For a client to send its whole request."""
    shutdown_grace_s: float = 30.0
    """How long rounds in flight may go on after a stop signal."""
    lame_duck_s: float = 0.5
    """After SIGTERM, how long the listener still answers 503, for load balancers to see it."""
    response_ttl_s: float = 86400.0
    """How long a stored response (`/v1/responses`) is kept after it was made or gone on from."""
    history_memory_bytes: int = 256 * 1024 * 1024
    """For what was said in the sessions used last, as ids and messages; the ledger has all of it."""
    max_rounds: int = 1024
    """Requests for rounds that may be under way at once, from their first byte to their answer's last."""
    bodies_memory_bytes: int = 512 * 1024 * 1024
    """For the bodies of all requests under way; at least one of `body_limit_bytes`."""
    answers_memory_bytes: int = 256 * 1024 * 1024
    """For what engines have answered and clients have not read yet."""
    reader_stall_s: float = 60.0
    """A client that takes nothing of its answer for so long is cut off."""
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0 to 65535, got {self.port}")
        _positive(self, "body_limit_bytes", "body_deadline_s", "response_ttl_s", "history_memory_bytes")
        _positive(self, "max_rounds", "bodies_memory_bytes", "answers_memory_bytes", "reader_stall_s")
        if self.bodies_memory_bytes < self.body_limit_bytes:
            raise ValueError(
                "bodies_memory_bytes must be at least body_limit_bytes: else some bodies never fit"
            )
        _one_of(self, "log_level", ("debug", "info", "warning", "error"))


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    policy: str = "adaptive"
    ordering: str = "fcfs"
    profile: str = "tiny-cpu"
    """Latency profile: a bundled name or a JSON file."""
    profiles: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Engine id or pool -> profile of engines that differ; the id counts before the pool."""
    slo_ttft_s: float = 2.0
    slo_itl_s: float = 0.1
    max_tries: int = 3
    prefill_in_flight: int = 2
    """Rounds that may be at one prefill engine at once; the rest wait in the core, in order."""
    max_queued_rounds: int = 256
    """That wait for one prefill engine in the core; one more is refused."""
    admission: float = 0.0
    """A session's first round is refused if it would wait for more than so many TTFT targets; 0 = never."""
    admission_under_way: float = 0.0
    """The same for rounds of sessions that have begun."""
    request_deadline_s: float = 600.0
    """For a whole round, the client's reading included."""
    first_token_deadline_s: float = 120.0

    def __post_init__(self) -> None:
        _positive(
            self, "slo_ttft_s", "slo_itl_s", "max_tries", "prefill_in_flight", "request_deadline_s",
            "first_token_deadline_s", "max_queued_rounds",
        )  # fmt: skip
        if not 0 <= self.admission < float("inf") or not 0 <= self.admission_under_way < float("inf"):
            raise ValueError("admission and admission_under_way must be 0 (never refuse) or more")
        if 0 < self.admission_under_way < self.admission:
            raise ValueError("admission_under_way must not be below admission: that wastes what has begun")


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    url: str | None = None
    """redis://, rediss:// or unix://; None = ANTIPHON_REDIS_URL, else the embedded Valkey in `state_dir`."""
    state_dir: str = ""
    """Empty = $XDG_STATE_HOME/antiphon or ~/.local/state/antiphon."""
    fleet: str = "default"
    """Fleets that share one Redis are told apart by this name."""
    session_ttl_s: float = 3600.0

    def __post_init__(self) -> None:
        _positive(self, "session_ttl_s")
        if self.url is not None and urlsplit(self.url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError(f"url must begin with redis://, rediss:// or unix://, got {self.url!r}")
        if not self.fleet or not self.fleet.isascii() or not self.fleet.replace("-", "").isalnum():
            raise ValueError(f"fleet must be letters, digits and dashes, got {self.fleet!r}")


@dataclass(frozen=True, slots=True)
class FleetConfig:
    key_file: str | None = None
    """None = `fleet.key` in the state directory. ANTIPHON_FLEET_KEY wins over both."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    path: str | None = None
    """Directory with tokenizer and chat template; None = what the first engine says."""
    names: tuple[str, ...] = ()
    """What clients may call the model; empty = the engines' model id and its last path component."""


@dataclass(frozen=True, slots=True)
class ServedModelConfig:
    """One of several models; with none of these there is one, that of [model]."""

    names: tuple[str, ...]
    """What clients may call it; the first one is its name in metrics and logs too."""
    path: str | None = None
    """Directory with tokenizer and chat template; None = what its first engine says."""
    engine_model: str = ""
    """The model id of its engines, whole or its last component; empty = one of the names, or the path."""
    profile: str = ""
    """Latency profile; empty = that of [scheduler]."""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError("a model of [[models]] needs `names`, none of them empty")


@dataclass(frozen=True, slots=True)
class RecordConfig:
    directory: str = ""
    """Where every round is written down, without its content; empty = nowhere."""
    session_ids: str = "hashed"
    """hashed (with the folder's own salt) or plain."""

    def __post_init__(self) -> None:
        _one_of(self, "session_ids", ("hashed", "plain"))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine that we did not start (or that is not in the ledger's registry)."""

    engine_id: str
    url: str
    pool: str = "decode"
    kv_addresses: tuple[str, ...] = ()
    """host:port of each rank's directory; empty = no linker, `local` only."""
    model: str = ""
    """Its model id, where there are several models and it has no linker to say so."""
    api_key_env: str = ""
    """Environment variable with the key that its HTTP asks for; empty = that of the fleet if it has our
    linker, else none."""

    def __post_init__(self) -> None:
        _one_of(self, "pool", ("prefill", "decode"))
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")


@dataclass(frozen=True, slots=True)
class Config:
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    repool: RepoolConfig = field(default_factory=RepoolConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    keys: tuple[KeyConfig, ...] = ()
    models: tuple[ServedModelConfig, ...] = ()
    engines: tuple[EngineConfig, ...] = ()
    policy: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    """[policy.<name>]: parameters of each policy, checked by the policy itself."""

    def __post_init__(self) -> None:
        ids = [engine.engine_id for engine in self.engines]
        if twice := sorted({engine_id for engine_id in ids if ids.count(engine_id) > 1}):
            raise ValueError(f"engines: the engine_id {twice[0]!r} is there twice")
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"keys: the name {twice[0]!r} is there twice")
        names = [name for model in self.models for name in model.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: the name {twice[0]!r} is there twice")
        if self.models and self.model != ModelConfig():
            raise ValueError("give [model] for one model or [[models]] for several, not both")

    def policy_parameters(self) -> Mapping[str, Any]:
        """Parameters of the chosen policy; empty if the file names none."""
        return self.policy.get(self.scheduler.policy, MappingProxyType({}))

    def state_dir(self, env: Mapping[str, str] = os.environ) -> Path:
        if self.ledger.state_dir:
            return Path(self.ledger.state_dir).expanduser()
        base = env.get("XDG_STATE_HOME")
        return (Path(base) if base else Path.home() / ".local" / "state") / "antiphon"


def load_config(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    env: Mapping[str, str] = os.environ,
) -> Config:
    """The one way to a `Config`. `overrides` maps dotted names ("gateway.port") to values; None = not given.

    Without `path`, ./antiphon.toml is read if it is there. Raises `UserError` naming file, key and remedy.
    """
    source = path or Path(DEFAULT_FILE)
    table = _read(source) if path is not None or source.is_file() else {}
    _find_profiles(table, source.parent)
    if url := env.get("ANTIPHON_REDIS_URL"):
        table.setdefault("ledger", {})["url"] = url
    for dotted, value in (overrides or {}).items():
        if value is not None:
            section, _, key = dotted.partition(".")
            table.setdefault(section, {})[key] = value
    try:
        _refuse_unknown(Config, table, "")
        return msgspec.convert(table, Config)
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(f"{source if path or source.is_file() else 'configuration'}: {error}") from error


def to_toml(config: Config) -> str:
    """The resolved configuration as a file that `load_config` reads back; a password in a URL is masked."""
    lines: list[str] = []
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if isinstance(value, tuple):
            for item in value:
                lines += [f"[[{section.name}]]", *_assignments(_fields(item)), ""]
        elif section.name == "policy":
            for name, parameters in value.items():
                lines += [f"[policy.{_key(name)}]", *_assignments(parameters), ""]
        else:
            lines += [f"[{section.name}]", *_assignments(_fields(value)), ""]
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error


def _find_profiles(table: dict[str, Any], folder: Path) -> None:
    """Latency profiles that lie where the file says, seen from itself, are those. Types are checked later."""

    def found(name: object) -> object:
        beside = folder / name if isinstance(name, str) else None
        return str(beside) if beside is not None and beside.suffix == ".json" and beside.is_file() else name

    models = table.get("models")
    for section in (table.get("scheduler"), *(models if isinstance(models, list) else ())):
        if isinstance(section, dict):
            if "profile" in section:
                section["profile"] = found(section["profile"])
            if isinstance(section.get("profiles"), dict):
                section["profiles"] = {key: found(name) for key, name in section["profiles"].items()}


def _refuse_unknown(kind: type, table: object, where: str) -> None:
    """Raises ValueError for the first key that the dataclass `kind` does not have, at any depth."""
    if not isinstance(table, dict):
        raise ValueError(f"{where or 'the file'}: expected a table, got {type(table).__name__}")
    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        path = f"{where}.{key}" if where else key
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(hints)}"
            raise ValueError(f"unknown key {path!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            _refuse_unknown(hints[key], value, path)
        elif isinstance(value, list):
            for item_kind in typing.get_args(hints[key]):
                if isinstance(item_kind, type) and dataclasses.is_dataclass(item_kind):
                    for index, item in enumerate(value):
                        _refuse_unknown(item_kind, item, f"{path}[{index}]")


def _fields(section: Any) -> dict[str, Any]:
    """Not `asdict`, which cannot copy a read-only mapping."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(name)} = {_toml(value)}" for name, value in values.items() if value is not None]


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return msgspec.json.encode(masked(value)).decode().replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(_assignments(value)) + "}"
    return repr(value)


def masked(text: str) -> str:
    """The text, with the password taken out if it is a URL that has one."""
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
        password = parts.password
    except ValueError:
        return text
    text = re.sub(r"([?&]password=)[^&#]*", r"\1***", text)
    return text.replace(f":{password}@", ":***@") if password else text


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")


def _one_of(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
