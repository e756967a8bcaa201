"""The page store: states of slots, what may be evicted, pins, and what holds the device's pages."""

from __future__ import annotations

import hashlib
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from antiphon.engines.page_memory import PageMemory
from antiphon.engines.page_store import PageStore, Pin
from tests.kv_peer import fill_store, make_chain, page_content

INFINITE = float("inf")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_store(n_pages: int, clock: Clock | None = None, *, checksums: bool = False) -> PageStore:
    return PageStore(n_pages, PageMemory(n_pages, 64), clock=clock or Clock(), checksums=checksums)


def store_chain(store: PageStore, seed: str, count: int) -> tuple[bytes, ...]:
    chain = make_chain(seed, count)
    fill_store(store, chain)
    return chain


def test_published_pages_are_found_by_prefix() -> None:
    """`prefix_pages` counts stored pages from the first on and stops at the first gap."""
    store = make_store(8)
    chain = make_chain("a", 4)
    fill_store(store, chain[:2])
    fill_store(store, chain[3:], parent=chain[2])
    assert store.prefix_pages(chain) == 2
    assert store.prefix_pages(chain[3:]) == 1
    assert store.missing(chain) == [2]
    store.check_invariants()


def test_inflight_pages_are_invisible() -> None:
    """Allocated slots are nobody's page until they are published, and free again after `discard`."""
    store = make_store(4)
    slots = store.allocate(3)
    assert len(slots) == 3 and store.counts().inflight == 3
    assert store.prefix_pages(make_chain("a", 3)) == 0
    store.discard(slots)
    assert store.counts().free == 4


def test_first_slots_are_neighbours() -> None:
    """A fresh store hands out adjacent slots, so that transfers can be merged."""
    assert make_store(8).allocate(5) == (0, 1, 2, 3, 4)


def test_a_second_copy_keeps_the_first_slot() -> None:
    """Publishing a stored page again frees the new slot: one page, one slot."""
    store = make_store(4)
    chain = store_chain(store, "a", 2)
    slots = store.allocate(2)
    assert store.publish(b"", chain, slots) == 0
    assert store.counts().free == 2
    store.check_invariants()


def test_only_leaves_are_evicted_least_recently_used_first() -> None:
    """What is left of an evicted chain is always its head."""
    store = make_store(6)
    old, young = store_chain(store, "old", 3), store_chain(store, "young", 3)
    slots = store.allocate(2)
    assert len(slots) == 2
    assert store.prefix_pages(old) == 1 and store.prefix_pages(young) == 3
    store.check_invariants()


def test_touch_saves_the_whole_chain() -> None:
    """`touch` of a tip counts as use of every page before it, and says how many there are."""
    store = make_store(6)
    old, young = store_chain(store, "old", 3), store_chain(store, "young", 3)
    assert store.touch(old[-1]) == 3
    assert store.touch(make_chain("unknown", 1)[0]) == 0
    store.allocate(3)
    assert store.prefix_pages(old) == 3 and store.prefix_pages(young) == 0


def test_a_head_is_as_young_as_its_tail_was() -> None:
    """A head does not become the next victim when its tail goes: it was used when the tail was."""
    store = make_store(8)
    chain = make_chain("a", 4)
    fill_store(store, chain[:2])
    other = store_chain(store, "b", 2)
    fill_store(store, chain[2:], parent=chain[1])
    store_chain(store, "c", 2)
    store.bind((1, 2), other)
    store.allocate(2)
    store.unbind_all()
    assert store.prefix_pages(chain) == 2 and store.prefix_pages(other) == 2
    store.allocate(2)
    assert store.prefix_pages(chain) == 2 and store.prefix_pages(other) == 0


def test_a_chain_is_found_from_its_end_whenever_it_was_learned() -> None:
    """SGLang offloads pieces of a chain without their parents, some after the round has ended."""
    chain = make_chain("a", 6)
    for before in range(4):
        store = make_store(8)
        for number, start in enumerate((0, 2, 4)):
            if number == before:
                store.learn(chain[:3])
                store.learn(chain[2:])
            fill_store(store, chain[start : start + 2])
        if before == 3:
            assert store.chain(chain[-1]) == (b"", chain[4:])
            store.learn(chain)
        assert store.chain(chain[-1]) == (b"", chain)
        assert store.chain(make_chain("b", 1)[0]) == (b"", ())
        store.check_invariants()


def test_learned_links_join_pieces_of_a_chain() -> None:
    """Pieces stored without a parent are one chain after `learn`: touched and shortened as one."""
    store = make_store(6)
    chain = make_chain("a", 4)
    fill_store(store, chain[:2])
    fill_store(store, chain[2:])
    store_chain(store, "b", 2)
    assert store.touch(chain[-1]) == 2
    store.learn(chain)
    assert store.touch(chain[-1]) == 4
    store.check_invariants()
    store.allocate(3)
    assert store.prefix_pages(chain) == 3


def test_pinned_pages_are_never_evicted() -> None:
    """A pin protects its pages and all before them; a full store then gives fewer slots."""
    store = make_store(4)
    chain = store_chain(store, "a", 4)
    pin = store.pin(chain[:3], ttl_s=5.0, holder="peer")
    assert len(store.allocate(4)) == 1
    assert store.prefix_pages(chain) == 3
    assert store.unpin(pin.pin_id) is True
    assert len(store.allocate(4)) == 3


def test_an_expired_pin_says_so_even_if_nothing_was_evicted() -> None:
    """`unpin` after the time to live answers False: whoever read under it cannot be sure."""
    clock = Clock()
    store = make_store(4, clock)
    chain = store_chain(store, "a", 2)
    kept, late = (store.pin(chain, ttl_s=ttl_s, holder="peer") for ttl_s in (5.0, 2.0))
    clock.now += 2.0
    assert store.unpin(late.pin_id) is False
    assert store.unpin(kept.pin_id) is True
    assert store.unpin(kept.pin_id) is False, "a pin can be given back once"
    assert store.unpin(12345) is False


def test_a_slot_under_an_expired_pin_may_be_reused() -> None:
    """Pins end by time: a peer that died holds nothing for ever."""
    clock = Clock()
    store = make_store(2, clock)
    store.pin(store_chain(store, "a", 2), ttl_s=5.0, holder="peer")
    assert store.allocate(2) == ()
    clock.now += 5.0
    assert len(store.allocate(2)) == 2


def test_pin_takes_the_longest_stored_prefix() -> None:
    """A pin covers what is there from the first page on, and no page after a gap."""
    store = make_store(8)
    chain = store_chain(store, "a", 3)
    pin = store.pin((*chain, *make_chain("b", 1)), ttl_s=1.0, holder="peer")
    assert len(pin.slots) == 3 and pin.checksums == ()
    assert store.pin(make_chain("c", 2), ttl_s=1.0, holder="peer").slots == ()


def test_quarantined_slots_come_back_only_by_release() -> None:
    """A slot that a late transfer may still write is not handed out, however full the store is."""
    store = make_store(4)
    slots = store.allocate(2)
    store.quarantine(slots)
    assert len(store.allocate(4)) == 2
    assert store.counts().quarantined == 2
    store.release(slots)
    assert set(store.allocate(4)) == set(slots)
    store.check_invariants()


def test_moves_from_a_wrong_state_are_refused() -> None:
    """A slot that is not INFLIGHT cannot be published, discarded or quarantined; nothing changes."""
    store = make_store(4)
    chain = store_chain(store, "a", 1)
    free = store.allocate(1)
    store.discard(free)
    for action in (store.discard, store.quarantine, store.release):
        with pytest.raises(ValueError, match="not all"):
            action(free)
    with pytest.raises(ValueError, match="not all"):
        store.publish(b"", chain, free)
    with pytest.raises(ValueError, match="2 hashes for 1 slots"):
        store.publish(b"", make_chain("b", 2), free)
    store.check_invariants()


def test_pages_on_the_device_are_held() -> None:
    """A page stays while a device page has its content: SGLang would never offer it again."""
    store = make_store(4)
    first, second = store_chain(store, "a", 2), store_chain(store, "b", 2)
    store.bind((7, 8), first)
    assert len(store.allocate(4)) == 2
    assert store.prefix_pages(first) == 2 and store.prefix_pages(second) == 0
    store.check_invariants()


def test_new_content_of_a_device_page_lets_the_old_page_go() -> None:
    """A device page holds only what was last copied from or to it, also when that is not stored here."""
    store = make_store(4)
    first, second = store_chain(store, "a", 2), store_chain(store, "b", 2)
    store.bind((7, 8), first)
    store.bind((7, 8), second)
    store.bind((8,), make_chain("not stored", 1))
    assert len(store.allocate(4)) == 3
    assert store.prefix_pages(second) == 1
    store.unbind_all()
    assert len(store.allocate(1)) == 1
    store.check_invariants()


def test_checksums_find_a_spoilt_page() -> None:
    """`bad_pages` names positions whose bytes changed after they were published; `forget` drops the page."""
    store = make_store(4, checksums=True)
    chain = store_chain(store, "a", 3)
    pin = store.pin(chain, ttl_s=INFINITE, holder="test")
    assert store.bad_pages(pin) == []
    assert store.corrupt(chain[1])
    assert store.bad_pages(pin) == [1]
    assert not store.forget(chain[1]), "pinned"
    store.unpin(pin.pin_id)
    assert store.forget(chain[1])
    assert store.prefix_pages(chain) == 1
    assert not store.corrupt(chain[1])
    store.check_invariants()


def test_corruption_changes_every_byte_but_keeps_floats_finite() -> None:
    """The test hook must be visible to a model, not crash it."""
    memory = PageMemory(1, 64)
    memory.view(0)[:] = page_content(hashlib.sha256(b"x").digest(), 64)
    before = bytes(memory.view(0))
    memory.corrupt(0)
    assert all(a ^ b == 0x80 for a, b in zip(before, bytes(memory.view(0)), strict=True))


def test_wait_for_ends_with_the_offloads_that_were_under_way() -> None:
    """A waiter wakes when its pages come or the offloads begun before it have ended, not at later ones."""
    store = make_store(4)
    chain = make_chain("a", 1)
    store.begin_offload()
    waiter = threading.Thread(target=store.wait_for, args=(chain, 60.0))
    waiter.start()
    store.begin_offload()
    assert waiter.is_alive()
    store.end_offload()
    waiter.join(10.0)
    assert not waiter.is_alive()
    waiter = threading.Thread(target=store.wait_for, args=(chain, 60.0))
    waiter.start()
    fill_store(store, chain)
    waiter.join(10.0)
    assert not waiter.is_alive() and store.counts().pending_offloads == 1
    store.end_offload()
    with pytest.raises(ValueError, match="without begin_offload"):
        store.end_offload()


def test_wait_for_is_bounded() -> None:
    """A pending offload that never ends costs a waiter its wait, no more."""
    store = make_store(4)
    store.begin_offload()
    store.wait_for(make_chain("a", 1), 0.01)
    assert store.counts().pending_offloads == 1


@pytest.mark.parametrize(("pages", "memory_pages"), [(0, 1), (4, 2)])
def test_impossible_sizes_are_refused(pages: int, memory_pages: int) -> None:
    """A store says at once that its memory does not fit."""
    with pytest.raises(ValueError, match="page"):
        PageStore(pages, PageMemory(memory_pages, 64))


def test_a_virtual_store_keeps_names_without_bytes() -> None:
    """Simulated engines use the same bookkeeping without memory."""
    store = PageStore(4)
    chain = make_chain("a", 2)
    store.publish(b"", chain, store.allocate(2))
    assert store.prefix_pages(chain) == 2 and not store.corrupt(chain[0])
    with pytest.raises(ValueError, match="virtual"):
        PageStore(4, checksums=True)


class StoreMachine(RuleBasedStateMachine):
    """Any order of operations keeps the books consistent, and pages under a valid pin keep their bytes."""

    fillings = Bundle("fillings")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = make_store(6, self.clock, checksums=True)
        self.valid: dict[int, tuple[Pin, tuple[bytes, ...], float]] = {}
        self.quarantined: list[tuple[int, ...]] = []

    def content(self, slot: int) -> bytes:
        assert self.store.memory is not None
        return bytes(self.store.memory.view(slot))

    @rule(seed=st.sampled_from("abc"), start=st.integers(0, 3), count=st.integers(1, 4))
    def fill(self, seed: str, start: int, count: int) -> None:
        chain = make_chain(seed, start + count)
        parent = chain[start - 1] if start else b""
        slots = self.store.allocate(count)
        assert self.store.memory is not None
        for slot, page_hash in zip(slots, chain[start:], strict=False):
            self.store.memory.view(slot)[:] = page_content(page_hash, 64)
        self.store.publish(parent, chain[start : start + len(slots)], slots)

    @rule(target=fillings, count=st.integers(1, 3))
    def allocate(self, count: int) -> object:
        slots = self.store.allocate(count)
        assert self.store.memory is not None
        for slot in slots:
            self.store.memory.view(slot)[:] = bytes(64)
        return multiple(slots) if slots else multiple()

    @precondition(lambda self: self.quarantined)
    @rule()
    def release(self) -> None:
        self.store.release(self.quarantined.pop())

    @rule(slots=fillings, quarantine=st.booleans())
    def end_filling(self, slots: tuple[int, ...], quarantine: bool) -> None:
        try:
            if quarantine:
                self.store.quarantine(slots)
                self.quarantined.append(slots)
            else:
                self.store.discard(slots)
        except ValueError:
            pass  # ended before

    @rule(
        target=pins, seed=st.sampled_from("abc"), count=st.integers(1, 6), ttl_s=st.sampled_from([1.0, 3.0])
    )
    def pin(self, seed: str, count: int, ttl_s: int) -> int:
        chain = make_chain(seed, count)
        pin = self.store.pin(chain, ttl_s=ttl_s, holder="machine")
        self.valid[pin.pin_id] = (pin, chain, self.clock.now + ttl_s)
        return pin.pin_id

    @rule(pin_id=pins)
    def unpin(self, pin_id: int) -> None:
        expected = pin_id in self.valid and self.valid[pin_id][2] > self.clock.now
        assert self.store.unpin(pin_id) is expected
        self.valid.pop(pin_id, None)

    @rule(seed=st.sampled_from("abc"), count=st.integers(1, 4))
    def touch(self, seed: str, count: int) -> None:
        self.store.touch(make_chain(seed, count)[-1])

    @rule(seed=st.sampled_from("abc"), count=st.integers(1, 4), device_page=st.integers(0, 2))
    def bind(self, seed: str, count: int, device_page: int) -> None:
        self.store.bind((device_page,), make_chain(seed, count)[-1:])

    @rule(seed=st.sampled_from("abc"))
    def learn(self, seed: str) -> None:
        self.store.learn(make_chain(seed, 4))

    @rule(seed=st.sampled_from("abc"), count=st.integers(1, 4))
    def forget(self, seed: str, count: int) -> None:
        self.store.forget(make_chain(seed, count)[-1])

    @rule()
    def flush(self) -> None:
        self.store.unbind_all()

    @rule(seconds=st.sampled_from([0.5, 1.5]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def books_are_consistent(self) -> None:
        self.store.check_invariants()

    @invariant()
    def pinned_bytes_are_what_was_stored(self) -> None:
        for pin, chain, expires_at in self.valid.values():
            if expires_at > self.clock.now:
                for slot, page_hash in zip(pin.slots, chain, strict=False):
                    assert self.content(slot) == page_content(page_hash, 64)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreMachine = StoreMachine.TestCase
