"""Views for policy tests that can be worked by hand.

Latency model of every case (SI units):
    prefill(N over P) = 0.1 + 0.001 N          1000 new tokens = 1.1 s
    decode step       = 0.010 + 0.001 B        batch of 10     = 0.020 s
    transfer(n)       = 0.05 + n * 100 / 1e6   1000 tokens     = 0.15 s
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from antiphon.policies.base import Candidate, ClusterView, EngineView, Placement, Pool, Reject, RoundView
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost

LATENCY = LatencyModel(
    name="by-hand",
    source="this file",
    prefill=PrefillCost(fixed_s=0.1, per_token_s=0.001),
    decode=DecodeCost(fixed_s=0.010, per_request_s=0.001),
    transfer=TransferCost(fixed_s=0.05, bytes_per_s=1e6, kv_bytes_per_token=100),
)

SLOWER = LatencyModel(
    name="by-hand-slower",
    source="this file",
    prefill=PrefillCost(fixed_s=0.1, per_token_s=0.002),
    decode=DecodeCost(fixed_s=0.020),
    transfer=TransferCost(fixed_s=0.1, bytes_per_s=1e6, kv_bytes_per_token=100),
)
"""An engine of another kind: 1000 new tokens = 2.1 s, a step 0.020 s, 1000 tokens moved = 0.2 s."""


def engine(engine_id: str, **changes: Any) -> EngineView:
    """An idle engine with a pool of 100,000 tokens; ids that begin with p are prefill engines."""
    values: dict[str, Any] = {
        "engine_id": engine_id,
        "pool": Pool.PREFILL if engine_id.startswith("p") else Pool.DECODE,
        "can_transfer": True,
        "batch": 0,
        "context_tokens": 0,
        "queue_s": 0.0,
        "queued_rounds": 0,
        "pool_tokens": 100_000,
        "used_tokens": 0,
        "sessions": 0,
        "latency": LATENCY,
    }
    return EngineView(**(values | changes))


def cluster(*engines: EngineView) -> ClusterView:
    by_id = {e.engine_id: e for e in sorted(engines, key=lambda e: e.engine_id)}
    return ClusterView(MappingProxyType(by_id))


def a_round(**changes: Any) -> RoundView:
    """1000 prompt tokens, 100 of output, targets of 0.5 s to the first token and 0.1 s between tokens."""
    history = MappingProxyType(dict(changes.pop("history", {})))
    values: dict[str, Any] = {
        "round_id": "r1",
        "session_id": "s1",
        "seed": 7,
        "prompt_tokens": 1000,
        "max_output_tokens": 100,
        "slo_ttft_s": 0.5,
        "slo_itl_s": 0.1,
        "home": None,
        "waited_s": 0.0,
        "history_tokens": history,
    }
    return RoundView(**(values | changes))


def placed(answer: Placement | Reject) -> Placement:
    assert isinstance(answer, Placement), answer
    return answer


def rejected(answer: Placement | Reject) -> Reject:
    assert isinstance(answer, Reject), answer
    return answer


def terms(candidate: Candidate) -> tuple[float, float, float, float]:
    return candidate.queue_s, candidate.prefill_s, candidate.pull_s, candidate.push_s
