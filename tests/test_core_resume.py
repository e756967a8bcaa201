"""The core's part when an answer breaks after its first token: placed again, or ended with the reason."""

from __future__ import annotations

import pytest

from antiphon.engines.page_hash import page_hashes
from antiphon.scheduler.messages import (
    Abort,
    Broke,
    Complete,
    EngineDown,
    EngineFailed,
    FirstToken,
    Generate,
    GoesOn,
    Prefetch,
    PrefetchDone,
    Prefill,
    PrefillDone,
    RoundFinished,
    Tick,
)
from antiphon.scheduler.outcomes import Outcome
from antiphon.scheduler.states import Phase
from tests.core_helpers import LOCAL, PAGE, RECOMPUTE, Bench, Choice, engine_up

AT_P: Choice = (LOCAL[0], "p0", "p0")


def goes_on(kept: int = 10, prompt: int = 100, **changes: frozenset[str]) -> GoesOn:
    hashes = page_hashes(range(prompt + kept), PAGE)
    return GoesOn(prompt + kept, hashes, 16 - kept, kept + 2, **changes)


def broke(on: GoesOn | str, kind: str = "broken") -> EngineFailed:
    return EngineFailed("r", "d0", kind, "cut", on)


def streaming(bench: Bench, choice: Choice = LOCAL) -> None:
    bench.place("r", choice)
    bench.send(FirstToken("r"))


def test_a_broken_answer_goes_on_with_what_is_kept() -> None:
    """Longer prompt, fewer tokens, another engine; the receipt is that of one round."""
    bench = Bench()
    streaming(bench)
    (generate,) = bench.send(broke(goes_on()))
    assert isinstance(generate, Generate) and (generate.engine_id, generate.rid) == ("p0", "r-02g")
    seen = bench.policy.seen[-1]
    assert (seen.prompt_tokens, seen.max_output_tokens, seen.excluded) == (110, 6, frozenset({"d0"}))
    first_s = bench.core.rounds["r"].first_token_s
    bench.send(FirstToken("r"))
    assert bench.core.rounds["r"].phase is Phase.DECODING and bench.core.rounds["r"].first_token_s == first_s
    (done,) = bench.send(RoundFinished("r", 16, 96, page_hashes(range(115), PAGE)))
    assert isinstance(done, Complete) and done.outcome is Outcome.COMPLETED and done.home == "p0"
    receipt = done.receipt
    assert (receipt.prompt_tokens, receipt.completion_tokens) == (100, 16)
    assert receipt.cached_tokens == 0, "the first engine had nothing of the prompt"
    assert receipt.ttft_s == pytest.approx(0.2) and receipt.itl_s == pytest.approx(0.3 / 15)
    assert receipt.queue_s == pytest.approx(0.1), "until its first dispatch"
    assert receipt.tries[0].failure == "d0: broken: cut (after 12 tokens)" and not receipt.tries[1].failure
    books = bench.core.books
    assert books.sessions.live_home(("t", "s")) == "p0"
    assert books.fleet.books["p0"].session_tokens[("t", "s")] == 116
    assert len(books.fleet.books["d0"].ttft.samples) == 1 and not books.fleet.books["p0"].ttft.samples
    assert not books.fleet.books["p0"].itl.samples, "windows learn nothing of it"


@pytest.mark.parametrize(("on", "note"), [("", None), ("it samples", "it samples")])
def test_what_cannot_go_on_ends_with_the_reason(on: str, note: str | None) -> None:
    bench = Bench()
    streaming(bench)
    error, done = bench.send(broke(on))
    assert isinstance(error, Broke) and error.message == "cut"
    assert isinstance(done, Complete) and done.outcome is Outcome.FAILED and len(done.receipt.tries) == 1
    assert [n for n in done.receipt.notes if note and note in n] or not note


def test_tries_are_counted_over_all_breaks() -> None:
    """The last of them ends it, never as a refusal: its client has seen a part."""
    bench = Bench(max_tries=2)
    streaming(bench)
    bench.send(engine_up("p1", "prefill"))
    bench.send(broke(goes_on()))
    error, done = bench.send(EngineFailed("r", "p0", "unreachable", "gone"))
    assert isinstance(error, Broke) and "2 tries failed" in error.message
    assert isinstance(done, Complete) and done.outcome is Outcome.FAILED


def test_nobody_else_is_no_reason_to_ask_the_same_engine_again() -> None:
    bench = Bench()
    streaming(bench)
    error, done = bench.send(broke(goes_on(excluded=frozenset({"p0"}))))
    assert isinstance(error, Broke) and isinstance(done, Complete)
    assert "could not go on elsewhere" in error.message


def test_it_may_go_on_by_any_arm() -> None:
    """Another engine prefills prompt and answer, the new home fetches them."""
    bench = Bench()
    bench.send(engine_up("d1", "decode"))
    streaming(bench)
    bench.policy.next.append((RECOMPUTE[0], "d1", "p0"))
    (prefill,) = bench.send(broke(goes_on(28)))
    assert isinstance(prefill, Prefill)
    (push,) = bench.send(PrefillDone("r", 0))
    assert isinstance(push, Prefetch) and push.pages == 128 // PAGE
    bench.send(PrefetchDone("r", "d1", 8, 8, 8 * 2048, 0.1))
    bench.send(FirstToken("r"))
    (done,) = bench.send(RoundFinished("r", 30, 112, page_hashes(range(129), PAGE)))
    assert isinstance(done, Complete) and done.receipt.cached_tokens == 0
    assert {held.engine_id for held in done.holdings} == {"d1", "p0"}


def test_what_is_kept_grows_from_break_to_break() -> None:
    bench = Bench(max_tries=3)
    streaming(bench)
    bench.send(engine_up("p1", "prefill"))
    bench.send(broke(goes_on(4)))
    bench.send(FirstToken("r"))
    bench.send(EngineFailed("r", "p0", "broken", "cut", goes_on(10)))
    round = bench.core.rounds["r"]
    assert (round.carried_tokens, round.prompt_tokens, round.arrived.prompt_tokens) == (10, 100, 110)
    bench.send(FirstToken("r"))
    (done,) = bench.send(RoundFinished("r", 16, 0, page_hashes(range(115), PAGE)))
    assert isinstance(done, Complete) and done.receipt.completion_tokens == 16


def test_an_answer_that_waits_to_go_on_has_a_deadline() -> None:
    """Then it ends with an error event; the deadline of its first token does not count any more."""
    bench = Bench(first_token_deadline_s=5.0)
    streaming(bench)
    bench.now = 4.0
    bench.send(broke(goes_on()))
    bench.now = 8.0
    assert bench.send(Tick()) == [] and bench.core.next_deadline() == pytest.approx(9.1)
    bench.now = 9.1
    abort, error, done = bench.send(Tick())
    assert isinstance(abort, Abort) and isinstance(error, Broke) and isinstance(done, Complete)
    assert bench.core.next_deadline() is None


def test_a_dead_engines_answers_go_on_or_end() -> None:
    """Those of which the driver says how; the others break."""
    bench = Bench()
    streaming(bench)
    bench.place("q", LOCAL, session="q", first=1000)
    bench.send(FirstToken("q"))
    commands = bench.send(EngineDown("d0", "one", "killed", {"r": goes_on(), "q": "it samples"}))
    kinds = [type(command) for command in commands]
    assert kinds == [Abort, Abort, Broke, Complete, Generate]
    generate = commands[-1]
    assert isinstance(generate, Generate) and (generate.round_id, generate.engine_id) == ("r", "p0")
    ended = commands[3]
    assert isinstance(ended, Complete) and "it samples" in ended.receipt.notes[0]
