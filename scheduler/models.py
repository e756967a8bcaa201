"""Which models a replica serves: under which names, where their files are, and which engines have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from antiphon.scheduler.config import Config, ServedModelConfig

ONLY = ""
"""Key of the model of a replica that serves one."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model, as it is configured."""

    key: str
    """What rounds, tokenizers and engines are told apart by: ONLY, or its first name."""
    names: tuple[str, ...]
    """What clients may call it; () = what its engines say."""
    path: str | None
    profile: str
    """Latency profile of its engines that have none of their own."""
    engine_ids: frozenset[str] = frozenset()
    """What its engines may call it; empty = anything."""

    def is_of(self, model_id: str, model_path: str) -> bool:
        """Whether an engine that says so has this model."""
        if self.key == ONLY:
            return True
        said = {model_id, _last(model_id)} | ({model_path, _last(model_path)} if not model_id else set())
        return bool(said & self.engine_ids - {""})


class Models:
    """All models of a replica, in the configuration's order."""

    def __init__(self, config: Config) -> None:
        several = tuple(_model(entry, config) for entry in config.models)
        only = Model(ONLY, config.model.names, config.model.path, config.scheduler.profile)
        self._models = several or (only,)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    def key_of_engine(self, model_id: str, model_path: str) -> str | None:
        """Of an engine's model, by what the engine says of it; None = it is none of ours."""
        found = [model.key for model in self._models if model.is_of(model_id, model_path)]
        return found[0] if found else None

    def names(self, model: Model, engine_ids: tuple[str, ...]) -> tuple[str, ...]:
        """By which clients may call it; `engine_ids`: what its engines call it. Empty while none is known."""
        if model.names:
            return model.names
        if not engine_ids and model.path:
            return (Path(model.path).name,)
        return tuple(dict.fromkeys([*map(_last, engine_ids), *engine_ids]))


def _model(entry: ServedModelConfig, config: Config) -> Model:
    said = {entry.engine_model} if entry.engine_model else {*entry.names}
    if entry.path and not entry.engine_model:
        said |= {entry.path.rstrip("/"), _last(entry.path)}
    profile = entry.profile or config.scheduler.profile
    return Model(entry.names[0], entry.names, entry.path, profile, frozenset(said))


def _last(name: str) -> str:
    """The last component of a path or a hub id."""
    return name.rstrip("/").rpartition("/")[2]
