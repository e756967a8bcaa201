"""Copies between device pages and store slots: one contract for the CPU's copier and the GPU's.

Without a GPU its copier runs on host tensors with `torch.cpu`, whose streams and events do nothing: that
covers its slicing, chunks and order. On a GPU the same contract runs with real streams and pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from antiphon.engines.device_copy import (  # noqa: E402
    DeviceCopy,
    DirectCopy,
    StreamedCopy,
    adjacent_runs,
    pinned_memory,
)
from antiphon.engines.device_pool import DevicePool, describe_pool, page_ids_of  # noqa: E402
from antiphon.engines.page_memory import PageMemory  # noqa: E402

PAGE, LAYERS, DEVICE_PAGES, SLOTS = 4, 3, 12, 20
Rig = tuple[DeviceCopy, DevicePool, PageMemory, list[Any], list[Any]]


def make_buffers(device: str, dtype: Any = None) -> tuple[list[Any], list[Any]]:
    """K and V buffers of every layer, each value different from all others; V is narrower than K."""

    def buffer(layer: int, kind: int, dim: int) -> Any:
        count = DEVICE_PAGES * PAGE * 2 * dim
        values = torch.arange(count, dtype=torch.float32) + (2 * layer + kind) * 10_000
        return values.reshape(DEVICE_PAGES * PAGE, 2, dim).to(dtype or torch.float32).to(device)

    return [buffer(i, 0, 8) for i in range(LAYERS)], [buffer(i, 1, 6) for i in range(LAYERS)]


def make_rig(kind: str, chunk_bytes: int = 1 << 20) -> Rig:
    if kind == "streamed-cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU's copies have not run here")
    device = "cuda" if kind == "streamed-cuda" else "cpu"
    keys, values = make_buffers(device)
    pool = describe_pool(keys, values, PAGE)
    if kind == "direct":
        memory = PageMemory(SLOTS, pool.page_bytes)
        return DirectCopy(pool, memory), pool, memory, keys, values
    on_gpu = kind == "streamed-cuda"
    memory = pinned_memory(SLOTS, pool.page_bytes) if on_gpu else PageMemory(SLOTS, pool.page_bytes)
    module = torch.cuda if on_gpu else torch.cpu
    return StreamedCopy(pool, memory, module, chunk_bytes), pool, memory, keys, values


KINDS = pytest.mark.parametrize(
    "kind", ["direct", "streamed-host", pytest.param("streamed-cuda", marks=pytest.mark.gpu)]
)


def page_bytes_on_device(keys: list[Any], values: list[Any], page: int) -> bytes:
    """[layer][K, V][token][head][dim] of one device page, put together the slow way."""
    rows = slice(page * PAGE, (page + 1) * PAGE)
    return b"".join(
        buffer[layer][rows].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for layer in range(LAYERS)
        for buffer in (keys, values)
    )


@KINDS
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 2000, 1])
def test_copy_out_gives_the_named_layout(kind: str, chunk_bytes: int) -> None:
    """A stored page is layer by layer K then V of its tokens, whatever the size of the chunks."""
    copier, _, memory, keys, values = make_rig(kind, chunk_bytes)
    pages, slots = [3, 4, 5, 1, 11], [0, 1, 7, 8, 19]
    copier.to_store(pages, slots, ())
    for page, slot in zip(pages, slots, strict=True):
        assert bytes(memory.view(slot)) == page_bytes_on_device(keys, values, page)
    untouched = set(range(SLOTS)) - set(slots)
    assert all(bytes(memory.view(slot)) == bytes(memory.page_bytes) for slot in untouched)


@KINDS
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1000, 1])
def test_copy_in_restores_elsewhere(kind: str, chunk_bytes: int) -> None:
    """What was copied out comes back bit for bit on other device pages, and no other page changes."""
    copier, _, _, keys, values = make_rig(kind, chunk_bytes)
    pages, slots, targets = [3, 4, 5], [9, 2, 3], [0, 7, 8]
    expected = [page_bytes_on_device(keys, values, page) for page in pages]
    others = set(range(DEVICE_PAGES)) - set(targets)
    before = {page: page_bytes_on_device(keys, values, page) for page in others}
    copier.to_store(pages, slots, ())
    done: list[int] = []
    copier.to_device(slots, targets, (), done.append)
    assert done == list(range(LAYERS)), "every layer is reported once, in order"
    assert [page_bytes_on_device(keys, values, page) for page in targets] == expected
    assert {page: page_bytes_on_device(keys, values, page) for page in others} == before


@KINDS
def test_a_reported_layer_is_there(kind: str) -> None:
    """When `layer_done(i)` is called, layer i can be read: the forward may begin with it."""
    copier, _, _, keys, values = make_rig(kind)
    source = [(keys[i][8:12].clone(), values[i][8:12].clone()) for i in range(LAYERS)]
    copier.to_store([2], [5], ())
    seen: list[bool] = []

    def check(layer: int) -> None:
        k, v = source[layer]
        seen.append(torch.equal(keys[layer][:4], k) and torch.equal(values[layer][:4], v))

    copier.to_device([5], [0], (), check)
    assert seen == [True] * LAYERS


@KINDS
def test_page_ids(kind: str) -> None:
    """Token slots become page numbers; anything but whole, adjacent, aligned pages is refused."""
    copier, pool, _, _, _ = make_rig(kind)
    slots = torch.tensor([*range(8, 12), *range(0, 4)]).to(pool.device)
    assert copier.page_ids(slots, ()) == [2, 0]
    for bad in ([0, 1, 2], [1, 2, 3, 4], [0, 1, 3, 2]):
        with pytest.raises(ValueError, match="token slots"):
            copier.page_ids(torch.tensor(bad).to(pool.device), ())


@KINDS
def test_ready_events_are_waited_for(kind: str) -> None:
    """A copy begins only after the events that it was given; on a GPU the bytes themselves prove it."""
    copier, pool, memory, keys, values = make_rig(kind)
    if kind == "streamed-cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            keys[0][8:12] = 7.0
            event = torch.cuda.Event()
            event.record(stream)
        copier.to_store([2], [0], (event,))
        assert bytes(memory.view(0)) == page_bytes_on_device(keys, values, 2)
        return
    waited: list[str] = []

    class Event:
        def synchronize(self) -> None:
            waited.append("host")

    if kind == "streamed-host":
        assert copier.page_ids(torch.arange(4), (Event(),)) == [0] and waited == ["host"]
    assert pool.device.type == "cpu"


def test_layouts_have_different_names() -> None:
    """Whatever changes the meaning of a page's bytes changes the layout's name."""
    keys, values = make_buffers("cpu")
    names = {
        describe_pool(keys, values, PAGE).layout,
        describe_pool(keys, values, PAGE * 2).layout,
        describe_pool(values, keys, PAGE).layout,
        describe_pool(keys[:2], values[:2], PAGE).layout,
        describe_pool(*make_buffers("cpu", torch.float16), PAGE).layout,
        describe_pool(*make_buffers("cpu", torch.bfloat16), PAGE).layout,
    }
    assert len(names) == 6


@pytest.mark.parametrize(
    "spoil",
    [
        lambda keys, values: (keys, values[:-1]),
        lambda keys, values: ([], []),
        lambda keys, values: ([k.transpose(0, 1) for k in keys], values),
        lambda keys, values: ([k.flatten(1) for k in keys], values),
    ],
)
def test_other_pools_are_refused(spoil: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Buffers that are not contiguous [slots, heads, dim], K and V of every layer, are an error."""
    with pytest.raises(ValueError, match="buffers"):
        describe_pool(*spoil(*make_buffers("cpu")), PAGE)


def test_adjacent_runs() -> None:
    """Runs cover the slots in order, each as long as it can be."""
    assert list(adjacent_runs([4, 5, 6, 2, 3, 9])) == [(0, 4, 3), (3, 2, 2), (5, 9, 1)]
    assert list(adjacent_runs([])) == [] and list(adjacent_runs([3])) == [(0, 3, 1)]
    assert page_ids_of(torch.tensor([4, 5]), 2) == [2]
