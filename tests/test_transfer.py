"""Pulling pages by real NIXL between two processes: what arrives is right; a failure is only fewer pages."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from antiphon.engines import wire
from antiphon.engines.directory_client import DirectoryClient, DirectoryError
from antiphon.engines.page_memory import PageMemory
from antiphon.engines.rank_service import RankService
from antiphon.engines.transfer import difference
from tests.kv_helpers import REPOSITORY, Peer, assert_holds, prefetch, wait_until
from tests.kv_peer import KEY, PAGE_BYTES, fill_store, free_port, make_chain, make_hello

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")), reason="needs NIXL"
)


@pytest.fixture
def start_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start(**options: Any) -> Peer:
        peers.append(Peer(**options))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


@pytest.fixture
def start_rank() -> Iterator[Callable[..., RankService]]:
    """Our side: a rank's whole service in this process."""
    ranks: list[RankService] = []

    def start(
        pages: int = 256, page_bytes: int = PAGE_BYTES, checksums: bool = False, **hello: Any
    ) -> RankService:
        memory = PageMemory(pages, page_bytes)
        port = free_port()
        fields = {"page_bytes": page_bytes} | hello
        ranks.append(RankService(make_hello("me", port, **fields), memory, KEY, checksums=checksums))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.store.check_invariants()
        rank.close()


# ---------------------------------------------------------------- what arrives


def test_pages_arrive_with_their_bytes(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """A pull brings the pages that are missing, and only those; the source's pins are given back."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 60")
    chain = make_chain("chain", 60)
    first = rank.puller.pull(prefetch(peer, chain[:40]))
    assert (first.pages, first.pulled_pages, first.pulled_bytes) == (40, 40, 40 * PAGE_BYTES)
    assert first.reason == ""
    second = rank.puller.pull(prefetch(peer, chain))
    assert (second.pages, second.pulled_pages) == (60, 20)
    third = rank.puller.pull(prefetch(peer, chain))
    assert (third.pages, third.pulled_pages) == (60, 0)
    assert_holds(rank, chain)
    assert rank.store.touch(chain[-1]) == 60, "pulled pages are linked to their parents"
    assert json.loads(peer.tell("counts"))["pins"] == 0


def test_both_directions(start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]) -> None:
    """The same pair pulls the other way by the Prefetch request, over the wire."""
    peer, rank = start_peer(), start_rank()
    chain = make_chain("mine", 30)
    fill_store(rank.store, chain)
    client = DirectoryClient(peer.address, KEY, "scheduler")
    request = wire.Prefetch(rank.hello.kv_addresses[0], rank.hello.incarnation, b"", chain, 10.0)
    reply = client.ask(request, wire.Prefetched, deadline_s=15.0)
    assert (reply.pages, reply.pulled_pages, reply.reason) == (30, 30, "")
    stats = client.ask(wire.Stats(), wire.StatsReply, deadline_s=5.0)
    assert stats.pulled_bytes_total == 30 * PAGE_BYTES and stats.used_pages == 30
    client.close()
    back = rank.puller.pull(prefetch(peer, make_chain("mine", 31)))
    assert (back.pages, back.pulled_pages) == (30, 0) and "only 0 of 1" in back.reason


def test_a_piece_of_a_chain_continues_what_is_there(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """Hashes that begin in the middle are linked to the given parent."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 20")
    chain = make_chain("chain", 20)
    rank.puller.pull(prefetch(peer, chain[:5]))
    rank.puller.pull(prefetch(peer, chain[5:], parent=chain[4]))
    assert rank.store.touch(chain[-1]) == 20


def test_the_source_has_less(start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]) -> None:
    """What the source does not hold is missing, with the reason in words; the rest arrives."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 7")
    result = rank.puller.pull(prefetch(peer, make_chain("chain", 10)))
    assert (result.pages, result.pulled_pages) == (7, 7) and "only 7 of 10" in result.reason


def test_our_store_is_full(start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]) -> None:
    """Pinned pages are not sacrificed to a pull: fewer pages come."""
    peer, rank = start_peer(), start_rank(pages=10)
    peer.tell("put chain 8")
    mine = make_chain("mine", 6)
    fill_store(rank.store, mine)
    pin = rank.store.pin(mine, ttl_s=60.0, holder="test")
    result = rank.puller.pull(prefetch(peer, make_chain("chain", 8)))
    assert result.pages == 4 and "room for only 4" in result.reason
    assert_holds(rank, make_chain("chain", 4))
    assert rank.store.unpin(pin.pin_id) and rank.store.prefix_pages(mine) == 6


def test_a_pull_waits_for_an_offload_under_way(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """Pages that are on their way into the source's store are waited for, within the deadline."""
    peer, rank = start_peer(), start_rank()
    peer.tell("begin-offload")
    result = rank.puller.pull(prefetch(peer, make_chain("chain", 3), deadline_s=1.0))
    assert result.pages == 0 and 0.4 < result.elapsed_s < 1.0, "half of the deadline is the longest wait"
    peer.tell("end-offload")
    peer.tell("put chain 3")
    assert rank.puller.pull(prefetch(peer, make_chain("chain", 3))).pages == 3


def test_pulls_of_the_same_pages_share_one_transfer(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """Sessions that begin alike ask for the same pages at once: they move once, and everyone gets them."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 60")
    requests = [prefetch(peer, make_chain("chain", count)) for count in (60, 50, 60, 40)]
    with ThreadPoolExecutor(len(requests)) as threads:
        results = list(threads.map(rank.puller.pull, requests))
    assert [(result.pages, result.reason) for result in results] == [(60, ""), (50, ""), (60, ""), (40, "")]
    assert rank.puller.totals.pulled_pages == 60
    assert_holds(rank, make_chain("chain", 60))


# ---------------------------------------------------------------- wrong pages


def test_a_corrupt_page_is_found_by_its_checksum(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """With checksums on, a spoilt page and all after it are discarded; without, nobody would know."""
    for checksums, expected in ((True, 3), (False, 8)):
        peer, rank = start_peer(checksums=checksums), start_rank()
        peer.tell("put chain 8")
        chain = make_chain("chain", 8)
        client = DirectoryClient(peer.address, KEY, "test")
        assert client.ask(wire.Corrupt(chain[3]), wire.Corrupted, deadline_s=5.0).found
        result = rank.puller.pull(prefetch(peer, chain))
        assert result.pages == expected
        assert ("wrong checksum" in result.reason) is checksums
        assert rank.puller.totals.discarded_pages == 8 - expected
        client.close()


def test_a_lost_pin_discards_what_was_read(
    start_peer: Callable[..., Peer],
    start_rank: Callable[..., RankService],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the source cannot say that the pin was held, nothing is published, though every byte came."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 5")
    ask = DirectoryClient.ask

    def unpin_before_confirm(
        self: DirectoryClient, request: Any, reply_type: Any, *, deadline_s: float
    ) -> Any:
        if isinstance(request, wire.Confirm):
            ask(self, request, wire.Confirmed, deadline_s=deadline_s)
        return ask(self, request, reply_type, deadline_s=deadline_s)

    monkeypatch.setattr(DirectoryClient, "ask", unpin_before_confirm)
    result = rank.puller.pull(prefetch(peer, make_chain("chain", 5)))
    assert result.pages == 0 and "pin ran out" in result.reason
    assert rank.store.counts().free == 256 and rank.puller.totals.discarded_pages == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", "other"),
        ("model_revision", "r2"),
        ("dtype", "bfloat16"),
        ("layout", "hnd"),
        ("world_size", 2),
    ],
)
def test_unlike_engines_do_not_exchange_pages(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService], field: str, value: object
) -> None:
    """Another model, revision, dtype, layout or number of ranks is refused by name before a byte moves."""
    peer, rank = start_peer(hello={field: value}), start_rank()
    peer.tell("put chain 2")
    result = rank.puller.pull(prefetch(peer, make_chain("chain", 2)))
    assert result.pages == 0 and "layout_mismatch" in result.reason and field in result.reason


def test_difference_names_every_field_that_matters() -> None:
    """Two hellos that differ in anything that gives pages another meaning are unlike."""
    mine = make_hello("a", 1)
    assert difference(mine, make_hello("b", 2, pool_tokens=1, store_pages=9, context_tokens=3)) == ""
    for field, value in (("page_size_tokens", 64), ("page_bytes", 1), ("rank", 1), ("transport", "virtual")):
        assert field in difference(mine, make_hello("b", 2, **{field: value}))


# ---------------------------------------------------------------- failing peers


def test_a_restarted_source_is_another_engine(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """Pages believed of the old incarnation are void; those of the new one can be pulled on the same port."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 5")
    assert rank.puller.pull(prefetch(peer, make_chain("chain", 5))).pages == 5
    peer.kill()
    again = start_peer(port=int(peer.address.rpartition(":")[2]))
    again.tell("put other 5")
    void = rank.puller.pull(prefetch(peer, make_chain("other", 5)))
    assert void.pages == 0 and "void_incarnation" in void.reason
    assert rank.puller.pull(prefetch(again, make_chain("other", 5))).reason == ""
    assert_holds(rank, make_chain("other", 5))


def test_a_reserve_for_another_incarnation_is_void(start_peer: Callable[..., Peer]) -> None:
    """The source itself refuses who believes to speak to an earlier life, and pins nothing."""
    peer = start_peer()
    client = DirectoryClient(peer.address, KEY, "test")
    request = wire.Reserve("me", "an earlier life", make_chain("chain", 1), 5.0, 0.0)
    with pytest.raises(DirectoryError) as caught:
        client.ask(request, wire.Reserved, deadline_s=5.0)
    assert caught.value.code == "void_incarnation"
    assert json.loads(peer.tell("counts"))["pins"] == 0
    client.close()


def test_a_dead_source_fails_fast_and_is_then_left_alone(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """A killed peer costs milliseconds; after three failures it is not even asked."""
    peer, rank = start_peer(), start_rank()
    peer.tell("put chain 5")
    assert rank.puller.pull(prefetch(peer, make_chain("chain", 5))).pages == 5
    peer.kill()
    for _ in range(3):
        failed = rank.puller.pull(prefetch(peer, make_chain("other", 2)))
        assert failed.pages == 0 and "unreachable" in failed.reason and failed.elapsed_s < 2.0
    assert "left alone" in rank.puller.pull(prefetch(peer, make_chain("other", 2))).reason


def test_a_hanging_source_costs_the_deadline_and_quarantines_what_may_still_land(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A READ that is given up keeps its slots aside until it ends; late bytes never touch a slot in use."""
    peer, rank = start_peer(pages=2048, page_bytes=65536), start_rank(pages=512, page_bytes=65536)
    peer.tell("put chain 400")
    chain = make_chain("chain", 400)
    assert rank.puller.pull(prefetch(peer, chain[:1])).pages == 1
    fill = rank.puller._fill

    def stop_before_the_read(*arguments: Any) -> Any:
        os.kill(peer.process.pid, signal.SIGSTOP)
        return fill(*arguments)

    monkeypatch.setattr(rank.puller, "_fill", stop_before_the_read)
    result = rank.puller.pull(prefetch(peer, chain, deadline_s=0.5))
    assert result.pages == 1 and "not finished" in result.reason and result.elapsed_s < 2.0
    counts = rank.store.counts()
    assert counts.quarantined == 399 and counts.inflight == 0
    monkeypatch.undo()
    # Meanwhile the slots that are left are used for something else.
    mine = make_chain("mine", 100)
    fill_store(rank.store, mine)
    os.kill(peer.process.pid, signal.SIGCONT)
    wait_until(lambda: rank.store.counts().quarantined == 0)
    assert_holds(rank, mine)
    assert rank.puller.pull(prefetch(peer, chain)).reason == ""
    assert_holds(rank, chain)


def test_a_source_killed_during_the_read_frees_its_slots(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a disconnect nothing can land any more: the slots are free again and no page is visible."""
    peer, rank = start_peer(pages=512, page_bytes=65536), start_rank(pages=512, page_bytes=65536)
    peer.tell("put chain 400")
    chain = make_chain("chain", 400)
    assert rank.puller.pull(prefetch(peer, chain[:1])).pages == 1
    fill = rank.puller._fill

    def kill_before_the_read(*arguments: Any) -> Any:
        peer.kill()
        return fill(*arguments)

    monkeypatch.setattr(rank.puller, "_fill", kill_before_the_read)
    result = rank.puller.pull(prefetch(peer, chain, deadline_s=5.0))
    assert result.pages == 1 and result.reason and result.elapsed_s < 5.0
    wait_until(lambda: rank.store.counts().free == 511)


def test_a_wrong_key_or_address_is_only_a_reason(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """Nonsense from the scheduler never raises in the puller."""
    peer, rank = start_peer(), start_rank()
    for source in ("nonsense", "127.0.0.1:1", rank.hello.kv_addresses[0]):
        result = rank.puller.pull(prefetch(peer, make_chain("chain", 2), source_address=source))
        assert result.pages == 0 and result.reason
    own = prefetch(
        peer,
        make_chain("chain", 2),
        source_address=rank.hello.kv_addresses[0],
        source_incarnation=rank.hello.incarnation,
    )
    assert "from itself" in rank.puller.pull(own).reason
    late = rank.puller.pull(prefetch(peer, make_chain("chain", 2), deadline_s=1e-9))
    assert late.pages == 0 and "deadline" in late.reason


def test_two_ranks_pull_each_from_its_own(
    start_peer: Callable[..., Peer], start_rank: Callable[..., RankService]
) -> None:
    """Rank r pulls from rank r only; what the whole engine has is the minimum over its ranks."""
    ports = {name: free_port() for name in ("source-0", "source-1", "mine-0", "mine-1")}
    source = [f"127.0.0.1:{ports[f'source-{rank}']}" for rank in range(2)]
    mine = tuple(f"127.0.0.1:{ports[f'mine-{rank}']}" for rank in range(2))
    peers = [
        start_peer(port=ports[f"source-{r}"], hello={"rank": r, "world_size": 2, "kv_addresses": source})
        for r in range(2)
    ]
    ranks = [start_rank(rank=r, world_size=2, kv_addresses=mine) for r in range(2)]
    peers[0].tell("put chain 9")
    peers[1].tell("put chain 6")
    chain = make_chain("chain", 9)
    results = [rank.puller.pull(prefetch(peer, chain)) for rank, peer in zip(ranks, peers, strict=True)]
    assert [result.pages for result in results] == [9, 6]
    for rank in ranks:
        assert_holds(rank, chain[: min(result.pages for result in results)])
    crossed = ranks[1].puller.pull(prefetch(peers[0], chain))
    assert crossed.pages == 6 and "rank is 1 here and 0 there" in crossed.reason


def test_an_agent_that_cannot_start_says_why() -> None:
    """A transport without tcp is refused by NIXL with a bare code: our error says what to change."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.kv_peer"],
        cwd=REPOSITORY,
        env=os.environ | {"UCX_TLS": "shm"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert process.returncode != 0 and "UCX_TLS='shm' must include tcp" in process.stderr


def test_an_idle_service_costs_nothing(start_rank: Callable[..., RankService]) -> None:
    """Directory, NIXL and their threads use under 1 % of a core when nobody asks."""
    start_rank()
    before, started = sum(os.times()[:2]), time.monotonic()
    time.sleep(3.0)  # the thing measured is what happens in this time
    used_s = sum(os.times()[:2]) - before
    assert used_s < 0.01 * (time.monotonic() - started) + 0.02
