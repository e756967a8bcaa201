"""Errors by whose fault they are: the operator's (`UserError`), or a client's or the fleet's (`ApiError`).

An `ApiError` becomes an OpenAI-shaped answer, `{"error": {"message", "type", "param", "code"}}`. Its status
is never 409: OpenAI's clients retry that one.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from antiphon.scheduler.rounds import RoundRefused

WOULD_WAIT = "would_wait"
"""A refusal by the predicted wait: for clients the code is `overloaded`, and the status 429."""
MAX_UPSTREAM_MESSAGE_CHARS = 2000
"""Of an engine's own error text, what is passed on."""


class UserError(Exception):
    """The operator's command, configuration or environment is wrong: what, where, what to do."""


class ApiError(Exception):
    """A request that is answered by an error. `kind` is OpenAI's `type`, `param` the field at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`retry-after-ms` is what OpenAI's clients read first; `Retry-After` is for everybody else."""
        if self.retry_after_s is None:
            return {}
        return {
            "retry-after-ms": str(math.ceil(self.retry_after_s * 1000)),
            "Retry-After": str(max(1, math.ceil(self.retry_after_s))),
        }


def invalid(message: str, *, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, code, message, param=param)


def model_not_found(model: str, served: tuple[str, ...]) -> ApiError:
    known = ", ".join(repr(name) for name in served)
    return ApiError(
        404, "model_not_found", f"The model {model!r} does not exist here; served: {known}.", param="model"
    )


def context_length_exceeded(prompt_tokens: int, window_tokens: int, param: str) -> ApiError:
    return invalid(
        f"This model's window is {window_tokens} tokens and the prompt has {prompt_tokens}: "
        f"at least one token must be left for the answer. Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def body_too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, "body_too_large", f"The request body is over the limit of {limit_bytes} bytes.")


def no_engine(message: str, retry_after_s: float = 1.0) -> ApiError:
    return ApiError(503, "no_engine_available", message, kind="overloaded_error", retry_after_s=retry_after_s)


def overloaded(message: str, retry_after_s: float) -> ApiError:
    """503: a bound of this replica is hit. Nothing was begun."""
    return ApiError(503, "overloaded", message, kind="overloaded_error", retry_after_s=retry_after_s)


def gateway_stopping() -> ApiError:
    """503: another replica, or this one's successor, takes the request."""
    return ApiError(
        503,
        "gateway_stopping",
        "The gateway is stopping: send the request again.",
        kind="overloaded_error",
        retry_after_s=1.0,
    )


def permission_denied(message: str) -> ApiError:
    return ApiError(403, "permission_denied", message, kind="permission_error")


def ledger_unavailable(message: str) -> ApiError:
    return ApiError(503, "ledger_unavailable", message, kind="server_error", retry_after_s=1.0)


def history_lost(session_id: str, why: str) -> ApiError:
    """410: an append has nothing to go on with. Our clients then send the whole history."""
    return ApiError(
        410, "history_lost", f"The history of session {session_id!r} is not there: {why}. Send all messages."
    )


def session_closed(session_id: str) -> ApiError:
    """410: for who says that the session must be open; for others it is opened again."""
    return ApiError(410, "session_closed", f"The session {session_id!r} is closed.", param="session.id")


def session_not_found(session_id: str) -> ApiError:
    return ApiError(404, "session_not_found", f"There is no session {session_id!r}.", param="session.id")


def deadline_exceeded(deadline_s: float) -> ApiError:
    return ApiError(
        504, "deadline_exceeded", f"The round did not finish within {deadline_s:g} s.", kind="server_error"
    )


def stream_broke(message: str) -> ApiError:
    """The answer broke off after its first token."""
    return ApiError(502, "stream_broke", message, kind="server_error")


def key_reused() -> ApiError:
    return ApiError(
        422,
        "idempotency_key_reused",
        "This Idempotency-Key was used for another request: make a new one for each call.",
        param="Idempotency-Key",
    )


def from_refusal(refusal: RoundRefused) -> ApiError:
    """The answer to a round that never started."""
    message = str(refusal)
    if refusal.code == "bad_upstream_request":
        usable = 400 <= refusal.status < 500 and refusal.status != 409
        return ApiError(
            refusal.status if usable else 400, refusal.code, upstream_message(refusal.body) or message
        )
    retry_after_s = refusal.retry_after_s if refusal.retry_after_s > 0 else None
    if refusal.code in ("rate_limit_exceeded", "session_limit_exceeded"):
        return ApiError(429, refusal.code, message, kind="rate_limit_error", retry_after_s=retry_after_s)
    if refusal.code == WOULD_WAIT:
        return ApiError(429, "overloaded", message, kind="overloaded_error", retry_after_s=retry_after_s)
    if refusal.code == "replaced_by_retry":
        return ApiError(410, refusal.code, message)
    if refusal.code == "idempotency_key_reused":
        return key_reused()
    if refusal.code == "upstream_failed":
        return ApiError(502, refusal.code, message, kind="server_error", retry_after_s=retry_after_s)
    return ApiError(503, refusal.code, message, kind="overloaded_error", retry_after_s=retry_after_s or 1.0)


def upstream_message(body: bytes) -> str:
    """What an engine's error answer says (OpenAI's, SGLang's or FastAPI's shape), or its text; bounded."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return body[:MAX_UPSTREAM_MESSAGE_CHARS].decode("utf-8", "replace").strip()
    inner = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or ""
    text = inner if isinstance(inner, str) else msgspec.json.encode(inner).decode()
    return text[:MAX_UPSTREAM_MESSAGE_CHARS].strip()
