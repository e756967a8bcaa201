"""A streamed answer as it comes: bytes -> deltas, and at the end the reply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from antiphon.client.errors import StreamBroke
from antiphon.client.results import Delta, Message, Reply, SessionInfo, Usage
from antiphon.client.wire import usage_and_session


class StreamReader:
    """Fed with whatever came; lines end with a line feed only, since texts may hold Unicode's other ends."""

    def __init__(self) -> None:
        self._unread = b""
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._session: SessionInfo | None = None
        self.done = False

    def feed(self, data: bytes) -> Iterator[Delta]:
        """What the bytes bring to show. Raises `StreamBroke` for an error in the stream."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if (delta := self._line(line)) is not None:
                yield delta

    def reply(self) -> Reply:
        """After the last bytes; raises `StreamBroke` if the answer's end did not come."""
        if not self.done:
            raise StreamBroke("the connection ended before the answer did")
        texts = {name: "".join(bits) for name, bits in self._texts.items()}
        message: Message = {"role": "assistant", "content": texts["content"]}
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if self._calls:
            message["content"] = texts["content"] or None
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return Reply(message, self._finish_reason, self._usage, self._session)

    def _line(self, line: bytes) -> Delta | None:
        if not line.startswith(b"data:"):
            return None  # a comment keeps the connection open
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return None
        try:
            event = msgspec.json.decode(data, type=dict[str, Any])
            if error := event.get("error"):
                raise StreamBroke(f"{error.get('code')}: {error.get('message')}")
            usage, session = usage_and_session(event)
            self._usage, self._session = usage or self._usage, session or self._session
            return self._delta(event)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise StreamBroke(f"an event that cannot be read: {error!r}") from error

    def _delta(self, event: Mapping[str, Any]) -> Delta | None:
        choices = event.get("choices") or ()
        if not choices:
            return None
        self._finish_reason = choices[0].get("finish_reason") or self._finish_reason
        delta = choices[0].get("delta") or {}
        for name, bits in self._texts.items():
            if delta.get(name):
                bits.append(delta[name])
        calls = tuple(delta.get("tool_calls") or ())
        for bit in calls:
            _add_call(self._calls.setdefault(bit.get("index", 0), _new_call()), bit)
        if not calls and not delta.get("content") and not delta.get("reasoning_content"):
            return None
        return Delta(delta.get("content") or "", delta.get("reasoning_content") or "", calls)


def _new_call() -> dict[str, Any]:
    return {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}


def _add_call(call: dict[str, Any], bit: Mapping[str, Any]) -> None:
    function = bit.get("function") or {}
    call["id"] = bit.get("id") or call["id"]
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    call["function"]["arguments"] += function.get("arguments") or ""
