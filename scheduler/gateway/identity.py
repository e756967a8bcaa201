"""Who a request belongs to: the session id, found in headers or body, or made.

An explicit id that is malformed is refused, never replaced: a silent fallback would split a conversation.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from antiphon.scheduler.errors import ApiError, invalid

MAX_ID_CHARS = 255
MAX_REQUEST_ID_CHARS = 128
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Identity:
    session_id: str
    identified_by: str
    """Which signal won: "header:x-session-id", "body:session.id", "body:session_id" or "new"."""
    tenant: str = DEFAULT_TENANT


def identify(headers: Mapping[str, str], session: str | None, session_id: str | None) -> Identity:
    """The first signal that is present wins; `headers` has lower-case names.

    `session` is the body's `session.id`, `session_id` the body's field of that name. Raises `ApiError`
    (400, invalid_session_id) for an explicit id that is not 1 to 255 visible ASCII characters.
    """
    signals = (
        ("header:x-session-id", "X-Session-ID", headers.get("x-session-id")),
        ("body:session.id", "session.id", session),
        ("body:session_id", "session_id", session_id),
    )
    for identified_by, param, value in signals:
        if value is not None:
            return Identity(_checked(value, param), identified_by)
    return Identity(f"sess_{secrets.token_hex(12)}", "new")


def given_request_id(headers: Mapping[str, str]) -> str | None:
    """The client's `X-Request-ID`, if it is fit to be logged and sent back."""
    given = headers.get("x-request-id", "")
    return given if 0 < len(given) <= MAX_REQUEST_ID_CHARS and _visible_ascii(given) else None


def _checked(value: str, param: str) -> str:
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise _invalid_session_id(f"it has {len(value)} characters", param)
    if not _visible_ascii(value):
        raise _invalid_session_id("it has other characters", param)
    return value


def _visible_ascii(value: str) -> bool:
    return all("!" <= char <= "~" for char in value)


def _invalid_session_id(what: str, param: str) -> ApiError:
    return invalid(
        f"A session id is 1 to {MAX_ID_CHARS} visible ASCII characters without spaces; {what}.",
        param=param,
        code="invalid_session_id",
    )
