"""The short form of `make fuzz`: 10,000 random events through the core; and that faults are found by it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

import pytest
from msgspec import Struct

from antiphon.eval.fuzz import fuzz, main, missing_pairs, plans, required_pairs
from antiphon.eval.fuzz_episode import DRAWN, Episode, Plan
from antiphon.eval.state_digest import state_digest
from antiphon.policies.registry import ORDERINGS, POLICIES
from antiphon.scheduler.core import Scheduler
from antiphon.scheduler.messages import ClientGone, RoundFinished
from antiphon.scheduler.states import Phase, Round

EVERY_POLICY = [DRAWN, *sorted(POLICIES)]


def test_short_run() -> None:
    """Ten thousand events under all policies: no check fails, and every event came in every phase it may."""
    found = fuzz(10_000, 1, EVERY_POLICY, 0, None)
    assert found is not None and found.events >= 10_000
    assert not missing_pairs(found)
    assert found.illegal.total() > 500 and found.explained > 50 and found.digests > 20
    assert set(found.arms) == {"local", "remote_recompute", "remote_pull", "move"}
    assert set(found.outcomes) == {"completed", "refused", "failed", "cancelled"}


def test_all_policies_and_orderings_take_part() -> None:
    """A run as long as the short one has every policy three times, and every ordering."""
    chosen = list(islice(plans(10_000, 1, EVERY_POLICY), 10_000 // 200))
    assert {plan.policy for plan in chosen} == {*POLICIES, DRAWN}
    assert {plan.ordering for plan in chosen} == {*ORDERINGS, DRAWN}
    assert any(plan.twin for plan in chosen)
    assert len({plan.seed for plan in chosen}) == len(chosen)


def test_what_a_run_must_have_tried() -> None:
    """Pairs come from the core's own table: legal and illegal ones are all there are."""
    legal, illegal = required_pairs()
    assert ("decoding", RoundFinished.__name__) in legal and ("queued", RoundFinished.__name__) in illegal
    in_phases = [(phase, event) for phase, event in legal | illegal if phase in {p.value for p in Phase}]
    assert len(in_phases) == (len(Phase) - 1) * 9
    assert not legal & illegal


def test_an_episode_is_its_plan() -> None:
    """Equal plans lead to equal events and commands, in whatever order a process hashes its strings."""
    plan = Plan("5/0", DRAWN, DRAWN, 400)
    one, other = Episode(plan), Episode(plan)
    assert one.run() == other.run()
    assert one.last_events() == other.last_events() and len(one.log) == 30
    assert one.found.commands != Episode(Plan("5/1", DRAWN, DRAWN, 400)).run().commands
    said = set()
    for hash_seed in "12":
        command = [sys.executable, "-m", "antiphon.eval.fuzz", "--events", "1500", "--episodes", "10"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        said.add(re.sub("in .* events/s", "", run.stdout))
    assert len(said) == 1


def test_a_failure_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A core that keeps the slots of rounds whose client left is found; the words shown repeat it."""

    gone = Scheduler._round_events[ClientGone]

    def forget(self: Scheduler, round: Round, event: ClientGone, now: float) -> None:
        if round.phase is Phase.DECODING:
            self.rounds.pop(round.round_id)
        else:
            gone(self, round, event, now)

    monkeypatch.setitem(Scheduler._round_events, ClientGone, forget)
    assert main(["--events", "10000"]) == 1
    first = capsys.readouterr().out
    assert "AssertionError" in first and "ClientGone(" in first
    again = re.search(r"again: python -m antiphon.eval.fuzz (.*)", first)
    assert again is not None and 5 < len(re.findall(r"^  \d+\.\d{4} ", first, re.MULTILINE)) <= 30
    assert main(again[1].split()) == 1
    assert capsys.readouterr().out == first


def test_a_core_that_takes_what_is_illegal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal event that is taken fails the run, and so does one that leaves a trace in the core."""
    monkeypatch.setattr(Round, "check", lambda self, event: None)
    assert fuzz(2_000, 1, [DRAWN], 0, None) is None
    monkeypatch.undo()
    check = Round.check

    def note(self: Round, event: object) -> None:
        self.tried_s += 1e-9
        check(self, event)  # type: ignore[arg-type]

    monkeypatch.setattr(Round, "check", note)
    with pytest.raises(AssertionError, match="an illegal event changed the core"):
        for number in range(40):
            Episode(Plan(f"1/{number}", DRAWN, DRAWN, 400)).run()


class _Deep(Struct):
    names: list[str]


@dataclass(slots=True)
class _Thing:
    """Something of every kind that a core is made of."""

    by_name: dict[str, _Deep] = field(default_factory=dict)
    order: OrderedDict[int, None] = field(default_factory=OrderedDict)
    some: set[str] = field(default_factory=set)
    left_out: int = 0


def test_digest_sees_any_change() -> None:
    """A list deep inside, the order of a dictionary, a set: all count; equal states are equal again."""
    thing = _Thing({"a": _Deep(["x"])}, OrderedDict.fromkeys([1, 2]), {"p", "q"})
    leave_out = frozenset({"left_out"})
    seen = [state_digest(thing, leave_out)]
    thing.by_name["a"].names.append("y")
    seen.append(state_digest(thing, leave_out))
    thing.order.move_to_end(1)
    seen.append(state_digest(thing, leave_out))
    thing.some.add("r")
    seen.append(state_digest(thing, leave_out))
    assert len(set(seen)) == 4
    thing.left_out = 7
    assert state_digest(thing, leave_out) == seen[-1] != state_digest(thing)
    thing.some.remove("r")
    thing.order.move_to_end(2)
    del thing.by_name["a"].names[1]
    assert state_digest(thing, leave_out) == seen[0]
