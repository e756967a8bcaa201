"""`Prompt`: what views of a growing log show is what plain lists show, whatever grew since."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.page_hash import namespace_seed, page_hashes
from antiphon.engines.prompt import MAX_ID, Prompt, as_prompt, body_with

IDS = st.lists(st.integers(0, MAX_ID), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 30), IDS), max_size=12))
def test_views_are_what_lists_are(steps: list[tuple[int, list[int]]]) -> None:
    """Any tree of extensions: every prompt made, earlier ones too, has its own ids, JSON and hashes."""
    made: list[tuple[Prompt, list[int]]] = [(Prompt(), [])]
    for choice, more in steps:
        prompt, ids = made[choice % len(made)]
        if choice % 2:  # hashes known before and after growing must agree
            prompt.hashes(2)
        made.append((prompt.extended(more), ids + more))
    salted = namespace_seed(None, "salt")
    for prompt, ids in made:
        assert len(prompt) == len(ids) and list(prompt) == list(prompt.ids) == ids
        assert msgspec.json.decode(prompt.json()) == ids
        assert msgspec.json.decode(body_with({"a": 1}, "ids", prompt)) == {"a": 1, "ids": ids}
        for size, seed in ((2, b""), (3, b""), (2, salted)):
            assert prompt.hashes(size, seed) == page_hashes(ids, size, seed)
        for start in (0, 1, len(ids)):
            assert list(prompt.tail(start)) == ids[start:] == list(prompt[start:])
        assert list(prompt[::-1]) == ids[::-1] and list(prompt[-2:]) == ids[-2:]
        for at in range(-len(ids), len(ids)):
            assert prompt[at] == ids[at]
        with pytest.raises(IndexError):
            prompt[len(ids)]


@pytest.mark.parametrize("wrong", [[-1], [MAX_ID + 1]])
def test_what_is_no_token_id_is_refused_and_harms_nothing(wrong: list[int]) -> None:
    prompt = Prompt([1, 2])
    with pytest.raises(OverflowError):
        prompt.extended(wrong)
    assert list(prompt.extended([3])) == [1, 2, 3] and prompt.json() == b"[1,2]"


def test_growing_costs_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of a long conversation hashes its new pages only, and a prompt in line is not copied."""
    hashed: list[int] = []

    def counted(ids: list[int], size: int, prior: bytes) -> tuple[bytes, ...]:
        hashed.append(len(ids))
        return page_hashes(ids, size, prior)

    monkeypatch.setattr("antiphon.engines.prompt.page_hashes", counted)
    chance = random.Random(1)
    prompts = [Prompt([chance.randrange(500) for _ in range(16_000)])]
    prompts[0].hashes(16)
    for _ in range(20):
        prompts.append(prompts[-1].extended([chance.randrange(500) for _ in range(16)]))
        prompts[-1].hashes(16)
    assert hashed == [16_000] + [16] * 20
    assert all(a._log is b._log for a, b in pairwise(prompts))
    fork = prompts[3].extended([1])
    assert fork._log is not prompts[3]._log, "the log has gone on: a fork has one of its own"
    assert fork.size_bytes < prompts[3].size_bytes


def test_a_prompt_is_taken_as_it_is() -> None:
    prompt = Prompt([7])
    assert as_prompt(prompt) is prompt and list(as_prompt((1, 2))) == [1, 2]
    assert body_with({}, "ids", (1, 2)) == b'{"ids":[1,2]}' == body_with({}, "ids", Prompt((1, 2)))
