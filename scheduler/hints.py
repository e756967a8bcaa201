"""What a client says of a round and its session beyond the prompt: targets, times, lengths, its end. Pure.

Each fact has one meaning here, whoever's spelling it came in. The body's `session` wins over our headers
(`X-Session-Hints`, `X-Session-TTL`, `X-Session-Final`), those over `nvext.agent_hints`, and those over the
headers of other gateways. What was addressed to us and is wrong is refused; in a header that was meant for
another system it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from antiphon.scheduler import hint_headers
from antiphon.scheduler.hint_headers import MAX_CLASS_CHARS, MAX_TTL_S, MIN_TTL_S, BadHint

__all__ = [
    "NO_HINTS", "BadHint", "Hints", "SessionFields", "Slos", "converted", "read_hints", "read_session",
    "targets",
]  # fmt: skip

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

Milliseconds = Annotated[float, Meta(gt=0, le=1e9)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TtlS = Annotated[float, Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]


class SloFields(msgspec.Struct, frozen=True, rename={"slo_class": "class"}):
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    deadline_ms: Milliseconds | None = None
    slo_class: Annotated[str, Meta(max_length=MAX_CLASS_CHARS)] | None = None


class NextRoundFields(msgspec.Struct, frozen=True):
    expected_input_tokens: Tokens | None = None
    expected_output_tokens: Tokens | None = None
    remaining_rounds: Tokens | None = None
    same_tools: bool | None = None


class SessionFields(msgspec.Struct, frozen=True):
    """The body's `session`. None means "not given": clients send null for that."""

    id: str | None = None
    parent_id: str | None = None
    final: bool | None = None
    ttl_s: TtlS | None = None
    expected_gap_s: Seconds | None = None
    expected_output_tokens: Tokens | None = None
    expected_rounds: Tokens | None = None
    next_round: NextRoundFields | None = None
    slo: SloFields | None = None
    priority: Priority | None = None
    append: bool | None = None
    must_exist: bool | None = None
    after_round: Tokens | None = None


class _AgentHints(msgspec.Struct, frozen=True):
    priority: float | None = None
    strict_priority: float | None = None
    osl: Tokens | None = None
    iat: Milliseconds | None = None
    total_requests: Tokens | None = None
    speculative_prefill: bool | None = None
    latency_sensitivity: float | None = None


@dataclass(frozen=True, slots=True)
class Hints:
    """None = not said. Times in seconds."""

    ttft_s: float | None = None
    itl_s: float | None = None
    deadline_s: float | None = None
    slo_class: str | None = None
    priority: int | None = None
    """Higher is more important."""
    ttl_s: float | None = None
    """How long the session is kept when idle."""
    final: bool = False
    """The session ends with this round."""
    expected_gap_s: float | None = None
    """From the end of this answer to the next request."""
    expected_output_tokens: int | None = None
    """Of this round."""
    next_input_tokens: int | None = None
    next_output_tokens: int | None = None
    """Of the next one."""
    remaining_rounds: int | None = None
    """After this one."""
    expected_rounds: int | None = None
    same_tools: bool | None = None
    append: bool = False
    """The messages are only what is new in the session."""
    must_exist: bool = False
    """Refuse the round if the session is unknown or closed."""
    after_round: int = 0
    """Of an append: the last round that the client knows of; refuse if the history ends before it."""
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """What was not understood, for the answer."""
    ttft_from: str = field(default="default", compare=False)
    itl_from: str = field(default="default", compare=False)
    """What named the targets: "body", "header" or "default"."""

    @property
    def ends(self) -> bool:
        """No round is to follow this one."""
        return self.final or self.remaining_rounds == 0


NO_HINTS = Hints()


@dataclass(frozen=True, slots=True)
class Slos:
    """A round's targets, and what named each: "body", "header" or "default"."""

    ttft_s: float
    itl_s: float
    ttft_from: str = field(default="default", compare=False)
    itl_from: str = field(default="default", compare=False)


def targets(hints: Hints, default: Slos) -> Slos:
    """The request's own targets where it names them, else `default`'s."""
    return Slos(
        default.ttft_s if hints.ttft_s is None else hints.ttft_s,
        default.itl_s if hints.itl_s is None else hints.itl_s,
        hints.ttft_from,
        hints.itl_from,
    )


def read_session(given: Mapping[str, Any] | None) -> tuple[SessionFields, tuple[str, ...]]:
    """The body's `session`, and warnings for keys in it that mean nothing here. Raises `BadHint`."""
    if given is None:
        return NO_SESSION, ()
    return converted(given, SessionFields, "session")


def read_hints(
    headers: Mapping[str, str],
    session: SessionFields | None = None,
    nvext: Any = None,
    priority: int | None = None,
    warnings: tuple[str, ...] = (),
) -> Hints:
    """All hints of a request in one; `headers` has lower-case names, several values joined by commas.

    `priority` is the body's field of that name, as SGLang has it. Raises `BadHint`.
    """
    told = list(warnings)
    body = _of_session(session or NO_SESSION)
    header = hint_headers.ours(headers, told)
    agent = _of_nvext(nvext) if nvext is not None else {}
    if priority is not None:
        agent.setdefault("priority", priority)
    found = {**hint_headers.of_peers(headers), **agent, **header, **body}
    if not found and not told:
        return NO_HINTS
    for name in ("ttft", "itl"):
        if f"{name}_s" in found:
            found[f"{name}_from"] = "body" if f"{name}_s" in body else "header"
    return Hints(**found, warnings=tuple(told))


# ---------------------------------------------------------------- the body

NO_SESSION = SessionFields()


def _of_session(session: SessionFields) -> dict[str, Any]:
    slo, following = session.slo or SloFields(), session.next_round or NextRoundFields()
    return _given(
        ttft_s=_seconds(slo.ttft_ms),
        itl_s=_seconds(slo.tpot_ms),
        deadline_s=_seconds(slo.deadline_ms),
        slo_class=slo.slo_class,
        priority=session.priority,
        ttl_s=session.ttl_s,
        final=session.final,
        expected_gap_s=session.expected_gap_s,
        expected_output_tokens=session.expected_output_tokens,
        next_input_tokens=following.expected_input_tokens,
        next_output_tokens=following.expected_output_tokens,
        remaining_rounds=following.remaining_rounds,
        expected_rounds=session.expected_rounds,
        same_tools=following.same_tools,
        append=session.append,
        must_exist=session.must_exist,
        after_round=session.after_round,
    )


def _of_nvext(nvext: Any) -> dict[str, Any]:
    """Dynamo's `nvext.agent_hints`; its `prefix_id` is new in every request and names no session."""
    given = nvext.get("agent_hints") if isinstance(nvext, Mapping) else None
    if given is None:
        return {}
    hints: _AgentHints = _converted(given, _AgentHints, "nvext.agent_hints")
    strict = hints.strict_priority if hints.priority is None else hints.priority
    return _given(
        priority=None if strict is None else _as_priority(strict, "nvext.agent_hints.priority"),
        expected_output_tokens=hints.osl,
        expected_gap_s=_seconds(hints.iat),
        expected_rounds=hints.total_requests,
    )


_AT_PATH = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)


def converted(given: Any, kind: type[S], where: str) -> tuple[S, tuple[str, ...]]:
    """A JSON object as a `kind`, and warnings for keys in it that mean nothing here. Raises `BadHint`.

    `where` is what the object is called in both; "" = it is the body itself.
    """
    return _converted(given, kind, where), tuple(_unknown(given, kind, where))


def _converted(given: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(given, kind)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        found = _AT_PATH.match(str(error))
        what, path = (found["what"], found["path"]) if found else (str(error), "")
        param = ".".join(filter(None, (where, path)))
        shown = f"`{param}`" if param else "the body"
        raise BadHint(param, f"Wrong value for {shown}: {what[:1].lower()}{what[1:]}.") from error


def _unknown(given: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> list[str]:
    """Keys that `kind` does not have, at any depth."""
    inner: dict[str, type[msgspec.Struct]] = {"slo": SloFields, "next_round": NextRoundFields}
    found = []
    for key, value in given.items():
        path = f"{where}.{key}"[:100] if where else key[:100]
        if key not in kind.__struct_encode_fields__:
            found.append(f"unknown key `{path}` was ignored")
        elif key in inner and isinstance(value, Mapping):
            found += _unknown(value, inner[key], path)
    return found


# ---------------------------------------------------------------- small things


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _as_priority(value: float, param: str) -> int:
    if not -(2**31) <= value < 2**31:
        raise BadHint(param, f"`{param}` is out of range.")
    return round(value)
