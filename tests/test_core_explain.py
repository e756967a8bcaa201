"""`Scheduler.explain`: the answer that `receive` would give, and no trace of having been asked."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from antiphon.policies.base import Arm, ClusterView, Placement, Policy, Reject, RoundView
from antiphon.policies.registry import make_policy
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.messages import Claimed, EngineDown, FirstToken, Holding, RoundFinished, Totals
from tests.core_helpers import LOCAL, MOVING, Bench, Drawn, arrived, claimed, engine_up, scheduler


def traces(core: Scheduler) -> tuple[Any, ...]:
    """Everything that the core remembers, as values."""
    books = core.books
    engines = {
        engine_id: {name: _value(getattr(book, name)) for name in type(book).__slots__}
        for engine_id, book in books.fleet.books.items()
    }
    index = books.residency
    beliefs = repr((index._trees, index._masks, index._below, index._by_bit))
    sessions = repr((books.sessions._sessions, books.sessions.output_tokens))
    rounds = repr((core.rounds, core.ended, core.accepted, core._deadlines))
    return repr(engines), beliefs, sessions, rounds, sorted(books.dirty), repr(books._published)


def _value(kept: Any) -> Any:
    if type(kept).__name__ in ("PrefillQueue", "Returns", "Slacks", "StoreUse"):
        return [getattr(kept, name) for name in type(kept).__slots__]
    return kept


def busy_core(policy: Policy) -> Scheduler:
    """Two sessions with homes and history, a round that prefills, two that wait, others' load."""
    core = scheduler(policy, prefill_in_flight=1)
    for engine_id in ("d0", "d1", "p0"):
        core.receive(engine_up(engine_id, "prefill" if engine_id == "p0" else "decode"), 0.0)
    for number in range(6):
        core.receive(arrived(f"r{number}", f"s{number % 3}", 200 + 16 * number, 1000 * (number % 3)), 1.0)
        others = {"d1": Totals(0.5, 1, 2, 900)}
        core.receive(Claimed(f"r{number}", 1, f"s{number % 3}", 1 + number // 3, others=others), 1.1)
        if core.rounds[f"r{number}"].phase.value == "generating":
            core.receive(FirstToken(f"r{number}"), 1.2)
            core.receive(RoundFinished(f"r{number}", 9, 0, core.rounds[f"r{number}"].arrived.hashes), 1.5)
    return core


def hints() -> dict[str, Claimed | None]:
    """What a claim may tell of round x of session s1, whose prompt is 300 tokens from 1000 on."""
    told = claimed("x", "s1", 3)
    hashes = arrived("x", "s1", 300, 1000).hashes
    believed = (Holding("p0", "one", 160), Holding("d1", "one", 999_999), Holding("d0", "old", 288))
    return {
        "no ledger": None,
        "nothing": told,
        "another home": structs.replace(told, home="d1"),
        "a home that is gone": structs.replace(told, home="d7"),
        "a fork": structs.replace(told, session_id="s1-fork", parent_id="s1", home="d0"),
        "holdings": structs.replace(told, holdings=believed),
        "a tip": structs.replace(told, tip=(hashes[8], Holding("d1", "one", 144))),
        "a tip of another chain": structs.replace(told, tip=(b"?" * 32, Holding("d1", "one", 144))),
        "others": structs.replace(told, home="d1", others={"d0": Totals(9.0, 3, 5, 30_000)}),
    }


@pytest.mark.parametrize("name", hints())
@pytest.mark.parametrize("policy", ["drawn", "ampd", "local", "remote"])
def test_explain_is_what_receive_decides(name: str, policy: str) -> None:
    """The same placement, predictions and reason, whatever the claim tells."""
    core = busy_core(Drawn() if policy == "drawn" else make_policy(policy))
    event, claim = arrived("x", "s1", 300, 1000), hints()[name]
    explained = core.explain(event, claim, 2.0)
    core.receive(event, 2.0)
    if claim is None:
        core._place(core.rounds["x"], 2.0)
    else:
        core.receive(claim, 2.0)
    assert isinstance(explained, Placement)
    assert core.rounds["x"].tries[0].placement == explained


@pytest.mark.parametrize("name", hints())
def test_explain_changes_nothing(name: str) -> None:
    """Books, rounds, sessions and beliefs are to the last value what they were; no command is left behind."""
    core = busy_core(make_policy("ampd"))
    core.books.cluster(2.0)  # views are built when they are asked for: those of this moment
    before, commands = traces(core), core._commands
    views = core.books.fleet.views(2.0)
    for _ in range(3):
        core.explain(arrived("x", "s1", 300, 1000), hints()[name], 2.0)
    assert traces(core) == before
    assert core.books.fleet.views(2.0) is views and core._commands is commands
    core.check_invariants()


def test_explain_sees_what_the_claim_tells() -> None:
    """The policy is shown the claimed home, holdings and load, each over what the core believes."""
    bench = Bench()
    seen: list[tuple[RoundView, ClusterView]] = []

    class Looking:
        def place(self, round: RoundView, cluster: ClusterView) -> Placement | Reject:
            seen.append((round, cluster))
            return Reject("looked", 1.0)

    bench.run("r1", LOCAL)
    bench.core.policy = Looking()
    event = arrived("x", tokens=200)
    claim = structs.replace(
        claimed("x", home="p0"),
        holdings=(Holding("p0", "one", 64), Holding("d0", "one", 32), Holding("d0", "old", 192)),
        others={"p0": Totals(2.0, 1, 3, 500)},
    )
    assert bench.core.explain(event, claim, bench.now) == Reject("looked", 1.0)
    round, cluster = seen[0]
    assert round.home == "p0" and dict(round.history_tokens) == {"d0": 112, "p0": 64}
    assert (cluster.engines["p0"].queue_s, cluster.engines["p0"].batch) == (2.0, 3)
    assert cluster.engines["d0"].sessions == 0 and bench.view("d0").sessions == 1
    bench.core.explain(event, None, bench.now)
    round, cluster = seen[1]
    assert round.home == "d0" and dict(round.history_tokens) == {"d0": 112}
    assert cluster.engines["p0"].queue_s == 0.0
    bench.core.explain(event, structs.replace(claim, session_id="fork", home=None), bench.now)
    round, _ = seen[2]
    assert (round.session_id, round.home) == ("fork", None), "a fork has no home of its own yet"


def test_explain_without_engines_says_why() -> None:
    """A Reject with its reason, not an error."""
    bench = Bench()
    bench.send(EngineDown("d0", "one", "x"))
    bench.send(EngineDown("p0", "one", "x"))
    assert bench.core.explain(arrived("x"), None, bench.now) == Reject("no engine", 1.0)


def test_a_move_is_explained_and_not_begun() -> None:
    """The session stays where it is."""
    bench = Bench()
    bench.run("r1", LOCAL)
    bench.policy.next.append(MOVING)
    explained = bench.core.explain(arrived("x", tokens=200), claimed("x"), bench.now)
    assert isinstance(explained, Placement) and explained.arm is Arm.MOVE and explained.home == "p0"
    assert bench.core.books.sessions.live_home(("t", "s")) == "d0" and not bench.core.rounds
