"""The queue of a prefill engine: what the core asks of an ordering, and how it keeps what waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.policies.base import Arm, ClusterView, RoundView
from antiphon.scheduler.messages import ClientGone, EngineDown, Prefill, PrefillDone
from antiphon.scheduler.tallies import PrefillQueue
from tests.core_helpers import RECOMPUTE, Bench, engine_up


@dataclass
class Longest:
    """Keeps a queue by prompt length, shortest first, and starts the longest of its window."""

    window: int
    keyed: list[str] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)

    def key(self, round: RoundView) -> float:
        self.keyed.append(round.round_id)
        return float(round.prompt_tokens)

    def order(self, queue: Sequence[RoundView], cluster: ClusterView) -> Sequence[RoundView]:
        assert all(round.work_s == 0.1 and round.home is not None for round in queue)
        self.asked.append([round.round_id for round in queue])
        return sorted(queue, key=lambda round: -round.prompt_tokens)


def waiting_bench(ordering: Longest, *tokens: int) -> Bench:
    """One round, `busy`, prefills at p0; the others, named by their tokens, wait there."""
    bench = Bench(ordering, prefill_in_flight=1)
    bench.place("busy", RECOMPUTE, session="busy", first=90_000)
    for number, count in enumerate(tokens):
        started = bench.place(str(count), RECOMPUTE, tokens=count, session=str(count), first=1000 * number)
        assert started == []
    return bench


def queue(bench: Bench) -> list[str]:
    return list(bench.core.books.fleet.books["p0"].queue)


def next_started(bench: Bench, done: str) -> str:
    (started,) = [c for c in bench.send(PrefillDone(done, 0)) if isinstance(c, Prefill)]
    return started.round_id


def test_a_queue_is_sorted_by_key_and_asked_about_its_window_only() -> None:
    """Of four that wait the ordering sees the first two by key; the key is computed once a round."""
    ordering = Longest(2)
    bench = waiting_bench(ordering, 300, 100, 400, 200)
    assert queue(bench) == ["100", "200", "300", "400"]
    assert next_started(bench, "busy") == "200"
    assert ordering.asked == [["100", "200"]] and queue(bench) == ["100", "300", "400"]
    assert next_started(bench, "200") == "300"
    assert ordering.asked[1:] == [["100", "300"]]
    assert ordering.keyed == ["300", "100", "400", "200"], "`busy` found a free place: no key was needed"


def test_who_was_passed_is_counted() -> None:
    """`postponed`: how often one behind it was started first; those behind the chosen one were not passed."""
    bench = waiting_bench(Longest(2), 100, 200, 300, 400)
    next_started(bench, "busy")
    next_started(bench, "200")
    postponed = {round_id: bench.core.rounds[round_id].postponed for round_id in queue(bench)}
    assert postponed == {"100": 2, "400": 0}
    assert bench.core.rounds["300"].postponed == 0
    view = bench.core.books.view(bench.core.rounds["100"], bench.now)
    assert view.postponed == 2


@pytest.mark.parametrize("window", [1, 4])
def test_an_ordering_is_asked_only_when_there_is_a_choice(window: int) -> None:
    """Window 1, or a single round that waits: the key alone decides."""
    ordering = Longest(window)
    bench = waiting_bench(ordering, *([300, 100] if window == 1 else [300]))
    assert next_started(bench, "busy") == ("100" if window == 1 else "300")
    assert ordering.asked == []


def test_equal_keys_are_served_by_round_id() -> None:
    """The order is total: ties end at the round id."""
    bench = Bench(Longest(1), prefill_in_flight=1)
    for name in ("busy", "c", "a", "b"):
        bench.place(name, RECOMPUTE, session=name, first=1000 * ord(name[0]))
    assert queue(bench) == ["a", "b", "c"]


def test_a_round_that_is_released_leaves_its_queue() -> None:
    """The client goes, or the home dies: it waits there no more; its next try queues anew, with a new key."""
    ordering = Longest(2)
    bench = waiting_bench(ordering, 100, 200, 300)
    bench.send(ClientGone("200"))
    assert queue(bench) == ["100", "300"]
    bench.send(engine_up("d1", "decode"))
    bench.policy.next += [(Arm.REMOTE_RECOMPUTE, "d1", "p0")] * 2 + [(Arm.LOCAL, "d1", "d1")]
    bench.send(EngineDown("d0", "one", "killed"))
    # the first took the free place, the next waits anew, the last is at d1
    assert ordering.keyed == ["100", "200", "300", ordering.keyed[-1]]
    assert queue(bench) == [ordering.keyed[-1]] and bench.core.books.fleet.books["d1"].decode.keys() == {
        "busy", "100", "300",
    }  # fmt: skip


@given(st.data())
def test_a_queue_against_a_sorted_list(data: st.DataObject) -> None:
    """Add, take from the front, take from anywhere: always (key, id) in order, nothing lost or kept."""
    kept, naive = PrefillQueue(), list[tuple[float, str]]()
    for number in range(data.draw(st.integers(0, 60))):
        what = data.draw(st.integers(0, 4))
        if what < 2 or not naive:
            entry = float(data.draw(st.integers(0, 9))), str(number)
            kept.add(*entry)
            naive = sorted([*naive, entry])
        elif what == 2:
            assert kept.head(1) == [naive[0][1]] and kept.remove(*naive.pop(0))
        else:
            entry = naive.pop(data.draw(st.integers(0, len(naive) - 1)))
            assert kept.remove(*entry)
            assert not kept.remove(*entry)
        assert list(kept) == [name for _, name in naive] and len(kept) == len(naive)
        assert kept.head(3) == [name for _, name in naive[:3]]


def test_a_long_queue_is_served_without_moving_it() -> None:
    """Taking the first of 20,000, or of the first few, leaves the rest of the list where it is."""
    kept = PrefillQueue()
    for number in range(20_000):
        kept.add(float(number), str(number))
    before = kept._waiting
    for number in range(1, 9_000, 3):
        for taken in (number, number - 1, number + 1):  # the second, then the first, then the next
            assert kept.remove(float(taken), str(taken))
    assert kept._waiting is before and len(before) == 20_000
    assert kept.head(2) == ["9000", "9001"] and len(kept) == 11_000
