"""What a conversation looks like from outside: a hash chain over its messages. Pure.

A client that sends no session id is recognised by what it sends back: the messages that were there before.
Each message's value covers it and all before it, tools included: equal values mean equal prefixes. Messages
are hashed as clients send them back: unknown fields and reasoning are dropped, no content equals empty
content, arguments of tool calls count as what they parse to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VALUE_BYTES = 16
_SYSTEM_ROLES = ("system", "developer")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Links:
    """The values of one list of messages."""

    values: tuple[bytes, ...]
    """One per message: of all messages up to it, and of the tools."""
    system_messages: int
    """Leading ones; the last of their values is link 0."""
    openers: int
    """So many of the first values stand before any answer: independent conversations share those."""
    turns: tuple[bytes, ...]
    """One per answer, the latest first: of tools, system messages, the answer and the message before it, but
    of nothing else. Still the same when early messages were summarised or dropped."""
    asked: int = 0
    """So many messages stand behind the last answer."""

    @property
    def tip(self) -> bytes:
        return self.values[-1]

    def own(self) -> tuple[bytes, ...]:
        """Values that no other conversation is likely to have, the longest first."""
        return self.values[self.openers :][::-1]


def chain(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[bytes]:
    """One value per message."""
    return list(links(messages, tools).values)


def links(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Links:
    """All that is to be known of these messages; `tools` as in the request (None and [] are the same)."""
    value = _digest(b"tools", _canonical_json(list(tools)) if tools else b"")
    values: list[bytes] = []
    turns: list[bytes] = []
    system_messages, openers, asked = 0, len(messages), len(messages)
    link_0, before = value, b""
    for at, message in enumerate(messages):
        canonical = _canonical(message)
        value = _digest(value, canonical)
        values.append(value)
        role = message.get("role")
        if at == system_messages and role in _SYSTEM_ROLES:
            system_messages, link_0 = at + 1, value
            continue
        if role == "assistant":
            openers, asked = min(openers, at), len(messages) - 1 - at
            turns.append(_digest(b"turn", link_0, before, canonical))
        before = canonical
    return Links(tuple(values), system_messages, openers, tuple(reversed(turns)), asked)


@dataclass(frozen=True, slots=True)
class Trail:
    """Where a conversation ends: what the values of its next messages depend on, at no cost of what was."""

    value: bytes
    """The last message's, or that of the tools alone."""
    link_0: bytes
    before: bytes
    """The last message itself."""
    opening: bool = True
    """Only system messages so far."""
    own: tuple[bytes, ...] = ()
    """As `Links.own()`, the latest ones."""
    turn: bytes | None = None
    """As `Links.turns[0]`."""


def trail(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    since: Trail | None = None,
    *,
    kept: int = 64,
) -> Trail:
    """After these messages: of a conversation that begins with them, or goes on with them `since` (then the
    tools are those of before)."""
    if since is None:
        value = _digest(b"tools", _canonical_json(list(tools)) if tools else b"")
        since = Trail(value, value, b"")
    value, link_0, before, opening = since.value, since.link_0, since.before, since.opening
    own, turn = since.own[::-1], since.turn
    for message in messages:
        canonical = _canonical(message)
        value = _digest(value, canonical)
        role = message.get("role")
        opening = opening and role in _SYSTEM_ROLES
        if opening:
            link_0 = value
            continue
        if role == "assistant":
            turn = _digest(b"turn", link_0, before, canonical)
        if turn is not None:
            own = (*own[1 - kept :], value)
        before = canonical
    return Trail(value, link_0, before, opening, own[::-1], turn)


def reply_message(message: Message) -> dict[str, Any]:
    """An answer's message as clients send it back: role, text, and names and arguments of its tool calls."""
    reply: dict[str, Any] = {"role": "assistant", "content": message.get("content") or None}
    if calls := message.get("tool_calls"):
        reply["tool_calls"] = [
            {"id": call.get("id"), "type": "function", "function": dict(call.get("function") or {})}
            for call in calls
        ]
    return reply


def scope_of(tenant: str, model: str, prompt_cache_key: str | None = None) -> str:
    """Within what conversations are told apart: never across tenants or models."""
    parts = [tenant.encode(), model.encode(), b"" if prompt_cache_key is None else _text(prompt_cache_key)]
    return _digest(b"scope", *parts, b"-" if prompt_cache_key is None else b"+").hex()


def _canonical(message: Message) -> bytes:
    """Different for messages that differ in anything a prompt could show."""
    fields = [
        _text(message.get("role")),
        _text(message.get("name")),
        _content(message.get("content")),
        _text(message.get("tool_call_id")),
        *map(_call, _calls(message)),
    ]
    return _framed(fields)


def _calls(message: Message) -> Iterable[Mapping[str, Any]]:
    found = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    found.append(message.get("function_call"))  # what it was called before there could be several
    return [function for function in found if isinstance(function, Mapping)]


def _call(function: Mapping[str, Any]) -> bytes:
    """Ids are left out: clients make their own."""
    return _framed([_text(function.get("name")), _arguments(function.get("arguments"))])


def _arguments(arguments: Any) -> bytes:
    """As parsed: clients parse them and write them anew, with other spaces, another order, 1 for 1.0."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return b"t" + _text(arguments)
    return b"j" + _canonical_json(arguments or {})


def _content(content: Any) -> bytes:
    """Text, whether bare or the only part; several parts stay apart, since a template may show the seams."""
    if not content:
        return b""
    if isinstance(content, str):
        return b"t" + _text(content)
    if isinstance(content, Sequence):
        parts = [part for part in content if not _is_empty_text(part)]
        if len(parts) == 1 and _is_text(parts[0]):
            return b"t" + _text(parts[0]["text"])
        return b"p" + _framed(map(_part, parts)) if parts else b""
    return b"j" + _canonical_json(content)


def _part(part: Any) -> bytes:
    return b"t" + _text(part["text"]) if _is_text(part) else b"j" + _canonical_json(part)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_empty_text(part: Any) -> bool:
    return _is_text(part) and not part["text"]


def _canonical_json(value: Any) -> bytes:
    """The same for whatever JSON calls the same. Nesting that is too deep for it counts by its repr."""
    try:
        return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), default=repr).encode()
    except (RecursionError, ValueError, TypeError):
        return b"?" + repr(value).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _text(value: Any) -> bytes:
    if value is None:
        return b""
    return (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")


def _framed(parts: Iterable[bytes]) -> bytes:
    """Parts with their lengths in front, so that none can run into the next."""
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(8, "little"), part))


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(_framed(parts), digest_size=VALUE_BYTES).digest()
