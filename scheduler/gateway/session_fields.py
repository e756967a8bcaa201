"""What a request says of its session, read once: the signals that name it, and the hints that it gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from antiphon.scheduler.errors import ApiError, invalid
from antiphon.scheduler.gateway.identity import BodySignals
from antiphon.scheduler.hints import BadHint, Hints, read_hints, read_session


class HeaderItems(Protocol):
    """Starlette's headers: a name may come more than once."""

    def items(self) -> Iterable[tuple[str, str]]: ...


class SessionBody(Protocol):
    """The fields of a body that are read here."""

    @property
    def session(self) -> Mapping[str, Any] | None: ...
    @property
    def session_id(self) -> str | None: ...
    @property
    def litellm_session_id(self) -> Any: ...
    @property
    def program_id(self) -> Any: ...
    @property
    def metadata(self) -> Any: ...
    @property
    def nvext(self) -> Any: ...
    @property
    def priority(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Said:
    """All of it."""

    headers: Mapping[str, str]
    """By lower-case name; several values of one are joined by commas."""
    signals: BodySignals
    hints: Hints


def read_said(headers: HeaderItems, body: SessionBody) -> Said:
    """Raises `ApiError` (400, invalid_session_hint) for what is addressed to us and has the wrong type."""
    named = joined(headers)
    try:
        session, warnings = read_session(body.session)
        hints = read_hints(named, session, body.nvext, body.priority, warnings)
    except BadHint as error:
        raise bad_hint(error) from error
    signals = BodySignals(
        session, body.session_id, body.litellm_session_id, body.program_id, body.metadata, body.nvext
    )
    return Said(named, signals, hints)


def joined(headers: HeaderItems) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers.items():
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def bad_hint(error: BadHint) -> ApiError:
    return invalid(str(error), param=error.param, code="invalid_session_hint")
