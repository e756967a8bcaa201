"""What the gateway answers, typed: replies, the bits of a stream, sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

Message = dict[str, Any]
"""As in the OpenAI API."""

NOT_KEPT = "this round is not kept"
"""So the warning begins that the server does not remember a round."""


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that no engine computed for this round."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0


class SessionInfo(msgspec.Struct, frozen=True):
    """The `session` of an answer: which session it was, and how the round ran."""

    id: str
    round: int | None = None
    parent_id: str | None = None
    identified_by: str = ""
    arm: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """The server remembers the round, so that the next one may bring only what is new."""
        return not any(warning.startswith(NOT_KEPT) for warning in self.warnings)


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it: it may be broken."""

    def parsed(self) -> Any:
        """The arguments; raises ValueError if the model wrote no JSON."""
        try:
            return msgspec.json.decode(self.arguments or "{}")
        except msgspec.DecodeError as error:
            raise ValueError(f"arguments of {self.name} are not JSON: {error}") from error


class Reply(msgspec.Struct, frozen=True):
    """One answer."""

    message: Message
    """As it is kept in the conversation."""
    finish_reason: str | None = None
    usage: Usage | None = None
    session: SessionInfo | None = None

    @property
    def text(self) -> str:
        content = self.message.get("content")
        return content if isinstance(content, str) else ""

    @property
    def reasoning(self) -> str:
        found = self.message.get("reasoning_content")
        return found if isinstance(found, str) else ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(
            ToolCall(call.get("id") or "", call["function"]["name"], call["function"].get("arguments") or "")
            for call in self.message.get("tool_calls") or ()
        )


class Delta(msgspec.Struct, frozen=True):
    """A bit of a streamed answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Bits of tool calls, as in the OpenAI API; the whole ones are in the reply."""


class SessionRecord(msgspec.Struct, frozen=True):
    """`GET /v1/sessions/{id}`; `more` has all of it."""

    id: str
    status: str = ""
    parent_id: str | None = None
    root_id: str | None = None
    round: int | None = None
    more: Mapping[str, Any] = {}


def tool_result(call: ToolCall, content: str) -> Message:
    """The message that answers a tool call."""
    return {"role": "tool", "tool_call_id": call.id, "content": content}
