"""What the standard evaluation runs: traces, clusters, loads, policies, orderings and seeds, as sweep specs.

Everything that is sent is written below the output folder first, so that a cell can be run again by itself:

    OUT/traces/TRACE-CLUSTER.jsonl     the sessions of one scenario, in their order
    OUT/specs/TRACE-CLUSTER.toml       its grid: `antiphon sweep` takes it
    OUT/results/TRACE-CLUSTER/         a result for each cell
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import msgspec

from antiphon.engines.cluster import load_cluster, resolve_engines
from antiphon.eval.cluster_files import find_cluster
from antiphon.eval.cluster_toml import toml_line
from antiphon.eval.load import Workbench
from antiphon.eval.standard_traces import Amount, Sample, Source, read_source, sample_of
from antiphon.eval.sweep_spec import SweepSpec, Variant
from antiphon.policies.registry import POLICIES
from antiphon.traces.schema import SessionTrace

OURS = "adaptive"
ORDERINGS = ("fcfs", "ampd_reorder")
ONE_ORDERING = ("local",)
"""Under these no round waits in a prefill queue of the scheduler."""
WITHOUT_ORDERING = "fcfs"
ABLATION_ORDERING = "ampd_reorder"
ABLATION: Mapping[str, Variant] = {
    "without-pull": Variant(OURS, {"pull": False}, ABLATION_ORDERING),
    "without-move": Variant(OURS, {"move": False}, ABLATION_ORDERING),
    "without-corrections": Variant(OURS, {}, ABLATION_ORDERING, corrections=False),
}
"""Each leaves out one part of `OURS`; without ordering it is in the grid anyhow, under fcfs."""
PROFILES = ("claude-code", "toolbench", "hotpotqa", "dureader")
"""Those whose load is reached within the rounds of a run: sessions of the others mostly sleep."""
LOADS = (0.3, 0.5, 0.7, 0.9, 1.1)
"""What is sent is the same for all of them, and for a run of fewer of them."""
MAX_GAP_S = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run."""

    name: str
    clusters: tuple[str, ...]
    seeds: tuple[int, ...]
    amount: Amount
    loads: tuple[float, ...] = LOADS
    profiles: tuple[str, ...] = PROFILES
    """Generated where no folder of traces is given."""
    policies: tuple[str, ...] = tuple(sorted(POLICIES))
    ablation: bool = True


H200, MIXED, H20 = "2p2d-qwen3-32b-h200", "mixed-h100-a100-qwen3-32b", "ampd-32xh20"
SCALES: Mapping[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale("standard", (H200, MIXED), (0,), Amount(40, 3.0, 2_000, 16_000)),
        Scale("full", (H200, MIXED, H20), (0, 1, 2), Amount(40, 6.0, 5_000, 30_000, whole=True)),
        Scale(
            "quick", (H200,), (0,), Amount(6, 0.0, 0, 200), (0.5, 0.9), ("toolbench", "hotpotqa"),
            (OURS, "local"), ablation=False,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """One trace on one cluster: what may be compared."""

    name: str
    source: Source
    cluster: str
    sample: Sample
    spec_path: Path
    results: Path
    spec: SweepSpec


def scenarios_of(scale: Scale, sources: Sequence[Source], out: Path) -> list[Scenario]:
    """Traces and specs written, in order of the traces. Raises `TraceError`, `ClusterError`, `OSError`."""
    benches = {cluster: workbench(cluster) for cluster in scale.clusters}
    made = []
    for source in sources:
        sessions = read_source(source, MAX_GAP_S)
        made += [_scenario(scale, source, sessions, cluster, benches[cluster], out) for cluster in benches]
    return made


def workbench(cluster: str) -> Workbench:
    """The idle fleet of a bundled cluster, or of a file."""
    path = find_cluster(cluster)
    read = load_cluster(path)
    return Workbench.of(read, resolve_engines(read, path.parent))


def _scenario(
    scale: Scale, source: Source, sessions: Sequence[SessionTrace], cluster: str, bench: Workbench, out: Path
) -> Scenario:
    name = f"{source.name}-{Path(cluster).stem}"
    sample = sample_of(sessions, bench, max(LOADS), scale.amount)
    trace = _write(out / "traces" / f"{name}.jsonl", msgspec.json.Encoder().encode_lines(sample.sessions()))
    spec = SweepSpec(
        traces=(f"../traces/{trace.name}",),
        clusters=(cluster if not Path(cluster).is_file() else str(Path(cluster).resolve()),),
        policies=scale.policies,
        orderings=ORDERINGS,
        one_ordering=ONE_ORDERING,
        variants=dict(ABLATION) if scale.ablation and OURS in scale.policies else {},
        loads=scale.loads,
        seeds=scale.seeds,
        max_gap_s=MAX_GAP_S,
        slo_ttft_s=sample.slo_ttft_s,
        slo_itl_s=sample.slo_itl_s,
        rounds=False,
    )
    spec_path = _write(out / "specs" / f"{name}.toml", spec_toml(spec).encode())
    return Scenario(name, source, Path(cluster).stem, sample, spec_path, out / "results" / name, spec)


def spec_toml(spec: SweepSpec) -> str:
    """The file that `read_spec` reads back as `spec`; TOML has no null, so what is not set is left out."""
    plain = {key: value for key, value in msgspec.to_builtins(spec).items() if value is not None}
    variants = plain.pop("variants")
    lines = [toml_line(key, value) for key, value in plain.items()]
    for name, variant in variants.items():
        parameters = ", ".join(starmap(toml_line, variant.pop("parameters").items()))
        lines += ["", f"[variants.{name}]", f"parameters = {{{parameters}}}"]
        lines += [toml_line(key, value) for key, value in variant.items()]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
