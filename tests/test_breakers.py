"""Circuit breakers against a model that says for each key what happened to it, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from antiphon.scheduler.breakers import CLOSED, HALF_OPEN, OPEN, PROBING, Breakers

LIMIT, OPEN_S, MOST_S = 3, 1.0, 6.0
KEYS, ROUNDS = ("a", "b"), ("r1", "r2", "r3")
keys, rounds = st.sampled_from(KEYS), st.sampled_from(ROUNDS)


class Model:
    """One key: what a reader of the module's first lines would expect."""

    def __init__(self) -> None:
        self.failures, self.pauses, self.until_s, self.probe = 0, 0, 0.0, ""

    def state(self, now: float) -> str:
        if not self.pauses:
            return CLOSED
        if self.probe:
            return PROBING
        return HALF_OPEN if now >= self.until_s else OPEN

    def open(self, now: float) -> None:
        self.until_s = now + min(MOST_S, (1.0, 2.0, 4.0, 8.0)[min(self.pauses, 3)])
        self.failures, self.probe = 0, ""
        self.pauses += 1


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breakers: Breakers[str] = Breakers(LIMIT, OPEN_S, MOST_S)
        self.models = {key: Model() for key in KEYS}
        self.opened = 0

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 2.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=keys, who=rounds, at_once=st.sampled_from([False, False, False, True]))
    def it_fails(self, key: str, who: str, at_once: bool) -> None:
        model = self.models[key]
        before = model.state(self.now)
        if before == CLOSED:
            model.failures += 1
            opens = at_once or model.failures == LIMIT
        else:
            opens = before == PROBING and model.probe == who
        if opens:
            model.open(self.now)
            self.opened += 1
        self.breakers.failed(key, who, self.now, at_once=at_once)

    @rule(key=keys)
    def it_succeeds(self, key: str) -> None:
        self.models[key] = Model()
        self.breakers.succeeded(key)

    @rule(key=keys, who=rounds)
    def it_is_tried(self, key: str, who: str) -> None:
        if self.models[key].state(self.now) == HALF_OPEN:
            self.models[key].probe = who
        self.breakers.trying(key, who, self.now)

    @rule(who=rounds)
    def a_round_leaves(self, who: str) -> None:
        for model in self.models.values():
            if model.probe == who:
                model.probe = ""
        self.breakers.left(who)

    @invariant()
    def as_the_model_says(self) -> None:
        states = {key: model.state(self.now) for key, model in self.models.items()}
        assert {key: self.breakers.state(key, self.now) for key in KEYS} == states
        refused = {key for key, state in states.items() if state in (OPEN, PROBING)}
        assert self.breakers.refused(self.now) == refused
        assert {key for key in KEYS if not self.breakers.allows(key, self.now)} == refused
        not_closed = {key: state for key, state in states.items() if state != CLOSED}
        assert self.breakers.not_closed_now(self.now) == not_closed
        assert self.breakers.not_closed == len(not_closed) and self.breakers.opened == self.opened
        self.breakers.check(ROUNDS)


TestBreakers = Machine.TestCase
TestBreakers.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_of_a_pair_both_names_count() -> None:
    """Whatever was held against an engine's links is forgotten with it."""
    links: Breakers[tuple[str, str]] = Breakers(1, OPEN_S, MOST_S)
    for pair in (("a", "b"), ("c", "a"), ("b", "c")):
        links.failed(pair, "r", 0.0)
    links.forget_if_about("a")
    assert links.refused(0.0) == {("b", "c")} and links.not_closed == 1


def test_a_forgotten_probe_is_found() -> None:
    """The invariant that the core checks after every event of a test does fail."""
    breakers: Breakers[str] = Breakers(1, OPEN_S, MOST_S)
    breakers.failed("a", "r1", 0.0)
    breakers.trying("a", "r2", 1.0)
    breakers.check({"r2"})
    with pytest.raises(AssertionError, match="dead probe"):
        breakers.check({"r1"})
