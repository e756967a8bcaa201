"""Orderings of a prefill queue against tables worked by hand: `edf`, `sjf`, `ampd_reorder`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from antiphon.policies.ampd_reorder import AmpdReorder, AmpdReorderParameters
from antiphon.policies.base import Ordering, RoundView
from antiphon.policies.edf import Edf
from antiphon.policies.registry import make_ordering
from antiphon.policies.sjf import Sjf, SjfParameters
from tests.policy_helpers import a_round, cluster

NOBODY = cluster()


def queued(name: str, arrived_s: float, **changes: float) -> RoundView:
    """A round that waits at 10 s on the core's clock."""
    return a_round(round_id=name, arrived_s=arrived_s, waited_s=10.0 - arrived_s, **changes)


def order_of(ordering: Ordering, *rounds: RoundView) -> list[str]:
    """By `order`; the key must say the same where it alone decides."""
    ordered = [r.round_id for r in ordering.order(rounds, NOBODY)]
    if ordering.window == 1:
        assert [r.round_id for r in sorted(rounds, key=lambda r: (ordering.key(r), r.round_id))] == ordered
    return ordered


def test_edf_serves_the_earliest_deadline() -> None:
    """Deadline = arrival + TTFT target: 9 + 0.5 before 8 + 2 before 9.75 + 0.5; equal ones by id."""
    a, b, c = queued("a", 8.0, slo_ttft_s=2.0), queued("b", 9.0), queued("c", 9.75)
    assert order_of(Edf(), a, b, c) == ["b", "a", "c"]
    d = queued("d", 9.5, slo_ttft_s=0.5)  # 10 s, as a
    assert order_of(Edf(), d, a) == ["a", "d"]


def test_sjf_serves_the_shortest_and_ages() -> None:
    """Key = arrival + 10 x work: short rounds pass a long one only if they arrive soon after it."""
    long = queued("long", 5.0, work_s=0.4)  # 5 + 4 = 9
    early = queued("early", 8.5, work_s=0.04)  # 8.9
    late = queued("late", 8.7, work_s=0.04)  # 9.1
    assert order_of(Sjf(), late, early, long) == ["early", "long", "late"]
    # without patience it is first come first served; with much of it, shortest first
    assert order_of(Sjf(SjfParameters(patience=0.0)), late, early, long) == ["long", "early", "late"]
    assert order_of(Sjf(SjfParameters(patience=100.0)), long, late, early) == ["early", "late", "long"]


def test_sjf_ties_end_at_the_round_id() -> None:
    """Equal keys: 5 + 10 x 0.5 = 7.5 + 10 x 0.25 (exact in binary)."""
    assert order_of(Sjf(), queued("b", 5.0, work_s=0.5), queued("a", 7.5, work_s=0.25)) == ["a", "b"]


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        # in order of arrival: a 0.2 + 1.0 <= 2; b 0.1 + 1.1 > 0.5; c 0.0 + 1.2 > 0.5: one.
        # b, c, a: b 0.1 + 0.1, c 0.2, a 0.2 + 1.2: all three. b, a, c: c late. c, b, a: b 0.3: three as well,
        # but b, c, a comes first in lexicographic order of arrival
        ([("a", 9.8, 1.0, 2.0), ("b", 9.9, 0.1, 0.5), ("c", 10.0, 0.1, 0.5)], ["b", "c", "a"]),
        # all in time in any order: nobody is moved
        ([("a", 9.8, 0.1, 2.0), ("b", 9.9, 0.1, 2.0), ("c", 10.0, 0.1, 2.0)], ["a", "b", "c"]),
        # nobody in time in any order: nobody is moved
        ([("a", 9.8, 1.0, 0.1), ("b", 9.9, 1.0, 0.1), ("c", 10.0, 1.0, 0.1)], ["a", "b", "c"]),
        # a is lost whatever runs first (waited 5 > 1): b and c run before it
        ([("a", 5.0, 1.0, 1.0), ("b", 9.9, 0.4, 1.0), ("c", 10.0, 0.4, 1.0)], ["b", "c", "a"]),
        # at the target it is met: b 0.25 + 0.25 <= 0.5, behind a 0.25 + 0.5 > 0.5 (exact in binary)
        ([("a", 9.5, 0.25, 2.0), ("b", 9.75, 0.25, 0.5)], ["b", "a"]),
        # the fourth is beyond the window: it stays fourth, however urgent
        ([("a", 9.0, 1.0, 9.0), ("b", 9.1, 1.0, 9.0), ("c", 9.2, 1.0, 9.0), ("d", 10.0, 0.1, 0.2)],
         ["a", "b", "c", "d"]),
    ],
)  # fmt: skip
def test_ampd_runs_the_permutation_that_attains_most(
    rounds: Sequence[tuple[str, float, float, float]], expected: list[str]
) -> None:
    """Rounds are (id, arrival, work, TTFT target), in any order; at 10 s, one after the other."""
    views = [queued(name, at, work_s=work, slo_ttft_s=slo) for name, at, work, slo in rounds]
    assert order_of(AmpdReorder(), *views) == expected
    assert order_of(AmpdReorder(), *reversed(views)) == expected


def test_ampd_counts_the_push_to_the_home() -> None:
    """b meets 0.5 s with 0.1 + 0.3 of work before its 0.05 of push, and not with 0.15 of it."""
    a = queued("a", 9.8, work_s=0.2, slo_ttft_s=2.0)
    soon = queued("b", 9.9, work_s=0.1, push_s=0.05, slo_ttft_s=0.5)
    late = queued("b", 9.9, work_s=0.1, push_s=0.15, slo_ttft_s=0.5)
    assert order_of(AmpdReorder(), a, soon) == ["a", "b"]
    assert order_of(AmpdReorder(), a, late) == ["b", "a"]


def test_ampd_postpones_a_round_so_often_and_no_more() -> None:
    """At 3 postponements the long round runs next; of two at the bound the first to have arrived."""
    long = {"work_s": 1.0, "slo_ttft_s": 2.0}
    b = queued("b", 9.9, work_s=0.1)
    assert order_of(AmpdReorder(), queued("a", 9.8, postponed=2, **long), b) == ["b", "a"]
    assert order_of(AmpdReorder(), queued("a", 9.8, postponed=3, **long), b) == ["a", "b"]
    # c is at the bound and runs first; behind it a and b in the order that attains most
    c = queued("c", 9.95, postponed=3, work_s=0.1)
    assert order_of(AmpdReorder(), queued("a", 9.8, postponed=2, **long), b, c) == ["c", "b", "a"]
    assert order_of(AmpdReorder(), queued("a", 9.8, postponed=4, **long), b, c) == ["a", "b", "c"]
    never = AmpdReorder(AmpdReorderParameters(postponements=0))
    assert order_of(never, queued("a", 9.8, **long), b) == ["a", "b"]


def test_ampd_window_one_is_first_come_first_served() -> None:
    """The window is a parameter: with 1 nothing is moved, with 4 the fourth is reached."""
    rounds = [queued(name, 9.0 + at / 10, work_s=1.0, slo_ttft_s=9.0) for at, name in enumerate("abc")]
    rounds.append(queued("d", 10.0, work_s=0.1, slo_ttft_s=0.2))
    assert order_of(AmpdReorder(AmpdReorderParameters(window=1)), *rounds) == ["a", "b", "c", "d"]
    wide = AmpdReorder(AmpdReorderParameters(window=4))
    assert wide.window == 4
    assert order_of(wide, *rounds) == ["d", "a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("sjf", {"patience": -1.0}, "patience must be a number of at least 0, got -1.0"),
        ("sjf", {"patience": float("nan")}, "patience must be a number of at least 0, got nan"),
        ("ampd_reorder", {"window": 7}, "window must be between 1 and 6, got 7"),
        ("ampd_reorder", {"postponements": -1}, "postponements must be at least 0, got -1"),
        ("edf", {"window": 3}, "ordering 'edf' has no parameter 'window': it takes none"),
    ],
)
def test_orderings_refuse_bad_parameters(name: str, parameters: dict[str, float], said: str) -> None:
    """The error names the parameter and the value."""
    with pytest.raises(ValueError, match=said):
        make_ordering(name, parameters)
