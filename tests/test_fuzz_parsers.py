"""Every parser of the network, fed with what is almost right: it answers or raises its own error, in time.

`make fuzz` runs the same with many more inputs.
"""

from __future__ import annotations

import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engines import sse
from antiphon.engines.page_index import Page, PageIndex
from tests.fuzz_parsers import TARGETS, Target, mutated, tried

EXAMPLES = 400


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_valid_inputs_are_taken(target: Target) -> None:
    """The seeds are right: else the fuzz would only ever see the first check."""
    for raw in target.seeds:
        try:
            target.parse(raw)
        except target.own as error:
            assert "503" in str(error) or "HTTP" in str(error)  # the seed is an error of the engine


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_only_its_own_errors(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    """Mutated structures, mutated bytes, deep nesting, random bytes."""
    caplog.set_level(logging.ERROR)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        tried(target, mutated(target, random.Random(seed)))

    check()


@given(raw=st.binary(max_size=300))
def test_random_bytes(raw: bytes) -> None:
    """Of all parsers the same bytes."""
    logging.disable(logging.WARNING)
    try:
        for target in TARGETS:
            tried(target, raw)
    finally:
        logging.disable(logging.NOTSET)


def test_an_event_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces are in which it comes, and whatever field it is."""
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    for piece in (b"data: x\n", b": comment\n", b"x", b"event: y\n"):
        parser = sse.SseParser()
        with pytest.raises(sse.SseError, match="larger than"):
            for _ in range(2000):
                parser.feed(piece)


def test_a_chain_that_a_peer_told_in_a_circle_ends() -> None:
    """Two pages that are each other's parent, by two requests: walking the chain stops."""
    index = PageIndex()
    a, b = b"a" * 32, b"b" * 32
    for slot, name in enumerate((a, b)):
        index.add(Page(name, b"", slot, 0, 0))
    index.learn(b"", [a, b])
    index.learn(b"", [b, a])
    assert [page.page_hash for page in index.chain(a)] == [a, b]
