"""Server-sent events from a byte stream, whatever its chunks: a sans-IO parser (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from dataclasses import dataclass

MAX_EVENT_BYTES = 64 * 1024 * 1024
"""An event larger than this is a broken peer, not an answer."""


class SseError(Exception):
    """The stream is not server-sent events, as far as we accept them."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    data: bytes
    event: str = "message"


class SseParser:
    """`feed` it bytes as they come; it returns the events that they complete.

    Lines may end in LF, CR or CRLF; comments, `id` and `retry` are skipped; several `data` lines are
    joined by LF. An event without data is none. What is unfinished at the end of the stream is dropped.
    """

    def __init__(self) -> None:
        self._partial: list[bytes] = []
        """Pieces of the line that has not ended."""
        self._skip_line_feed = False
        """The last line ended in CR: a LF right after it belongs to it."""
        self._first_line = True
        self._data: list[bytes] = []
        self._event = ""
        self._size_bytes = 0

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Events completed by `chunk`; raises `SseError` when one grows beyond MAX_EVENT_BYTES."""
        if self._skip_line_feed and chunk:
            self._skip_line_feed = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        events: list[SseEvent] = []
        for piece in chunk.splitlines(keepends=True):
            line = piece.rstrip(b"\r\n")
            self._size_bytes += len(line)
            if self._size_bytes > MAX_EVENT_BYTES:
                raise SseError(f"one event is larger than {MAX_EVENT_BYTES} bytes")
            self._partial.append(line)
            if len(line) < len(piece):
                self._end_line(events)
        self._skip_line_feed = self._skip_line_feed or chunk.endswith(b"\r")
        return events

    def _end_line(self, events: list[SseEvent]) -> None:
        line = self._partial[0] if len(self._partial) == 1 else b"".join(self._partial)
        self._partial.clear()
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line:
            self._read_field(line)
            return
        if self._data:
            events.append(SseEvent(b"\n".join(self._data), self._event or "message"))
        self._data, self._event, self._size_bytes = [], "", 0

    def _read_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode(errors="replace")
