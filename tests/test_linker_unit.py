"""The linker against SGLang's real interface and real KV pool, without an engine around it."""

from __future__ import annotations

import importlib.util
import uuid
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryClient
from antiphon.engines.linker_config import parse_config
from antiphon.engines.worker import Worker
from tests.kv_peer import free_port, make_chain

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang")

KEY = "linker-tests-key-0123456789"
PAGE, LAYERS, POOL_TOKENS = 4, 3, 64


@pytest.fixture(scope="module")
def sglang() -> SimpleNamespace:
    """What the tests use of SGLang, and the linker's module, imported as an engine on a CPU does."""
    from antiphon.engines import cpu_shims

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu_shims.apply()
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        from antiphon.engines import linker
    return SimpleNamespace(
        CacheInitParams=CacheInitParams,
        PoolName=PoolName,
        PoolTransfer=PoolTransfer,
        MHATokenToKVPool=MHATokenToKVPool,
        ComponentType=ComponentType,
        linker=linker,
    )


class Rig:
    """A linker on a real pool, and the calls that SGLang makes."""

    def __init__(self, sglang: SimpleNamespace, tp_size: int = 1, **config: Any) -> None:
        import torch

        self.sglang, self.torch = sglang, torch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pool = sglang.MHATokenToKVPool(
                size=POOL_TOKENS, page_size=PAGE, dtype=torch.float32, head_num=2, head_dim=8,
                layer_num=LAYERS, device="cpu", enable_memory_saver=False,
            )  # fmt: skip
        for number, buffer in enumerate((*self.pool.k_buffer, *self.pool.v_buffer)):
            buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape) + 10_000.0 * number)
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.incarnation = uuid.uuid4().hex
        extra = {"engine_id": "e", "incarnation": self.incarnation, "model_id": "tiny", "kv_port": port}
        self.params = sglang.CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: self.pool),
            page_size=PAGE,
        )
        self.linker = sglang.linker.AntiphonLinker(
            SimpleNamespace(tp_size=tp_size, pp_size=1, dp_size=1),
            self.params,
            components={sglang.ComponentType.FULL},
            extra_config=extra | config,
            forward_stream=None,
        )

    def transfer(self, hashes: tuple[bytes, ...], pages: list[int] | None = None) -> list[Any]:
        indices = None
        if pages is not None:
            indices = self.torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])
        keys = [page_hash.hex() for page_hash in hashes]
        return [self.sglang.PoolTransfer(name=self.sglang.PoolName.KV, keys=keys, device_indices=indices)]

    def offload(self, hashes: tuple[bytes, ...], pages: list[int]) -> bool:
        assert self.linker.offload(self.transfer(hashes, pages), session_id=None)
        assert self.linker.num_completed_offloads() == 1
        stored: bool = self.linker.pop_completed_offload()
        return stored

    def load(self, rid: str, hashes: tuple[bytes, ...], pages: list[int]) -> bool:
        """Everything from load to the end of the forward; whether it landed."""
        if not self.linker.load(rid, self.transfer(hashes, pages)):
            return False
        index = self.linker.start_layer_wise_loading()
        self.linker.layer_done_counter.set_consumer(index)
        for layer in range(LAYERS):
            self.linker.layer_done_counter.wait_until(layer)
        landed: bool = self.linker.finish_layer_wise_loading(index)
        return landed

    def content(self, page: int) -> list[Any]:
        rows = slice(page * PAGE, (page + 1) * PAGE)
        return [buffer[rows].clone() for buffer in (*self.pool.k_buffer, *self.pool.v_buffer)]

    def same(self, before: list[Any], page: int) -> bool:
        return all(map(self.torch.equal, before, self.content(page)))


@pytest.fixture
def rig(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", KEY)
    rig = Rig(sglang, checksum=True, fault_injection=True, store_pages=24)
    yield rig
    rig.linker.store.check_invariants()
    rig.linker.close()


def test_offloaded_pages_can_be_looked_up_and_loaded(rig: Rig) -> None:
    """What is offloaded is found at once, every length of it, and comes back bit for bit on other slots."""
    chain = make_chain("a", 3)
    before = [rig.content(page) for page in (2, 5, 6)]
    assert rig.offload(chain, [2, 5, 6])
    assert rig.linker.lookup("r1", rig.transfer((*chain, *make_chain("b", 1)))) == [1, 2, 3]
    assert rig.load("r1", chain, [9, 10, 12])
    assert all(rig.same(content, page) for content, page in zip(before, (9, 10, 12), strict=True))
    assert rig.linker.store.counts().pins == 0


def test_lookup_of_nothing(rig: Rig) -> None:
    """An unknown tail is no length at all, and leaves no pin."""
    assert rig.linker.lookup("r1", rig.transfer(make_chain("a", 2))) == []
    assert rig.linker.lookup("r1", []) == []
    assert rig.linker.store.counts().pins == 0


def test_lookup_pins_until_load(rig: Rig) -> None:
    """Between lookup and load the promised pages cannot be evicted; repeated lookups keep one pin."""
    chain = make_chain("a", 3)
    assert rig.offload(chain, [2, 3, 4])
    rig.linker.reset()
    for _ in range(3):
        assert rig.linker.lookup("r1", rig.transfer(chain)) == [1, 2, 3]
    assert rig.linker.store.counts().pins == 1
    taken = rig.linker.store.allocate(24)
    assert len(taken) == 21
    rig.linker.store.discard(taken)
    assert rig.load("r1", chain, [2, 3, 4])


def test_load_refuses_when_a_page_is_gone(rig: Rig) -> None:
    """A vanished page makes the request recompute; nothing is queued."""
    chain = make_chain("a", 3)
    assert rig.offload(chain[:2], [2, 3])
    assert not rig.load("r1", chain, [5, 6, 7])
    assert rig.linker.start_layer_wise_loading() == -1
    assert rig.linker.finish_layer_wise_loading(-1)
    assert rig.linker.store.counts().pins == 0


def test_load_refuses_a_spoilt_page_and_drops_it(rig: Rig) -> None:
    """With checksums on, a page whose bytes changed is never loaded, and is not offered again."""
    chain = make_chain("a", 2)
    assert rig.offload(chain, [2, 3])
    rig.linker.reset()
    assert rig.linker.store.corrupt(chain[1])
    assert rig.linker.lookup("r1", rig.transfer(chain)) == [1, 2]
    assert not rig.load("r1", chain, [5, 6])
    assert rig.linker.lookup("r1", rig.transfer(chain)) == [1]
    assert rig.load("r1", chain[:1], [5])


def test_with_several_ranks_a_missing_page_fails_the_load(
    sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang wants one answer to `load` from all ranks: the load is queued, and its failure reported."""
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", KEY)
    rig = Rig(sglang, tp_size=2)
    chain = make_chain("a", 2)
    assert rig.offload(chain[:1], [2])
    assert rig.linker.load("r1", rig.transfer(chain, [5, 6]))
    index = rig.linker.start_layer_wise_loading()
    assert not rig.linker.finish_layer_wise_loading(index)
    assert rig.linker.store.counts().pins == 0
    rig.linker.close()


def test_cancel_before_the_start(rig: Rig) -> None:
    """A cancelled load gives its pin back and is not started; an unknown one is no error."""
    chain = make_chain("a", 2)
    assert rig.offload(chain, [2, 3])
    assert rig.linker.load("r1", rig.transfer(chain, [5, 6]))
    with pytest.raises(RuntimeError, match="queued already"):
        rig.linker.load("r1", rig.transfer(chain, [5, 6]))
    before = rig.content(5)
    assert rig.linker.cancel_queued_load("r1") and not rig.linker.cancel_queued_load("r1")
    assert rig.linker.start_layer_wise_loading() == -1
    assert rig.same(before, 5) and rig.linker.store.counts().pins == 0


def test_several_requests_load_in_one_batch(rig: Rig) -> None:
    """All loads queued before the start share one counter, and each gets its own pages."""
    one, two = make_chain("a", 2), make_chain("b", 1)
    assert rig.offload(one, [2, 3]) and rig.offload(two, [4])
    before = [rig.content(page) for page in (2, 3, 4)]
    assert rig.linker.load("r1", rig.transfer(one, [8, 9]))
    assert rig.linker.load("r2", rig.transfer(two, [10]))
    index = rig.linker.start_layer_wise_loading()
    assert rig.linker.finish_layer_wise_loading(index)
    assert all(rig.same(content, page) for content, page in zip(before, (8, 9, 10), strict=True))


def test_a_full_store_reports_false_and_recovers(rig: Rig) -> None:
    """An offload without room fails without harm, and succeeds when it is offered again later."""
    chain = make_chain("a", 2)
    held = rig.linker.store.allocate(24)
    assert not rig.offload(chain, [2, 3])
    assert rig.linker.store.counts().pending_offloads == 0
    rig.linker.store.discard(held)
    assert rig.offload(chain, [2, 3])


def test_offloading_again_copies_nothing(rig: Rig) -> None:
    """Pages that are stored already, after a load for instance, keep their slots."""
    chain = make_chain("a", 3)
    assert rig.offload(chain[:2], [2, 3]) and rig.offload(chain, [7, 8, 9])
    assert rig.linker.store.counts().used == 3
    assert rig.linker.store.touch(chain[-1]) == 3


def test_the_store_contains_what_is_on_the_device(rig: Rig) -> None:
    """However much is pulled, a page whose device copy may live is never evicted; after a flush it may be."""
    chain = make_chain("a", 4)
    assert rig.offload(chain, [2, 3, 4, 5])
    store = rig.linker.store
    for number in range(10):
        slots = store.allocate(8)
        store.publish(b"", make_chain(f"pulled-{number}", len(slots)), slots)
    assert store.prefix_pages(chain) == 4
    rig.linker.reset()
    store.discard(store.allocate(24))
    assert store.prefix_pages(chain) == 0


def test_slots_that_are_not_pages_fail_the_offload_only(rig: Rig) -> None:
    """If SGLang's slots were not what we assume, pages are not stored; no wrong page is."""
    chain = make_chain("a", 1)
    transfer = rig.transfer(chain, [2])
    transfer[0].device_indices += 1
    assert rig.linker.offload(transfer)
    assert rig.linker.pop_completed_offload() is False
    assert rig.linker.lookup("r1", rig.transfer(chain)) == []


def test_other_pools_in_a_transfer_are_not_ours(rig: Rig) -> None:
    """A transfer for a pool that we do not keep is neither found nor stored."""
    transfers = rig.transfer(make_chain("a", 1), [2]) * 2
    assert rig.linker.lookup("r1", transfers) == [] and not rig.linker.offload(transfers)


def test_the_directory_tells_the_truth(rig: Rig) -> None:
    """The hello names this engine and its pages; what was offloaded can be reserved by a peer."""
    chain = make_chain("a", 2)
    assert rig.offload(chain, [2, 3])
    client = DirectoryClient(rig.address, KEY.encode(), "test")
    hello = client.connect(5.0)
    assert (hello.incarnation, hello.page_size_tokens, hello.pool_tokens) == (
        rig.incarnation,
        PAGE,
        POOL_TOKENS,
    )
    assert hello.page_bytes == LAYERS * 2 * PAGE * 2 * 8 * 4 and hello.dtype == "float32"
    assert hello.store_pages == 24 and hello.kv_addresses == (rig.address,) and hello.agent_metadata
    reserve = wire.Reserve("peer", rig.incarnation, chain, 5.0, 0.0)
    reserved = client.ask(reserve, wire.Reserved, deadline_s=5.0)
    assert len(reserved.slots) == 2 and len(reserved.checksums) == 2
    assert client.ask(wire.Confirm(reserved.pin_id), wire.Confirmed, deadline_s=5.0).held
    client.close()


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"kv_prot": 1}, "unknown field `kv_prot`"),
        ({"store_pages": "many"}, r"Expected `int`.*store_pages"),
        ({"store_pages": POOL_TOKENS // PAGE}, "the store must be larger"),
        ({"kv_port": 0}, "kv_port must be a port"),
        ({"kv_addresses": ["127.0.0.1:1", "127.0.0.1:2"]}, "kv_addresses names 2 ranks"),
        ({"interface": "no-such-device"}, "no network interface 'no-such-device'"),
        ({"fleet_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE has 0 bytes"),
    ],
)
def test_bad_configuration_is_refused_in_words(
    sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], complaint: str
) -> None:
    """Every mistake in the config is named before anything starts."""
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", KEY)
    with pytest.raises(ValueError, match=complaint):
        Rig(sglang, **config)


def test_unsupported_engines_are_refused(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools and parallelism that we cannot carry are named; the alternative would be wrong pages."""
    monkeypatch.setenv("ANTIPHON_FLEET_KEY", KEY)
    rig = Rig(sglang)
    try:
        full = {sglang.ComponentType.FULL}
        plain = SimpleNamespace(pp_size=1, dp_size=1)
        refuse = sglang.linker._refuse_unsupported
        refuse(plain, rig.params, rig.pool, full)
        cases = [
            (SimpleNamespace(pp_size=2, dp_size=1), rig.params, rig.pool, full, "pp_size 2"),
            (plain, rig.params, SimpleNamespace(), full, "SimpleNamespace"),
            (plain, rig.params, rig.pool, {*full, sglang.ComponentType.SWA}, "sliding window"),
        ]
        for *arguments, complaint in cases:
            with pytest.raises(ValueError, match=complaint):
                refuse(*arguments)
        rig.params.is_eagle = True
        with pytest.raises(ValueError, match="speculative"):
            refuse(plain, rig.params, rig.pool, full)
    finally:
        rig.linker.close()


def test_default_store_is_larger_than_the_device() -> None:
    """1.25 x the device pool, and two windows of pages for what is pulled."""
    config = parse_config({"engine_id": "e", "incarnation": "i", "model_id": "m", "context_tokens": 100})
    assert config.pages_for(1000, 16) == 1250 + 14


def test_a_worker_handles_in_order_and_survives_errors() -> None:
    """An item that fails does not stop the thread; `drain` waits for all; `close` ends it."""
    done: list[int] = []

    def handle(item: int) -> None:
        if item == 1:
            raise ValueError("one")
        done.append(item)

    worker: Worker[int] = Worker("test-worker", handle)
    for item in range(4):
        worker.put(item)
    worker.drain()
    assert done == [0, 2, 3]
    worker.close()
    worker.close()
