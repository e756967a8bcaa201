"""What a session's rounds tell and ask once the ledger knows its beginning: the news and little more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from antiphon.scheduler.residency import (
    ResidencyIndex,
    chain_checkpoints,
    latest_checkpoints,
    stride_pages,
)
from antiphon.scheduler.told import MAX_SESSIONS, Told

PAGE = 16
HOLDER = ("epoch", "d0", "i1")


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_the_news_is_told_whole_and_the_rest_ever_more_sparsely(pages: int, since: int) -> None:
    """All checkpoints beyond `since`, longest first; of the others a few."""
    hashes = [number.to_bytes(32, "big") for number in range(pages)]
    whole, found = chain_checkpoints(hashes, PAGE), latest_checkpoints(hashes, PAGE, since)
    assert found == sorted(set(found), reverse=True) and set(found) <= set(whole)
    new = [item for item in whole if item[0] > since * PAGE]
    assert found[: len(new)] == new
    old = min(since, pages) // stride_pages(PAGE)
    assert len(found) - len(new) <= old.bit_length() + 2
    for tokens, _ in whole:  # a prefix is understated by no more than three times what lies behind it
        below = max((t for t, _ in found if t <= tokens), default=0)
        assert tokens - below <= max(0, 3 * (old * stride_pages(PAGE) * PAGE - tokens))


def test_a_long_history_asks_about_as_much_as_a_short_one() -> None:
    """Within a handful of places, at a thousand tokens and at a million."""
    index = ResidencyIndex()
    index.admit("d0", "i1", 1 << 20)
    counts = []
    for tokens in (1_000, 100_000, 1_000_000):
        hashes = [number.to_bytes(32, "big") for number in range(tokens // PAGE)]
        index.record("d0", "i1", hashes[:-4], PAGE)
        counts.append(len(index.checkpoints(hashes, PAGE, since=len(hashes) - 4)))
    assert counts[0] >= 2 and counts[-1] <= counts[0] + 6


def test_who_was_told_counts_for_a_while_and_for_one_holder() -> None:
    told = Told(keep_s=10.0)
    assert told.holder(("t", "s"), 0.0) is None
    told.note(("t", "s"), HOLDER, 100.0)
    assert told.holder(("t", "s"), 109.0) == HOLDER and told.holder(("t", "s"), 110.0) is None
    assert told.holder(("u", "s"), 100.0) is None


def test_memory_is_bounded() -> None:
    told = Told(keep_s=10.0)
    for number in range(MAX_SESSIONS + 10):
        told.note(("t", str(number)), HOLDER, 0.0)
    assert told.holder(("t", "9"), 1.0) is None and told.holder(("t", "10"), 1.0) == HOLDER
