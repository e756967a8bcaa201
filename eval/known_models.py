"""Models that ship with the package: shape and window (`data/models.toml`), and their latency profiles.

A file of one's own adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from antiphon.eval.hardware import ModelShape, Some, gpu_name, gpu_named
from antiphon.policies.latency import LatencyModel, bundled_profiles, load_latency_model

Table = TypeVar("Table", bound=msgspec.Struct)
MODELS = Path(__file__).with_name("data") / "models.toml"


class KnownModel(ModelShape, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model's shape, with what else is to be known of it to size engines."""

    model: str
    """As it is published: Qwen/Qwen3-32B."""
    window_tokens: Some
    """Longest prompt and output."""
    source: str
    """Where the numbers come from, in words."""
    profiles: tuple[str, ...] = ()
    """Latency profiles of it beside those that ship: JSON files, relative to the file that names them."""


def read_models(path: Path | None = None) -> dict[str, KnownModel]:
    """Short name -> model: those that ship, and those of a file, which come first where both have a name.

    Raises ValueError naming file and key.
    """
    known = read_tables(MODELS, KnownModel)
    if path is not None:
        for name, model in read_tables(path, KnownModel).items():
            beside = tuple(str(path.parent / profile) for profile in model.profiles)
            known[name] = msgspec.structs.replace(model, profiles=beside)
    return known


def read_tables(path: Path, kind: type[Table]) -> dict[str, Table]:
    """A TOML file of equal tables, by their names; raises ValueError naming file, table and key."""
    try:
        written = msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    tables: dict[str, Table] = {}
    for name, table in written.items():
        try:
            tables[name] = msgspec.convert(table, kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}: [{name}]: {error}") from error
    return tables


def model_named(name: str, models: Mapping[str, KnownModel]) -> tuple[str, KnownModel]:
    """Its short name and itself, by short or published name in any case; ValueError names those there are."""
    lowered = name.strip().lower()
    for short, model in models.items():
        if lowered in (short.lower(), model.model.lower()):
            return short, model
    raise ValueError(f"no model {name!r}; there are {', '.join(models)}")


def profile_name(model: str, system: str, gpus: int) -> str:
    """`Qwen/Qwen3-32B` on 4 x `h200_sxm` is `qwen3-32b-h200-tp4`."""
    base = model.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-v0.1")
    return f"{base}-{gpu_name(system)}-tp{gpus}"


def profile_for(model: KnownModel, gpu: str, tp: int) -> LatencyModel | None:
    """What an engine of `tp` such GPUs takes: a profile that the model's file names, else one that ships.

    None if there is neither. Raises ValueError for an unknown GPU or a profile that cannot be read.
    """
    system, described = gpu_named(gpu)
    for path in model.profiles:
        own = load_latency_model(path)
        if (own.gpu, own.gpus) == (described.label, tp):
            return own
    name = profile_name(model.model, system, tp)
    return load_latency_model(name) if name in bundled_profiles() else None


def degrees_for(model: KnownModel, gpu: str) -> tuple[int, ...]:
    """Tensor-parallel degrees on this GPU that there are profiles for."""
    return tuple(tp for tp in (1, 2, 4, 8, 16) if profile_for(model, gpu, tp) is not None)
