"""Runs Dynamo's offline replay; runs in a Python that has ai-dynamo, and knows nothing of Antiphon.

stdin: {"trace": path, "block_tokens", "pools": {"prefill": POOL, "decode": POOL}, "kv_bytes_per_token",
        "link_bytes_per_s", "slo_ttft_s", "slo_itl_s"}
POOL:  {"workers", "device_tokens", "batch_tokens", "max_running", "prefill": [[tokens, ms], ...],
        "kv_tokens": [...], "context_tokens": [...], "itl_ms": [[...], ...]}
stdout: {"version", "call_s", "summary": Dynamo's own, as it is}

Run by path with `python -I`, so that the modules beside it are not on its path.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def write_timing(pool: dict[str, Any], path: Path) -> None:
    """The pool's latency as the table that Dynamo reads: prefill by tokens, step by KV and context in use."""
    numpy = importlib.import_module("numpy")
    arrays = {
        "prefill_isl": [tokens for tokens, _ in pool["prefill"]],
        "prefill_ttft_ms": [ms for _, ms in pool["prefill"]],
        "decode_active_kv_tokens": pool["kv_tokens"],
        "decode_context_length": pool["context_tokens"],
        "decode_itl": pool["itl_ms"],
    }
    # floats throughout: Dynamo refuses integers, of tokens too
    numpy.savez(path, **{name: numpy.asarray(values, numpy.float64) for name, values in arrays.items()})


def engine_args(kind: str, pool: dict[str, Any], asked: dict[str, Any], timing: Path) -> dict[str, Any]:
    """What one worker of the pool is told."""
    return {
        "engine": {
            "backend": "sglang",
            "block_size": asked["block_tokens"],
            "num_gpu_blocks": pool["device_tokens"] // asked["block_tokens"],
            "worker_type": kind,
            "max_num_seqs": pool["max_running"],
            "max_num_batched_tokens": pool["batch_tokens"],
            "timing_model": {
                "type": "external",
                "provider": "dynamo_profile",
                "config": {"path": str(timing)},
            },
            "kv_transfer_bandwidth": asked["link_bytes_per_s"] / 1e9,
            "kv_transfer_bytes_per_token": asked["kv_bytes_per_token"],
            # the default would send the whole prompt again in every round
            "kv_transfer_timing_mode": "destination_missing",
        }
    }


def main() -> None:
    asked = json.load(sys.stdin)
    # Libraries log to stdout; it is for the answer alone.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    replay = importlib.import_module("dynamo.replay")
    folder = Path(asked["trace"]).parent
    args: dict[str, Any] = {}
    for kind, pool in asked["pools"].items():
        timing = folder / f"{kind}.npz"
        write_timing(pool, timing)
        args[f"{kind}_engine_args"] = engine_args(kind, pool, asked, timing)
        args[f"num_{kind}_workers"] = pool["workers"]
    began_s = time.perf_counter()
    report = replay.run_trace_replay(
        asked["trace"],
        trace_block_size=asked["block_tokens"],
        router_mode="kv_router",
        sla_ttft_ms=asked["slo_ttft_s"] * 1000,
        sla_itl_ms=asked["slo_itl_s"] * 1000,
        **args,
    )
    call_s = time.perf_counter() - began_s
    answer = {
        "version": importlib.metadata.version("ai-dynamo"),
        "call_s": call_s,
        "summary": report if isinstance(report, dict) else report.summary,
    }
    with answer_to:
        json.dump(answer, answer_to, default=str)


if __name__ == "__main__":
    main()
