"""What the linker is told through SGLang's linker config, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from antiphon.engines.handshake import FLEET_KEY_ENV, load_fleet_key
from antiphon.engines.interfaces import find_interface

DEVICE_POOL_FACTOR = 1.25


class LinkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`linker_extra_config` of the engine's command line. It says where the fleet key is, not what."""

    engine_id: str
    incarnation: str
    model_id: str
    model_revision: str = ""
    kv_port: int = 0
    """Directory port of rank 0; rank r listens on kv_port + r."""
    kv_addresses: tuple[str, ...] = ()
    """host:port per rank, in place of `interface` and `kv_port`."""
    interface: str = "127.0.0.1"
    """Network device or IPv4 address."""
    fleet_key_env: str = FLEET_KEY_ENV
    key_file: str = ""
    store_pages: int = 0
    """0 = 1.25 x the device pool, and room for two windows of prefetched pages."""
    checksum: bool = False
    fault_injection: bool = False
    context_tokens: int = 0

    def fleet_key(self) -> bytes:
        """Raises ValueError when there is none."""
        return load_fleet_key(self.fleet_key_env, self.key_file)

    def addresses(self, world_size: int) -> tuple[str, ...]:
        """host:port of every rank's directory; raises ValueError."""
        if self.kv_addresses:
            if len(self.kv_addresses) != world_size:
                raise ValueError(
                    f"kv_addresses names {len(self.kv_addresses)} ranks, engine has {world_size}"
                )
            return self.kv_addresses
        if not 0 < self.kv_port <= 65536 - world_size:
            raise ValueError(f"kv_port must be a port for each of {world_size} ranks, got {self.kv_port}")
        host = find_interface(self.interface).address
        return tuple(f"{host}:{self.kv_port + rank}" for rank in range(world_size))

    def pages_for(self, device_pages: int, page_size_tokens: int) -> int:
        """Size of the store; raises ValueError if it could not contain the device pool.

        The engine offers each page once: what the store drops while it is on the device is lost to everyone.
        """
        if self.store_pages == 0:
            window_pages = -(-self.context_tokens // page_size_tokens)
            return int(device_pages * DEVICE_POOL_FACTOR) + max(1, 2 * window_pages)
        if self.store_pages <= device_pages:
            raise ValueError(
                f"store_pages is {self.store_pages}, but the device pool has {device_pages} pages of "
                f"{page_size_tokens} tokens; the store must be larger, so that pulled pages find room too. "
                f"Raise store_pages (0 = default) or lower --max-total-tokens"
            )
        return self.store_pages


def parse_config(extra_config: Mapping[str, Any] | None) -> LinkerConfig:
    """Raises ValueError naming the unknown, missing or mistyped key."""
    try:
        return msgspec.convert(dict(extra_config or {}), LinkerConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"linker_extra_config: {error}") from error
