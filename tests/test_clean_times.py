"""Which times of an engine are clean: prompts, decodes and transfers, scene by scene."""

from __future__ import annotations

import msgspec
import pytest

from antiphon.policies.base import Corrections
from antiphon.scheduler.clean_times import SETTLE_S, EngineTimes, Prefilled, flow_begins, flow_over
from antiphon.scheduler.corrections import CorrectionConfig, Corrector
from antiphon.scheduler.fleet import EngineBook
from antiphon.scheduler.messages import Totals
from antiphon.scheduler.observer import passes_s
from tests.core_helpers import LATENCY, engine_up

CONFIG = CorrectionConfig()


def times(*, chunk: int = 512, interval: int = 2) -> EngineTimes:
    up = msgspec.structs.replace(engine_up("e", "decode"), chunk_tokens=chunk, decode_interval=interval)
    return EngineTimes(EngineBook(up, LATENCY, set()), LATENCY, Corrector(CONFIG))


def own_s(engine: EngineTimes, round_id: str, now: float) -> float | None:
    found = engine.prompt_over(round_id, now)
    return None if found is None else pytest.approx(found.seconds)  # type: ignore[return-value]


def test_a_prompt_alone_tells_its_time() -> None:
    """From when it came to when it was done."""
    engine = times()
    engine.prompt_comes("a", 1.0, 100, 0)
    assert own_s(engine, "a", 1.5) == 0.5
    assert engine.prompt_over("a", 2.0) is None, "it is over already"


def test_the_next_in_line_begins_where_the_one_before_ends() -> None:
    """It came after that one had surely begun, and that one was a single pass: they never shared one."""
    engine = times()
    engine.prompt_comes("a", 1.0, 100, 0)
    engine.prompt_comes("b", 1.0 + 2 * SETTLE_S, 100, 0)
    assert own_s(engine, "a", 1.5) == 0.5
    engine.prompt_comes("c", 1.5, 100, 0)
    assert own_s(engine, "b", 1.75) == 0.25
    assert own_s(engine, "c", 2.75) == 1.0


def test_prompts_that_may_share_a_pass_tell_nothing() -> None:
    """They came together; or the first has chunks left, whose last one has room for the second."""
    engine = times()
    engine.prompt_comes("a", 1.0, 100, 0)
    engine.prompt_comes("b", 1.001, 100, 0)
    assert own_s(engine, "a", 1.5) is None and own_s(engine, "b", 1.5) is None
    engine.prompt_comes("a", 2.0, 600, 0)
    engine.prompt_comes("b", 2.5, 100, 0)
    assert own_s(engine, "a", 3.0) is None and own_s(engine, "b", 3.1) is None
    engine.prompt_comes("a", 4.0, 100, 0)
    for number, name in enumerate("bc"):
        engine.prompt_comes(name, 4.1 + number / 10, 100, 0)
    assert own_s(engine, "a", 4.5) == 0.5
    assert own_s(engine, "b", 5.0) is None and own_s(engine, "c", 5.0) is None


def test_prompts_that_find_the_engine_just_idle_may_share_a_pass() -> None:
    """Two end in one pass, and at that moment two others are sent: neither is under way before the other."""
    engine = times()
    engine.prompt_comes("a", 1.0, 600, 0)
    engine.prompt_comes("b", 1.2, 100, 0)
    engine.prompt_over("a", 1.5)
    engine.prompt_comes("c", 1.5, 100, 0)
    engine.prompt_over("b", 1.5)
    engine.prompt_comes("d", 1.5, 100, 0)
    assert own_s(engine, "c", 2.0) is None and own_s(engine, "d", 2.0) is None


def test_who_overtakes_or_is_dropped_spoils_the_others() -> None:
    """The order was not that of arrival, or an aborted prompt took an unknown time."""
    engine = times()
    engine.prompt_comes("a", 1.0, 100, 0)
    engine.prompt_comes("b", 1.2, 100, 0)
    assert own_s(engine, "b", 1.5) is None and own_s(engine, "a", 1.6) is None
    engine.prompt_comes("a", 2.0, 100, 0)
    engine.prompt_comes("b", 2.2, 100, 0)
    engine.prompt_dropped("a", 2.3)
    assert own_s(engine, "b", 2.6) is None


def test_another_replica_s_prefills_spoil_ours() -> None:
    """Its rounds are known by number only."""
    engine = times()
    engine.prompt_comes("a", 1.0, 100, 0)
    engine.book.others = Totals(0.5, 1)
    assert own_s(engine, "a", 1.5) is None
    engine.prompt_comes("b", 2.0, 100, 0)
    engine.book.others = Totals()
    assert own_s(engine, "b", 2.5) is None


def test_where_others_decode_their_steps_are_known() -> None:
    """Half a step when it comes, K between two chunks; right after another prefill K steps come first."""
    engine = times(chunk=512, interval=2)
    engine.decode_begins("d", 0.0, 1000)
    step_s = LATENCY.decode_step_s(1, 1000)
    engine.prompt_comes("a", 1.0, 1100, 0)
    assert engine.step_s() == pytest.approx(step_s, rel=0.1)
    found = engine.prompt_over("a", 2.0)
    assert isinstance(found, Prefilled) and found.other_s == pytest.approx(4.5 * engine.step_s())
    engine.prompt_comes("b", 2.0 + engine.step_s(), 100, 0)
    assert own_s(engine, "b", 3.0) is None
    engine.prompt_comes("c", 3.0 + 3 * engine.step_s(), 100, 0)
    assert engine.prompt_over("c", 4.0) is not None


def test_the_decode_clock_follows_the_batch() -> None:
    """Two rounds, the second for a part of the time: tokens of the first by hand, its own context counted."""
    engine = times()
    cost = LATENCY.decode
    engine.decode_begins("a", 0.0, 10_000)
    begin = engine.clock
    engine.decode_begins("b", 1.0, 30_000)
    alone = 1.0 / LATENCY.decode_step_s(1, 10_000)
    assert engine.clock - begin == pytest.approx(alone, rel=0.05)
    engine.decode_over("b", 2.0)
    together = 1.0 / LATENCY.decode_step_s(2, 40_000 + round(alone))
    assert engine.clock - begin == pytest.approx(alone + together, rel=0.05)
    engine.run_clock(3.0)
    assert engine.clock - begin == pytest.approx(2 * alone + together, rel=0.05)
    assert cost.fixed_s > 0
    engine.decode_over("a", 3.0)
    assert engine.decodes == 0 and engine._context_tokens == 0


def test_tokens_that_come_are_context() -> None:
    """A step after a thousand tokens costs what that context costs."""
    engine = times()
    engine.decode_begins("a", 0.0, 100)
    begin = engine.clock
    while engine.clock < begin + 1000:
        engine.run_clock(engine._clock_s + 0.1)
    tokens = 100 + round(engine.clock - begin)
    assert engine.step_s() == pytest.approx(LATENCY.decode_step_s(1, tokens), rel=1e-3)
    assert engine.step_s() > 1.02 * LATENCY.decode_step_s(1, 100)


def test_prefills_stall_the_clock_as_predicted() -> None:
    """Those that ended, and of the one under way at most what has passed."""
    engine = times()
    engine.decode_begins("d", 0.0, 100)
    predicted_s = LATENCY.prefill_s(400, 0)
    engine.prompt_comes("a", 1.0, 400, 0)
    assert engine.stalled_s(1.0 + predicted_s / 4) == pytest.approx(predicted_s / 4)
    assert engine.stalled_s(99.0) == pytest.approx(predicted_s)
    engine.book.corrections = Corrections(prefill=1.5)
    engine.prompt_over("a", 99.0)
    assert engine.stalled_s(99.0) == pytest.approx(1.5 * predicted_s)
    engine.prompt_comes("b", 100.0, 400, 0)
    engine.prompt_comes("c", 100.1, 400, 0)
    engine.prompt_comes("d", 100.2, 400, 0)
    engine.prompt_over("b", 101.0)
    so_far_s = engine.stalled_s(101.0)
    assert engine.stalled_s(101.0 + predicted_s) == pytest.approx(so_far_s + predicted_s), "one of two runs"


def test_a_transfer_alone_on_its_two_links() -> None:
    """Another one that shares source or puller, at any time, spoils both; the other way does not."""
    a, b, c = times(), times(), times()
    flow_begins("1", a, b)
    flow_begins("2", b, a)
    assert flow_over("1", a, b) and flow_over("2", b, a)
    flow_begins("1", a, b)
    flow_begins("2", a, c)
    assert not flow_over("2", a, c) and not flow_over("1", a, b)
    flow_begins("1", a, b)
    flow_begins("2", c, b)
    assert not flow_over("1", a, b) and not flow_over("2", c, b)
    assert not flow_over("1", a, b), "it is over already"


def test_passes_by_hand() -> None:
    """1,100 tokens over 200 in chunks of 512."""
    s = LATENCY.prefill_s
    assert passes_s(LATENCY, 1100, 200, 512) == pytest.approx(s(512, 200) + s(512, 712) + s(76, 1224))
    assert passes_s(LATENCY, 1100, 200, 0) == s(1100, 200)
