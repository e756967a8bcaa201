"""GPUs and models by their specification: rates, memory, bytes of KV per token, tokens that fit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Some = Annotated[int, Meta(ge=1, le=10**15)]
BF16_BYTES = 2
MEMORY_SHARE = 0.88
"""Of a GPU's memory, for weights and KV (--mem-fraction-static); the rest is for activations and graphs."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU. Rates are peak rates of the data sheet, but for the two links."""

    label: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    """bf16, dense."""
    nic_bytes_per_s: float
    """Of the one network card that we give an engine, each way."""
    host_bytes_per_s: float
    """Host memory to one GPU over PCIe: what copies reach, about 0.78 of the bus."""
    scaled_from: str = ""
    """The system in whose place AIConfigurator is asked; empty = it has data for this one."""


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "h100_sxm": Gpu("H100 SXM 80 GB", 80e9, 3.35e12, 989e12, 50e9, 50e9),
        "h200_sxm": Gpu("H200 SXM 141 GB", 141e9, 4.8e12, 989e12, 50e9, 50e9),
        "a100_sxm": Gpu("A100 SXM 80 GB", 80e9, 2.039e12, 312e12, 25e9, 25e9),
        "h20_sxm": Gpu("H20 96 GB", 96e9, 4.0e12, 148e12, 25e9, 50e9, scaled_from="h100_sxm"),
        "l40s": Gpu("L40S 48 GB", 48e9, 0.864e12, 362e12, 25e9, 25e9),
        "b200_sxm": Gpu("B200 SXM 180 GB", 180e9, 7.7e12, 2250e12, 50e9, 50e9),
    }
)
"""By AIConfigurator's name of the system, or what it would be. Network cards of 400 Gb/s, on A100, H20 and
L40S of 200; PCIe 5, on A100 and L40S 4. Memory and rates: NVIDIA's data sheets of the GPU; for B200 an eighth
of the HGX board's."""


def gpu_name(system: str) -> str:
    """What people call it: `h100_sxm` is `h100`."""
    return system.partition("_")[0]


def gpu_named(name: str) -> tuple[str, Gpu]:
    """Its system and itself, by either name in any case; ValueError names those there are."""
    lowered = name.strip().lower()
    for system, gpu in GPUS.items():
        if lowered in (system, gpu_name(system)):
            return system, gpu
    raise ValueError(f"no GPU {name!r}; there are {', '.join(map(gpu_name, GPUS))}")


class ModelShape(msgspec.Struct, frozen=True):
    """What of a decoder-only transformer decides its memory and arithmetic, in bf16."""

    layers: Some
    kv_heads: Some
    head_dim: Some
    parameters: Some
    active_parameters: Some
    """Used for one token: fewer than all in a mixture of experts."""
    expert_missed: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of the experts that one token leaves out; 0 for a dense model."""

    def kv_bytes_per_token(self, gpus: int) -> int:
        """Over all ranks of one engine: a rank holds at least one KV head."""
        return 2 * self.layers * max(self.kv_heads, gpus) * self.head_dim * BF16_BYTES

    @property
    def weight_bytes(self) -> int:
        return self.parameters * BF16_BYTES


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """From a Hugging Face config.json of the Llama, Qwen3 or Mixtral kind; norms and biases are not counted.

    Raises ValueError naming a missing key.
    """
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        width = int(config["moe_intermediate_size" if "num_experts" in config else "intermediate_size"])
        used = int(config["num_experts_per_tok"]) if experts else 1
        tied = bool(config.get("tie_word_embeddings"))
        embedding = int(config["vocab_size"]) * hidden
    except KeyError as error:
        raise ValueError(f"the model's config.json has no {error.args[0]!r}") from error
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    router = hidden * experts
    every = layers * (attention + router)
    expert = layers * 3 * hidden * width
    return ModelShape(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        parameters=every + expert * max(experts, 1) + embedding * (1 if tied else 2),
        active_parameters=every + expert * used + embedding,
        expert_missed=1.0 - used / experts if experts else 0.0,
    )


def device_tokens(shape: ModelShape, gpu: Gpu, gpus: int, page_tokens: int = 64) -> int:
    """Tokens of KV that fit beside the weights, whole pages; ValueError when the weights do not fit."""
    free = gpus * gpu.memory_bytes * MEMORY_SHARE - shape.weight_bytes
    tokens = int(free / shape.kv_bytes_per_token(gpus)) // page_tokens * page_tokens
    if tokens < page_tokens:
        raise ValueError(
            f"the weights ({shape.weight_bytes / 1e9:.0f} GB) leave no room on {gpus} x {gpu.label}"
        )
    return tokens
