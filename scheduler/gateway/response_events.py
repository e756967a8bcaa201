"""A chat's events as a response of OpenAI's Responses API: its events, and the object at their end. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from antiphon.scheduler.gateway.blocks import Block, Blocks, Change, Event, Kind, Step
from antiphon.scheduler.gateway.responses import ResponsesBody

_PREFIXES = {Kind.REASONING: "rs", Kind.TEXT: "msg", Kind.CALL: "fc"}


class ResponseEvents:
    """Feed it the chat's events; what it gives are the response's, numbered."""

    def __init__(self, body: ResponsesBody, response_id: str, created: int) -> None:
        self.response_id = response_id
        self.stored = body.stored
        self._body = body
        self._created = created
        self._blocks = Blocks()
        self._number = 0
        self._closed: set[int] = set()

    def begin(self) -> list[Event]:
        shown = self.response("in_progress")
        return [self._event("created", response=shown), self._event("in_progress", response=shown)]

    def feed(self, event: Event) -> list[Event]:
        return [made for step in self._blocks.feed(event) for made in self._made(step)]

    def end(self) -> list[Event]:
        """Closes what is open: all but the last event, which is `last`."""
        steps = [*self._blocks.nothing_said(), *self._blocks.end()]
        return [made for step in steps for made in self._made(step)]

    def last(self) -> Event:
        """`response.completed` or `.incomplete`, with the whole response."""
        status = self.status
        return self._event(status, response=self.response(status))

    def failed(self, message: str) -> Event:
        error = {"code": "server_error", "message": message}
        return self._event("failed", response=self.response("failed") | {"error": error})

    @property
    def status(self) -> str:
        return "incomplete" if self._blocks.finish_reason in ("length", "content_filter") else "completed"

    def reply(self) -> dict[str, Any]:
        """The answer as a message of a chat."""
        return self._blocks.message()

    @property
    def session_id(self) -> str:
        """Where the round ran in the end; known after the last event of the chat."""
        return str((self._blocks.session or {}).get("id") or "")

    def response(self, status: str) -> dict[str, Any]:
        """The response object as it stands."""
        body, blocks = self._body, self._blocks
        running = status == "in_progress"
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(blocks.finish_reason)
        conversation = body.conversation_id
        shown = {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [] if running else [self._item(block) for block in blocks.blocks],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.stored,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": self._text_config(),
            "tool_choice": body.tool_choice or "auto",
            "tools": [
                {"strict": None, "parameters": None, "description": None, **tool} for tool in body.tools or ()
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": _usage(blocks.usage) if blocks.usage else None,
            "user": body.user,
        }
        if conversation is not None:
            shown["conversation"] = {"id": conversation}
        if blocks.session is not None:
            shown["session"] = blocks.session
        return shown

    def _text_config(self) -> dict[str, Any]:
        text = self._body.text
        return {
            "format": text.format if text is not None and text.format else {"type": "text"},
            "verbosity": text.verbosity if text is not None and text.verbosity else "medium",
        }

    # ---------------------------------------------------------------- events

    def _made(self, step: Step) -> Iterator[Event]:
        block = step.block
        at = {"item_id": self._item_id(block), "output_index": block.number}
        if step.change is Change.OPENED:
            yield self._event("output_item.added", output_index=block.number, item=self._opened(block))
            if block.kind is not Kind.CALL:
                yield self._event("content_part.added", **at, content_index=0, part=_part(block, empty=True))
        elif step.change is Change.GREW:
            yield self._grew(step, at)
        else:
            self._closed.add(block.number)
            yield self._done(block, at)
            if block.kind is not Kind.CALL:
                yield self._event("content_part.done", **at, content_index=0, part=_part(block))
            yield self._event("output_item.done", output_index=block.number, item=self._item(block))

    def _grew(self, step: Step, at: dict[str, Any]) -> Event:
        if step.block.kind is Kind.CALL:
            return self._event("function_call_arguments.delta", **at, delta=step.piece)
        if step.block.kind is Kind.REASONING:
            return self._event("reasoning_text.delta", **at, content_index=0, delta=step.piece)
        logprobs = list(step.logprobs)
        return self._event("output_text.delta", **at, content_index=0, delta=step.piece, logprobs=logprobs)

    def _done(self, block: Block, at: dict[str, Any]) -> Event:
        if block.kind is Kind.CALL:
            done = {"name": block.name, "arguments": _arguments(block)}
            return self._event("function_call_arguments.done", **at, **done)
        if block.kind is Kind.REASONING:
            return self._event("reasoning_text.done", **at, content_index=0, text=block.text)
        logprobs = block.logprobs
        return self._event("output_text.done", **at, content_index=0, text=block.text, logprobs=logprobs)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return event

    # ---------------------------------------------------------------- items

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.response_id.removeprefix('resp_')}_{block.number}"

    def _opened(self, block: Block) -> dict[str, Any]:
        """The item as it begins."""
        item = self._item(block) | {"status": "in_progress"}
        nothing: dict[str, Any] = {"arguments": ""} if block.kind is Kind.CALL else {"content": []}
        return item | nothing

    def _item(self, block: Block) -> dict[str, Any]:
        cut = self._blocks.finish_reason == "length" and block is self._blocks.blocks[-1]
        status = "incomplete" if cut else "completed"
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind is Kind.CALL:
            call = {"call_id": block.call_id, "name": block.name, "arguments": _arguments(block)}
            return item | {"type": "function_call"} | call
        if block.kind is Kind.REASONING:
            return item | {"type": "reasoning", "summary": [], "content": [_part(block)]}
        return item | {"type": "message", "role": "assistant", "content": [_part(block)]}


def _part(block: Block, *, empty: bool = False) -> dict[str, Any]:
    text = "" if empty else block.text
    if block.kind is Kind.REASONING:
        return {"type": "reasoning_text", "text": text}
    logprobs = [] if empty else block.logprobs
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _arguments(block: Block) -> str:
    """A call without arguments is one with none of them: clients parse this as JSON."""
    return block.text or "{}"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage.get("prompt_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": details.get("cached_tokens", 0), "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage.get("reasoning_tokens") or 0},
        "total_tokens": usage["total_tokens"],
    }


def told_again(body: ResponsesBody, response: Mapping[str, Any]) -> list[Event]:
    """The events of a response that has been made: each block comes whole."""
    events = ResponseEvents(body, response["id"], response["created_at"])
    made = [*events.begin(), *(e for delta in _deltas(response) for e in events.feed(delta)), *events.end()]
    return [*made, events.last() | {"response": response}]


def _deltas(response: Mapping[str, Any]) -> Iterator[Event]:
    """The chat that it was made of."""
    for number, item in enumerate(response["output"]):
        choice: dict[str, Any] = {}
        if item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            choice["delta"] = {"tool_calls": [{"index": number, "id": item["call_id"], "function": function}]}
        else:
            (part,) = item["content"]
            name = "reasoning_content" if item["type"] == "reasoning" else "content"
            choice["delta"] = {name: part["text"]}
            choice["logprobs"] = {"content": part.get("logprobs")}
        yield {"choices": [choice]}
    reason = (response["incomplete_details"] or {}).get("reason", "stop")
    yield {"choices": [{"finish_reason": "length" if reason == "max_output_tokens" else reason}]}


def document(response: dict[str, Any]) -> bytes:
    """A response as it is sent and stored."""
    return msgspec.json.encode(response)
