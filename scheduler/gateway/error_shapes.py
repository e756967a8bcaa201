"""Errors in the shape that clients of a route expect: OpenAI's, or Anthropic's on its routes. Pure."""

from __future__ import annotations

from typing import Any

from antiphon.scheduler.errors import ApiError

MESSAGES_PATH = "/v1/messages"

_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """What is answered on `path`."""
    anthropic = path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")
    return anthropic_body(error) if anthropic else error.body()


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """As Anthropic's API has it, whole or as an event."""
    other = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, other)
    return {"type": "error", "error": {"type": kind, "message": error.message}}
