"""Asks AIConfigurator for a grid of points; runs in a Python that has it, and knows nothing of Antiphon.

stdin: {"model", "system", "backend", "tp", "prefill": [[N, P], ...], "decode": [[B, L], ...]}
stdout: {"database", "backend_version", "config", "prefill": [[N, P, seconds], ...],
         "decode": [[B, L, seconds], ...], "left_out": points without data,
         "estimated": points that are not from measured kernels}

N new tokens over P cached ones; B requests of L context tokens each. Run by path with `python -I`, so that
the modules beside it are not on its path.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def model_config(model: str) -> dict[str, Any]:
    """The model's config.json as AIConfigurator ships it; ValueError if it ships none."""
    name = f"{model.replace('/', '--')}_config.json"
    path = importlib.resources.files("aiconfigurator_core") / "model_configs" / name
    if not path.is_file():
        raise ValueError(f"AIConfigurator ships no configuration of {model!r}")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def compile_engine(asked: dict[str, Any], config: dict[str, Any]) -> Any:
    """AIConfigurator's engine: tensor parallel, in the experts of a mixture too."""
    parallel = {"tp_size": asked["tp"]}
    if "num_experts" in config or "num_local_experts" in config:
        parallel |= {"moe_tp_size": asked["tp"], "moe_ep_size": 1}
    engine = importlib.import_module("aiconfigurator_core.sdk.engine")
    # By folder, not by name: it would fetch from a hub what it ships but does not list (Mixtral).
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return engine.EngineHandle.compile(folder, asked["system"], asked["backend"], **parallel)


def ask(
    engine: Any, points: Iterable[tuple[int, int]], latency_ms: Callable[[int, int], float]
) -> tuple[list[tuple[int, int, float]], int, int]:
    """(answered points in seconds, points without data, points answered from estimates)."""
    answered: list[tuple[int, int, float]] = []
    left_out = estimated = 0
    for first, second in points:
        try:
            found_ms = latency_ms(first, second)
        except Exception as error:
            # Their native classes differ between releases; by name is what stays.
            if type(error).__name__ != "PerfDataNotAvailableError":
                raise
            left_out += 1
            continue
        estimated += engine.last_provenance() is not None
        answered.append((first, second, found_ms / 1000))
    return answered, left_out, estimated


def main() -> None:
    asked = json.load(sys.stdin)
    # Libraries print warnings; stdout is for the answer alone.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    config = model_config(asked["model"])
    engine = compile_engine(asked, config)
    prefill, no_prefill, guessed_prefill = ask(
        engine, asked["prefill"], lambda n, p: float(engine.predict_prefill_latency(1, n + p, p))
    )
    decode, no_decode, guessed_decode = ask(
        engine, asked["decode"], lambda b, length: float(engine.predict_decode_latency(b, length, 2))
    )
    database = importlib.import_module("aiconfigurator_core.sdk.perf_database")
    slots = database.get_version_slots(asked["system"], asked["backend"]) or {}
    answer = {
        "database": f"aiconfigurator-core {importlib.metadata.version('aiconfigurator-core')}",
        "backend_version": str(slots.get("current", "unknown")),
        "config": config,
        "prefill": prefill,
        "decode": decode,
        "left_out": no_prefill + no_decode,
        "estimated": guessed_prefill + guessed_decode,
    }
    with answer_to:
        json.dump(answer, answer_to)


if __name__ == "__main__":
    main()
