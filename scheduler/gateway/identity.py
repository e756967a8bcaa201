"""Who a request belongs to: the session that it names, by whatever name; else the one that it goes on with.

A session id that is addressed to us and malformed is refused, never replaced: a silent fallback would split a
conversation. What other systems call a session may look like anything: if it is no id of ours it is hashed
into one, so that the same name is the same session. A request that names nothing is compared with the
conversations that we served (`message_chain`); no request is ever refused for what that finds.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from antiphon.scheduler.errors import (
    ApiError,
    invalid,
    ledger_unavailable,
    session_closed,
    session_not_found,
)
from antiphon.scheduler.gateway.message_chain import Links, scope_of
from antiphon.scheduler.hints import SessionFields
from antiphon.scheduler.session_config import SessionConfig
from antiphon.scheduler.session_store import LedgerUnavailable, SessionStore

log = logging.getLogger(__name__)

MAX_ID_CHARS = 255
MAX_REQUEST_ID_CHARS = 128
DEFAULT_TENANT = "default"

AGENT_HEADER, AGENT_PARENT_HEADER = "x-claude-code-agent-id", "x-claude-code-session-id"
"""A sub-agent's own id, and the session that it belongs to when no parent agent is named."""
METADATA_KEYS = ("session_id", "thread_id", "conversation_id")


@dataclass(frozen=True, slots=True)
class Identity:
    session_id: str
    identified_by: str
    """Which signal won: "header:x-session-id", "body:session.id", "body:session_id", "header:<alias>",
    "body:<alias>", "path" (of the request), "prefix" (goes on where a session ended), "prefix:fork" (branches
    off one), "prefix:compaction" (goes on, with early messages rewritten), "retry" (is one, of a call with an
    idempotency key) or "new"."""
    tenant: str = DEFAULT_TENANT
    parent_id: str | None = None
    final: bool = False
    """Close the session after this answer."""

    @property
    def kind(self) -> str:
        """`identified_by` without names that a configuration gives: few values, for metrics."""
        head, _, name = self.identified_by.partition(":")
        return head if head in ("header", "body") and name not in _OWN_NAMES else self.identified_by


_OWN_NAMES = ("x-session-id", "session.id", "session_id")


@dataclass(frozen=True, slots=True)
class BodySignals:
    """What a body says of its session."""

    session: SessionFields
    session_id: str | None = None
    litellm_session_id: Any = None
    program_id: Any = None
    metadata: Any = None
    nvext: Any = None


def identify(
    headers: Mapping[str, str], body: BodySignals, config: SessionConfig, tenant: str = DEFAULT_TENANT
) -> Identity | None:
    """The session that a request names; None if it names none. `headers` has lower-case names.

    Raises `ApiError` (400, invalid_session_id) for an id of ours that is not 1 to 255 visible ASCII
    characters. The parent is the one that the request names, None if that is the session itself.
    """
    parent_id = named_parent(headers, body, config)
    for identified_by, param, value in (
        ("header:x-session-id", "X-Session-ID", headers.get("x-session-id")),
        ("body:session.id", "session.id", body.session.id),
        ("body:session_id", "session_id", body.session_id),
    ):
        if value is not None:
            return _identity(checked_id(value, param), identified_by, tenant, parent_id)
    for identified_by, name in _aliases(headers, body, config):
        if isinstance(name, str) and name:
            return _identity(_as_id(name), identified_by, tenant, parent_id)
    return None


def new_identity(tenant: str = DEFAULT_TENANT, parent_id: str | None = None) -> Identity:
    """A session that nobody has named."""
    return Identity(new_session_id(), "new", tenant, parent_id)


def new_session_id() -> str:
    return f"sess_{secrets.token_hex(12)}"


def _identity(session_id: str, identified_by: str, tenant: str, parent_id: str | None) -> Identity:
    return Identity(session_id, identified_by, tenant, parent_id if parent_id != session_id else None)


def _aliases(
    headers: Mapping[str, str], body: BodySignals, config: SessionConfig
) -> Iterator[tuple[str, Any]]:
    """Other systems' names for a session, in order: (signal, value)."""
    for header in config.aliases:
        yield f"header:{header}", headers.get(header)
    yield "body:litellm_session_id", body.litellm_session_id
    yield "body:program_id", body.program_id
    control = body.nvext.get("session_control") if isinstance(body.nvext, Mapping) else None
    if isinstance(control, Mapping):
        yield "body:nvext.session_control.session_id", control.get("session_id")
    if isinstance(body.metadata, Mapping):
        for key in METADATA_KEYS:
            yield f"body:metadata.{key}", body.metadata.get(key)


def named_parent(headers: Mapping[str, str], body: BodySignals, config: SessionConfig) -> str | None:
    """The parent that a request names, whether or not it names its session. Raises `ApiError`."""
    for param, value in (
        ("X-Parent-Session-ID", headers.get("x-parent-session-id")),
        ("session.parent_id", body.session.parent_id),
    ):
        if value is not None:
            return checked_id(value, param)
    for header in config.parent_aliases:
        if headers.get(header):
            return _as_id(headers[header])
    if headers.get(AGENT_HEADER) and headers.get(AGENT_PARENT_HEADER):
        return _as_id(headers[AGENT_PARENT_HEADER])
    return None


class Identifier:
    """Finds the session of every request. Used from one event loop."""

    def __init__(
        self,
        config: SessionConfig,
        store: SessionStore | None = None,
        on_identified: Callable[[str], None] = lambda kind: None,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Without a store nothing is inferred. `on_identified` gets each identity's `kind`, `on_failed` is
        told of each inference that could not be made because the store was away."""
        self._config = config
        self._store = store
        self._on_identified = on_identified
        self._on_failed = on_failed

    async def identify(
        self,
        headers: Mapping[str, str],
        body: BodySignals,
        tenant: str,
        final: bool,
        conversation: Callable[[], tuple[str, Links]] | None = None,
        path_id: str | None = None,
    ) -> Identity:
        """The session that the request names, else the one that it goes on with, else a new one.

        `path_id` is the session that the request's path names, which wins. `conversation` makes (scope,
        links) of the messages; None when there are none. It is called only if they are needed. Raises
        `ApiError` as the function `identify` does, and for nothing else.
        """
        found = identify(headers, body, self._config, tenant)
        if path_id is not None:
            parent_id = named_parent(headers, body, self._config)
            found = _identity(checked_id(path_id, "session_id"), "path", tenant, parent_id)
        if found is None:
            found = await self._infer(tenant, conversation) if conversation is not None else None
            found = found or new_identity(tenant)
            named = named_parent(headers, body, self._config)
            if named is not None and named != found.session_id:
                found = replace(found, parent_id=named)
        self._on_identified(found.kind)
        return replace(found, final=True) if final else found

    async def must_be_open(self, identity: Identity) -> None:
        """Raises `ApiError`: 404 if the session is unknown, 410 if it is closed, 503 if nobody can say."""
        if self._store is None:
            raise ledger_unavailable("`must_exist` needs the ledger, and this gateway has none.")
        try:
            document = await self._store.get(identity.tenant, identity.session_id)
        except LedgerUnavailable as error:
            raise ledger_unavailable(f"Whether the session exists cannot be told: {error}.") from error
        if document is None:
            raise session_not_found(identity.session_id)
        if document.status == "closed":
            raise session_closed(identity.session_id)

    async def _infer(self, tenant: str, conversation: Callable[[], tuple[str, Links]]) -> Identity | None:
        if self._store is None or not self._config.infer:
            return None
        scope, links = conversation()
        if not links.turns:
            return None  # nothing that we answered is in it
        try:
            found = await self._store.find_chain(scope, links.own())
            if found is not None:
                at, session_id, is_tip = found
                if not is_tip and at < links.asked:
                    # Somebody was asked just this before. Whoever's last answer is here goes on all the same.
                    answered = await self._store.find_chain(scope, links.own()[links.asked : links.asked + 1])
                    if answered is not None and answered[2]:
                        _, session_id, is_tip = answered
                if is_tip:
                    return Identity(session_id, "prefix", tenant)
                return Identity(new_session_id(), "prefix:fork", tenant, session_id)
            compacted = await self._store.find_turn(scope, links.turns)
        except LedgerUnavailable as error:
            log.debug("a conversation is not looked up: %s", error)
            self._on_failed()
            return None
        return Identity(compacted, "prefix:compaction", tenant) if compacted is not None else None


def conversation_scope(tenant: str, model: str, prompt_cache_key: Any) -> str:
    """`message_chain.scope_of`, for a cache key as it stands in a body."""
    return scope_of(tenant, model, prompt_cache_key if isinstance(prompt_cache_key, str) else None)


def given_request_id(headers: Mapping[str, str]) -> str | None:
    """The client's `X-Request-ID`, if it is fit to be logged and sent back."""
    given = headers.get("x-request-id", "")
    return given if 0 < len(given) <= MAX_REQUEST_ID_CHARS and _visible_ascii(given) else None


def checked_id(value: str, param: str) -> str:
    """The value, if it is a session id; raises `ApiError` (400, invalid_session_id)."""
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise _invalid_session_id(f"it has {len(value)} characters", param)
    if not _visible_ascii(value):
        raise _invalid_session_id("it has other characters", param)
    return value


def _as_id(name: str) -> str:
    """Another system's name for a session, as an id: itself if it is one, else its hash."""
    if len(name) <= MAX_ID_CHARS and _visible_ascii(name):
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16)
    return f"sess_{digest.hexdigest()}"


def _visible_ascii(value: str) -> bool:
    return all("!" <= char <= "~" for char in value)


def _invalid_session_id(what: str, param: str) -> ApiError:
    return invalid(
        f"A session id is 1 to {MAX_ID_CHARS} visible ASCII characters without spaces; {what}.",
        param=param,
        code="invalid_session_id",
    )
