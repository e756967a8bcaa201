"""`AntiphonLinker`: SGLang's out-of-tree cache linker, one per rank, between device pool and page store.

SGLang calls it on its scheduler thread. `lookup` answers from the local store and never waits; `offload`
copies new device pages into the store; `load` copies stored pages into device slots of a request. Pages of
other engines come into the store beforehand, by Prefetch, never from here. On a CPU copies are done
at once; on a GPU two threads do them, and block when there is nothing to do.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from antiphon.engines import wire
from antiphon.engines.device_copy import (
    DeviceCopy,
    DirectCopy,
    StreamedCopy,
    adjacent_runs,
    pinned_memory,
)
from antiphon.engines.device_pool import DevicePool, describe_pool
from antiphon.engines.linker_config import LinkerConfig, parse_config
from antiphon.engines.page_memory import PageMemory
from antiphon.engines.page_store import PageStore, Pin
from antiphon.engines.rank_service import RankService
from antiphon.engines.worker import Worker

logger = logging.getLogger(__name__)

PROMISE_TTL_S = 10.0
"""From `lookup` to `load`: SGLang looks up again in every round until it admits the request."""


@dataclass(frozen=True, slots=True)
class _Load:
    pin: Pin
    hashes: tuple[bytes, ...]
    indices: torch.Tensor
    broken: bool = False
    """Pages are missing or spoilt; queued nevertheless, see `load`."""


@dataclass(frozen=True, slots=True)
class _LoadBatch:
    counter_index: int
    loads: tuple[_Load, ...]
    ready: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Offload:
    hashes: tuple[bytes, ...]
    indices: torch.Tensor
    ready: tuple[Any, ...]


class AntiphonLinker(UnifiedCacheLinker):  # type: ignore[misc]  # sglang has no stubs
    """Constructed by SGLang once per rank; raises ValueError for what it cannot serve."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        config = parse_config(extra_config)
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        _refuse_unsupported(server_args, params, kvcache, components)
        pool = describe_pool(kvcache.k_buffer, kvcache.v_buffer, params.page_size)
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: kvcache}
        self.layer_done_counter = LayerWiseLoadCounter(len(pool.layers))
        n_pages = config.pages_for(pool.n_pages, params.page_size)
        self._copy: DeviceCopy
        if pool.device.type == "cpu":
            memory = PageMemory(n_pages, pool.page_bytes)
            self._copy = DirectCopy(pool, memory)
        else:
            memory = pinned_memory(n_pages, pool.page_bytes)
            self._copy = StreamedCopy(pool, memory, torch.get_device_module(pool.device))
        self._service = RankService(
            _hello(config, pool, int(kvcache.size), _rank(params), int(server_args.tp_size)),
            memory,
            config.fleet_key(),
            on_gpu=self._copy.asynchronous,
            checksums=config.checksum,
            fault_injection=config.fault_injection,
        )
        self.store: PageStore = self._service.store
        self._promises: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """rid -> (when, pin) of what `lookup` promised, oldest first."""
        self._queued: dict[str, _Load] = {}
        self._results: deque[bool] = deque()
        inline = not self._copy.asynchronous
        self._offloads: Worker[_Offload] = Worker("antiphon-offload", self._run_offload, inline=inline)
        self._loads: Worker[_LoadBatch] = Worker("antiphon-load", self._run_loads, inline=inline)
        logger.info(
            "Antiphon linker %s: %d store pages of %d bytes, device pool %d pages, layout %s",
            self._service.hello.kv_addresses, n_pages, pool.page_bytes, pool.n_pages, pool.layout,
        )  # fmt: skip

    # ------------------------------------------------------------ store -> device

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every length of the tail, in pages, that the store holds now; they are pinned until `load`."""
        self._drop_promise(rid)
        self._drop_old_promises()
        hashes = _hashes_of(transfers)
        if not hashes:
            return []
        self.store.learn(hashes)
        pin = self.store.pin(hashes, ttl_s=PROMISE_TTL_S, holder=rid)
        if not pin.slots:
            self.store.unpin(pin.pin_id)
            return []
        self._promises[rid] = (time.monotonic(), pin.pin_id)
        return list(range(1, len(pin.slots) + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue a load; False (the request then recomputes) if a page is gone or spoilt.

        All ranks must answer alike, but each knows only its own pages: with several ranks such a load is
        queued and fails, which aborts the request on all of them, and the scheduler tries it again.
        """
        hashes, indices = _hashes_of(transfers), _indices_of(transfers)
        if rid in self._queued:
            raise RuntimeError(f"a load for request {rid} is queued already")
        pin = self.store.pin(hashes, ttl_s=float("inf"), holder=rid)
        self._drop_promise(rid)
        bad = self.store.bad_pages(pin)
        broken = len(pin.slots) < len(hashes) or bool(bad)
        if broken and self._service.hello.world_size == 1:
            self.store.unpin(pin.pin_id)
            for position in bad:
                logger.error("page %s is spoilt and is dropped", hashes[position].hex())
                self.store.forget(hashes[position])
            return False
        self._queued[rid] = _Load(pin, hashes, indices, broken)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        self._drop_promise(rid)
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        self.store.unpin(load.pin.pin_id)
        return True

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        loads, self._queued = tuple(self._queued.values()), {}
        index: int = self.layer_done_counter.update_producer()
        self._loads.put(_LoadBatch(index, loads, self._ready_events()))
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        landed: bool = self.layer_done_counter.finish(counter_index)
        return landed

    def _run_loads(self, batch: _LoadBatch) -> None:
        """Copy a batch in. Pinned pages cannot vanish, so nothing but the device itself can fail here."""
        try:
            slots: list[int] = []
            device_pages: list[int] = []
            for load in batch.loads:
                if load.broken:
                    raise ValueError("a page was gone or spoilt")
                pages = self._copy.page_ids(load.indices, batch.ready)
                self.store.bind(pages, load.hashes)
                slots += load.pin.slots
                device_pages += pages
            self._copy.to_device(
                slots,
                device_pages,
                batch.ready,
                lambda layer: self.layer_done_counter.complete(batch.counter_index, layer),
            )
        except Exception as error:
            logger.exception("a load of %d requests failed", len(batch.loads))
            self.layer_done_counter.fail(batch.counter_index, error)
        finally:
            for load in batch.loads:
                self.store.unpin(load.pin.pin_id)

    # ------------------------------------------------------------ device -> store

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Start copying new pages out. On a CPU they are in the store when this returns, so that whoever gets
        the reply of a prefill can pull them; on a GPU a Reserve waits for offloads that are pending."""
        hashes = _hashes_of(transfers)
        if not hashes:
            return False
        offload = _Offload(hashes, _indices_of(transfers), self._ready_events())
        self.store.begin_offload()
        self._offloads.put(offload)
        return True

    def num_completed_offloads(self) -> int:
        return len(self._results)

    def pop_completed_offload(self) -> bool:
        return self._results.popleft()

    def _run_offload(self, offload: _Offload) -> None:
        stored = False
        try:
            stored = self._store_pages(offload)
        except Exception:
            logger.exception("an offload of %d pages failed", len(offload.hashes))
        finally:
            self.store.end_offload()
            self._results.append(stored)

    def _store_pages(self, offload: _Offload) -> bool:
        """False when the store has no room: SGLang offers the pages again, meanwhile nobody can pull them."""
        hashes = offload.hashes
        device_pages = self._copy.page_ids(offload.indices, offload.ready)
        # What is stored already is held by this before room is made for the rest.
        self.store.bind(device_pages, hashes)
        missing = self.store.missing(hashes)
        slots = self.store.allocate(len(missing))
        if len(slots) < len(missing):
            self.store.discard(slots)
            return False
        try:
            self._copy.to_store([device_pages[i] for i in missing], slots, offload.ready)
        except BaseException:
            self.store.discard(slots)
            raise
        for start, first, count in adjacent_runs(missing):
            parent = hashes[first - 1] if first else b""
            self.store.publish(parent, hashes[first : first + count], slots[start : start + count])
        self.store.bind(device_pages, hashes)
        return not self.store.missing(hashes)

    # ------------------------------------------------------------ life cycle

    def reset(self) -> None:
        """The device tree is flushed: finish what runs, forget what was promised. The store keeps all."""
        self._offloads.drain()
        self._loads.drain()
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        for rid in list(self._promises):
            self._drop_promise(rid)
        self._results.clear()
        self.layer_done_counter.reset()
        self.store.unbind_all()

    def close(self) -> None:
        self.reset()
        self._offloads.close()
        self._loads.close()
        self._service.close()

    def _ready_events(self) -> tuple[Any, ...]:
        return tuple(self.record_offload_ready()) if self._copy.asynchronous else ()

    def _drop_promise(self, rid: str) -> None:
        promise = self._promises.pop(rid, None)
        if promise is not None:
            self.store.unpin(promise[1])

    def _drop_old_promises(self) -> None:
        """Requests that were dropped before they were loaded leave no trace but this."""
        too_old = time.monotonic() - PROMISE_TTL_S
        while self._promises and next(iter(self._promises.values()))[0] < too_old:
            _, (_, pin_id) = self._promises.popitem(last=False)
            self.store.unpin(pin_id)


def _hashes_of(transfers: Sequence[PoolTransfer]) -> tuple[bytes, ...]:
    """Page hashes of the KV pool; () if any other pool is asked for, which this linker does not keep."""
    if len(transfers) != 1 or transfers[0].name != PoolName.KV:
        return ()
    return tuple(bytes.fromhex(key) for key in transfers[0].keys or ())


def _indices_of(transfers: Sequence[PoolTransfer]) -> torch.Tensor:
    indices = transfers[0].device_indices
    if indices is None:
        raise ValueError("transfer without device indices")
    return indices


def _rank(params: Any) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0
    return int(torch.distributed.get_rank(group=params.tp_cache_group))


def _hello(
    config: LinkerConfig, pool: DevicePool, pool_tokens: int, rank: int, world_size: int
) -> wire.Hello:
    return wire.Hello(
        engine_id=config.engine_id,
        incarnation=config.incarnation,
        model_id=config.model_id,
        model_revision=config.model_revision,
        dtype=pool.dtype,
        page_size_tokens=pool.page_size_tokens,
        page_bytes=pool.page_bytes,
        layout=pool.layout,
        pool_tokens=pool_tokens,
        store_pages=0,
        rank=rank,
        world_size=world_size,
        kv_addresses=config.addresses(world_size),
        transport="nixl",
        context_tokens=config.context_tokens,
    )


def _refuse_unsupported(server_args: Any, params: Any, kvcache: Any, components: Any) -> None:
    """Raise ValueError naming what this linker cannot carry; the alternative would be wrong pages."""
    reasons = []
    if type(kvcache).__name__ != "MHATokenToKVPool":
        reasons.append(f"KV pool {type(kvcache).__name__} (only plain MHA/GQA pools: MHATokenToKVPool)")
    elif kvcache.kv_cache_layout != "nhd" or kvcache.k_scale_buffer is not None:
        reasons.append(f"KV layout {kvcache.kv_cache_layout} or per-token scales (only nhd without scales)")
    if set(components) != {ComponentType.FULL}:
        reasons.append("attention other than full (sliding window, Mamba)")
    sizes = {name: int(getattr(server_args, name, 1) or 1) for name in ("pp_size", "dp_size")}
    reasons += [f"{name} {size}" for name, size in sizes.items() if size != 1]
    if params.is_eagle or params.sidecar_draft_device_pools or params.mtp_draft_device_pools:
        reasons.append("speculative decoding with a draft KV pool")
    if reasons:
        raise ValueError(f"the Antiphon linker does not support {'; '.join(reasons)}: start with --no-linker")
