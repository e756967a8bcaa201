"""Pulls that share links in simulated time: worked by hand, and nothing lost or doubled."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest

from antiphon.engines.chains import Branch, Chain
from antiphon.engines.closed_form import ClosedFormEngine
from antiphon.engines.cluster import EngineGroup, EngineSpec
from antiphon.engines.links import Network, Pull
from antiphon.engines.transfer import SEGMENT_BYTES
from antiphon.policies.latency import DecodeCost, LatencyModel, PrefillCost, TransferCost

PAGE = 16
TOKEN_BYTES = 1 << 16
PAGE_BYTES = PAGE * TOKEN_BYTES
SEGMENT_PAGES = SEGMENT_BYTES // PAGE_BYTES
LINK = 1000 * PAGE_BYTES
"""A page takes a millisecond."""
ROUND_TRIP_S = 0.002
FOREVER = float("inf")


def make_engine(name: str, *, link: float = LINK, store_pages: int = 10_000) -> ClosedFormEngine:
    latency = LatencyModel(
        "links",
        "made up",
        PrefillCost(0.01, 0.0001),
        DecodeCost(0.01),
        TransferCost(ROUND_TRIP_S, LINK, TOKEN_BYTES),
    )
    group = EngineGroup(1, "decode", "", PAGE * 1000, PAGE * store_pages, link)
    return ClosedFormEngine(EngineSpec(name, group, latency), PAGE)


def run(network: Network, *starts: tuple[float, Callable[[float], object]]) -> list[tuple[float, Pull]]:
    """Do all of `starts` at their times, and the network's events between; what ended, and when."""
    left = deque(sorted(starts, key=lambda start: start[0]))
    ended: list[tuple[float, Pull]] = []
    while left or network.next_event_s < FOREVER:
        if left and left[0][0] < network.next_event_s:
            now, start = left.popleft()
            start(now)
        else:
            now = network.next_event_s
            ended += [(now, pull) for pull in network.advance(now)]
    return ended


def held(engine: ClosedFormEngine, number: int, pages: int) -> Branch:
    """A branch whose first `pages` the engine's store has."""
    branch = Branch(number)
    assert engine.store.extend(branch, pages, 0) == pages
    return branch


def starter(network: Network, pull: Pull) -> tuple[float, Callable[[float], object]]:
    return pull.tag, lambda now: network.start(pull, now)


def test_one_pull_takes_a_round_trip_and_its_bytes() -> None:
    """Only what the puller lacks and the source has is moved, at the link's speed."""
    a, b, network = make_engine("a"), make_engine("b"), Network(PAGE)
    branch = held(a, 0, 80)
    b.store.extend(branch, 30, 0)
    pull = Pull(1.0, b, a, Chain(branch, 100), 90)
    ((now, ended),) = run(network, starter(network, pull))
    assert ended is pull
    assert now == pytest.approx(1.0 + ROUND_TRIP_S + 0.050, abs=1e-9)
    assert (pull.pulled_pages, pull.pulled_bytes, pull.have_pages) == (50, 50 * PAGE_BYTES, 80)
    assert pull.reason == "the source has only 50 of 60 pages"
    assert b.store.match(Chain(branch, 100)) == 80
    assert b.store.locked_pages == 0


def test_nothing_to_pull_takes_a_round_trip() -> None:
    """All there already: the answer comes after the directory's round trip."""
    a, b, network = make_engine("a"), make_engine("b"), Network(PAGE)
    branch = held(b, 0, 40)
    pull = Pull(0.0, b, a, Chain(branch, 40), 40)
    assert run(network, starter(network, pull)) == [(ROUND_TRIP_S, pull)]
    assert (pull.pulled_pages, pull.have_pages, pull.reason) == (0, 40, "")


def test_two_pulls_from_one_source_share_its_link() -> None:
    """Both at half speed while both run, the longer one at full speed afterwards."""
    a, b, c = make_engine("a"), make_engine("b"), make_engine("c")
    network = Network(PAGE)
    short, long = held(a, 0, 100), held(a, 1, 300)
    first = Pull(0.0, b, a, Chain(long, 300), 300)
    second = Pull(0.1, c, a, Chain(short, 100), 100)
    ended = run(network, starter(network, first), starter(network, second))
    # Alone until 0.102; then 100 pages each take 0.2 s; then 100 pages of the first alone.
    assert [pull for _, pull in ended] == [second, first]
    assert [now for now, _ in ended] == pytest.approx([0.302, 0.402], abs=1e-9)


def test_the_worse_end_sets_the_rate() -> None:
    """A slow puller does not use up its source's link; the source's other way is free."""
    a, slow, c = make_engine("a"), make_engine("slow", link=LINK / 4), make_engine("c")
    network = Network(PAGE)
    out, back = held(a, 0, 100), held(slow, 1, 100)
    ended = run(
        network,
        starter(network, Pull(0.0, slow, a, Chain(out, 100), 100)),
        starter(network, Pull(0.0, c, slow, Chain(back, 100), 100)),
    )
    assert [now for now, _ in ended] == pytest.approx([0.402, 0.402], abs=1e-9)


def test_deadline_keeps_whole_segments() -> None:
    """At the deadline what is not a whole segment is dropped; the pages in front of it stay."""
    a, b, network = make_engine("a"), make_engine("b"), Network(PAGE)
    branch = held(a, 0, 5 * SEGMENT_PAGES)
    seconds = ROUND_TRIP_S + 2.5 * SEGMENT_PAGES / 1000
    pull = Pull(0.0, b, a, Chain(branch, 5 * SEGMENT_PAGES), 5 * SEGMENT_PAGES, seconds)
    assert run(network, starter(network, pull)) == [(seconds, pull)]
    assert (pull.pulled_pages, pull.have_pages) == (2 * SEGMENT_PAGES, 2 * SEGMENT_PAGES)
    assert pull.reason == "the deadline passed"


def test_a_deadline_within_the_round_trip() -> None:
    """A pull that has no time to start ends in time, with nothing."""
    a, b, network = make_engine("a"), make_engine("b"), Network(PAGE)
    pull = Pull(0.0, b, a, Chain(held(a, 0, 10), 10), 10, ROUND_TRIP_S / 2)
    assert run(network, starter(network, pull)) == [(ROUND_TRIP_S / 2, pull)]
    assert (pull.pulled_pages, pull.reason) == (0, "the deadline passed")


def test_a_page_that_two_want_is_moved_once() -> None:
    """The second pull waits for the first, then brings the rest without another round trip."""
    a, b, network = make_engine("a"), make_engine("b"), Network(PAGE)
    branch = held(a, 0, 150)
    first = Pull(0.0, b, a, Chain(branch, 100), 100)
    second = Pull(0.01, b, a, Chain(branch, 150), 150)
    ended = run(network, starter(network, first), starter(network, second))
    assert [pull for _, pull in ended] == [first, second]
    assert [now for now, _ in ended] == pytest.approx([0.102, 0.152], abs=1e-9)
    assert (first.pulled_pages, second.pulled_pages, second.have_pages) == (100, 50, 150)


def test_the_next_in_line_takes_over() -> None:
    """When the pull that others wait for is cancelled, the next one brings the page."""
    a, b, network = make_engine("a"), make_engine("b"), Network(PAGE)
    branch = held(a, 0, 50)
    pulls = [Pull(0.0, b, a, Chain(branch, 50), 50) for _ in range(3)]
    cancel = (0.012, lambda now: network.cancel(pulls[0], now))
    ended = run(network, *(starter(network, pull) for pull in pulls), cancel)
    assert [pull for _, pull in ended] == [pulls[1], pulls[2]]
    assert [now for now, _ in ended] == pytest.approx([0.062, 0.062], abs=1e-9)
    assert [pull.pulled_pages for pull in pulls] == [0, 50, 0]
    assert b.store.locked_pages == 0


def test_engine_gone_ends_its_pulls() -> None:
    """Pulls from and to a dead engine end at once with whole segments; the others get its share."""
    a, b, c = make_engine("a"), make_engine("b"), make_engine("c")
    network = Network(PAGE)
    mine, other = held(a, 0, 4 * SEGMENT_PAGES), held(c, 1, 4 * SEGMENT_PAGES)
    both = 4 * SEGMENT_PAGES / 1000
    dying = Pull(0.0, b, a, Chain(mine, 999), 999)
    living = Pull(0.0, b, c, Chain(other, 4 * SEGMENT_PAGES), 4 * SEGMENT_PAGES)
    late = Pull(both, b, a, Chain(mine, 999), 999)
    gone: list[Pull] = []
    death = (ROUND_TRIP_S + both, lambda now: gone.extend(network.engine_gone(a, now)))
    ended = run(network, starter(network, dying), starter(network, living), death)
    assert gone == [dying]
    assert (dying.pulled_pages, dying.reason) == (2 * SEGMENT_PAGES, "a is gone")
    assert [now for now, _ in ended] == pytest.approx([ROUND_TRIP_S + both * 1.5], abs=1e-9)
    ((_, ended_late),) = run(network, starter(network, late))
    assert (ended_late.pulled_pages, ended_late.reason) == (0, "a is gone")


def test_store_too_small() -> None:
    """What the puller's store has no room for is not kept, and what it had of the chain is not evicted."""
    a, b, network = make_engine("a"), make_engine("b", store_pages=50), Network(PAGE)
    branch = held(a, 0, 80)
    b.store.extend(branch, 20, 0)
    held(b, 1, 30)
    pull = Pull(0.0, b, a, Chain(branch, 80), 80)
    run(network, starter(network, pull))
    assert (pull.pulled_pages, pull.have_pages) == (30, 50)
    assert pull.reason == "the store has room for only 30 of 60 pages"


def test_being_read_counts_as_use() -> None:
    """The source evicts what was just pulled from it after what nobody asked for."""
    a, b, network = make_engine("a", store_pages=60), make_engine("b"), Network(PAGE)
    asked, other = held(a, 0, 30), held(a, 1, 30)
    run(network, starter(network, Pull(0.0, b, a, Chain(asked, 30), 30)))
    held(a, 2, 20)
    assert [a.store.match(Chain(branch, 30)) for branch in (asked, other)] == [30, 10]


@pytest.mark.parametrize("seed", range(8))
def test_bytes_are_conserved(seed: int) -> None:
    """However many pulls share links, none beats its link and every byte asked for arrives once."""
    rng = random.Random(seed)
    engines = [make_engine(f"e{n}", link=LINK * rng.choice([1, 2])) for n in range(4)]
    network = Network(PAGE)
    starts, pulls = [], []
    for number in range(60):
        source, puller = rng.sample(engines, 2)
        branch = held(source, number, rng.randrange(1, 150))
        pull = Pull(rng.random(), puller, source, Chain(branch, 150), 150)
        pulls.append(pull)
        starts.append(starter(network, pull))
    ended = run(network, *starts)
    assert sorted(map(id, pulls)) == sorted(id(pull) for _, pull in ended)
    for engine in engines:
        engine.check_invariants()
        for end in ("puller", "source"):
            mine = [(now, pull) for now, pull in ended if getattr(pull, end) is engine]
            seconds = max(now for now, _ in mine) - min(pull.started_s for _, pull in mine)
            assert sum(pull.pulled_bytes for _, pull in mine) <= seconds * engine.spec.group.link_bytes_per_s
    for pull in pulls:
        assert pull.pulled_pages == pull.have_pages == pull.source.store.match(pull.chain)
        assert pull.puller.store.match(pull.chain) == pull.have_pages
