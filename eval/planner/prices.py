"""What GPUs cost, and the network and host memory around them: `data/prices.toml`, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from antiphon.eval.hardware import gpu_name, gpu_named
from antiphon.eval.known_models import read_tables

PRICES = Path(__file__).parent.parent / "data" / "prices.toml"


class GpuPrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of GPU."""

    price_per_gpu_hour: Annotated[float, Meta(gt=0.0, le=1e9)]
    """USD."""
    gpus_per_node: Annotated[int, Meta(ge=1, le=10_000)]
    """Of one server: no engine is larger."""
    nic_bytes_per_s: Annotated[float, Meta(gt=0.0, le=1e18)]
    """Of one engine, each way."""
    store_bytes_per_gpu: Annotated[int, Meta(ge=0, le=10**15)]
    """Host memory for an engine's page store, for each of its GPUs."""

    def store_tokens(self, gpus: int, kv_bytes_per_token: int, page_tokens: int = 64) -> int:
        """KV that the page store of an engine of `gpus` GPUs holds, whole pages."""
        return self.store_bytes_per_gpu * gpus // (kv_bytes_per_token * page_tokens) * page_tokens


def read_prices(path: Path | None = None) -> dict[str, GpuPrice]:
    """GPU (short name: h100) -> its price: the user's file, or the one that ships; never a mix of both.

    Raises ValueError naming file and key.
    """
    path = path or PRICES
    prices: dict[str, GpuPrice] = {}
    for name, price in read_tables(path, GpuPrice).items():
        try:
            gpu = gpu_name(gpu_named(name)[0])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if gpu in prices:
            raise ValueError(f"{path}: {gpu} is there twice, once as {name!r}")
        prices[gpu] = price
    return prices


def price_of(gpu: str, prices: Mapping[str, GpuPrice]) -> GpuPrice:
    """By either name of the GPU; ValueError names those that have a price."""
    short = gpu_name(gpu_named(gpu)[0])
    if short not in prices:
        raise ValueError(f"no price for {short}; the file of prices has {', '.join(prices) or 'none'}")
    return prices[short]
