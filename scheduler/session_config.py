"""Configuration of sessions, [session]: which headers name them elsewhere, and whether to infer them."""

from __future__ import annotations

import re
from dataclasses import dataclass

ALIASES = (
    "x-dynamo-session-id",
    "x-claude-code-agent-id",  # before its session: a sub-agent is a session of its own
    "x-claude-code-session-id",
    "thread-id",  # Codex; its session-id is that of the whole run
    "session-id",
    "session_id",
    "x-session-affinity",  # OpenCode, Fireworks, AIPerf
    "x-opencode-session",
    "agent-session-id",  # Goose, Envoy AI gateway
    "x-litellm-session-id",
    "x-grok-conv-id",
    "x-hermes-session-id",
    "x-smg-routing-key",
    "x-aibrix-session-key",
)
PARENT_ALIASES = ("x-dynamo-parent-session-id", "x-codex-parent-thread-id", "x-claude-code-parent-agent-id")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")


@dataclass(frozen=True, slots=True)
class SessionConfig:
    aliases: tuple[str, ...] = ALIASES
    """Headers that name the session when `X-Session-ID` and the body do not, the first one that is there."""
    parent_aliases: tuple[str, ...] = PARENT_ALIASES
    """Headers that name its parent when `X-Parent-Session-ID` and the body do not."""
    infer: bool = True
    """Know a conversation that names no session by its earlier messages."""

    def __post_init__(self) -> None:
        for name in ("aliases", "parent_aliases"):
            for header in getattr(self, name):
                if not _HEADER.fullmatch(header):
                    raise ValueError(f"{name}: {header!r} is not a header's name in lower case")
