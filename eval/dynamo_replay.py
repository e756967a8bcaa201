"""Dynamo's offline replay of our sessions on our cluster: the peer beside our simulator.

It runs in a Python of its own that has ai-dynamo and numpy, with a table made from our latency profile. The
two are not one model. In Dynamo's a prefill costs the same over any history (no N P term), the next round
computes a round's output again, every round is prefilled in the prefill pool, and there is no page store.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from antiphon.engines.cluster import Cluster, EngineSpec
from antiphon.policies.latency import LatencyModel
from antiphon.traces.schema import SessionTrace

SCRIPT = Path(__file__).with_name("dynamo_script.py")


class DynamoError(Exception):
    """There is no replay: the Python cannot be run, or Dynamo refuses; says what it said."""


@dataclass(frozen=True, slots=True)
class DynamoRun:
    """What Dynamo says of one replay."""

    version: str
    requests: int
    requests_within_slo: int
    wall_s: float
    """Its own figure: construction and run of its engine, without reading the trace."""
    call_s: float
    """Of the whole call, reading the trace included."""
    ttft_s: dict[str, float]
    """mean, p50, p90, p99."""
    itl_s: dict[str, float]
    """The same, of each round's mean."""
    simulated_s: float

    @property
    def requests_per_s(self) -> float:
        """Per second of `wall_s`."""
        return self.requests / self.wall_s


def replay_with_dynamo(
    python: Path,
    starts: Sequence[tuple[float, SessionTrace]],
    cluster: Cluster,
    specs: Sequence[EngineSpec],
    deadline_s: float = 600.0,
) -> DynamoRun:
    """Replay (start, session) pairs, as `traces.arrivals.schedule` gives them; gaps and windows as they are.

    `specs` are those of `resolve_engines`; an engine's pool is its role. The KV router is used, and only what
    the decode worker lacks is moved. Raises `DynamoError`.
    """
    decode = _pool(specs, "decode")
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        with trace.open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in trace_rows(starts, cluster.page_tokens))
        asked = {
            "trace": str(trace),
            "block_tokens": cluster.page_tokens,
            "pools": {
                kind: timing_table(pool, cluster)
                for kind, pool in (("prefill", _pool(specs, "prefill")), ("decode", decode))
            },
            "kv_bytes_per_token": decode[0].latency.transfer.kv_bytes_per_token,
            "link_bytes_per_s": min(spec.group.link_bytes_per_s for spec in specs),
            "slo_ttft_s": cluster.slo.ttft_s,
            "slo_itl_s": cluster.slo.itl_s,
        }
        answer = _run(python, asked, deadline_s)
    run = _read(answer)
    sent = sum(len(session.rounds) for _, session in starts)
    if run.requests != sent:
        raise DynamoError(f"Dynamo completed {run.requests} of {sent} requests")
    return run


def trace_rows(starts: Iterable[tuple[float, SessionTrace]], block_tokens: int) -> Iterator[dict[str, Any]]:
    """Dynamo's rows: a start in ms or a delay after the previous round, cumulative input, an id per block.

    A block keeps its id while it lies wholly in what the round keeps of the previous prompt. Sessions share
    the ids of their shared prefix.
    """
    fresh = count()
    shared: dict[str, list[int]] = {}
    for start_s, session in starts:
        blocks: list[int] = []
        if session.shared_prefix:
            blocks = shared.setdefault(session.shared_prefix, [])
            lacking = session.shared_tokens // block_tokens - len(blocks)
            blocks.extend(next(fresh) for _ in range(lacking))
        prompt_tokens = session.shared_tokens
        for number, turn in enumerate(session.rounds):
            if number:
                prompt_tokens = min(turn.kept_tokens, prompt_tokens)
            kept = blocks[: prompt_tokens // block_tokens]
            needed = -(-turn.prompt_tokens // block_tokens)
            blocks = kept + [next(fresh) for _ in range(needed - len(kept))]
            prompt_tokens = turn.prompt_tokens
            when = {"delay": turn.gap_s * 1000} if number else {"timestamp": start_s * 1000}
            yield {
                "session_id": session.session_id,
                **when,
                "input_length": turn.prompt_tokens,
                "output_length": turn.output_tokens,
                "hash_ids": blocks,
            }


def _pool(specs: Sequence[EngineSpec], kind: str) -> list[EngineSpec]:
    """The engines of one role, all alike: Dynamo is told of one kind of worker a role."""
    pool = [spec for spec in specs if spec.group.pool == kind]
    if not pool:
        raise DynamoError(f"Dynamo's replay needs a {kind} engine; the cluster has none")
    if len({(spec.latency.name, spec.group.device_tokens) for spec in pool}) > 1:
        raise DynamoError(f"Dynamo's replay knows one kind of {kind} engine; the cluster has several")
    return pool


def timing_table(pool: Sequence[EngineSpec], cluster: Cluster) -> dict[str, Any]:
    """What Dynamo is told of the equal engines of one pool: how many, their memory, their latency in ms."""
    group, latency = pool[0].group, pool[0].latency
    contexts = _doubling(cluster.page_tokens, cluster.window_tokens)
    kv_tokens = _doubling(cluster.page_tokens, max(group.device_tokens, cluster.window_tokens))
    return {
        "workers": len(pool),
        "device_tokens": group.device_tokens,
        "batch_tokens": group.chunk_tokens or cluster.window_tokens,
        "max_running": group.max_running_requests,
        "prefill": [[tokens, latency.prefill_s(tokens, 0) * 1000] for tokens in contexts],
        "kv_tokens": kv_tokens,
        "context_tokens": contexts,
        "itl_ms": [[_step_ms(latency, kv, context) for context in contexts] for kv in kv_tokens],
    }


def _step_ms(latency: LatencyModel, kv_tokens: int, context_tokens: int) -> float:
    """One decode step of the batch that a table's row and column stand for."""
    return latency.decode_step_s(max(1, kv_tokens // context_tokens), kv_tokens) * 1000


def _doubling(first: int, last: int) -> list[int]:
    """first, twice that, ... and last."""
    steps = [first]
    while steps[-1] * 2 < last:
        steps.append(steps[-1] * 2)
    return [*steps, last]


def _run(python: Path, asked: dict[str, Any], deadline_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [str(python), "-I", str(SCRIPT)],
            input=json.dumps(asked), capture_output=True, text=True, timeout=deadline_s, check=False,
            env=dict(os.environ) | {"DYN_LOG": "error"},  # else it logs every routing choice
        )  # fmt: skip
    except OSError as error:
        raise DynamoError(f"{python} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise DynamoError(
            f"Dynamo's replay was not done within {deadline_s:g} s; sessions that come faster than the "
            "cluster can serve them may keep it busy without an end: lower their rate"
        ) from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise DynamoError(
            f"Dynamo's replay in {python} failed (ai-dynamo 1.6.1 and numpy must be there): {said[-1]}"
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise DynamoError(f"Dynamo's replay in {python} answered no JSON: {done.stdout[:200]!r}") from error
    return answer


def _read(answer: dict[str, Any]) -> DynamoRun:
    try:
        summary = answer["summary"]
        return DynamoRun(
            version=answer["version"],
            requests=summary["completed_requests"],
            requests_within_slo=summary["goodput_completed_requests"],
            wall_s=summary["wall_time_ms"] / 1000,
            call_s=answer["call_s"],
            ttft_s=_distribution(summary, "ttft"),
            itl_s=_distribution(summary, "tpot"),
            simulated_s=summary["duration_ms"] / 1000,
        )
    except (KeyError, TypeError) as error:
        raise DynamoError(f"Dynamo's summary is not as in 1.6.1: {error!r}") from error


def _distribution(summary: dict[str, Any], name: str) -> dict[str, float]:
    keys = (("mean", "mean"), ("p50", "median"), ("p90", "p90"), ("p99", "p99"))
    return {ours: summary[f"{theirs}_{name}_ms"] / 1000 for ours, theirs in keys}
