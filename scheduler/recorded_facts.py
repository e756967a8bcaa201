"""What a recording says of the replica that made it: `replica-*.json`, rewritten as engines come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from antiphon.engines.wire import Hello
from antiphon.policies.latency import LatencyModel
from antiphon.scheduler.messages import EngineDown, EngineUp

FACTS_SCHEMA = "antiphon.replica/1"
FACT_FILES = "replica-*.json"


class EngineFacts(msgspec.Struct, frozen=True):
    """One engine, as it was last seen."""

    engine_id: str
    pool: str
    device_tokens: int
    store_tokens: int
    """0 = no page store: `local` rounds only."""
    page_tokens: int
    chunk_tokens: int
    decode_interval: int
    window_tokens: int
    """0 = unknown."""
    profile: LatencyModel | None = None
    """Its own, if it has one; else the replica's holds."""


class EngineChange(msgspec.Struct, frozen=True):
    at_s: float
    """Unix time."""
    engine_id: str
    kind: str
    """up | down"""


class ReplicaFacts(msgspec.Struct):
    """One replica of the recording."""

    replica: str
    policy: str
    ordering: str
    profile: LatencyModel
    slo_ttft_s: float
    slo_itl_s: float
    policy_parameters: dict[str, Any] = {}
    engines: dict[str, EngineFacts] = {}
    changes: list[EngineChange] = []
    schema: str = FACTS_SCHEMA

    def note(self, event: EngineUp | EngineDown, hello: Hello | None, at_s: float) -> None:
        """An engine came or went, at Unix time `at_s`."""
        if isinstance(event, EngineUp):
            self.engines[event.engine_id] = EngineFacts(
                engine_id=event.engine_id,
                pool=event.pool,
                device_tokens=event.pool_tokens,
                store_tokens=hello.store_pages * hello.page_size_tokens if hello is not None else 0,
                page_tokens=event.page_size_tokens,
                chunk_tokens=event.chunk_tokens,
                decode_interval=event.decode_interval,
                window_tokens=hello.context_tokens if hello is not None else 0,
                profile=event.latency,
            )
        kind = "up" if isinstance(event, EngineUp) else "down"
        self.changes.append(EngineChange(at_s, event.engine_id, kind))


def read_facts(directory: Path) -> list[ReplicaFacts]:
    """Of every replica that recorded in `directory`, by name. Raises ValueError naming the bad file."""
    found = []
    for path in sorted(directory.glob(FACT_FILES)):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=ReplicaFacts))
        except (OSError, msgspec.MsgspecError) as error:
            raise ValueError(f"{path}: {error}") from error
    return found
