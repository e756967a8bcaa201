"""Cluster files: the engines of a simulation, their links, targets and prices, as TOML.

Frozen and strict: an unknown key or an impossible number is a `ClusterError` that names file and key.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from antiphon.policies.latency import LatencyModel, load_latency_model

Count = Annotated[int, Meta(ge=1, le=10_000)]
SomeTokens = Annotated[int, Meta(ge=1)]
Tokens = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
MoreThanZero = Annotated[float, Meta(gt=0.0, le=1e18)]


class ClusterError(Exception):
    """A cluster file cannot be used: file, key, what is wrong."""


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Targets of a round that brings none of its own."""

    ttft_s: MoreThanZero
    itl_s: MoreThanZero


class EngineGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` equal engines, called NAME-0, NAME-1, ... (NAME defaults to the pool)."""

    count: Count
    pool: Literal["prefill", "decode"]
    profile: str
    """Latency profile: a bundled name or a JSON file (relative to the cluster file)."""
    device_tokens: SomeTokens
    """KV that fits on the device."""
    store_tokens: Tokens
    """KV that fits in the page store (host memory)."""
    link_bytes_per_s: MoreThanZero
    """Of one engine, each way; concurrent transfers share it."""
    chunk_tokens: Tokens = 8192
    """C, --chunked-prefill-size; 0 = whole prompts."""
    decode_interval: Tokens = 0
    """K, --prefill-decode-interval: decode steps between two chunks; 0 = prefill first."""
    max_running_requests: Count = 256
    request_fixed_s: Seconds = 0.002
    """Of every engine request, before it is queued: HTTP, tokenizer manager, scheduling."""
    name: str = ""
    price_per_gpu_hour: Annotated[float, Meta(ge=0.0, le=1e9)] | None = None
    believed: str = ""
    """What the scheduler is told where it is not `profile`, by which the engines run; "" = `profile`."""


class EngineEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine dies or (re)starts, with nothing in its memory."""

    at_s: Seconds
    engine: str
    kind: Literal["down", "up"]


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fleet."""

    name: str
    slo: Slo
    engines: tuple[EngineGroup, ...]
    description: str = ""
    page_tokens: SomeTokens = 64
    window_tokens: SomeTokens = 131_072
    """Longest prompt + output of the model: a longer round is refused."""
    claim_s: Seconds = 0.0005
    """The ledger's round trip before every decision."""
    events: tuple[EngineEvent, ...] = ()


class EngineSpec(msgspec.Struct, frozen=True):
    """One engine of a cluster, resolved."""

    engine_id: str
    group: EngineGroup
    latency: LatencyModel
    """What it runs by."""
    believed: LatencyModel | None = None
    """What the scheduler is told; None = `latency`."""


def load_cluster(path: Path) -> Cluster:
    """Read and check a cluster file; raises `ClusterError`."""
    try:
        cluster = msgspec.toml.decode(path.read_bytes(), type=Cluster)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: {error}") from error
    specs = resolve_engines(cluster, path.parent)
    if "decode" not in {spec.group.pool for spec in specs}:
        raise ClusterError(f"{path}: no engine of the decode pool: sessions need a home")
    known = {spec.engine_id for spec in specs}
    for event in cluster.events:
        if event.engine not in known:
            raise ClusterError(
                f"{path}: events: no engine {event.engine!r}; there are {', '.join(sorted(known))}"
            )
    return cluster


def resolve_engines(cluster: Cluster, folder: Path = Path()) -> tuple[EngineSpec, ...]:
    """Every engine with its latency profile, in the order of the file; raises `ClusterError`."""
    specs: list[EngineSpec] = []
    named: dict[str, int] = defaultdict(int)
    for group in cluster.engines:
        latency = _profile(cluster, folder, group.profile)
        believed = _profile(cluster, folder, group.believed) if group.believed else None
        if group.device_tokens < cluster.page_tokens:
            raise ClusterError(
                f"cluster {cluster.name!r}: device_tokens below one page ({cluster.page_tokens})"
            )
        if 0 < group.chunk_tokens < cluster.page_tokens:
            raise ClusterError(
                f"cluster {cluster.name!r}: chunk_tokens below one page ({cluster.page_tokens})"
            )
        name = group.name or group.pool
        first, named[name] = named[name], named[name] + group.count
        numbers = range(first, first + group.count)
        specs += [EngineSpec(f"{name}-{n}", group, latency, believed) for n in numbers]
    return tuple(specs)


def _profile(cluster: Cluster, folder: Path, name: str) -> LatencyModel:
    """A JSON file beside the cluster file, else whatever else the name stands for."""
    beside = folder / name
    try:
        return load_latency_model(str(beside) if beside.is_file() else name)
    except ValueError as error:
        raise ClusterError(f"cluster {cluster.name!r}: {error}") from error
