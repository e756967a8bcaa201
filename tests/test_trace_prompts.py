"""Token ids from token counts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.traces.prompts import Vocabulary, filler_ids, prompt_ids
from antiphon.traces.schema import RoundTrace, SessionTrace

VOCABULARY = Vocabulary(32, 500)
GROWS = SessionTrace(
    "grows",
    (
        RoundTrace(100, 8),
        RoundTrace(150, 8, kept_tokens=108),
        RoundTrace(90, 8, kept_tokens=60),
        RoundTrace(120, 8),
    ),
)


def said(session: SessionTrace, outputs: list[list[int]], seed: int = 0) -> list[list[int]]:
    """The prompts of a whole session in which the engine answered `outputs`."""
    prompts: list[list[int]] = []
    before: list[int] = []
    for index, output in enumerate(outputs):
        prompts.append(prompt_ids(session, index, before, VOCABULARY, seed))
        before = prompts[-1] + output
    return prompts


def test_every_round_extends_what_was_really_said() -> None:
    """A prompt begins with what is kept of the previous prompt and the true output; its length is exact."""
    outputs = [[500 + index] * 8 for index in range(4)]
    prompts = said(GROWS, outputs)
    for index, turn in enumerate(GROWS.rounds):
        assert len(prompts[index]) == turn.prompt_tokens
        if index:
            before = prompts[index - 1] + outputs[index - 1]
            assert prompts[index][: turn.kept_tokens] == before[: turn.kept_tokens]
    assert prompts[1][100:108] == outputs[0]


def test_a_short_answer_is_made_up_for() -> None:
    """Where the engine said less than recorded, the prompt is still as long as the trace says."""
    assert len(prompt_ids(GROWS, 1, [7] * 100 + [9], VOCABULARY, 0)) == 150


def test_prompts_are_a_function_of_seed_session_and_round() -> None:
    """Equal seeds give equal ids; another seed, session or round gives others."""
    outputs = [[1] * 8] * 4
    assert said(GROWS, outputs) == said(GROWS, outputs)
    firsts = {
        tuple(prompt_ids(SessionTrace(name, GROWS.rounds), index, [], VOCABULARY, seed)[-50:])
        for name, index, seed in itertools.product("ab", (0, 3), (0, 1))
    }
    assert len(firsts) == 8


def test_sessions_of_one_prefix_share_it_and_nothing_more() -> None:
    """Equal `shared_prefix` ids give equal first tokens, as far as the shorter one goes; other ids do not."""

    def first(name: str, prefix: str, shared_tokens: int) -> list[int]:
        session = SessionTrace(name, (RoundTrace(200, 1),), shared_prefix=prefix, shared_tokens=shared_tokens)
        return prompt_ids(session, 0, [], VOCABULARY, 0)

    one, two, other = first("one", "p", 120), first("two", "p", 80), first("three", "q", 120)
    assert one[:80] == two[:80]
    assert one[80:] != two[80:]
    assert one[:80] != other[:80]


@given(st.integers(0, 2_000), st.integers(0, 500), st.integers(1, 500))
def test_filler_stays_in_its_vocabulary(count: int, low: int, span: int) -> None:
    """Filler has the asked length and only ids of the range; a shorter draw begins a longer one."""
    ids = filler_ids("name", count, Vocabulary(low, low + span))
    assert len(ids) == count
    assert all(low <= token < low + span for token in ids)
    assert filler_ids("name", count // 2, Vocabulary(low, low + span)) == ids[: count // 2]


def test_filler_uses_its_whole_vocabulary() -> None:
    """Every id of the range comes up, about equally often."""
    ids = filler_ids("name", 46_800, VOCABULARY)
    counts = [ids.count(token) for token in range(32, 500)]
    assert min(counts) > 50
    assert max(counts) < 160


@pytest.mark.parametrize(("low", "high"), [(5, 5), (-1, 5), (9, 5)])
def test_empty_vocabularies_are_refused(low: int, high: int) -> None:
    """A range without ids, or with negative ones, is an error at once."""
    with pytest.raises(ValueError, match="empty or negative"):
        Vocabulary(low, high)
