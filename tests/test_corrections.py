"""Online correction: the arithmetic, and what rounds teach the core."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.policies.base import NEUTRAL, Arm, Candidate, Corrections, Placement
from antiphon.scheduler.corrections import CorrectionConfig, Corrector, Term, learn_transfer
from antiphon.scheduler.messages import (
    ClaimLost,
    ClientGone,
    EngineFailed,
    FirstToken,
    Generate,
    RoundFinished,
)
from antiphon.scheduler.observer import Observer, passes_s
from antiphon.scheduler.outcomes import Try
from antiphon.scheduler.states import Round, new_round
from tests.core_helpers import LATENCY, Chosen, arrived, claimed, engine_up, scheduler

CONFIG = CorrectionConfig()
ANY = st.floats(allow_nan=True, allow_infinity=True)
TIMES = st.floats(min_value=1e-6, max_value=1e5)


# ---------------------------------------------------------------- the arithmetic


def test_a_factor_by_hand() -> None:
    """The profile counts as one observation; from the fourth on the factor is told, and it is clipped."""
    term = Term(CONFIG)
    for n in range(1, 4):
        assert not term.learn(1.0, 1.5) and term.factor == 1.0
        assert term.log_ratio == pytest.approx(math.log(1.5) * n / (n + 1))
    assert term.learn(1.0, 1.5) and term.factor == pytest.approx(1.5**0.8)
    for _ in range(60):
        term.learn(1.0, 9.0)
    assert term.evidence == pytest.approx(10.0) and term.factor == CONFIG.clip
    for _ in range(80):
        term.learn(1.0, 0.01)
    assert term.factor == 1 / CONFIG.clip


def test_a_short_time_counts_for_less() -> None:
    """A tenth of `full_s` moves the mean a tenth as far, once there is evidence."""
    terms = [Term(CONFIG, evidence=1 / CONFIG.weight) for _ in range(2)]
    terms[0].learn(CONFIG.full_s, CONFIG.full_s * 1.2)
    terms[1].learn(CONFIG.full_s / 10, CONFIG.full_s / 10 * 1.2)
    assert terms[1].log_ratio == pytest.approx(terms[0].log_ratio / 10)
    assert terms[0].log_ratio == pytest.approx(CONFIG.weight * math.log(1.2))


@pytest.mark.parametrize(
    ("predicted_s", "actual_s"),
    [(0.0009, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (math.inf, 1.0), (1.0, math.inf),
     (math.nan, 1.0), (1.0, math.nan), (1e9, 1.0)],
)  # fmt: skip
def test_what_cannot_be_measured_is_ignored(predicted_s: float, actual_s: float) -> None:
    """Too short, not a number, no time at all."""
    term = Term(CONFIG)
    assert not term.learn(predicted_s, actual_s) and term == Term(CONFIG)
    assert learn_transfer(term, predicted_s, Term(CONFIG), 1.0, actual_s) == (False, False)
    assert term == Term(CONFIG)


def test_calling_an_engine_takes_milliseconds_too() -> None:
    """A prefill so short that this would count is ignored; a transfer's prediction has it."""
    corrector = Corrector(CONFIG)
    for term, samples in ((corrector.prefill, 0), (corrector.decode, 1), (corrector.transfer, 1)):
        term.learn(0.019, 0.021)
        assert term.samples == samples
    corrector.prefill.learn(0.021, 0.023)
    assert corrector.prefill.samples == 1


@settings(max_examples=60)
@given(st.lists(st.tuples(ANY, ANY), max_size=40), st.lists(st.tuples(TIMES, TIMES), max_size=40))
def test_whatever_is_seen_a_factor_stays_within_its_clip(
    wild: list[tuple[float, float]], tame: list[tuple[float, float]]
) -> None:
    """And is a number; nothing raises."""
    one, other = Term(CONFIG), Term(CONFIG)
    for predicted_s, actual_s in wild + tame:
        one.learn(predicted_s, actual_s)
        learn_transfer(one, predicted_s, other, abs(predicted_s), actual_s)
        for term in (one, other):
            assert 1 / CONFIG.clip <= term.factor <= CONFIG.clip
            assert abs(term.log_ratio) <= 2 * math.log(CONFIG.clip) + 1e-9
            assert 1.0 <= term.evidence <= 1 / CONFIG.weight


@settings(max_examples=40)
@given(
    st.floats(min_value=0.55, max_value=1.8),
    st.lists(st.floats(min_value=0.9, max_value=1.1), min_size=30, max_size=60),
)
def test_a_factor_finds_a_noisy_truth(truth: float, noise: list[float]) -> None:
    """30 observations, each off by at most 10 %: it is within 15 %."""
    term = Term(CONFIG)
    for off in noise:
        term.learn(0.2, 0.2 * truth * off)
    assert truth / 1.15 < term.factor < truth * 1.15


def test_one_stall_does_little() -> None:
    """An engine that hung for a minute once is not taken for slow."""
    term = Term(CONFIG)
    for _ in range(20):
        term.learn(0.1, 0.1)
    term.learn(0.1, 60.0)
    assert term.factor < 1.16


@settings(max_examples=30)
@given(st.permutations(list(range(3)) * 12), st.floats(min_value=1.3, max_value=1.9))
def test_only_the_slow_end_of_transfers_is_blamed(order: list[int], slow: float) -> None:
    """Three engines pull from each other; one is slow. The others are cleared by their own transfers."""
    ends = [Term(CONFIG) for _ in range(3)]
    for pair in order:  # 0: engines 0 and 1; 1: 1 and 2; 2: 2 and 0
        one, other = ends[pair], ends[(pair + 1) % 3]
        actual_s = 0.1 * (1.0 if pair == 0 else slow)
        learn_transfer(one, 0.1, other, 0.1, actual_s)
    assert ends[2].factor == pytest.approx(slow, rel=0.12)
    assert max(ends[0].factor, ends[1].factor) < 1.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 0.0},
        {"weight": 1.1},
        {"least_samples": 0},
        {"least_s": 0.0},
        {"full_s": 0.0},
        {"clip": 0.9},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    """By name."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CorrectionConfig(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the core


class Bench:
    """A core with one engine whose prefills take `slow` times as long as its profile says."""

    def __init__(self, slow: float, *, corrections: bool = True) -> None:
        self.core = scheduler(Chosen(), corrections=corrections)
        self.core.receive(engine_up("a", "decode"), 0.0)
        self.slow = slow
        self.now = 0.0
        self.count = 0

    @property
    def learnt(self) -> Corrections:
        return self.core.books.fleet.books["a"].corrections

    def begin(self, *, degraded: bool = False) -> str:
        self.count += 1
        self.now += 1.0
        name = f"r{self.count}"
        self.core.receive(arrived(name, f"s{self.count}", tokens=1000, first=self.count * 2000), self.now)
        event = ClaimLost(name, "away") if degraded else claimed(name, f"s{self.count}")
        self.core.receive(event, self.now)
        return name

    def finish(self, name: str, *, lagged: bool = False) -> None:
        self.now += self.slow * passes_s(LATENCY, 1000, 0, 0)
        self.core.receive(FirstToken(name), self.now)
        self.now += 10.0
        self.core.receive(RoundFinished(name, 2, 0, (), lagged), self.now)
        self.core.check_invariants()


def test_rounds_that_finish_teach_the_core() -> None:
    """From the fourth on; policies see it in the engine's view."""
    bench = Bench(1.5)
    for number in range(8):
        assert (bench.learnt == NEUTRAL) == (number < 4)
        bench.finish(bench.begin())
    view = bench.core.books.cluster(bench.now).engines["a"]
    assert view.corrections == bench.learnt and view.corrections.prefill == pytest.approx(1.5, rel=0.06)
    assert view.corrections.decode == view.corrections.transfer == 1.0


def test_what_teaches_nothing() -> None:
    """Lagged, degraded, retried and cancelled rounds; and a core that was told not to learn."""
    bench = Bench(1.5)
    for _ in range(6):
        bench.finish(bench.begin(), lagged=True)
        bench.finish(bench.begin(degraded=True))
    assert bench.learnt == NEUTRAL
    for _ in range(6):
        name = bench.begin()
        bench.core.receive(EngineFailed(name, "a", "rejected", "full"), bench.now)
        bench.finish(name)
    assert bench.learnt == NEUTRAL
    off = Bench(1.5, corrections=False)
    for _ in range(6):
        off.finish(off.begin())
    assert off.learnt == NEUTRAL


def test_a_retried_round_teaches_nothing_even_if_no_engine_had_begun_with_it() -> None:
    """Its first try ended in a queue."""
    core = Bench(1.0).core
    rounds: dict[str, Round] = {}
    observer = Observer(core.books.fleet, rounds, CONFIG)
    placed = Placement(Arm.LOCAL, "a", "a", "chosen", Candidate(Arm.LOCAL, "a", 0.0, 0.1, 0.0, 0.0))
    for number in range(8):
        name, now = f"r{number}", float(number)
        rounds[name] = round = new_round(arrived(name, tokens=1000), now, now + 60)
        round.tries = [Try(placed)] * (2 if number < 4 else 1)
        observer.observe(claimed(name), [Generate(name, "a", "rid")], now)
        observer.observe(FirstToken(name), [], now + 0.5)
        observer.observe(RoundFinished(name, 2, 0, ()), [], now + 0.6)
        assert (core.books.fleet.books["a"].corrections == NEUTRAL) == (number < 7)


def test_a_decode_that_others_stalled_tells_its_steps() -> None:
    """The prefill of another round in between is taken off; of too much of it nothing is told."""
    for share, told in ((0.15, 8), (0.5, 0)):
        bench = Bench(1.0)
        for _ in range(8):
            first = bench.begin()
            bench.core.receive(FirstToken(first), bench.now)
            stall_s = passes_s(LATENCY, 1000, 0, 0)
            steps = round(stall_s * (1 - share) / share / LATENCY.decode_step_s(1, 1000))
            bench.now += 0.01 - 1.0
            second = bench.begin()
            bench.now += stall_s
            bench.core.receive(FirstToken(second), bench.now)
            bench.core.receive(ClientGone(second), bench.now)
            bench.now += steps * LATENCY.decode_step_s(1, 1000 + steps // 2) - 0.01
            bench.core.receive(RoundFinished(first, steps + 1, 0, ()), bench.now)
        assert bench.core.observer is not None
        term = bench.core.observer._engines["a"].corrector.decode
        assert term.samples == told and term.factor == pytest.approx(1.0, abs=0.02)


def test_another_profile_begins_anew() -> None:
    """What was learnt was about the other one's predictions."""
    bench = Bench(1.5)
    for _ in range(6):
        bench.finish(bench.begin())
    up = bench.core.books.fleet.books["a"].up
    bench.core.receive(
        msgspec.structs.replace(up, latency=msgspec.structs.replace(LATENCY, name="new")), 99.0
    )
    bench.begin()
    assert bench.learnt == NEUTRAL


def test_a_new_incarnation_begins_anew() -> None:
    """What was learnt of the old one is gone; the same one's next hello changes nothing."""
    bench = Bench(1.5)
    for _ in range(6):
        bench.finish(bench.begin())
    learnt = bench.learnt
    bench.core.receive(engine_up("a", "decode"), bench.now)
    assert bench.learnt == learnt != NEUTRAL
    bench.core.receive(engine_up("a", "decode", "two"), bench.now)
    assert bench.learnt == NEUTRAL
    for number in range(5):
        assert (bench.learnt == NEUTRAL) == (number < 4)
        bench.finish(bench.begin())
