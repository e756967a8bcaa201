"""One session as its client knows it: what was said, what is expected, and the calls that go on with it.

No I/O: the sync and the async session drive the same plans. Only what is new is sent as long as the server
has the rest; when it has not (`history_lost`, or it does not know the session), everything is. A try that may
have run is never repeated as an append, which could count twice, but as the whole conversation, which cannot.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from antiphon.client.errors import Refused, SessionBusy
from antiphon.client.results import Message, Reply
from antiphon.client.retries import Plan, Send, Wait, plan_call
from antiphon.client.wire import CHAT, IDEMPOTENCY_KEY, Answer, Call, Outcome, session_path

NOT_HELD = {
    (404, "session_not_found"), (404, "not_found"), (405, "method_not_allowed"), (410, "session_closed"),
    (410, "history_lost"), (501, "append_unavailable"), (503, "ledger_unavailable"),
}  # fmt: skip
"""Answers to an append that mean: send everything. A server without the route says one of them too."""
OURS = ("messages", "stream", "stream_options", "session", "session_id", "n")
"""Fields of a request that the session fills in itself."""

MAX_ID_CHARS = 255
FORK_ID_BYTES = 6

Given = str | Message | Sequence[Message]
"""A user's text, one message, or several."""

Round = Generator[Send | Wait, Outcome | None, Answer]


class Conversation:
    """Changed only by `finished`: a round that failed leaves it as it was."""

    def __init__(
        self,
        session_id: str | None,
        parent_id: str | None,
        options: Mapping[str, Any],
        messages: Sequence[Message] = (),
        *,
        held: bool = False,
        resumed: bool = False,
    ) -> None:
        self.id = session_id or f"sess_{secrets.token_hex(12)}"
        self.parent_id = parent_id
        self.messages = list(messages)
        self.hints: dict[str, Any] = {}
        self._options = checked_options(options)
        self._held = held or resumed
        """The server has all of `messages`, and nothing else."""
        self._resumed = resumed
        """What was said before is known to the server alone."""
        self._round = 0
        """The last one that was answered; 0 = that is not known."""
        self._busy = False

    def begin(self) -> None:
        """Raises `SessionBusy`; each `begin` is followed by an `end`."""
        if self._busy:
            raise SessionBusy(f"session {self.id}: a round is still running; use fork() for several at once")
        self._busy = True

    def end(self) -> None:
        self._busy = False

    def round(
        self,
        new: Sequence[Message],
        options: Mapping[str, Any],
        *,
        stream: bool,
        final: bool,
        max_retries: int,
    ) -> Round:
        """Plan of the call that says `new`; its answer is one of chat completions, maybe an error."""
        body = {**self._options, **checked_options(options)}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        session = {**self.hints, **({"final": True} if final else {})}
        if session:
            body["session"] = session
        headers = {"X-Session-ID": self.id, IDEMPOTENCY_KEY: secrets.token_hex(16)}
        if self.parent_id is not None:
            headers["X-Parent-Session-ID"] = self.parent_id
        whole = Call("POST", CHAT, {**body, "messages": [*self.messages, *new]}, headers, stream)
        # Until it is `finished`, the server may hold this round or not: after a failure everything is sent.
        held, self._held = self._held, self._resumed
        if not held:
            return plan_call(whole, max_retries)
        # A server that has forgotten the session must say so, not begin another one with half a conversation.
        known = {"after_round": self._round} if self._round else {}
        news = {**body, "session": {**session, "must_exist": True, **known}, "messages": [*new]}
        append = Call("POST", session_path(self.id, "rounds"), news, headers, stream)
        if self._resumed:
            return plan_call(append, max_retries, repeatable=False)
        return _append(append, whole, max_retries)

    def finished(self, new: Sequence[Message], reply: Reply) -> None:
        """It was said and answered."""
        self.messages += [*new, reply.message]
        self._held = self._resumed or reply.session is None or reply.session.kept
        self._round = (reply.session.round if reply.session is not None else None) or 0
        if reply.session is not None and reply.session.id != self.id:
            # Somebody else was running a round on this session: the server made this one a fork.
            self.parent_id, self.id = self.id, reply.session.id

    def fork_call(self, n: int) -> Call:
        """The ids are made here, so that a call that is repeated makes no more of them."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if len(self.id) + 1 + 2 * FORK_ID_BYTES > MAX_ID_CHARS:
            ids = [f"sess_{secrets.token_hex(12)}" for _ in range(n)]
        else:
            ids = [f"{self.id}/{secrets.token_hex(FORK_ID_BYTES)}" for _ in range(n)]
        return Call("POST", session_path(self.id, "fork"), {"ids": ids})

    def children(self, ids: Sequence[str], options: Mapping[str, Any], *, known: bool) -> list[Conversation]:
        """Conversations that begin as this one; `known` = the server lets them begin so, too."""
        if self._resumed and not known:
            raise Refused(404, f"session {self.id} cannot be forked: the server does not know it")
        merged = {**self._options, **checked_options(options)}
        held = known and self._held
        return [
            Conversation(child, self.id, merged, self.messages, held=held, resumed=self._resumed)
            for child in ids
        ]


def _append(append: Call, whole: Call, max_retries: int) -> Plan:
    answer = yield from plan_call(append, max_retries, again=whole, hopeless=_is_not_held)
    if _is_not_held(answer):
        answer = yield from plan_call(whole, max_retries)
    return answer


def _is_not_held(answer: Answer) -> bool:
    return not answer.ok and (answer.status, answer.error().code) in NOT_HELD


def messages_of(given: Given) -> list[Message]:
    """What is to be said, as messages; raises TypeError or ValueError."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    several = [given] if isinstance(given, Mapping) else list(given)
    if not several:
        raise ValueError("nothing to say: give a text, a message or a list of messages")
    for message in several:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"a message is an object with a `role`, got {message!r:.100}")
    return [dict(message) for message in several]


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a chat request less what the session fills in; raises ValueError for those."""
    for name in OURS:
        if name in options:
            raise ValueError(f"{name!r} is not an option: the session fills it in")
    return dict(options)


def expectation(**hints: Any) -> dict[str, Any]:
    """`session` of the requests to come, from keyword arguments; None leaves one out."""
    known = {
        "gap_s": "expected_gap_s",
        "output_tokens": "expected_output_tokens",
        "rounds": "expected_rounds",
        "remaining_rounds": "remaining_rounds",
        "ttl_s": "ttl_s",
        "priority": "priority",
        "slo": "slo",
    }
    said = {known[name]: value for name, value in hints.items() if value is not None}
    if "remaining_rounds" in said:
        said["next_round"] = {"remaining_rounds": said.pop("remaining_rounds")}
    return said
