"""What the gateway remembers of what was said: looked up before a round, added to after it.

Before: the conversation that a request goes on with, and its prompt as ids (`history.py`). After: the round
goes into the token log, and the end of the conversation where requests without an id look for it. Both happen
before the answer's last event goes out, so that a client that sends its next round at once is known. What
fails here fails no round: it is told in the answer's `session.warnings`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.conversation import Conversation, Message, Said
from antiphon.scheduler.errors import ApiError, history_lost, ledger_unavailable, session_not_found
from antiphon.scheduler.gateway import history
from antiphon.scheduler.gateway.identity import Identity
from antiphon.scheduler.gateway.message_chain import Trail, reply_message, trail
from antiphon.scheduler.gateway.prompts import (
    INLINE_CHARS,
    PromptTokenizer,
    TemplateOptions,
    content_chars,
    content_text,
)
from antiphon.scheduler.ledger import Ledger
from antiphon.scheduler.rounds import RoundHandle
from antiphon.scheduler.session_store import LedgerUnavailable, SessionStore
from antiphon.scheduler.token_log import FencedOff, HistoryLost, TokenLogs

log = logging.getLogger(__name__)

TRAIL = "trail"
"""Key in a conversation's notes: (its `Trail`, when all of it was last written)."""
NOT_KEPT = "this round is not kept: the next one must bring the whole history"
NOT_FINDABLE = "the conversation will not be recognised without its session id"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a chat request says, as far as its prompt goes."""

    tenant: str
    identity: Identity
    messages: Sequence[Message]
    """All of them, or those of an append."""
    tools: list[dict[str, Any]] | None
    options: TemplateOptions
    model: str
    scope: str
    """Among what conversations it is looked for (`message_chain.scope_of`)."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """A chat request's prompt, and what it was made of."""

    asked: Asked
    prompt: Prompt
    base: Conversation
    plan: history.Plan
    fingerprint: bytes
    kept_messages: int
    new_messages: Sequence[Message]
    """Beyond those kept."""
    appended: bool
    """They are all that the client sent."""

    @property
    def served_tokens(self) -> int:
        """Of the prompt, what the same session's rounds before had."""
        return self.plan.kept_tokens if self.base.session_id == self.asked.identity.session_id else 0


class Conversations:
    """For one event loop. Without logs nothing is remembered, and append is refused."""

    def __init__(
        self, logs: TokenLogs | None = None, store: SessionStore | None = None, ledger: Ledger | None = None,
        ttl_s: float = 3600.0,
    ) -> None:  # fmt: skip
        self._logs = logs
        self._store = store
        self._ledger = ledger
        self._ttl_s = ttl_s

    # ---------------------------------------------------------------- before a round

    async def base(
        self,
        tenant: str,
        session_id: str,
        *,
        must_exist: bool,
        opens: bool,
        after_round: int = 0,
        before: Callable[[Conversation, int], Conversation] = lambda found, answered: found,
    ) -> Conversation:
        """What an append goes on with; without entries for a first round, which `opens` says it may be.

        Raises `ApiError`: 410 if it is gone, 404 if the session must exist and does not, 503 while the ledger
        is away.
        """
        if self._logs is None:
            raise ApiError(501, "append_unavailable", "This gateway keeps no histories: send all messages.")
        try:
            # Asked before what is loaded, which may grow meanwhile.
            answered = await self._rounds_answered(tenant, session_id)
            found = await self._logs.load(tenant, session_id)
            if answered > found.round:
                raise HistoryLost(f"its round {answered} was not kept")
            if found.parts and found.round < after_round:  # a ledger that was rolled back knows of no loss
                raise HistoryLost(f"it ends with round {found.round}, the client's with {after_round}")
        except HistoryLost as error:
            raise history_lost(session_id, str(error)) from error
        except LedgerUnavailable as error:
            raise ledger_unavailable(
                f"The history of session {session_id!r} cannot be read: {error}"
            ) from error
        if not found.parts and must_exist:
            raise session_not_found(session_id)
        if not found.parts and not opens:
            raise history_lost(session_id, "nothing is known of what these messages answer")
        return before(found, answered)

    async def _rounds_answered(self, tenant: str, session_id: str) -> int:
        return await self._ledger.rounds_answered(tenant, session_id) if self._ledger is not None else 0

    async def prompt(
        self, tokenizer: PromptTokenizer, asked: Asked, base: Conversation | None = None
    ) -> Spoken:
        """The prompt of a chat; `base` is what an append goes on with. Raises `ApiError` (400)."""
        key = history.options_key(asked.tools, asked.options)
        appended = base is not None
        if base is not None and base.messages:
            same_options, kept = key == base.options, len(base.messages)
            plan = await _off_loop(
                content_chars(asked.messages) + (0 if same_options else INLINE_CHARS),
                lambda: history.append(
                    tokenizer, base, asked.messages, asked.options, same_options=same_options
                ),
            )
            new = asked.messages
        else:
            base = base or await self._known(asked)
            plan = await _off_loop(
                content_chars(asked.messages),
                lambda: history.go_on(tokenizer, base, asked.messages, asked.options),
            )
            kept = history.same_messages(base.messages, asked.messages)
            if asked.options.continue_final_message:  # the reply takes the last message's place
                kept = min(kept, len(asked.messages) - 1)
            new = asked.messages[kept:]
        return Spoken(asked, plan.prompt(), base, plan, tokenizer.fingerprint, kept, new, appended)

    async def _known(self, asked: Asked) -> Conversation:
        """What the request may go on with: its session's history, else that of the one it was forked from."""
        empty = Conversation(asked.tenant, asked.identity.session_id)
        if self._logs is None or asked.identity.identified_by == "new":
            return empty
        try:
            found = await self._logs.load(asked.tenant, asked.identity.session_id)
            parent_id = asked.identity.parent_id
            if not found.parts and parent_id is not None:
                found = await self._logs.load(asked.tenant, parent_id)
        except (HistoryLost, LedgerUnavailable) as error:
            log.info("history not used: %s", error, extra={"session": asked.identity.session_id})
            return empty
        return found

    async def fork(self, tenant: str, parent: str, children: Sequence[str], ttl_s: float) -> bool:
        """Let sessions that have had no round begin with all that was said in `parent`; False if that is not
        there, or not all of it. Raises `LedgerUnavailable`."""
        if self._logs is None:
            return False
        try:
            answered = await self._rounds_answered(tenant, parent)
            if answered > (await self._logs.load(tenant, parent)).round:
                return False
            return all([await self._logs.fork(tenant, parent, child, ttl_s) for child in children])
        except HistoryLost:
            return False

    async def forget(self, tenant: str, session_ids: Sequence[str]) -> None:
        """What was said in sessions that are closed. Raises `LedgerUnavailable`."""
        if self._logs is not None:
            for session_id in session_ids:
                await self._logs.delete(tenant, session_id)

    # ---------------------------------------------------------------- after it

    async def keep(
        self, spoken: Spoken, handle: RoundHandle, message: dict[str, Any], ttl_s: float | None
    ) -> tuple[str, ...]:
        """Remember a round that ended well; warnings for the client. Never raises."""
        if handle.answered is None or self._logs is None or _is_late(spoken, handle):
            return ()
        begun = message.get("content") or ""
        reply = reply_message(message)
        messages = list(spoken.new_messages)
        if spoken.asked.options.continue_final_message and messages:
            reply["content"] = content_text(messages.pop().get("content")) + begun or None
        said = Said(
            prompt=spoken.prompt,
            answered=handle.answered,
            kept_tokens=spoken.plan.kept_tokens,
            kept_messages=spoken.kept_messages,
            messages=messages,
            reply=reply,
            plain=not message.get("reasoning_content"),
            options=history.options_key(spoken.asked.tools, spoken.asked.options),
            tokenizer=spoken.fingerprint,
            model=spoken.asked.model,
            round=handle.round_number,
            text=spoken.plan.text,
        )
        ttl_s = ttl_s or self._ttl_s
        end, fresh = self._trail(spoken, said, ttl_s)
        logged, found = await asyncio.gather(
            self._add(spoken, handle, said, ttl_s),
            self._remember(spoken.asked.scope, end, fresh, handle.session_id, ttl_s),
            return_exceptions=True,
        )
        warnings = []
        if isinstance(logged, BaseException):
            warnings.append(_failed(logged, NOT_KEPT, handle.session_id))
        else:
            written = time.monotonic() if fresh is None else spoken.base.notes.get(TRAIL, (None, 0.0))[1]
            logged.notes[TRAIL] = end, written
        if isinstance(found, BaseException):
            warnings.append(_failed(found, NOT_FINDABLE, handle.session_id))
        return tuple(warnings)

    async def _add(self, spoken: Spoken, handle: RoundHandle, said: Said, ttl_s: float) -> Conversation:
        """To the log. A retry takes the place of a first try that wrote while this one was prepared."""
        assert self._logs is not None
        session_id, fence, replaces = handle.session_id, handle.fence, not spoken.appended
        try:
            return await self._logs.add(spoken.base, session_id, said, ttl_s, replaces=replaces, fence=fence)
        except HistoryLost:
            call = handle.request.call
            if call is None or not call.again:
                raise
            found = await self._logs.load(spoken.asked.tenant, session_id)
            before = found.before(said.messages)
            if before is found or before.messages != spoken.base.messages:
                raise
            return await self._logs.add(before, session_id, said, ttl_s, replaces=False, fence=fence)

    async def took_over(self, handle: RoundHandle) -> None:
        """The round is a retry and has the session: its first try, if it still runs, writes no more."""
        call = handle.request.call
        if self._logs is None or call is None or not call.again or not handle.fence:
            return
        try:
            ttl_s = handle.expires_in_s or self._ttl_s
            await self._logs.fence_off(handle.request.tenant, handle.session_id, handle.fence, ttl_s)
        except LedgerUnavailable as error:
            log.info("the log is not fenced: %s", error, extra={"session": handle.session_id})

    def _trail(self, spoken: Spoken, said: Said, ttl_s: float) -> tuple[Trail, int | None]:
        """The conversation's end, and how many of its last values are new; None = all are to be written."""
        base, more = spoken.base, [*said.messages, said.reply]
        known, written_s = base.notes.get(TRAIL, (None, 0.0))
        if known is not None and said.kept_messages == len(base.messages):
            stale = time.monotonic() - written_s > ttl_s / 4
            return trail(more, None, known), None if stale else len(more)
        whole = (*base.messages[: said.kept_messages], *more)
        return trail(whole, spoken.asked.tools), None

    async def _remember(
        self, scope: str, end: Trail, fresh: int | None, session_id: str, ttl_s: float
    ) -> None:
        if self._store is not None:
            # The former tip is an inner value now: that makes one more than there are new messages.
            inner = end.own[1:] if fresh is None else end.own[1 : fresh + 1]
            await self._store.remember_chain(scope, end.value, inner, session_id, ttl_s, end.turn)


def _is_late(spoken: Spoken, handle: RoundHandle) -> bool:
    """The round repeats one that others came after: the session's history is theirs."""
    call, base = handle.request.call, spoken.base
    return call is not None and base.session_id == handle.session_id and 0 < call.number < base.round


async def _off_loop(chars: int, work: Any) -> history.Plan:
    """Here if it is short, else in a thread: the event loop must not stall for one client's history."""
    plan: history.Plan = work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)
    return plan


def _failed(error: BaseException, warning: str, session_id: str) -> str:
    if not isinstance(error, LedgerUnavailable | HistoryLost | FencedOff):
        log.error("a round is not remembered, by a bug", exc_info=error)
    else:
        log.warning("%s: %s", warning, error, extra={"session": session_id})
    return warning
