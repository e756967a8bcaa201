"""Faults of a link on command, in a puller over real NIXL: each costs pages or time, none a wrong page."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryClient, DirectoryError
from antiphon.engines.page_memory import PageMemory
from antiphon.engines.rank_service import RankService
from tests.kv_helpers import Peer, assert_holds, prefetch, wait_until
from tests.kv_peer import KEY, PAGE_BYTES, free_port, make_chain, make_hello

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")), reason="needs NIXL"
)

CHAIN = make_chain("chain", 8)


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    started = Peer(checksums=True)
    started.tell(f"put chain {len(CHAIN)}")
    yield started
    started.close()


def start(*, fault_injection: bool = True) -> RankService:
    memory = PageMemory(64, PAGE_BYTES)
    return RankService(
        make_hello("me", free_port()), memory, KEY, checksums=True, fault_injection=fault_injection
    )


@pytest.fixture
def rank() -> Iterator[RankService]:
    service = start()
    yield service
    service.store.check_invariants()
    service.close()


def tell(rank: RankService, kind: Any, **fields: Any) -> wire.LinkFaults:
    client = DirectoryClient(rank.hello.kv_addresses[0], KEY, "test")
    try:
        return client.ask(wire.LinkFault(kind, **fields), wire.LinkFaults, deadline_s=5.0)
    finally:
        client.close()


def test_corrupt_bytes_are_discarded_and_come_right_the_next_time(peer: Peer, rank: RankService) -> None:
    tell(rank, "corrupt", count=1)
    first = rank.puller.pull(prefetch(peer, CHAIN))
    assert first.pages == 0 and "checksum" in first.reason
    assert tell(rank, "none") == wire.LinkFaults(hit_reads=1, reading=0)
    assert rank.puller.pull(prefetch(peer, CHAIN)).pages == len(CHAIN)
    assert_holds(rank, CHAIN)


def test_a_cut_link_ends_with_the_deadline_or_at_once(peer: Peer, rank: RankService) -> None:
    """Silence lasts until the deadline; a reset is a READ that fails. Neither keeps a slot."""
    tell(rank, "cut", count=1)
    silent = rank.puller.pull(prefetch(peer, CHAIN, deadline_s=0.3))
    assert silent.pages == 0 and "not finished" in silent.reason and silent.elapsed_s >= 0.3
    tell(rank, "cut", seconds=0.05, count=1)
    reset = rank.puller.pull(prefetch(peer, CHAIN))
    assert reset.pages == 0 and "disconnected" in reset.reason and reset.elapsed_s < 5.0
    assert rank.store.counts().free == 64 and rank.store.counts().quarantined == 0


def test_a_slow_link_is_late_but_right(peer: Peer, rank: RankService) -> None:
    """In time it is whole; past the deadline nothing of it is shown; `clear` ends the wait."""
    tell(rank, "slow", seconds=0.2, bytes_per_s=1e6)
    late = rank.puller.pull(prefetch(peer, CHAIN, deadline_s=0.1))
    assert late.pages == 0 and "not finished" in late.reason
    tell(rank, "clear")
    tell(rank, "slow", seconds=60.0)
    pulled: list[wire.Prefetched] = []
    thread = threading.Thread(
        target=lambda: pulled.append(rank.puller.pull(prefetch(peer, CHAIN, deadline_s=30.0)))
    )
    thread.start()
    wait_until(lambda: tell(rank, "none").reading == 1)
    tell(rank, "clear")
    thread.join(10.0)
    assert pulled[0].pages == len(CHAIN)
    assert_holds(rank, CHAIN)


def test_what_cannot_be_is_refused_and_without_the_flag_everything_is(rank: RankService) -> None:
    for fields in ({"seconds": -1.0}, {"seconds": float("nan")}, {"bytes_per_s": -1.0}, {"count": -1}):
        with pytest.raises(DirectoryError, match="out of range"):
            tell(rank, "slow", **fields)
    plain = start(fault_injection=False)
    try:
        with pytest.raises(DirectoryError, match="without fault injection"):
            tell(plain, "clear")
    finally:
        plain.close()
