"""Checks of a chat's messages: roles, contents, tool calls. A failed one is an `ApiError` with the place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.scheduler.errors import ApiError, invalid

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

MEDIA = {
    "image_url": "images", "input_image": "images", "image": "images",
    "input_audio": "audio", "audio_url": "audio",
    "video_url": "video", "file": "files", "input_file": "files", "document": "files",
}  # fmt: skip
"""Content parts, by what they hold, that no engine here is given."""


def check_messages(messages: list[dict[str, Any]]) -> None:
    if not messages:
        raise invalid("`messages` is empty: at least one message is needed.", param="messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role")
        if role not in ROLES if isinstance(role, str) else True:
            raise invalid(
                f"`role` must be one of {', '.join(sorted(ROLES))}; got {role!r:.60}.", param=f"{where}.role"
            )
        _check_content(message.get("content"), f"{where}.content")
        calls = message.get("tool_calls")
        if calls is not None and not (
            isinstance(calls, list)
            and all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls)
        ):
            raise invalid(
                "`tool_calls` must be a list of objects with a `function`.", param=f"{where}.tool_calls"
            )


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise invalid("`content` must be a string, a list of parts, or null.", param=where)
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if (refused := media_refused(kind, f"{where}[{index}]")) is not None:
            raise refused
        if kind != "text":
            raise invalid(
                f"Only content parts of type `text` are supported, not {kind!r:.60}.",
                param=f"{where}[{index}]",
            )
        if not isinstance(part.get("text"), str):
            raise invalid("A text part needs a string `text`.", param=f"{where}[{index}].text")


def media_refused(kind: Any, where: str) -> ApiError | None:
    """The error for a part of this type if it holds what no engine here is given."""
    if not isinstance(kind, str) or kind not in MEDIA:
        return None
    return invalid(
        f"`{kind}` is not supported: engines here take text only, no {MEDIA[kind]}. Leave it out, or say in "
        "words what it holds.",
        param=where,
        code="media_not_supported",
    )


def string_field(holder: Mapping[str, Any], name: str, where: str) -> str:
    """A part's field that must be text; raises `ApiError` (400)."""
    value = holder.get(name)
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string.", param=f"{where}.{name}")
    return value
