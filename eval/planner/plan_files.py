"""A plan as files: `antiphon simulate --cluster`, `antiphon serve --config`, and the engines' start lines.

Engines have the same names in all three. They are put on servers of their kind in the order of the plan, the
large ones first; none lies on two servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from antiphon.eval.cluster_toml import cluster_toml, toml_line
from antiphon.eval.hardware import MEMORY_SHARE
from antiphon.eval.planner.ask import Ask
from antiphon.eval.planner.plans import EngineType, Group, Plan
from antiphon.eval.planner.score import PAGE_TOKENS
from antiphon.policies.latency import LatencyModel, bundled_profiles, load_latency_model

FIRST_PORT = 30_000
"""Of each server; the next engine has the next."""
KEY = '${KEY_FILE:+--key-file "$KEY_FILE"}'
"""Nothing where it is not set: then the environment has the key, or the state directory."""
PROFILES = "profiles"
"""Folder of the profiles that do not ship as they are needed."""


class Engine(NamedTuple):
    """One engine at its place."""

    engine_id: str
    group: Group
    node: str
    """h100-1: the first server with H100."""
    gpus: tuple[int, ...]
    """Of the node."""
    port: int


def write_files(folder: Path, plan: Plan, ask: Ask, gpus_per_node: Mapping[str, int]) -> None:
    """`cluster.toml`, `antiphon.toml`, `engines.sh`, and the profiles that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    profiles = {group.type: _profile(folder, group.type) for group in plan.groups}
    cluster = plan.cluster("plan", ask.slo, ask.window_tokens, PAGE_TOKENS)
    groups = tuple(
        replace(described, profile=profiles[group.type])
        for described, group in zip(cluster.engines, plan.groups, strict=True)
    )
    (folder / "cluster.toml").write_text(cluster_toml(replace(cluster, engines=groups)))
    places = placed(plan, gpus_per_node)
    (folder / "antiphon.toml").write_text(_config(plan, ask, places, profiles))
    (folder / "engines.sh").write_text(engines_script(plan, ask, places))


def _profile(folder: Path, each: EngineType) -> str:
    """The name of one that ships, if it is that one; else a file beside, relative to `folder`."""
    latency = each.on_its_link
    if latency.name in bundled_profiles() and load_latency_model(latency.name) == latency:
        return latency.name
    name = f"{PROFILES}/{_file_name(latency)}-{latency.transfer.bytes_per_s / 1e9:g}GBps.json"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(latency), indent=1) + b"\n")
    return name


def _file_name(latency: LatencyModel) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in latency.name)


def placed(plan: Plan, gpus_per_node: Mapping[str, int]) -> tuple[Engine, ...]:
    """Every engine on the first server that has room for it, the large ones first; in the plan's order."""
    wanted: list[tuple[str, Group]] = []
    counts: dict[str, int] = {}
    for group in plan.groups:
        for _ in range(group.count):
            wanted.append((f"{group.pool}-{counts.get(group.pool, 0)}", group))
            counts[group.pool] = counts.get(group.pool, 0) + 1
    used: dict[str, list[int]] = {}
    """GPU -> GPUs in use on each of its servers."""
    ports: dict[str, int] = {}
    found: dict[str, Engine] = {}
    for engine_id, group in sorted(wanted, key=lambda each: -each[1].type.tp):
        gpu, tp = group.type.gpu, group.type.tp
        nodes = used.setdefault(gpu, [])
        number = next((n for n, taken in enumerate(nodes) if taken + tp <= gpus_per_node[gpu]), len(nodes))
        if number == len(nodes):
            nodes.append(0)
        first, nodes[number] = nodes[number], nodes[number] + tp
        node = f"{gpu}-{number + 1}"
        port = ports[node] = ports.get(node, FIRST_PORT - 1) + 1
        found[engine_id] = Engine(engine_id, group, node, tuple(range(first, first + tp)), port)
    return tuple(found[engine_id] for engine_id, _ in wanted)


# ---------------------------------------------------------------- antiphon.toml


def _config(plan: Plan, ask: Ask, places: tuple[Engine, ...], profiles: Mapping[EngineType, str]) -> str:
    lines = [
        f"# {plan.describe()}: for `antiphon serve --config antiphon.toml`. Made by `antiphon plan`.",
        '# Engines on other machines must reach the ledger: url = "redis://HOST:6379" under [ledger], or',
        "# ANTIPHON_REDIS_URL. They need the fleet key too (antiphon engine --key-file).",
        "",
        "[scheduler]",
        toml_line("policy", plan.policy),
        toml_line("ordering", "fcfs"),
        toml_line("slo_ttft_s", ask.slo.ttft_s),
        toml_line("slo_itl_s", ask.slo.itl_s),
        toml_line("profile", profiles[plan.groups[0].type]),
    ]
    own: dict[str, str] = {}
    """Engine id or pool -> profile, where it is another."""
    for pool in ("prefill", "decode"):
        of_pool = {profiles[group.type] for group in plan.groups if group.pool == pool}
        if len(of_pool) == 1:
            own[pool] = of_pool.pop()
        else:
            own |= {e.engine_id: profiles[e.group.type] for e in places if e.group.pool == pool}
    lines += ["", "[scheduler.profiles]", *(toml_line(name, profile) for name, profile in own.items())]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- start lines


def engines_script(plan: Plan, ask: Ask, places: tuple[Engine, ...]) -> str:
    """A shell script: `sh engines.sh NODE` starts that server's engines; one line for each."""
    nodes = dict.fromkeys(sorted((engine.node for engine in places), key=_node_order))
    mixed = len({group.type.tp for group in plan.groups}) > 1
    lines = [
        "#!/bin/sh",
        f"# {plan.describe()}; {_on_one_line(ask.model)}. Made by `antiphon plan`.",
        "# On each server: MODEL=/path/to/model LEDGER=redis://HOST:6379 INTERFACE=eth0 sh engines.sh NODE",
        f"# with NODE one of: {', '.join(nodes)}",
        "# and the fleet key of `antiphon serve`: KEY_FILE=/path/to/fleet.key, or ANTIPHON_FLEET_KEY.",
        *(["# Its degrees differ (--mixed-tp): no KV moves between such engines yet."] if mixed else []),
        "set -eu",
        ': "${MODEL:?the model directory}" "${LEDGER:?URL of the ledger}" "${INTERFACE:?network interface}"',
        'pids=""',
        "# What a script starts in the background does not hear Ctrl-C.",
        "trap 'trap \"\" INT TERM; kill $pids || true; wait $pids || true; exit 130' INT TERM",
        'case "${1:-}" in',
    ]
    for node in nodes:
        lines.append(f"{node})")
        for engine in places:
            if engine.node == node:
                lines += [f"  {start_line(engine, ask)} &", '  pids="$pids $!"']
        lines.append("  ;;")
    lines += [f'*) echo "usage: sh engines.sh {"|".join(nodes)}" >&2; exit 2 ;;', "esac", "wait"]
    return "\n".join(lines) + "\n"


def _on_one_line(name: str) -> str:
    """A model's name, which may hold anything, within a comment."""
    return "".join(sign if sign.isprintable() else "?" for sign in name)


def _node_order(node: str) -> tuple[str, int]:
    gpu, _, number = node.rpartition("-")
    return gpu, int(number)


def start_line(engine: Engine, ask: Ask) -> str:
    """The shell command of one engine."""
    each = engine.group.type
    ours = [
        f"CUDA_VISIBLE_DEVICES={','.join(map(str, engine.gpus))}",
        'antiphon engine --model "$MODEL" --ledger "$LEDGER" --interface "$INTERFACE"',
        KEY,
        f"--port {engine.port} --pool {engine.group.pool} --engine-id {engine.engine_id}",
    ]
    if each.store_tokens > each.device_tokens:  # a smaller store than the device's pool is refused
        ours.append(f"--store-pages {each.store_tokens // PAGE_TOKENS}")
    sglang = [
        f"--tp-size {each.tp}",
        f"--chunked-prefill-size {engine.group.chunk_tokens}",
        f"--prefill-decode-interval {engine.group.decode_interval}",
        f"--mem-fraction-static {MEMORY_SHARE}",
        f"--context-length {ask.window_tokens}",
    ]
    return " ".join([*ours, "--", *sglang])
