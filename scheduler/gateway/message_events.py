"""A chat's events as a message of Anthropic's API: its events, the whole, and errors in its shape. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway.blocks import Block, Blocks, Change, Event, Kind, Step
from antiphon.scheduler.gateway.error_shapes import anthropic_body
from antiphon.scheduler.gateway.messages import MessagesBody

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
"""All others are the end of the turn."""


class MessageEvents:
    """Feed it the chat's events; what it gives are the message's."""

    def __init__(self, body: MessagesBody, message_id: str) -> None:
        self._body = body
        self._id = message_id
        self._blocks = Blocks()

    def begin(self) -> list[Event]:
        """The usage is not known before the end: `message_delta` has it."""
        message = self._message([], None, None) | {"usage": _usage({})}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def feed(self, event: Event) -> list[Event]:
        return [made for step in self._blocks.feed(event) for made in self._made(step)]

    def end(self) -> list[Event]:
        events = [made for step in self._blocks.end() for made in self._made(step)]
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        last: Event = {"type": "message_delta", "delta": delta, "usage": _usage(self._blocks.usage)}
        if self._blocks.session is not None:
            last["session"] = self._blocks.session
        return [*events, last, {"type": "message_stop"}]

    def failed(self, error: ApiError) -> Event:
        return anthropic_body(error)

    def whole(self) -> dict[str, Any]:
        content = [_whole_block(block) for block in self._blocks.blocks]
        message = self._message(content, *self._stop()) | {"usage": _usage(self._blocks.usage)}
        return message if self._blocks.session is None else message | {"session": self._blocks.session}

    def _message(self, content: list[Any], reason: str | None, sequence: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
        }

    def _stop(self) -> tuple[str, str | None]:
        matched = self._blocks.matched_stop
        if self._blocks.finish_reason == "stop" and matched in (self._body.stop_sequences or ()):
            return "stop_sequence", matched
        return _STOP_REASONS.get(self._blocks.finish_reason, "end_turn"), None

    def _made(self, step: Step) -> Iterator[Event]:
        block, at = step.block, {"index": step.block.number}
        if step.change is Change.OPENED:
            yield {"type": "content_block_start", **at, "content_block": _empty_block(block)}
        elif step.change is Change.CLOSED:
            if block.kind is Kind.REASONING:
                signature = {"type": "signature_delta", "signature": ""}
                yield {"type": "content_block_delta", **at, "delta": signature}
            yield {"type": "content_block_stop", **at}
        elif step.piece:
            yield {"type": "content_block_delta", **at, "delta": _delta(block, step.piece)}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Tokens that came from a cache are counted apart from those that were read anew."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": max(0, usage.get("prompt_tokens", 0) - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }


def _empty_block(block: Block) -> dict[str, Any]:
    if block.kind is Kind.CALL:
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    if block.kind is Kind.REASONING:
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(block: Block, piece: str) -> dict[str, Any]:
    if block.kind is Kind.CALL:
        return {"type": "input_json_delta", "partial_json": piece}
    if block.kind is Kind.REASONING:
        return {"type": "thinking_delta", "thinking": piece}
    return {"type": "text_delta", "text": piece}


def _whole_block(block: Block) -> dict[str, Any]:
    if block.kind is Kind.CALL:
        return _empty_block(block) | {"input": _input(block.text)}
    return _empty_block(block) | {"thinking" if block.kind is Kind.REASONING else "text": block.text}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments; what is no JSON object (it was cut, or the model wrote it wrongly) stays text."""
    if not arguments:
        return {}
    try:
        found = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"_arguments": arguments}
