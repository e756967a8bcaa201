"""Keys that configured engines ask for: those that registered themselves take the fleet's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from antiphon.engines.base import EngineRecord
from antiphon.scheduler.config import EngineConfig
from antiphon.scheduler.errors import UserError


class StaticEngineKeys:
    """What to present to an engine's HTTP.

    A configured engine gets what its `api_key_env` holds. Without that, it gets the fleet's key only if it
    has our linker, and so proves the fleet key first; one of others gets none: it could use it on ours.
    """

    def __init__(self, engines: Sequence[EngineConfig], env: Mapping[str, str] = os.environ) -> None:
        """Raises `UserError` if the environment lacks a key."""
        self._keys: dict[tuple[str, str], str] = {}
        for engine in engines:
            if engine.api_key_env and not env.get(engine.api_key_env):
                raise UserError(
                    f"engine {engine.engine_id!r}: the environment variable {engine.api_key_env} is not set"
                )
            if engine.api_key_env or not engine.kv_addresses:
                key = env[engine.api_key_env] if engine.api_key_env else ""
                self._keys[engine.engine_id, engine.url] = key

    def get(self, record: EngineRecord) -> str | None:
        """None = the fleet's, "" = none. An engine of that id that registered elsewhere is another one."""
        if record.incarnation:
            return None
        return self._keys.get((record.engine_id, record.url))
