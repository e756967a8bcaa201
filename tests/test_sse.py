"""The event-stream parser gives the same events however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from antiphon.engines import sse
from antiphon.engines.sse import SseError, SseEvent, SseParser

LINES = st.one_of(
    st.sampled_from(
        [b"", b": keep-alive", b"event: sglext_ids", b"id: 7", b"retry: 10", b"data", b"data:", b"junk"]
    ),
    st.binary(max_size=12).map(lambda raw: b"data: " + raw.replace(b"\r", b"").replace(b"\n", b"")),
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"]))).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


def parse(pieces: list[bytes]) -> list[SseEvent]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@given(STREAMS, st.lists(st.integers(0, 10_000), max_size=8))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 10, 18])
def test_any_split_gives_the_same_events(stream: bytes, places: list[int]) -> None:
    """Cutting a stream anywhere, down to single bytes, changes no event."""
    whole = parse([stream])
    assert parse(cut(stream, places)) == whole
    assert parse([stream[index : index + 1] for index in range(len(stream))]) == whole


@given(
    st.lists(
        st.tuples(st.binary(min_size=1, max_size=30), st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=6
    )
)
def test_what_is_sent_comes_out(items: list[tuple[bytes, bytes]]) -> None:
    """Every event with data comes out once, in order, whatever line ends its sender likes."""
    payloads = [(raw.replace(b"\r", b"_").replace(b"\n", b"_"), end) for raw, end in items]
    stream = b"".join(b"data: " + payload + end + end for payload, end in payloads)
    assert [event.data for event in parse([stream])] == [payload for payload, _ in payloads]


def test_fields() -> None:
    """Comments, ids and events without data vanish; data lines are joined; a name holds for one event."""
    stream = (
        b"\xef\xbb\xbf: hi\ndata: one\ndata:two\nid: 4\n\nevent: named\ndata: x\n\n"
        b"event: empty\n\ndata: y\n\n"
    )
    assert parse([stream]) == [SseEvent(b"one\ntwo"), SseEvent(b"x", "named"), SseEvent(b"y")]


def test_unfinished_event_is_dropped() -> None:
    """An event that the stream's end cut off is not an event."""
    assert parse([b"data: whole\n\ndata: half\n"]) == [SseEvent(b"whole")]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer cannot make us keep more than the limit for one event; many small events are no problem."""
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    assert len(parse([b"data: " + b"x" * 60 + b"\n\n"] * 5)) == 5
    parser = SseParser()
    with pytest.raises(SseError, match="100 bytes"):
        for _ in range(20):
            parser.feed(b"data: " + b"x" * 10)
