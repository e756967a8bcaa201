"""A prefetch that fails says whether the way from its source is to blame: each reason there is, once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from antiphon.engines import wire
from antiphon.engines.base import Engine, EngineRecord
from antiphon.engines.directory import DirectoryLimits, DirectoryServer
from antiphon.engines.faults import Faults
from antiphon.engines.http import HttpEngine
from antiphon.engines.prompt import Prompt
from antiphon.engines.virtual_directory import VirtualAgent, VirtualBackend
from antiphon.engines.virtual_kv import RIGHT_CONTENT, VirtualStore
from antiphon.policies.latency import load_latency_model
from antiphon.scheduler.engine_calls import CallDeadlines, EngineCalls
from antiphon.scheduler.messages import Prefetch, PrefetchDone
from antiphon.scheduler.rounds import LiveRound, RoundRequest
from tests.kv_peer import KEY, free_port, make_chain, make_hello

CHAIN = make_chain("chain", 8)
QUICK_S = 1.0
"""For what takes all of its time; a busy machine must get as far as that."""


class Side:
    """The directory of one virtual engine, with its store."""

    def __init__(
        self, pages: int = 64, key: bytes = KEY, limits: DirectoryLimits | None = None, **hello: Any
    ) -> None:
        self.store = VirtualStore(pages)
        latency = load_latency_model("qwen3-32b-h200-tp4")
        self.hello = make_hello("side", free_port(), **({"transport": "virtual", "page_bytes": 64} | hello))
        agent = VirtualAgent(self.hello, self.store, latency, Faults(), speed=1.0)
        self.backend = VirtualBackend(self.hello, self.store, agent, Faults(), key, fault_injection=True)
        self.server = DirectoryServer(self.backend, key, limits=limits)
        self.server.start()

    def put(self, chain: tuple[bytes, ...]) -> None:
        slots = self.store.allocate(len(chain))
        for slot in slots:
            self.store.content.view(slot)[:] = RIGHT_CONTENT
        self.store.publish(b"", chain, slots)

    def pull(self, address: str, incarnation: str, deadline_s: float = 5.0) -> wire.Prefetched:
        return self.backend.prefetch(wire.Prefetch(address, incarnation, b"", CHAIN, deadline_s))

    def pull_from(self, source: Side, deadline_s: float = 5.0) -> wire.Prefetched:
        return self.pull(source.server.address, source.hello.incarnation, deadline_s)

    def close(self) -> None:
        self.backend.close()
        self.server.close()
        self.store.check_invariants()


Start = Callable[..., Side]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def started(*, holds: int = len(CHAIN), **options: Any) -> Side:
            side = Side(**options)
            stack.callback(side.close)
            side.put(CHAIN[:holds])
            return side

        yield started


@pytest.fixture
def silent() -> Iterator[str]:
    """Who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def nobody() -> str:
    return f"127.0.0.1:{free_port()}"


# ---------------------------------------------------------------- the way, or the source


def test_a_source_that_cannot_be_reached_or_says_nothing(start: Start, silent: str) -> None:
    unreachable = start(holds=0).pull(nobody(), "x")
    assert unreachable.blame and "unreachable" in unreachable.reason
    hung = start(holds=0).pull(silent, "x", QUICK_S)
    assert hung.blame and "deadline" in hung.reason and hung.elapsed_s < 5.0


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"kind": "cut"}, "not finished"), ({"kind": "cut", "seconds": 0.01}, "disconnected")],
)
def test_a_link_that_is_silent_or_resets(start: Start, fault: dict[str, Any], words: str) -> None:
    puller = start(holds=0)
    puller.backend.link_fault(wire.LinkFault(**fault))
    result = puller.pull_from(start(), QUICK_S)
    assert result.blame and words in result.reason and result.pulled_pages == 0


def test_torn_pages_count_even_if_others_came(start: Start) -> None:
    puller, source = start(holds=0), start()
    puller.backend.link_fault(wire.LinkFault("corrupt", count=1))
    none = puller.pull_from(source)
    assert none.blame and "checksum" in none.reason
    with_some, torn = start(holds=0), start()
    torn.store.corrupt(CHAIN[3])
    some = with_some.pull_from(torn)
    assert (some.pulled_pages, some.blame) == (3, True) and "checksum" in some.reason


def test_a_stranger_or_other_pages_never_come_by_this_way(start: Start) -> None:
    stranger = start(holds=0).pull_from(start(key=b"the-key-of-another-fleet-0123456789"))
    assert stranger.blame and "denied" in stranger.reason
    unlike = start(holds=0).pull_from(start(dtype="int8"))
    assert unlike.blame and "layout_mismatch" in unlike.reason


def test_a_source_that_was_left_alone_stays_blamed(start: Start) -> None:
    """So that the scheduler does not send rounds that way before the puller tries it again."""
    puller, gone = start(holds=0), nobody()
    for _ in range(3):
        puller.pull(gone, "x")
    result = puller.pull(gone, "x")
    assert result.blame and "left alone" in result.reason


# ---------------------------------------------------------------- neither


def test_what_the_source_has_and_who_it_is_blames_nobody(start: Start) -> None:
    puller, source = start(holds=0), start(holds=5)
    short = puller.pull_from(source)
    assert (short.pages, short.blame) == (5, False) and "the source has only" in short.reason
    later_life = puller.pull(source.server.address, "an earlier life")
    assert not later_life.blame and "void_incarnation" in later_life.reason
    busy = start(holds=0).pull_from(start(limits=DirectoryLimits(max_connections=0)))
    assert not busy.blame and "busy" in busy.reason


def test_the_pullers_own_room_and_time_blame_nobody(start: Start) -> None:
    full = start(holds=0, pages=4).pull_from(start())
    assert not full.blame and "our store has room for only 4" in full.reason
    itself = start(holds=0)
    own = itself.pull_from(itself)
    assert not own.blame and "pull from itself" in own.reason
    nonsense = start(holds=0).pull("no address", "x")
    assert not nonsense.blame and nonsense.reason


def test_everything_that_comes_has_no_blame(start: Start) -> None:
    result = start(holds=0).pull_from(start())
    assert (result.pages, result.reason, result.blame) == (len(CHAIN), "", False)


# ---------------------------------------------------------------- on the wire, and at the scheduler


def test_engines_and_schedulers_of_before_understand_each_other() -> None:
    """What blames nobody has no new field; a field that is not there blames nobody."""
    plain = wire.encode(wire.Prefetched(1, 1, 4096, 0.1, "the source has only 1 of 2 pages"))
    assert b"blame" not in plain
    assert wire.decode(plain[4:]).blame is False
    told = wire.encode(wire.Prefetched(0, 0, 0, 0.1, "broken", True))
    assert wire.decode(told[4:]).blame is True


def told(
    addresses: tuple[str, ...], sources: tuple[str, ...], incarnation: str, deadline_s: float = QUICK_S
) -> PrefetchDone:
    """What the core is told of a prefetch by an engine whose ranks are at these addresses."""

    async def ask() -> PrefetchDone:
        engines: dict[str, Engine] = {
            name: HttpEngine(EngineRecord(name, "http://127.0.0.1:9", "decode", incarnation, kv), KEY)
            for name, kv in (("puller", addresses), ("source", sources))
        }
        body = {"model": "tiny"}
        request = RoundRequest("r", "s", "t", "/v1/completions", Prompt([1] * 128), body, 8, 1.0, 1.0)
        live: Any = LiveRound(request, None, CHAIN, 16)  # type: ignore[arg-type]
        try:
            return await EngineCalls(engines, CallDeadlines(prefetch_grace_s=0.1)).prefetch(
                live, Prefetch("r", "puller", "source", incarnation, 0, len(CHAIN), deadline_s)
            )
        finally:
            for engine in engines.values():
                await engine.close()

    return asyncio.run(ask())


def test_one_rank_that_blames_the_way_is_enough(start: Start) -> None:
    source, puller = start(), start(holds=0)
    ranks = (puller.server.address, start(holds=0).server.address)
    done = told(ranks, (source.server.address, nobody()), source.hello.incarnation, 10.0)
    assert done.link_failed and done.pages == 0 and "unreachable" in done.reason


def test_a_puller_that_gives_no_answer_is_the_engines_matter(start: Start, silent: str) -> None:
    source = start()
    for puller in (nobody(), silent):
        done = told((puller,), (source.server.address,), source.hello.incarnation)
        assert (done.pages, done.link_failed) == (0, False) and done.reason
    no_linker = told((), (source.server.address,), source.hello.incarnation)
    assert not no_linker.link_failed and "no KV linker" in no_linker.reason
