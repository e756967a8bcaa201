"""What a planner chooses: engine types, groups of equal engines, plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from msgspec import Struct
from msgspec.structs import force_setattr, replace

from antiphon.engines.cluster import Cluster, EngineGroup, EngineSpec, Slo
from antiphon.policies.latency import LatencyModel

PoolName = Literal["prefill", "decode"]


class EngineType(Struct, frozen=True):
    """One engine: `tp` GPUs of one kind that run the model tensor parallel."""

    gpu: str
    """As the user names it: h100."""
    tp: int
    latency: LatencyModel
    device_tokens: int
    """KV that fits beside the weights."""
    store_tokens: int
    """KV that fits in its page store."""
    link_bytes_per_s: float
    price_per_gpu_hour: float
    """USD."""

    @property
    def name(self) -> str:
        return f"{self.tp}x{self.gpu}"

    @property
    def price_per_hour(self) -> float:
        return self.tp * self.price_per_gpu_hour

    @property
    def on_its_link(self) -> LatencyModel:
        """The profile, with the network that these engines have: policies predict transfers by it."""
        transfer = self.latency.transfer
        if transfer.bytes_per_s == self.link_bytes_per_s:
            return self.latency
        return replace(self.latency, transfer=replace(transfer, bytes_per_s=self.link_bytes_per_s))


class Group(Struct, frozen=True):
    """`count` equal engines of one pool."""

    pool: PoolName
    type: EngineType
    count: int
    chunk_tokens: int
    """C."""
    decode_interval: int
    """K."""


FIRST_CK: Mapping[PoolName, tuple[int, int]] = MappingProxyType({"prefill": (8192, 4), "decode": (2048, 4)})
"""C and K of each pool's engines before any search: where nobody decodes, large chunks cost nobody."""


def group(pool: PoolName, each: EngineType, count: int) -> Group:
    """With the first C and K."""
    return Group(pool, each, count, *FIRST_CK[pool])


def in_order(types: Iterable[EngineType]) -> list[EngineType]:
    """The dearer GPU first, then by degree: whatever the order in which a budget names them."""
    return sorted(types, key=_rank)


def _rank(each: EngineType) -> tuple[float, str, int]:
    return -each.price_per_gpu_hour, each.gpu, each.tp


class Plan(Struct, frozen=True):
    """A fleet and the policy that runs it. Equal plans are equal values, however their groups came."""

    groups: tuple[Group, ...]
    """Prefill first, each pool in the order of its types."""
    policy: str = "adaptive"

    def __post_init__(self) -> None:
        if len(self.groups) > 1:
            force_setattr(self, "groups", tuple(sorted(self.groups, key=_group_rank)))

    @property
    def colocated(self) -> bool:
        """Every engine prefills the rounds of its own sessions: there is no prefill pool."""
        return not self.pool("prefill")

    @property
    def gpus(self) -> dict[str, int]:
        """GPU kind -> how many."""
        used: Counter[str] = Counter()
        for group in self.groups:
            used[group.type.gpu] += group.count * group.type.tp
        return dict(used)

    @property
    def price_per_hour(self) -> float:
        """USD."""
        return sum(group.count * group.type.price_per_hour for group in self.groups)

    @property
    def engines(self) -> int:
        return sum(group.count for group in self.groups)

    def pool(self, name: PoolName) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.pool == name)

    def describe(self) -> str:
        """`prefill 2 x 4xh100, decode 3 x 4xa100, adaptive`."""
        if self.colocated:
            engines = " + ".join(f"{group.count} x {group.type.name}" for group in self.groups)
            return f"co-located {engines}, {self.policy}"
        pools = []
        for name in ("prefill", "decode"):
            engines = " + ".join(f"{g.count} x {g.type.name}" for g in self.groups if g.pool == name)
            pools.append(f"{name} {engines}")
        return f"{', '.join(pools)}, {self.policy}"

    def fits(self, budget: dict[str, int]) -> bool:
        """Within so many GPUs of each kind."""
        return all(count <= budget.get(gpu, 0) for gpu, count in self.gpus.items())

    def with_counts(self, counts: tuple[int, ...]) -> Plan:
        """The same groups, of other sizes; a group of none goes."""
        pairs = zip(self.groups, counts, strict=True)
        return replace(self, groups=tuple(replace(group, count=count) for group, count in pairs if count))

    def specs(self) -> tuple[EngineSpec, ...]:
        """Its engines for a simulation, in the order of the groups."""
        specs: list[EngineSpec] = []
        for number, group in enumerate(self.groups):
            named = f"{group.pool}-{group.type.name}-{number}"
            described = self._cluster_group(group)
            latency = group.type.on_its_link
            specs += [EngineSpec(f"{named}-{n}", described, latency) for n in range(group.count)]
        return tuple(specs)

    def cluster(self, name: str, slo: Slo, window_tokens: int, page_tokens: int) -> Cluster:
        """The same fleet as a cluster file says it."""
        return Cluster(
            name=name,
            slo=slo,
            engines=tuple(self._cluster_group(group) for group in self.groups),
            description=self.describe(),
            page_tokens=page_tokens,
            window_tokens=window_tokens,
        )

    @staticmethod
    def _cluster_group(group: Group) -> EngineGroup:
        return EngineGroup(
            count=group.count,
            pool=group.pool,
            profile=group.type.latency.name,
            device_tokens=group.type.device_tokens,
            store_tokens=group.type.store_tokens,
            link_bytes_per_s=group.type.link_bytes_per_s,
            chunk_tokens=group.chunk_tokens,
            decode_interval=group.decode_interval,
            price_per_gpu_hour=group.type.price_per_gpu_hour,
        )


def _group_rank(group: Group) -> tuple[bool, tuple[float, str, int], int, int, int]:
    return (
        group.pool == "decode", _rank(group.type), group.chunk_tokens, group.decode_interval, group.count
    )  # fmt: skip
