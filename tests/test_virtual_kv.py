"""The device pool and the two tiers of a simulated engine's KV."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from antiphon.engines.page_hash import namespace_seed, page_hashes
from antiphon.engines.virtual_kv import Allocation, DevicePool, VirtualKv, VirtualStore

PAGE = 4


def make_kv(device_pages: int = 8, store_pages: int = 16) -> VirtualKv:
    return VirtualKv(device_pages, VirtualStore(store_pages), PAGE)


def run_prompt(kv: VirtualKv, prompt: list[int], seed: bytes = b"") -> Allocation:
    """Admit, compute and end one prompt; returns how it was found."""
    allocation = kv.admit(prompt, seed, 0)
    assert allocation is not None
    assert kv.grow(allocation, len(prompt))
    kv.commit(allocation, prompt)
    kv.release(allocation)
    kv.device.check_invariants()
    kv.store.check_invariants()
    return allocation


def test_match_is_whole_pages_without_the_last_token() -> None:
    """A prompt that ends at a page boundary does not match its own last page."""
    kv = make_kv()
    prompt = list(range(12))
    assert run_prompt(kv, prompt).device_tokens == 0
    assert run_prompt(kv, prompt).device_tokens == 8
    assert run_prompt(kv, [*prompt, 99]).device_tokens == 12


def test_every_whole_page_is_offloaded() -> None:
    """The store holds the pages of a computed prompt, and a partial last page is nowhere."""
    kv = make_kv()
    prompt = list(range(14))
    run_prompt(kv, prompt)
    assert kv.store.prefix_pages(page_hashes(prompt, PAGE)) == 3
    assert kv.store.counts().used == 3


def test_what_the_device_lost_comes_from_the_store() -> None:
    """After a flush of the device the same prefix is found in the store."""
    kv = make_kv()
    prompt = list(range(14))
    run_prompt(kv, prompt)
    kv.device.flush()
    again = run_prompt(kv, prompt)
    assert (again.device_tokens, again.host_tokens) == (0, 12)


def test_what_came_from_the_store_is_not_offered_to_it() -> None:
    """Pages that are stored already take no other slots, so nothing is evicted for them."""
    kv = make_kv(store_pages=3)
    prompt = list(range(14))
    run_prompt(kv, prompt)
    kv.device.flush()
    run_prompt(kv, prompt)
    assert kv.store.counts().evicted_total == 0


def test_seed_separates() -> None:
    """Equal tokens under another salt share nothing."""
    kv = make_kv()
    prompt = list(range(14))
    run_prompt(kv, prompt, namespace_seed(cache_salt="a"))
    other = run_prompt(kv, prompt, namespace_seed(cache_salt="b"))
    assert (other.device_tokens, other.host_tokens) == (0, 0)


def test_eviction_takes_the_oldest_tail_first() -> None:
    """Room for a new prompt comes from the end of the chain that was unused the longest."""
    kv = make_kv(device_pages=6, store_pages=1)
    old, new = list(range(12)), list(range(100, 112))
    run_prompt(kv, old)
    run_prompt(kv, new)
    run_prompt(kv, list(range(200, 204)))
    assert kv.device.match(page_hashes(old, PAGE)) == 2
    assert kv.device.match(page_hashes(new, PAGE)) == 3


def test_requests_in_flight_are_not_evicted() -> None:
    """A prompt that would need locked pages is not admitted, and leaves no lock behind."""
    kv = make_kv(device_pages=4)
    first = kv.admit(list(range(12)), b"", 0)
    assert first is not None and kv.grow(first, 12)
    assert kv.admit(list(range(100, 108)), b"", 0) is None
    kv.commit(first, list(range(12)))
    assert kv.admit([*range(12), 50, 51, 52, 53, 54], b"", 0) is None
    kv.release(first)
    assert kv.device.used_pages == 0
    assert kv.admit(list(range(100, 108)), b"", 0) is not None


def test_two_requests_that_compute_the_same_share_it_afterwards() -> None:
    """The second copy of a page is freed when it would join the tree."""
    kv = make_kv()
    prompt = list(range(8))
    both = [kv.admit(prompt, b"", 0) for _ in range(2)]
    for allocation in both:
        assert allocation is not None and kv.grow(allocation, 8)
    assert kv.device.used_pages == 4
    for allocation in both:
        assert allocation is not None
        kv.commit(allocation, prompt)
    assert kv.device.used_pages == 2
    for allocation in both:
        assert allocation is not None
        kv.release(allocation)
    assert kv.device.used_pages == 0


def test_page_that_the_store_lost_is_not_offered_again() -> None:
    """While the device has a page, losing it in the store is for good: only new pages are offloaded."""
    kv = make_kv(device_pages=8, store_pages=2)
    first, second = list(range(8)), list(range(100, 108))
    run_prompt(kv, first)
    run_prompt(kv, second)
    run_prompt(kv, first)
    assert kv.store.prefix_pages(page_hashes(first, PAGE)) == 0
    assert kv.store.prefix_pages(page_hashes(second, PAGE)) == 2


def test_store_full_of_pins_takes_nothing() -> None:
    """When too few slots can be had the device still works and no slot leaks."""
    kv = make_kv(store_pages=3)
    first, second = list(range(8)), list(range(100, 108))
    run_prompt(kv, first)
    pin = kv.store.pin(page_hashes(first, PAGE), ttl_s=60.0, holder="test")
    run_prompt(kv, second)
    assert kv.store.prefix_pages(page_hashes(second, PAGE)) == 0
    assert run_prompt(kv, second).device_tokens == 4
    assert kv.store.unpin(pin.pin_id)
    assert kv.store.counts().inflight == 0


def test_corrupt_page_makes_what_builds_on_it_wrong() -> None:
    """A flipped page is noticed when it is loaded, and everything computed on it is stored wrong."""
    kv = make_kv()
    prompt = list(range(12))
    run_prompt(kv, prompt)
    assert kv.store.corrupt(page_hashes(prompt, PAGE)[0])
    assert not run_prompt(kv, prompt).wrong, "the device still has the right pages"
    kv.device.flush()
    longer = [*prompt, *range(50, 60)]
    assert run_prompt(kv, longer).wrong
    kv.device.flush()
    pin = kv.store.pin(page_hashes(longer, PAGE), ttl_s=1.0, holder="test")
    contents = [bytes(kv.store.content.view(slot)) for slot in pin.slots]
    assert contents[0] != contents[1] == contents[2]
    assert contents[3:] == [contents[0]] * 2


def test_pages_given_back_twice_are_an_error() -> None:
    """The pool does not let a request free what it does not have."""
    pool = DevicePool(4)
    assert pool.take(2)
    pool.give_back(2)
    with pytest.raises(ValueError, match="1 pages given back, 0 are out"):
        pool.give_back(1)


class TwoTiers(RuleBasedStateMachine):
    """Random requests over few tokens, so that prefixes are shared, on tiers that are too small for them."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = make_kv(device_pages=10, store_pages=7)
        self.live: list[tuple[Allocation, list[int], int]] = []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24), salt=st.booleans())
    def admit(self, prompt: list[int], salt: bool) -> None:
        seed = namespace_seed(cache_salt="s") if salt else b""
        before = self.kv.device.used_pages
        allocation = self.kv.admit(prompt, seed, 0)
        if allocation is None:
            assert self.kv.device.used_pages == before
            return
        found = allocation.device_tokens + allocation.host_tokens
        assert found % PAGE == 0 and found < len(prompt)
        assert self.kv.grow(allocation, len(prompt)), "admission promised the room"
        self.live.append((allocation, prompt, found))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        allocation, tokens, computed = self.live[index]
        upto = data.draw(st.integers(computed, len(tokens)))
        self.kv.commit(allocation, tokens[:upto])
        assert self.kv.device.match(allocation.hashes[: upto // PAGE]) == upto // PAGE
        self.live[index] = (allocation, tokens, upto)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        allocation, tokens, computed = self.live[index]
        if self.kv.grow(allocation, len(tokens) + 1):
            self.live[index] = (allocation, [*tokens, token], computed)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        allocation, _, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.kv.release(allocation)

    @rule()
    def flush(self) -> None:
        self.kv.device.flush()

    @invariant()
    def books_are_right(self) -> None:
        self.kv.device.check_invariants()
        self.kv.store.check_invariants()
        assert self.kv.store.counts().inflight == self.kv.store.counts().pins == 0
        if not self.live:
            assert self.kv.device.used_pages == 0


TestTwoTiers = TwoTiers.TestCase
TestTwoTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
