"""The device side of a page: where SGLang's K and V buffers keep it, and what names its byte order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PagePart:
    """K or V of one layer: its device buffer as [pages, bytes], and where its bytes lie in a stored page."""

    pages: torch.Tensor
    offset: int

    @property
    def size(self) -> int:
        return int(self.pages.shape[1])


@dataclass(frozen=True, slots=True)
class DevicePool:
    """The device side: `layers[i]` holds the parts of layer i, in the order of their offsets."""

    page_size_tokens: int
    layers: tuple[tuple[PagePart, ...], ...]
    layout: str
    """Names the byte order: equal names mean that pages can be exchanged."""
    dtype: str

    @property
    def page_bytes(self) -> int:
        return sum(part.size for layer in self.layers for part in layer)

    @property
    def n_pages(self) -> int:
        return int(self.layers[0][0].pages.shape[0])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layers[0][0].pages.device
        return device


def describe_pool(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], page_size: int) -> DevicePool:
    """The pool of layers whose buffers are `keys[i]` and `values[i]`, each contiguous [slots, heads, dim].

    Raises ValueError for anything else.
    """
    if not keys or len(keys) != len(values):
        raise ValueError(f"need as many K as V buffers, got {len(keys)} and {len(values)}")
    dtype = str(keys[0].dtype).removeprefix("torch.")
    layers = []
    offset = 0
    for pair in zip(keys, values, strict=True):
        parts = []
        for buffer in pair:
            pages = _as_pages(buffer, page_size)
            parts.append(PagePart(pages, offset))
            offset += int(pages.shape[1])
        layers.append(tuple(parts))
    shapes = "x".join(str(size) for size in keys[0].shape[1:]), "x".join(str(s) for s in values[0].shape[1:])
    layout = f"layer.kv.token.head.dim/{len(keys)}.k{shapes[0]}.v{shapes[1]}/{dtype}/page{page_size}"
    return DevicePool(page_size, tuple(layers), layout, dtype)


def _as_pages(buffer: torch.Tensor, page_size: int) -> torch.Tensor:
    """[token slots, heads, dim] as [pages, bytes of a page] of uint8, sharing memory."""
    if buffer.dim() != 3 or not buffer.is_contiguous():
        raise ValueError(f"KV buffers must be contiguous [slots, heads, dim], got {tuple(buffer.shape)}")
    n_pages = buffer.shape[0] // page_size
    flat = buffer[: n_pages * page_size].reshape(n_pages, -1)
    return flat.view(torch.uint8)


def page_ids_of(indices: torch.Tensor, page_size: int) -> list[int]:
    """Page numbers of host-side token slots; raises ValueError unless they are whole pages in order."""
    if indices.numel() % page_size:
        raise ValueError(f"{indices.numel()} token slots are not whole pages of {page_size}")
    by_page = indices.reshape(-1, page_size)
    firsts = by_page[:, 0]
    expected = firsts[:, None] + torch.arange(page_size, dtype=indices.dtype)
    if bool((firsts % page_size).any()) or not bool((by_page == expected).all()):
        raise ValueError("token slots of a page are not adjacent on the device")
    ids: list[int] = (firsts // page_size).tolist()
    return ids
