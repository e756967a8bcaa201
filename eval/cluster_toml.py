"""Cluster files written: the inverse of `engines/cluster.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from antiphon.engines.cluster import Cluster
from antiphon.policies.latency import LatencyModel

PROFILE_FILE = "profile.json"


def write_cluster(directory: Path, cluster: Cluster, profile: LatencyModel) -> Path:
    """`cluster.toml` and, beside it, the profile that its groups name; the path of the former."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PROFILE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    path = directory / "cluster.toml"
    path.write_text(cluster_toml(cluster))
    return path


def cluster_toml(cluster: Cluster) -> str:
    """The file that `load_cluster` reads back as `cluster`."""
    plain: dict[str, Any] = msgspec.to_builtins(cluster)
    lines = [toml_line(name, value) for name, value in plain.items() if _is_scalar(value)]
    for name, value in plain.items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *(toml_line(key, inner) for key, inner in value.items())]
        elif not _is_scalar(value):
            for item in value or ():
                found = [toml_line(key, inner) for key, inner in item.items() if inner is not None]
                lines += ["", f"[[{name}]]", *found]
    return "\n".join(lines) + "\n"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


def toml_line(key: str, value: object) -> str:
    """`key = value` for texts, numbers, truths and lists of them."""
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    text = msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return f"{key} = {text}"
