"""What a caller may say of a round, as keyword arguments of a model call, and how it goes onto the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HINTS = (
    "session_id", "parent_session_id", "session_final", "expected_gap_s", "expected_output_tokens",
    "expected_rounds", "remaining_rounds", "slo", "priority", "ttl_s",
)  # fmt: skip
"""Keyword arguments of `invoke` and its like that are for Antiphon, not for the model."""

_SESSION = ("expected_gap_s", "expected_output_tokens", "expected_rounds", "slo", "priority", "ttl_s")


def take_hints(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the hints from `kwargs`; those that are not None."""
    taken = {name: kwargs.pop(name) for name in HINTS if name in kwargs}
    return {name: value for name, value in taken.items() if value is not None}


def headers_of(hints: Mapping[str, Any]) -> dict[str, str]:
    """The session's names are headers: gateways and logs on the way see them without reading the body."""
    headers = {}
    if (session_id := hints.get("session_id")) is not None:
        headers["X-Session-ID"] = str(session_id)
    if (parent := hints.get("parent_session_id")) is not None:
        headers["X-Parent-Session-ID"] = str(parent)
    if hints.get("session_final"):
        headers["X-Session-Final"] = "true"
    return headers


def session_object(hints: Mapping[str, Any]) -> dict[str, Any]:
    """The body's `session`; empty when nothing was said."""
    session = {name: hints[name] for name in _SESSION if name in hints}
    if (remaining := hints.get("remaining_rounds")) is not None:
        session["next_round"] = {"remaining_rounds": remaining}
    return session


def add_to_request(request: dict[str, Any], hints: Mapping[str, Any]) -> None:
    """Merge into the `extra_headers` and `extra_body` of an OpenAI request; what is there already wins."""
    if headers := headers_of(hints):
        given = request.get("extra_headers") or {}
        named = {name.lower() for name in given}
        new = {name: value for name, value in headers.items() if name.lower() not in named}
        request["extra_headers"] = {**new, **given}
    if session := session_object(hints):
        body = request.get("extra_body") or {}
        request["extra_body"] = {**body, "session": {**session, **(body.get("session") or {})}}
