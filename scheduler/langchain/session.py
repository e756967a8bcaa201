"""Whose round a model call is: the session id, and its parent's, from LangChain's `RunnableConfig`.

The thread id names the conversation. LangGraph says by `checkpoint_ns` which agent of it is calling:
"model:TASK" is the outermost agent's model, "tools:TASK|model:TASK" that of an agent that a tool started.
Without the last segment it names the agent, so a sub-agent is a session of its own with a link to the one
that started it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORK_HASH_BYTES = 6


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A session and the one that started it; None = not known."""

    session_id: str | None = None
    parent_id: str | None = None


def session_from_config(config: Mapping[str, Any]) -> SessionKey:
    """The first that is there: `configurable.session_id` (as it is), `configurable.thread_id`,
    `metadata.session_id`, `metadata.thread_id`; the latter three get a suffix for a sub-agent.
    """
    configurable: Mapping[str, Any] = config.get("configurable") or {}
    metadata: Mapping[str, Any] = config.get("metadata") or {}
    parent = _text(configurable.get("parent_session_id"))
    if given := _text(configurable.get("session_id")):
        return SessionKey(given, parent)
    names = configurable.get("thread_id"), metadata.get("session_id"), metadata.get("thread_id")
    root = next(filter(None, map(_text, names)), None)
    if root is None:
        return SessionKey(None, parent)
    namespace = _text(configurable.get("checkpoint_ns")) or ""
    agent = _without_last(namespace.split("|"))
    if not agent:
        return SessionKey(root, parent)
    return SessionKey(_fork_id(root, agent), _fork_id(root, _starter_of(agent)))


def _fork_id(root: str, agent: list[str]) -> str:
    """The outermost agent is the thread itself."""
    if not agent:
        return root
    digest = hashlib.blake2b("|".join(agent).encode(), digest_size=FORK_HASH_BYTES).hexdigest()
    return f"{root}/{digest}"


def _starter_of(agent: list[str]) -> list[str]:
    """The agent one level further out. A bare number tells apart what one task started more than once: it
    is no level."""
    while agent and agent[-1].isdecimal():
        agent = _without_last(agent)
    return _without_last(agent)


def _without_last(segments: list[str]) -> list[str]:
    return segments[:-1]


def _text(value: Any) -> str | None:
    """Ids may be given as UUIDs or numbers; an empty one is none."""
    return str(value) or None if value is not None else None
