"""Configuration of who may come in, and of how much each may do: [access], [limits], [[keys]]."""

from __future__ import annotations

import re
from dataclasses import dataclass

LIMITS = ("body_bytes", "sessions", "rounds_in_flight", "tokens_per_minute")


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may come in. With any `[[keys]]`, or with `ledger_keys`, a request needs an API key."""

    ledger_keys: bool = False
    """Keys that `antiphon keys` keeps in the ledger count too."""
    open_paths: tuple[str, ...] = ("/health", "/ready", "/metrics")
    """Answered without a key."""
    key_cache_s: float = 10.0
    """A key of the ledger is asked for again after this: so long a removed one may go on."""
    key_keep_s: float = 3600.0
    """While the ledger is away, a key that it named stays valid this long."""

    def __post_init__(self) -> None:
        for name in ("key_cache_s", "key_keep_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Of each API key that has none of its own (without keys: of all clients together); 0 = none."""

    body_bytes: int = 0
    sessions: int = 0
    """That live, over the fleet."""
    rounds_in_flight: int = 0
    """At one replica."""
    tokens_per_minute: int = 0
    """Prompt and output, over the fleet."""

    def __post_init__(self) -> None:
        _check_limits(self)


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """An API key, by its digest or by where the environment has it: never the key itself."""

    name: str
    """In logs and lists."""
    tenant: str = "default"
    key_sha256: str = ""
    """In hex."""
    key_env: str = ""
    """Name of the environment variable that holds it."""
    admin: bool = False
    """Sees engines, and sessions and receipts of all tenants."""
    body_bytes: int | None = None
    """This and the next: as in [limits]; None = what stands there, 0 = no limit."""
    sessions: int | None = None
    rounds_in_flight: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for what, value in (("name", self.name), ("tenant", self.tenant)):
            if not 0 < len(value) <= 255 or not all("!" <= char <= "~" for char in value):
                raise ValueError(f"a key's {what} is 1 to 255 visible ASCII characters, got {value!r}")
        if bool(self.key_sha256) == bool(self.key_env):
            raise ValueError(f"key {self.name!r}: give one of key_sha256 and key_env")
        # What stands there may be the key itself, by mistake: it is not shown.
        if self.key_sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.key_sha256):
            raise ValueError(f"key {self.name!r}: key_sha256 must be 64 hex digits (`antiphon keys new`)")
        _check_limits(self)


def _check_limits(config: LimitsConfig | KeyConfig) -> None:
    for name in LIMITS:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
