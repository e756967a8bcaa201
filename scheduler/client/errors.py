"""What can go wrong with a call, by whose fault it is.

AntiphonError
    Refused        the caller's: the request is wrong or not allowed (400, 401, 403, 404, 410, 413, 422)
    Overloaded     nobody's: the fleet cannot take it now (429, 503); `retry_after_s` says when to come back
    ServerFault    the gateway's or an engine's (500, 502, 504), or an answer that cannot be read
    Unreachable    the network's: no answer, or it broke off before it began
    StreamBroke    an answer that had begun did not come to its end
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import msgspec

OVERLOADED = (429, 503)


class AntiphonError(Exception):
    """A call that failed. A session is as it was before it: the call can be made again."""


class Unreachable(AntiphonError):
    """No answer from the gateway."""


class StreamBroke(AntiphonError):
    """The answer broke off; what came of it is not in the conversation."""


class SessionBusy(RuntimeError):
    """The session's last answer has not ended yet. What is to run side by side is a fork."""


class ApiError(AntiphonError):
    """The gateway answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        where = f" ({param})" if param else ""
        super().__init__(f"HTTP {status} {code}: {message}{where}")
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id


class Refused(ApiError):
    """The request is at fault: it would be refused again."""


class Overloaded(ApiError):
    """The fleet is full, or the caller's limit is reached."""


class ServerFault(ApiError):
    """The gateway or an engine failed."""


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None
    param: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The exception for an answer that is no success; `headers` has lower-case names."""
    try:
        told = msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        told = _Error(body[:500].decode("utf-8", "replace").strip() or "no message")
    kind = Overloaded if status in OVERLOADED else ServerFault if status >= 500 else Refused
    return kind(
        status,
        told.message,
        code=str(told.code or ""),
        param=told.param,
        retry_after_s=retry_after_s(headers),
        request_id=headers.get("x-request-id", ""),
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The server's wish; None = none, or not a number of seconds."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wished = float(headers[name]) / per_second
        except (KeyError, ValueError):
            continue
        if 0 <= wished < float("inf"):
            return wished
    return None


@contextlib.contextmanager
def ignoring_not_found() -> Iterator[None]:
    """For calls after which the session need not be there, or need not have been."""
    try:
        yield
    except Refused as error:
        if error.status not in (404, 410):
            raise
