"""Cluster files that ship with the package, by name (`clusters/*.toml`)."""

from __future__ import annotations

from pathlib import Path

from antiphon.engines.cluster import ClusterError

FOLDER = Path(__file__).with_name("clusters")


def bundled_clusters() -> list[str]:
    """Their names, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_cluster(name_or_path: str | Path) -> Path:
    """A file by path, or a bundled one by name; a file that exists comes first. Raises `ClusterError`."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = FOLDER / f"{name_or_path}.toml"
    if bundled.parent == FOLDER and bundled.is_file():
        return bundled
    raise ClusterError(
        f"cluster {str(name_or_path)!r} is neither a file nor one of {', '.join(bundled_clusters())}"
    )
