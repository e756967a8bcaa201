"""What a sweep is told: a grid of simulations as TOML, and the cells that it names.

    traces = ["weka.jsonl.gz"]
    clusters = ["2p2d-qwen3-32b-h200"]
    policies = ["ampd", "local"]
    loads = [0.3, 0.7]            # or session_rates = [...]
    seeds = [0, 1]
    max_sessions = 60             # and, optional: orderings, max_gap_s, slo_ttft_s, slo_itl_s, rounds
    [variants.ampd-strict]        # a policy under other parameters, as one more series
    policy = "ampd"
    parameters = {alpha = 0.7}

Frozen and strict: an unknown key is an error. Traces and cluster files are looked for beside the spec first.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from antiphon.engines.cluster import ClusterError, load_cluster, resolve_engines
from antiphon.eval.cluster_files import find_cluster
from antiphon.eval.simulation_plan import SimulateOptions, SimulationError
from antiphon.policies.registry import make_ordering, make_policy
from antiphon.traces.readers import trace_sha256

Some = Annotated[tuple[str, ...], Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0.0)]
Series = tuple[str, str, str, dict[str, Any], bool]
"""Variant or "", policy, ordering, parameters, corrections."""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy as it is not by default: one more series of the grid, under a name of its own."""

    policy: str
    parameters: dict[str, Any] = {}
    ordering: str = "fcfs"
    corrections: bool = True
    """Whether the core corrects its latency model by what engines really take."""


class SweepSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A grid: every combination of the lists is one cell; of variants, every one with traces, clusters, loads
    and seeds."""

    traces: Some
    clusters: Some
    policies: tuple[str, ...] = ()
    orderings: Some = ("fcfs",)
    one_ordering: tuple[str, ...] = ()
    """Policies under which nothing waits in a queue of the scheduler: they run under the first ordering."""
    variants: dict[Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Variant] = {}
    loads: tuple[Positive, ...] = ()
    """Shares of the fleet's time (rho)."""
    session_rates: tuple[Positive, ...] = ()
    seeds: Annotated[tuple[int, ...], Meta(min_length=1)] = (0,)
    max_sessions: Annotated[int, Meta(ge=1)] | None = None
    max_gap_s: Annotated[float, Meta(ge=0.0)] = 60.0
    slo_ttft_s: Positive | None = None
    slo_itl_s: Positive | None = None
    share_system: bool = False
    skip_bad: bool = False
    rounds: bool = True
    """Write every round beside the result: distributions and time lines of a report come from them."""


class Cell(msgspec.Struct, frozen=True):
    """One simulation of the grid."""

    name: str
    """Of its files: readable, and ending in a hash of all that it depends on."""
    trace: str
    cluster: str
    policy: str
    ordering: str
    seed: int
    load: float | None
    session_rate: float | None
    variant: str = ""
    """Its name; "" for a policy by its defaults."""
    parameters: dict[str, Any] = {}
    corrections: bool = True

    def options(self, spec: SweepSpec, out: Path) -> SimulateOptions:
        """What `run_simulation` is given; results go into `out`."""
        return SimulateOptions(
            trace=Path(self.trace),
            cluster=self.cluster,
            policy=self.policy,
            ordering=self.ordering,
            session_rate=self.session_rate,
            load=self.load,
            max_gap_s=spec.max_gap_s,
            max_sessions=spec.max_sessions,
            slo_ttft_s=spec.slo_ttft_s,
            slo_itl_s=spec.slo_itl_s,
            seed=self.seed,
            json_path=out / f"{self.name}.json",
            rounds_path=out / f"{self.name}.rounds.jsonl.gz" if spec.rounds else None,
            share_system=spec.share_system,
            skip_bad=spec.skip_bad,
            policy_parameters=self.parameters,
            variant=self.variant,
            corrections=self.corrections,
        )


def read_spec(path: Path) -> SweepSpec:
    """Raises `SimulationError`: file, key, what is wrong."""
    try:
        spec = msgspec.toml.decode(path.read_bytes(), type=SweepSpec)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise SimulationError(f"{path}: {error}") from error
    if bool(spec.loads) == bool(spec.session_rates):
        raise SimulationError(f"{path}: give either loads or session_rates")
    if not spec.policies and not spec.variants:
        raise SimulationError(f"{path}: give policies, or variants")
    try:
        for _, policy, ordering, parameters, _ in series_of(spec):
            make_policy(policy, parameters)
            make_ordering(ordering)
        for name in spec.orderings:
            make_ordering(name)
    except ValueError as error:
        raise SimulationError(f"{path}: {error}") from error
    return spec


def cells_of(spec: SweepSpec, folder: Path) -> list[Cell]:
    """Every cell, in the order of the lists. Names hold traces, clusters and latency profiles by content.

    Raises `ClusterError`, and `TraceError` for a trace that is not there.
    """
    traces = {name: _beside(folder, name) for name in spec.traces}
    hashes = {name: trace_sha256(path) for name, path in traces.items()}
    clusters = {name: _cluster(folder, name) for name in spec.clusters}
    contents = {name: _content(path) for name, path in clusters.items()}
    loads: list[tuple[float | None, float | None]] = [(load, None) for load in spec.loads]
    loads += [(None, rate) for rate in spec.session_rates]
    common = msgspec.json.encode(
        [spec.max_sessions, spec.max_gap_s, spec.slo_ttft_s, spec.slo_itl_s, spec.share_system, spec.skip_bad]
    )
    cells = []
    for trace, cluster, series, (load, rate), seed in itertools.product(
        spec.traces, spec.clusters, series_of(spec), loads, spec.seeds
    ):
        variant, policy, ordering, parameters, corrections = series
        what: list[object] = [hashes[trace], policy, ordering, load, rate, seed]
        what += [parameters, corrections] if variant else []
        content = contents[cluster] + common + msgspec.json.encode(what, order="sorted")
        digest = hashlib.sha256(content).hexdigest()[:10]
        amount = f"rho{load:g}" if load is not None else f"rate{rate:g}"
        folder_name, file_name = Path(trace).parent.name, Path(trace).name.split(".")[0]
        stem = f"{folder_name}-{file_name}" if folder_name else file_name
        stem = f"{stem}-{clusters[cluster].stem}-{variant or policy}-{ordering}"
        cells.append(
            Cell(
                name=f"{stem}-{amount}-s{seed}-{digest}",
                trace=str(traces[trace]),
                cluster=str(clusters[cluster]),
                policy=policy,
                ordering=ordering,
                seed=seed,
                load=load,
                session_rate=rate,
                variant=variant,
                parameters=parameters,
                corrections=corrections,
            )
        )
    return list({cell.name: cell for cell in cells}.values())  # who lists a thing twice means it once


def series_of(spec: SweepSpec) -> list[Series]:
    """In the order of the lists; variants come last."""
    plain: list[Series] = [
        ("", policy, ordering, {}, True)
        for policy in spec.policies
        for ordering in (spec.orderings[:1] if policy in spec.one_ordering else spec.orderings)
    ]
    return plain + [
        (name, it.policy, it.ordering, it.parameters, it.corrections) for name, it in spec.variants.items()
    ]


def _content(cluster: Path) -> bytes:
    """The file, and the coefficients that it names."""
    specs = resolve_engines(load_cluster(cluster), cluster.parent)
    told = [spec.believed for spec in specs if spec.believed is not None]
    profiles = [spec.latency for spec in specs] + told
    return cluster.read_bytes() + b"".join(map(msgspec.json.encode, profiles))


def _beside(folder: Path, name: str) -> Path:
    beside = folder / name
    return beside if beside.exists() else Path(name)


def _cluster(folder: Path, name: str) -> Path:
    try:
        return find_cluster(_beside(folder, name))
    except ClusterError:
        return find_cluster(name)
