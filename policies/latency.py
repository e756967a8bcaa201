"""Latency formulas, SI units: prefill, decode step, transfer, load. A leaf for policies, core, simulation.

    prefill(N new over P cached) = fixed + N * per_token + N * P * per_token_cached + N^2 * per_token_squared
                                   + P * cached_token + P^2 * cached_squared
    decode step(batch B, total context T) = fixed + B * per_request + T * per_context_token
                                            + experts * (1 - expert_missed^B)
    transfer(tokens, queued bytes) = fixed + (queued bytes + tokens * bytes per token) / bandwidth
    load(tokens, host to device) = fixed + tokens * bytes per token / bandwidth

Coefficients are data files (`data/*.json`) that name their source and how far off they are.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

Cost = Annotated[float, Meta(ge=0.0, le=1e9)]
"""Seconds, for one of something."""
Rate = Annotated[float, Meta(gt=0.0, le=1e18)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class PrefillCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    fixed_s: Cost
    per_token_s: Cost
    per_token_cached_s: Cost = 0.0
    per_token_squared_s: Cost = 0.0
    cached_token_s: Cost = 0.0
    """Per cached token, however few are new: reading its KV."""
    cached_squared_s: Cost = 0.0
    """Per cached token squared: attention kernels that go over the cached ones again (SGLang's on a CPU)."""


class DecodeCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    fixed_s: Cost
    per_request_s: Cost = 0.0
    per_context_token_s: Cost = 0.0
    experts_s: Cost = 0.0
    """Reading all experts of a mixture; a batch reads those that any of its tokens uses. Dense: 0."""
    expert_missed: Share = 0.0
    """Share of the experts that one token leaves out."""

    def batch_s(self, batch: int) -> float:
        """What a step of `batch` requests costs before any context is read."""
        seconds = self.fixed_s + batch * self.per_request_s
        if self.experts_s:
            seconds += self.experts_s * (1.0 - self.expert_missed**batch)
        return seconds


class TransferCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fixed_s: Cost
    bytes_per_s: Rate
    kv_bytes_per_token: Annotated[int, Meta(ge=1)]


class LoadCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Page store (host memory) to device, one request's pages."""

    fixed_s: Cost
    bytes_per_s: Rate


class FitError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a formula is from the points that it was fitted to: shares of the point's value."""

    points: int
    mean: float
    p95: float
    max: float


class LatencyModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One model on one kind of machine."""

    name: str
    source: str
    """Where the coefficients come from, in words."""
    prefill: PrefillCost
    decode: DecodeCost
    transfer: TransferCost
    load: LoadCost | None = None
    """None: loading from the page store costs nothing that was measured."""
    model: str = ""
    gpu: str = ""
    gpus: int = 1
    """GPUs of one engine (tensor parallel)."""
    prefill_error: FitError | None = None
    decode_error: FitError | None = None

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds to prefill `new_tokens` over `cached_tokens`; 0 for nothing to do."""
        if new_tokens <= 0:
            return 0.0
        c = self.prefill
        return (
            c.fixed_s
            + new_tokens * (c.per_token_s + cached_tokens * c.per_token_cached_s)
            + new_tokens * new_tokens * c.per_token_squared_s
            + cached_tokens * (c.cached_token_s + cached_tokens * c.cached_squared_s)
        )

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of one decode step of `batch` requests with `context_tokens` in all; 0 for no batch."""
        if batch <= 0:
            return 0.0
        return self.decode.batch_s(batch) + context_tokens * self.decode.per_context_token_s

    def transfer_s(self, tokens: int, queued_bytes: float = 0.0) -> float:
        """Seconds to move the KV of `tokens` over a link that owes `queued_bytes` first; 0 for nothing."""
        if tokens <= 0:
            return 0.0
        c = self.transfer
        return c.fixed_s + (queued_bytes + tokens * c.kv_bytes_per_token) / c.bytes_per_s

    def load_s(self, tokens: int) -> float:
        """Seconds to copy the KV of `tokens` from the page store to the device; 0 for nothing."""
        if tokens <= 0 or self.load is None:
            return 0.0
        return self.load.fixed_s + tokens * self.transfer.kv_bytes_per_token / self.load.bytes_per_s


def bundled_profiles() -> list[str]:
    """Names of the profiles that ship, in order."""
    names = (entry.name for entry in (resources.files("antiphon.policies") / "data").iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def load_latency_model(name_or_path: str) -> LatencyModel:
    """A bundled profile by name, or a JSON file by path; raises ValueError naming what is wrong."""
    bundled = resources.files("antiphon.policies") / "data" / f"{name_or_path}.json"
    try:
        raw = bundled.read_bytes() if bundled.is_file() else Path(name_or_path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"latency profile {name_or_path!r} is neither bundled nor a readable file: {error}"
        ) from error
    try:
        return msgspec.json.decode(raw, type=LatencyModel)
    except msgspec.MsgspecError as error:
        raise ValueError(f"latency profile {name_or_path!r}: {error}") from error
